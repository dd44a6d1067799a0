"""What users of training loops of their own have saved: runs and their checkpoints, in files of the state directory.

A checkpoint is a directory that the engine wrote and a small JSON file beside it, written last: one without the other
is swept at start. The paths users know are `tinker://<run>/<segment>/<name>`. Knows no HTTP and no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from tandem.errors import Conflict, InvalidRequest, NotFound, TandemError
from tandem.jobs import files
from tandem.jobs.records import new_id

T = TypeVar("T")
Kind = Literal["training", "sampler", "external"]
SEGMENTS: dict[str, Kind] = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
SEGMENT_OF: dict[Kind, str] = {kind: segment for segment, kind in SEGMENTS.items()}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+@-]{0,127}")
SCHEME = "tinker://"
MIN_TTL_S, MAX_TTL_S = 3600, 10 * 365 * 86400


class RunRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A model that was trained. Times are seconds since 1970."""

    run_id: str
    tenant: str
    session_id: str
    base_model: str
    rank: int
    train_attn: bool = True
    train_mlp: bool = True
    created_at: float = 0.0
    last_request_at: float = 0.0
    user_metadata: dict[str, Any] | None = None


class CheckpointRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A saved state. `directory` is its name below the store's root; `public` ones are everybody's to read."""

    run_id: str
    name: str
    kind: Kind
    tenant: str
    directory: str
    base_model: str
    rank: int
    train_attn: bool = True
    train_mlp: bool = True
    created_at: float
    size_bytes: int = 0
    with_optimizer: bool = False
    optimizer: str = "adamw"
    public: bool = False
    expires_at: float | None = None
    user_metadata: dict[str, Any] | None = None

    @property
    def checkpoint_id(self) -> str:
        return f"{SEGMENT_OF[self.kind]}/{self.name}"

    @property
    def path(self) -> str:
        return f"{SCHEME}{self.run_id}/{self.checkpoint_id}"


def parse(path: str) -> tuple[str, Kind, str]:
    """(run, kind, name) of a path. Raises InvalidRequest."""
    run_id, _, rest = path.removeprefix(SCHEME).partition("/")
    segment, _, name = rest.partition("/")
    if not path.startswith(SCHEME) or segment not in SEGMENTS or not run_id or not name:
        raise InvalidRequest(
            f"{path[:200]!r} is no checkpoint: give tinker://<run>/<{'|'.join(SEGMENTS)}>/<name>", "path"
        )
    return run_id, SEGMENTS[segment], name


def check_name(name: str) -> None:
    """Raises InvalidRequest for what cannot name a checkpoint."""
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"a checkpoint's name has 1 to 128 letters, digits and ._=+@-, beginning with a letter or digit; "
            f"{name[:200]!r} has not",
            "path",
        )


def expiry(ttl_seconds: int | None, now: float) -> float | None:
    """When something saved now expires. Raises InvalidRequest."""
    if ttl_seconds is None:
        return None
    if not MIN_TTL_S <= ttl_seconds <= MAX_TTL_S:
        raise InvalidRequest(f"ttl_seconds must be {MIN_TTL_S} to {MAX_TTL_S}, not {ttl_seconds}", "ttl_seconds")
    return now + ttl_seconds


class Checkpoints:
    """All runs and checkpoints of a state directory, in memory and on disk. Owned by one process."""

    def __init__(self, root: Path) -> None:
        """Read what is there and sweep what a crash left. Raises OSError."""
        self.root = root
        self._runs: dict[str, RunRecord] = {}
        self._checkpoints: dict[tuple[str, Kind, str], CheckpointRecord] = {}
        root.mkdir(parents=True, exist_ok=True)
        known = set()
        for file in sorted(root.glob("run-*.json")):
            with contextlib.suppress(msgspec.DecodeError):  # cannot be ours: what we write is there wholly or not
                run = msgspec.json.decode(file.read_bytes(), type=RunRecord)
                self._runs[run.run_id] = run
                known.add(file.name)
        for file in sorted(root.glob("ckpt-*.json")):
            with contextlib.suppress(msgspec.DecodeError):
                record = msgspec.json.decode(file.read_bytes(), type=CheckpointRecord)
                if (root / record.directory).is_dir():
                    self._checkpoints[record.run_id, record.kind, record.name] = record
                    known |= {file.name, record.directory}
        files.sweep(root, known)

    # ------------------------------------------------------------ runs

    async def put_run(self, run: RunRecord) -> None:
        """Remember a run, or what has changed of it."""
        self._runs[run.run_id] = run
        await _disk(files.write, self.root / f"run-{_plain(run.run_id)}.json", msgspec.json.encode(run))

    def runs(self, tenant: str) -> list[RunRecord]:
        """A tenant's runs, the newest first."""
        return sorted((r for r in self._runs.values() if r.tenant == tenant), key=lambda r: -r.created_at)

    def run(self, tenant: str, run_id: str) -> RunRecord:
        """Raises NotFound, also for another tenant's."""
        run = self._runs.get(run_id)
        if run is None or run.tenant != tenant:
            raise NotFound(f"there is no training run {run_id[:200]!r}", "run_id")
        return run

    # ------------------------------------------------------------ checkpoints

    def new_directory(self) -> Path:
        """Where the engine may write the next checkpoint."""
        return self.root / new_id("ckpt-")

    def find(self, run_id: str, kind: Kind, name: str) -> CheckpointRecord | None:
        return self._checkpoints.get((run_id, kind, name))

    def check_free(self, run_id: str, kind: Kind, name: str, overwrite: bool) -> None:
        """Raises InvalidRequest where the name is not one, Conflict where it is taken."""
        check_name(name)
        if self.find(run_id, kind, name) is not None and not overwrite:
            raise Conflict(f"{run_id} has a {kind} checkpoint {name!r} already: choose another name, or overwrite it")

    def checkpoints(self, tenant: str, run_id: str | None = None) -> list[CheckpointRecord]:
        """A tenant's checkpoints, of one run or of all, the newest first."""
        found = (c for c in self._checkpoints.values() if c.tenant == tenant and run_id in (None, c.run_id))
        return sorted(found, key=lambda c: -c.created_at)

    def readable(self, tenant: str, path: str) -> CheckpointRecord:
        """A checkpoint of the tenant's own, or a public one. Raises InvalidRequest, NotFound."""
        record = self._checkpoints.get(parse(path))
        if record is None or (record.tenant != tenant and not record.public):
            raise NotFound(f"there is no checkpoint {path[:200]!r}", "path")
        return record

    def own(self, tenant: str, path: str) -> CheckpointRecord:
        """A checkpoint that the tenant may change. Raises InvalidRequest, NotFound."""
        record = self.readable(tenant, path)
        if record.tenant != tenant:
            raise NotFound(f"{path[:200]!r} is not yours to change", "path")
        return record

    def directory(self, record: CheckpointRecord) -> Path:
        return self.root / record.directory

    async def put(self, record: CheckpointRecord) -> CheckpointRecord:
        """Make a checkpoint known whose directory is complete, or what has changed of it; what had its name before
        goes. Raises TandemError where the disk refuses it."""
        directory = self.directory(record)
        record.size_bytes = await _disk(_size, directory)
        key = record.run_id, record.kind, record.name
        old = self._checkpoints.get(key)
        await _disk(files.write, self._file(record), msgspec.json.encode(record))
        self._checkpoints[key] = record
        if old is not None and old.directory != record.directory:
            await self._remove(old)
        return record

    async def delete(self, record: CheckpointRecord) -> None:
        self._checkpoints.pop((record.run_id, record.kind, record.name), None)
        await self._remove(record)

    async def copy(self, record: CheckpointRecord, run: RunRecord, expires_at: float | None) -> CheckpointRecord:
        """The same checkpoint once more, in another run. Raises Conflict, TandemError."""
        self.check_free(run.run_id, record.kind, record.name, overwrite=False)
        target = self.new_directory()
        source = self.directory(record)
        await _disk(files.copy_tree, source, target, [file.name for file in source.iterdir()])
        copied = msgspec.structs.replace(
            record, run_id=run.run_id, tenant=run.tenant, directory=target.name, created_at=time.time(),
            expires_at=expires_at, public=False,
        )  # fmt: skip
        return await self.put(copied)

    async def expire(self, now: float) -> list[CheckpointRecord]:
        """Delete what is past its time; returns it."""
        late = [c for c in self._checkpoints.values() if c.expires_at is not None and c.expires_at < now]
        for record in late:
            await self.delete(record)
        return late

    async def discard(self, directory: Path) -> None:
        """Remove a directory that became no checkpoint."""
        await _disk(files.remove, directory)

    def _file(self, record: CheckpointRecord) -> Path:
        return self.root / f"{record.directory}.json"

    async def _remove(self, record: CheckpointRecord) -> None:
        await _disk(files.remove, self._file(record))
        await _disk(files.remove, self.directory(record))


async def _disk(act: Callable[..., T], *args: Any) -> T:
    try:
        return await asyncio.to_thread(act, *args)
    except OSError as error:
        raise TandemError(f"the checkpoint cannot be stored: {files.explain(error)}") from error


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def _plain(run_id: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", run_id)
