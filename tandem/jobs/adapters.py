"""Adapters on disk and the names they go by: records, aliases, and which of them the engine holds at the moment.

An adapter's weights never change. Aliases move, in one transaction each; a request resolves them when it arrives.
Reads PEFT's adapter_config.json as JSON; the weights are the engine's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tandem.errors import Conflict, InvalidRequest, ModelError, NotFound, TandemError
from tandem.jobs import files, queries
from tandem.jobs.recipe import check_text, plain
from tandem.jobs.records import AdapterRecord, Alias, new_id
from tandem.jobs.store import Database

if TYPE_CHECKING:
    from tandem.engine.client import EngineClient

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_NAME = 200
PRIVATE = "rollouts:"  # begins the engine's names of what running jobs sample from: nobody else may


@dataclass(frozen=True)
class Shape:
    """What a run that continues an adapter must share with it."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    use_rslora: bool


def read_shape(path: Path) -> Shape:
    """The shape in a PEFT directory. Raises ModelError where there is none that training could continue."""
    file = path / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        targets = config["target_modules"]
        found = Shape(
            int(config["r"]), float(config.get("lora_alpha", 8)),
            (targets,) if isinstance(targets, str) else tuple(sorted(targets)), bool(config.get("use_rslora", False)),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} cannot be read as PEFT's: {type(error).__name__}: {error}") from error
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name):
            raise ModelError(f"{file}: {name} is set, and an adapter of several shapes cannot be trained on")
    return found


