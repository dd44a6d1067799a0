"""Which of Tinker's sampling weights the engine holds: snapshots of models in training, and checkpoints loaded again.

Snapshots live in memory only; the engine takes so many, and a loop makes one at every step, so old ones go first those
that nobody uses. Checkpoints are loaded from their files again when they are asked for.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tandem.engine.client import EngineClient
from tandem.errors import Gone, Overloaded

PREFIX = "tinker:"  # of the engine's names of all of them, also of tinker://...
SNAPSHOTS_PER_MODEL = 16


@dataclass(eq=False)
class Resident:
    """`directory` None: it exists in memory only."""

    name: str
    session_id: str
    model_id: str
    directory: Path | None = None
    num_users: int = 0


class Residents:
    """By the engine's name, the least recently used first."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._residents: dict[str, Resident] = {}
        self._loading: asyncio.Lock | None = None

    def publish(self, model_id: str, session_id: str, name: str) -> asyncio.Future:
        """Let the engine take a snapshot of a model, in its order. Raises Overloaded where there is no room."""
        if name not in self._residents:
            mine = [r for r in self._residents.values() if r.model_id == model_id and r.directory is None]
            idle = [r for r in mine if not r.num_users]
            for old in idle[: max(0, len(mine) + 1 - SNAPSHOTS_PER_MODEL)]:
                self._drop(old)
            self._make_room()
        resident = self._residents.pop(name, None) or Resident(name, session_id, model_id)
        self._residents[name] = resident
        return self._engine.publish(model_id, name)

    def keep(self, name: str, directory: Path) -> None:
        """A snapshot has files now, from which it can be loaded again."""
        if name in self._residents:
            self._residents[name].directory = directory

    async def use(self, name: str, session_id: str, directory: Path | None) -> Resident:
        """Have weights in the engine until `release`, loading them from `directory` where they are not. Raises Gone
        for a snapshot that went, and what the engine refuses the files with."""
        resident = self._residents.get(name)
        if resident is None or name not in self._engine.adapters:
            if directory is None:
                raise Gone(
                    f"these weights were replaced by {SNAPSHOTS_PER_MODEL} newer snapshots and are gone: sample from "
                    "a newer one, or give save_weights_for_sampler a name to keep them"
                )
            resident = await self._load(name, session_id, directory)
        resident.num_users += 1
        self._residents[name] = self._residents.pop(name)
        return resident

    def release(self, resident: Resident) -> None:
        resident.num_users -= 1

    async def _load(self, name: str, session_id: str, directory: Path) -> Resident:
        self._loading = self._loading or asyncio.Lock()
        async with self._loading:
            resident = self._residents.get(name)
            if resident is None or name not in self._engine.adapters:
                self._make_room()
                await self._engine.load_adapter(name, str(directory))
                resident = self._residents[name] = Resident(name, session_id, "", directory)
            return resident

    def forget(self, name: str) -> None:
        """The checkpoint behind a name is deleted or replaced."""
        if (resident := self._residents.get(name)) is not None:
            self._drop(resident)

    def end_session(self, session_id: str) -> None:
        for resident in [r for r in self._residents.values() if r.session_id == session_id]:
            self._drop(resident)

    def _make_room(self) -> None:
        """For one more. At most half of what the engine may hold is ours, for there are other users of adapters."""
        most = self._engine.max_resident_adapters
        while (
            len(self._residents) >= max(1, most // 2)
            or len(self._engine.adapters.keys() | self._residents.keys()) >= most
        ):
            idle = [r for r in self._residents.values() if not r.num_users]
            if not idle:
                raise Overloaded("all adapters that the server may hold are in use (--max-cpu-loras): try again later")
            # What can be loaded again goes first; then the oldest of the model that has most.
            counts = Counter(r.model_id for r in self._residents.values() if r.directory is None)
            files = [r for r in idle if r.directory is not None]
            self._drop(files[0] if files else max(idle, key=lambda r: counts[r.model_id]))

    def _drop(self, resident: Resident) -> None:
        """Requests that use it finish with it. What the engine answers is nobody's concern: it is gone either way."""
        self._residents.pop(resident.name, None)
        self._engine.retire_adapter(resident.name)
