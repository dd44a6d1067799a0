"""Keeps the state of training runs within its memory: moves what is idle to disk and back on a thread of its own.

Who goes and who comes is `memory/residency`'s decision, the tensors are the trainer's; here are the thread, the files
and what becomes of a run whose move fails.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.engine.trainer import Trainer
from tandem.errors import BudgetError, TandemError
from tandem.finetune import spill
from tandem.memory.residency import Busy, Moves, Residency, Where
from tandem.scheduler.progress import Progress, RunQueue

# A run with work stays until it is this share of a microbatch ahead of one that waits for its place: to move a run
# takes about as long as to train some hundred tokens.
LEAD_SHARE = 0.25
# After a disk that could not be written to; runs that wait for a place give up after so many failures in a row.
RETRY_S = 5.0
PATIENCE = 3
FOLDER = "tandem-runs-"
LOCK = "lock"
log = logging.getLogger("tandem.engine")


@dataclass(slots=True)
class _Move:
    """A run on its way. `path`: the file that it comes from. `is_closed`: nobody waits for it any more."""

    future: Future[Any]
    path: Path | None = None
    was_idle: bool = False
    is_closed: bool = False


class Residents:
    """`fail(run, error)` is told of runs whose operations cannot be done."""

    def __init__(
        self, trainer: Trainer, progress: Progress, max_runs: int | None, folder: str | None,
        fail: Callable[[RunQueue, TandemError], None],
    ) -> None:  # fmt: skip
        self.residency = Residency(trainer.resident_bytes, max_runs)
        self._trainer = trainer
        self._progress = progress
        self._fail = fail
        self._folder = Folder(folder)
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="runs")
        self._moves: dict[int, _Move] = {}
        self._recalled: list[_Move] = []  # runs that were asked for again before they had left
        self._lead = LEAD_SHARE * progress.batch_tokens
        self.num_moves = 0  # runs that have left so far
        self._num_failures = 0
        self._retry_at: float | None = None

    # ------------------------------------------------------------ runs come and go

    def fits(self, num_bytes: int) -> bool:
        """Whether a run of this size may be in memory at once."""
        return self.residency.fits(num_bytes)

    def open(self, version: int, num_bytes: int, is_here: bool) -> None:
        """A run that has just been opened."""
        self.residency.open(version, num_bytes, is_here)

    def close(self, version: int) -> None:
        """A run that the trainer is about to forget."""
        if (move := self._moves.get(version)) is not None:
            move.is_closed = True
            return
        self.residency.close(version)
        if (spilled := self._trainer.slots[version].spilled) is not None:
            self._delete(spilled.path)

    def use(self, run: RunQueue) -> None:
        """A run has got something to do."""
        self.residency.touch(run.version)
        if self.residency.where(run.version) is Where.LEAVING and self._moves[run.version].was_idle:
            # What is being written is not needed: the file goes, whatever is in it by then.
            self._recalled.append(self._moves.pop(run.version))
            self._stay(run)

    def make_room(self, num_bytes: int) -> None:
        """Wait until a run of this size fits, as far as others can leave. For the few that cannot wait their turn."""
        self._settle()
        while not self.fits(num_bytes):
            if not self.residency.count(Where.LEAVING):
                idle, busy = self._at_rest()
                candidates = [*idle, *(b.version for b in busy if b.is_at_rest)]
                if not candidates or self._is_blocked:
                    return
                self._leave(candidates[0])
            wait(self.futures)
            self._settle()

    def bring(self, version: int) -> None:
        """Wait until a run is here, beyond what may be if need be. Raises TandemError where it cannot be read."""
        while version in self._moves:
            wait([self._moves[version].future])
            self._settle()
        if self.residency.where(version) is Where.HERE:
            return
        self.make_room(self.residency.num_bytes(version))
        self._come(version)
        wait([self._moves[version].future])
        error = self._moves[version].future.exception()
        self._settle()
        if error is not None:
            raise TandemError(f"the state of the training run cannot be read back from disk: {error}") from error

    # ------------------------------------------------------------ every step

    @property
    def has_work(self) -> bool:
        """Moves can be taken note of, or begun."""
        if any(future.done() for future in self.futures):
            return True
        due = self._due()
        return bool(due.come or due.leave)

    @property
    def futures(self) -> list[Future[Any]]:
        """Moves under way."""
        return [move.future for move in [*self._moves.values(), *self._recalled]]

    @property
    def num_spilled(self) -> int:
        """Open runs whose state is not in memory yet, or any more."""
        return self.residency.count(Where.AWAY, Where.COMING)

    def _runs(self) -> Collection[RunQueue]:
        return self._progress.runs.values()

    def _at_rest(self) -> tuple[list[int], list[Busy]]:
        """Of the runs here, those with nothing to do, the least recently used first, and those with something."""
        idle: set[int] = set()
        busy: list[Busy] = []
        for run in self._runs():
            if self.residency.where(run.version) is Where.HERE:
                may_leave = self._progress.may_leave(run)
                if may_leave and not run.ops:
                    idle.add(run.version)
                    continue
                self.residency.touch(run.version)
                if not self._trainer.is_between(run.version):  # a probe needs its passes to come to an end
                    busy.append(Busy(run.version, run.service, may_leave))
        return [version for version in self.residency if version in idle], busy

    @property
    def _is_blocked(self) -> bool:
        """The disk has just refused a run."""
        return self._retry_at is not None and time.monotonic() < self._retry_at

    def _due(self) -> Moves:
        wanting = {
            run.version: run.service
            for run in self._runs()
            if run.ops and self.residency.where(run.version) is Where.AWAY
        }
        is_over = self.residency.is_over
        if not wanting and not is_over:
            return Moves()
        idle, busy = self._at_rest()
        moves = self.residency.arrange(wanting, idle, busy, self._lead)
        if self._is_blocked:
            return Moves(moves.come)
        if is_over:
            excess = self.residency.excess(idle, busy)
            moves = moves._replace(leave=tuple(dict.fromkeys([*moves.leave, *excess])))
        return moves

    def begin(self) -> None:
        """Before anything is planned: take note of moves that are done, begin those that are due."""
        self._settle()
        moves = self._due()
        for version in moves.come:
            self._come(version)
        for version in moves.leave:
            self._leave(version)
        for run in self._runs():
            run.is_held = run.version in moves.hold

    # ------------------------------------------------------------ moves

    def _leave(self, version: int) -> None:
        self.residency.move(version, Where.HERE, Where.LEAVING)
        run = self._queue_of(version)
        run.is_away = True
        self.num_moves += 1
        name = f"{self.num_moves}.run"
        tensors = self._trainer.tensors(version)
        future = self._mover.submit(lambda: spill.write(tensors, self._folder.path() / name))
        self._moves[version] = _Move(future, was_idle=not run.ops)

    def _come(self, version: int) -> None:
        self.residency.move(version, Where.AWAY, Where.COMING)
        slot = self._trainer.slots[version]
        path = slot.spilled.path if slot.spilled is not None else None
        self._moves[version] = _Move(self._mover.submit(self._trainer.fetched, slot), path)

    def _stay(self, run: RunQueue) -> None:
        self.residency.move(run.version, Where.LEAVING, Where.HERE)
        run.is_away = False

    def _queue_of(self, version: int) -> RunQueue:
        return next(run for run in self._runs() if run.version == version)

    def _settle(self) -> None:
        for move in [move for move in self._recalled if move.future.done()]:
            self._recalled.remove(move)
            self._clean(move)
        for version, move in list(self._moves.items()):
            if not move.future.done():
                continue
            del self._moves[version]
            where, error = self.residency.where(version), move.future.exception()
            if move.is_closed:
                self._clean(move)
                self.residency.move(version, where, Where.HERE if where is Where.LEAVING else Where.AWAY)
                self.residency.close(version)
            elif where is Where.LEAVING:
                self._left(version, move) if error is None else self._stayed(version, error)
            else:
                self._came(version, move) if error is None else self._lost(version, error)

    def _clean(self, move: _Move) -> None:
        """Remove the file of a move that nobody waits for."""
        if move.path is not None:
            self._delete(move.path)
        elif move.future.exception() is None and isinstance(spilled := move.future.result(), spill.Spilled):
            self._delete(spilled.path)

    def _left(self, version: int, move: _Move) -> None:
        self._trainer.leave(version, move.future.result())
        self.residency.move(version, Where.LEAVING, Where.AWAY)
        self._num_failures, self._retry_at = 0, None

    def _stayed(self, version: int, error: BaseException) -> None:
        run = self._queue_of(version)
        self._stay(run)
        self._num_failures += 1
        self._retry_at = time.monotonic() + RETRY_S
        log.warning(
            "The state of training run %s cannot be moved to %s: %s. It stays in memory; runs that need its place "
            "wait. Free some disk space, or give --train-resident-bytes or --train-spill-dir",
            run.run_id, self._folder, error, exc_info=None if isinstance(error, OSError) else error,
        )  # fmt: skip
        if self._num_failures < PATIENCE:
            return
        self._num_failures = 0
        for other in list(self._runs()):
            if other.ops and self.residency.where(other.version) is Where.AWAY:
                self._fail(other, BudgetError(
                    f"there is no room in memory for the training run {other.run_id}, and others cannot be moved to "
                    f"{self._folder}: {error}: free some disk space or close runs, then try again"
                ))  # fmt: skip

    def _came(self, version: int, move: _Move) -> None:
        self._trainer.arrive(version, move.future.result())
        self.residency.move(version, Where.COMING, Where.HERE)
        self.residency.touch(version)
        self._queue_of(version).is_away = False
        if move.path is not None:
            self._delete(move.path)

    def _lost(self, version: int, error: BaseException) -> None:
        self.residency.move(version, Where.COMING, Where.AWAY)
        run = self._queue_of(version)
        if isinstance(error, OSError):
            failure = TandemError(
                f"the state of the training run {run.run_id} cannot be read back from disk: {error}: try again, or "
                "open a run from its last checkpoint"
            )
        else:
            failure = BudgetError(f"there is no memory for the training run {run.run_id}: {error}")
        log.error("%s", failure, exc_info=None if isinstance(error, OSError) else error)
        self._fail(run, failure)

    def _delete(self, path: Path) -> None:
        self._mover.submit(path.unlink, True)

    # ------------------------------------------------------------ the end

    def close_all(self) -> None:
        """Give up what moves and remove every file. Idempotent."""
        self._mover.shutdown(wait=True, cancel_futures=True)
        self.remove_files()

    def remove_files(self) -> None:
        """On any thread, when the process is about to end."""
        self._folder.remove()

    def check(self) -> None:
        """Where runs are said to be is where their tensors are. Raises AssertionError."""
        slots = self._trainer.slots
        for run in self._runs():
            where = self.residency.where(run.version)
            assert slots[run.version].run.is_here is (where in (Where.HERE, Where.LEAVING)), (run.run_id, where)
            assert run.is_away is (where is not Where.HERE), (run.run_id, where)
            assert (where in (Where.LEAVING, Where.COMING)) <= (run.version in self._moves), (run.run_id, where)


class Folder:
    """A directory of one engine's own, made when it is first needed. Raises OSError then.

    Whoever was killed could not clean up: directories whose lock nobody holds are removed.
    """

    def __init__(self, parent: str | None) -> None:
        self._parent = Path(parent).expanduser() if parent else Path(tempfile.gettempdir())
        self._path: Path | None = None
        self.remove: Callable[[], object] = lambda: None

    def __str__(self) -> str:
        return str(self._path or self._parent)

    def path(self) -> Path:
        if self._path is None:
            self._parent.mkdir(parents=True, exist_ok=True)
            for left_behind in self._parent.glob(f"{FOLDER}*"):
                _remove_unless_used(left_behind)
            path = Path(tempfile.mkdtemp(prefix=FOLDER, dir=self._parent))
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._path, self.remove = path, weakref.finalize(self, _remove, path, lock)
        return self._path


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _remove_unless_used(path: Path) -> None:
    with suppress(OSError):  # somebody else's, or gone already
        lock = os.open(path / LOCK, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