class Adapters:
    """The records by name, and the engine's residents. One per server; owned by `Jobs`."""

    def __init__(self, db: Database, engine: EngineClient, root: Path, model_names: Sequence[str]) -> None:
        """Use `open`."""
        self._db = db
        self._engine = engine
        self._root = root
        self._model_names = list(model_names)
        self._records: dict[str, AdapterRecord] = {}
        self._aliases: dict[str, Alias] = {}
        self._used: dict[str, None] = {}  # residents of ours, the least recently used first
        self._loading = asyncio.Lock()

    @classmethod
    async def open(cls, db: Database, engine: EngineClient, root: Path, model_names: Sequence[str]) -> Adapters:
        """Read the names; nothing is loaded into the engine yet."""
        self = cls(db, engine, root, model_names)
        for record in await db.run(queries.list_adapters):
            self.add(record)
        self._aliases = {alias.name: alias for alias in await db.run(queries.list_aliases)}
        return self

    def add(self, record: AdapterRecord) -> None:
        """Know a record that the database has."""
        self._records[record.name] = self._absolute(record)

    def _absolute(self, record: AdapterRecord) -> AdapterRecord:
        return msgspec.structs.replace(record, path=str(self._root / record.path))

    def records(self) -> list[AdapterRecord]:
        return list(self._records.values())

    def aliases(self) -> list[Alias]:
        return list(self._aliases.values())

    def get(self, name: str) -> AdapterRecord:
        """The adapter a name or alias stands for. Raises NotFound."""
        record = self._records.get(self._target(name))
        if record is None:
            raise NotFound(f"there is no adapter {name!r}: see /v1/models for those there are", param="model")
        return record

    def _target(self, name: str) -> str:
        alias = self._aliases.get(name)
        return alias.target if alias else name

    def has_base(self, base_model: str) -> bool:
        """Whether the engine's model is this one, as far as names tell; a path may be spelled in several ways."""
        return plain(base_model) in map(plain, self._model_names)

    # Names for serving

    def resident_now(self, name: str) -> str | None:
        """The engine's adapter for a name or alias, if the engine has it now."""
        target = self._target(name)
        if target not in self._engine.adapters or target.startswith(PRIVATE):
            return None
        if target in self._used:
            self._touch(target)
        return target

    async def resident(self, name: str) -> str | None:
        """The same, loading it where needed; None for a name nobody knows. Raises what the engine refuses it with."""
        if found := self.resident_now(name):
            return found
        async with self._loading:
            if found := self.resident_now(name):
                return found
            record = self._records.get(self._target(name))
            if record is None:
                return None
            if not self.has_base(record.base_model):
                raise ModelError(
                    f"{record.name} is an adapter of {record.base_model}, but {self._model_names[0]} is served here: "
                    "if that is the same model, give both names with --served-model-name"
                )
            await self._load(record.name, record.path)
            return record.name

    async def _load(self, name: str, path: str) -> None:
        """Load, unloading the least recently used of ours for as long as the engine says that it is full."""
        while True:
            try:
                await self._engine.load_adapter(name, path)
            except Conflict:
                if not await self.make_room():
                    raise
            else:
                self._touch(name)
                return

    async def make_room(self) -> bool:
        """Unload the least recently used of ours that no request uses. False where there is none."""
        busy = {*self._engine.stats.running_adapters, *self._engine.stats.waiting_adapters}
        idle = [other for other in self._used if other not in busy]
        if idle:
            await self._unload(idle[0])
        return bool(idle)

    async def _unload(self, name: str) -> None:
        self._used.pop(name, None)
        if name in self._engine.adapters:
            with contextlib.suppress(NotFound):  # somebody else unloaded it just now
                await self._engine.unload_adapter(name)

    def _touch(self, name: str) -> None:
        self._used.pop(name, None)
        self._used[name] = None

    # Changes

    async def import_(self, name: str, source: Path) -> AdapterRecord:
        """Copy a PEFT directory, prove that the engine can use it, and remember it.

        Raises InvalidRequest, ModelError, Conflict when the name is taken, TandemError when the disk refuses it.
        """
        self._check_name(name, "name")
        self._check_free(name)
        rank = (await asyncio.to_thread(read_shape, source)).rank
        relative = f"{files.ADAPTERS}/{new_id('imported-')}"
        copied = self._root / relative
        try:
            await asyncio.to_thread(files.copy_tree, source, copied, (CONFIG_FILE, WEIGHTS_FILE))
        except OSError as error:
            raise _refusal(source, error) from error
        record = AdapterRecord(
            name=name, path=relative, base_model=self._model_names[0], created_at=queries.now(), rank=rank,
            kind="imported",
        )  # fmt: skip
        async with self._loading:
            try:
                self._check_free(name)
                await self._load(name, str(copied))
            except BaseException:
                await asyncio.to_thread(files.remove, copied)
                raise
            try:
                await self._db.run(queries.add_adapter, record)
            except BaseException:
                await self._unload(name)
                raise  # the row may be there all the same; without it, the copy is swept at the next start
            self.add(record)
        return self._records[name]

    async def delete(self, name: str) -> None:
        """Forget an alias, or an adapter with its files; requests that use it finish with it, and the files of a
        running job's newest checkpoint go when the job has a newer state, or at the next start.

        Raises NotFound, Conflict while an alias points at it or an unfinished job continues it.
        """
        async with self._loading:
            if name in self._aliases:
                await self._db.run(queries.delete_alias, name)
                del self._aliases[name]
                return
            record = self.get(name)
            if pointing := [alias.name for alias in self._aliases.values() if alias.target == name]:
                raise Conflict(f"{', '.join(pointing)} points at {name}: promote another adapter first", param="model")
            changed = [
                msgspec.structs.replace(alias, history=[old for old in alias.history if old != name])
                for alias in self._aliases.values()
                if name in alias.history
            ]
            is_free = await self._db.run(queries.delete_adapter, name, changed)
            del self._records[name]
            self._aliases |= {alias.name: alias for alias in changed}
            await self._unload(name)
            if is_free:
                await asyncio.to_thread(files.remove, Path(record.path))

    async def promote(self, name: str, target: str) -> Alias:
        """Point the alias `name` at an adapter, or at what another alias points at. Raises NotFound, Conflict."""
        self._check_name(name, "alias")
        async with self._loading:
            record, old = self.get(target), self._aliases.get(name)
            if old is None:
                self._check_free(name)
            if old is not None and old.target == record.name:
                return old
            history = [*old.history, old.target] if old else []
            return await self._put(Alias(name=name, target=record.name, history=history))

    async def rollback(self, name: str) -> Alias:
        """Point the alias at what it pointed at before. Raises NotFound, Conflict where there is nothing."""
        async with self._loading:
            alias = self._aliases.get(name)
            if alias is None:
                raise NotFound(f"there is no alias {name!r}", param="alias")
            if not alias.history:
                raise Conflict(f"{name} has never pointed anywhere but at {alias.target}", param="alias")
            return await self._put(Alias(name=name, target=alias.history[-1], history=alias.history[:-1]))

    async def _put(self, alias: Alias) -> Alias:
        await self._db.run(queries.put_alias, alias)
        self._aliases[alias.name] = alias
        return alias

    def _check_name(self, name: str, param: str) -> None:
        check_text(name, param)
        if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
            raise InvalidRequest(f"{param} must have 1 to {MAX_NAME} printable characters", param=param)

    def _check_free(self, name: str) -> None:
        taken = (self._records, self._aliases, self._model_names, self._engine.adapters)
        if any(name in names for names in taken) or name.startswith(PRIVATE):
            raise Conflict(f"the name {name!r} is taken: choose another, or delete what has it", param="name")


def _refusal(source: Path, error: OSError) -> TandemError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ModelError(f"{source} is not a PEFT adapter directory: {Path(error.filename or '').name} is missing")
    return TandemError(f"cannot copy {source}: {files.explain(error)}")
