"""Tinker's sessions: who they belong to, the models and samplers in them, and how they end.

A session lives as long as its client says so. When it ends, its models' runs are closed and their memory is free; what
was saved stays. What models and samplers do is in `tinker_training.py` and `tinker_sampling.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.api.serving import Serving
from tandem.api.tinker_downloads import Downloads
from tandem.api.tinker_futures import Future, Futures
from tandem.api.tinker_order import Order
from tandem.api.tinker_residents import Residents
from tandem.api.tinker_results import Result
from tandem.api.tinker_seats import Seats
from tandem.errors import Gone, InvalidRequest, NotFound, TandemError
from tandem.jobs.checkpoints import SCHEME, Checkpoints, parse

log = logging.getLogger("tandem.tinker")

SWEEP_S = 2.0
MAX_OPEN_SESSIONS = 256  # of one tenant
NUM_ENDED_KEPT = 1024
NUM_NOTES = 4096
OTHERS_SHARE = 8
NUM_FINISHED_KEPT = 16384
NUM_USAGE_ROWS = 65536


@dataclass(frozen=True)
class Patience:
    """Seconds: without a sign of life before a session ends (the SDKs send one every 10), that an operation waits for
    those before it to arrive, that a result waits to be collected."""

    session_s: float = 90.0
    order_s: float = 120.0
    future_s: float = 600.0


@dataclass(eq=False)
class Op:
    """An operation on its way to its turn. `start` hands it to the engine at once and returns what waits for it."""

    seq_id: int
    start: Callable[[], Awaitable[Result]]
    turn: asyncio.Future[Awaitable[Result]]

    def begin(self) -> None:
        if self.turn.done():  # nobody waits for it any more
            return
        try:
            self.turn.set_result(self.start())
        except TandemError as error:
            self.turn.set_exception(error)

    async def outcome(self) -> Result:
        return await (await self.turn)


@dataclass(eq=False)
class Model:
    """A LoRA in training. Its id is also the engine's name of the run."""

    model_id: str
    session: Session
    base_model: str
    rank: int
    train_attn: bool = True
    train_mlp: bool = True
    optimizer: str = "adamw"
    order: Order[Op] = field(default_factory=Order)
    saving: set[tuple[str, str]] = field(default_factory=set)  # (kind, name) of checkpoints being written


@dataclass(eq=False)
class Sampler:
    """Weights to sample from: `adapter` is the engine's name of them, None for the base model."""

    sampler_id: str
    session: Session
    base_model: str
    adapter: str | None = None
    model_path: str | None = None
    num_clients: int = 1
    finished: deque[str] = field(default_factory=lambda: deque(maxlen=NUM_FINISHED_KEPT))  # request ids, oldest first
    num_finished: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def finish(self, request_id: str) -> None:
        self.finished.append(request_id)
        self.num_finished += 1
        self.news.set()

    def finished_since(self, cursor: int) -> list[str]:
        """Request ids done after the first `cursor` ones, as far as they are remembered."""
        first = self.num_finished - len(self.finished)
        return list(self.finished)[max(0, cursor - first) :]


@dataclass(eq=False)
class Session:
    """One client program. Times are seconds since 1970, `seen_s` is monotonic."""

    session_id: str
    tenant: str
    created_at: float
    seen_s: float
    user_metadata: dict[str, Any] | None = None
    display_name: str | None = None
    project_id: str | None = None
    tags: list[str] = field(default_factory=list)
    models: dict[str, Model] = field(default_factory=dict)
    samplers: dict[str, Sampler] = field(default_factory=dict)
    model_ids: list[str] = field(default_factory=list)  # also of models that are unloaded
    status: dict[str, Any] = field(default_factory=lambda: {"type": "active"})
    timeline: list[tuple[str, str, float, float]] = field(default_factory=list)  # (what, of what, began, ended)

    @property
    def is_open(self) -> bool:
        return self.status["type"] == "active"


class Sessions:
    """All sessions of a server, and what they share."""

    def __init__(self, serving: Serving, store: Checkpoints, patience: Patience) -> None:
        self.serving = serving
        self.store = store
        self.patience = patience
        self.futures = Futures(patience.future_s)
        self.residents = Residents(serving.engine)
        self.waiting: dict[str, list[int]] = {}  # by tenant: samples, and their prompts' tokens
        self.downloads = Downloads()
        self.notes: deque[tuple[str, float, str, str]] = deque(maxlen=NUM_NOTES)  # (tenant, when, what, of what)
        self.usage: dict[tuple[str, int, str, str], int] = {}  # (tenant, hour since 1970, session, kind) -> tokens
        self._seats: Seats | None = None
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._sweeping: asyncio.Task[None] | None = None

    @property
    def seats(self) -> Seats:
        """Those of the engine but a few, which stay free for requests on other routes."""
        if self._seats is None:
            all_seats = self.serving.report.max_num_seqs
            self._seats = Seats(max(1, all_seats - max(1, all_seats // OTHERS_SHARE)))
        return self._seats

    def count(self, session: Session, kind: str, num_tokens: int) -> None:
        """Add to what a session has used in this hour."""
        key = (session.tenant, int(time.time() // 3600), session.session_id, kind)
        self.usage[key] = self.usage.pop(key, 0) + num_tokens
        while len(self.usage) > NUM_USAGE_ROWS:
            del self.usage[next(iter(self.usage))]

    def note(self, tenant: str, event: str, path: str) -> None:
        """Remember what was done to a checkpoint."""
        self.notes.append((tenant, time.time(), event, path))

    # ------------------------------------------------------------ finding

    def create(self, tenant: str, **described: Any) -> Session:
        """Raises InvalidRequest where the tenant has too many open."""
        if sum(s.is_open for s in self.of_tenant(tenant)) >= MAX_OPEN_SESSIONS:
            raise InvalidRequest(f"{MAX_OPEN_SESSIONS} sessions are open: close some, or wait until they expire")
        session = Session(str(uuid.uuid4()), tenant, time.time(), time.monotonic(), **described)
        self._sessions[session.session_id] = session
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = asyncio.create_task(self._sweep())
        return session

    def of_tenant(self, tenant: str) -> list[Session]:
        """The newest first, ended ones too."""
        return [s for s in reversed(self._sessions.values()) if s.tenant == tenant]

    def known(self, tenant: str, session_id: str) -> Session:
        """A session, open or ended. Raises NotFound, also for another tenant's."""
        session = self._sessions.get(session_id)
        if session is None or session.tenant != tenant:
            raise NotFound(f"there is no session {session_id[:80]!r}", "session_id")
        return session

    def session(self, tenant: str, session_id: str) -> Session:
        """An open session, which has just shown a sign of life. Raises NotFound, Gone."""
        session = self.known(tenant, session_id)
        if not session.is_open:
            how = session.status.get("detail") or session.status["type"]
            raise Gone(f"the session {session_id} is over ({how}): create another", "session_id")
        session.seen_s = time.monotonic()
        return session

    def model(self, tenant: str, model_id: str) -> Model:
        """Raises NotFound, Gone where its session is over."""
        session_id = model_id.partition(":")[0]
        try:
            session = self.session(tenant, session_id)
        except NotFound:
            raise NotFound(f"there is no model {model_id[:120]!r}", "model_id") from None
        model = session.models.get(model_id)
        if model is None:
            raise NotFound(f"there is no model {model_id[:120]!r} in this session, or it was unloaded", "model_id")
        return model

    def sampler(self, tenant: str, sampler_id: str) -> Sampler:
        """Raises NotFound, Gone where its session is over."""
        session_id = sampler_id.partition(":")[0]
        try:
            session = self.session(tenant, session_id)
        except NotFound:
            raise NotFound(f"there is no sampling session {sampler_id[:120]!r}", "sampling_session_id") from None
        if sampler_id not in session.samplers:
            raise NotFound(f"there is no sampling session {sampler_id[:120]!r}", "sampling_session_id")
        return session.samplers[sampler_id]

    def checkpoint_directory(self, sampler: Sampler) -> Path | None:
        """Where the weights of a sampler can be loaded from. Raises NotFound where they were deleted."""
        if sampler.model_path is None:
            return None
        return self.store.directory(self.store.readable(sampler.session.tenant, sampler.model_path))

    async def resident(self, path: str) -> str | None:
        """The engine's adapter of a checkpoint, loading it where needed; None for what is no checkpoint's path. Who
        knows a path may sample from it on the other routes: the run's name in it cannot be guessed."""
        if not path.startswith(SCHEME):
            return None
        record = self.store.find(*parse(path))
        if record is None or not self.serving.is_base(record.base_model):
            return None
        self.residents.release(await self.residents.use(path, "", self.store.directory(record)))
        return path

    # ------------------------------------------------------------ operations in order

    def submit(self, model: Model, seq_id: int | None, kind: str, start: Callable[[], Awaitable[Result]]) -> Future:
        """Run an operation of a model when those before it have been handed on. The same number again gives the same
        future. Raises InvalidRequest, Overloaded; the number is still free then."""
        if seq_id is None:
            seq_id = model.order.next_seq
        if seq_id < 1:
            raise InvalidRequest(f"seq_id must be at least 1, not {seq_id}", "seq_id")
        if known := self.known_op(model, seq_id, kind):
            return known
        session = model.session
        self.futures.check_room(session.tenant)
        op = Op(seq_id, start, asyncio.get_running_loop().create_future())
        ready = model.order.add(seq_id, op, time.monotonic())
        future = self.futures.add(
            session.tenant, session.session_id, (model.model_id, seq_id), kind, self._timed(session, model, kind, op)
        )
        for each in ready:
            each.begin()
        return future

    def known_op(self, model: Model, seq_id: int | None, kind: str) -> Future | None:
        """The future of an operation that was sent before. Raises InvalidRequest where that was another one."""
        future = self.futures.find((model.model_id, seq_id))
        if future is not None and future.kind != kind:
            raise InvalidRequest(f"seq_id {seq_id} was a {future.kind}, it cannot be a {kind} as well", "seq_id")
        return future

    async def _timed(self, session: Session, model: Model, kind: str, op: Op) -> Result:
        began = time.time()
        try:
            return await op.outcome()
        finally:
            session.timeline.append((kind, model.model_id, began, time.time()))
            del session.timeline[:-10_000]

    # ------------------------------------------------------------ endings

    def drop_model(self, model: Model) -> asyncio.Future[None]:
        """Close a model's run; what it had queued fails. Snapshots that samplers use stay until the session ends."""
        model.session.models.pop(model.model_id, None)
        for op in model.order.drain():
            if not op.turn.done():
                op.turn.set_exception(Gone(f"the model {model.model_id} was unloaded before this was done"))
        return self.serving.engine.close_run(model.model_id)

    def end(self, session: Session, status: dict[str, Any]) -> None:
        """Free all that a session holds."""
        session.status = status
        for model in list(session.models.values()):
            self.drop_model(model)
        self.futures.end_session(session.session_id)
        self.residents.end_session(session.session_id)
        session.samplers.clear()
        ended = [s.session_id for s in self._sessions.values() if not s.is_open]
        for session_id in ended[:-NUM_ENDED_KEPT]:
            del self._sessions[session_id]

    async def _sweep(self) -> None:
        """Until nothing is left that could expire."""
        while any(s.is_open for s in self._sessions.values()) or len(self.futures):
            await asyncio.sleep(min(SWEEP_S, self.patience.session_s / 4))
            now_s = time.monotonic()
            for session in [s for s in self._sessions.values() if s.is_open]:
                if now_s - session.seen_s > self.patience.session_s:
                    log.info("the session %s has shown no sign of life and ends", session.session_id)
                    self.end(session, {"type": "cancelled", "detail": "it expired without a sign of life"})
                    continue
                for model in session.models.values():
                    self._give_up_late(model, now_s)
            self.futures.sweep(now_s)
            try:
                await self.store.expire(time.time())
            except TandemError:
                log.exception("checkpoints past their time stay for now")

    def _give_up_late(self, model: Model, now_s: float) -> None:
        for op in model.order.overdue(now_s - self.patience.order_s):
            if not op.turn.done():
                missing = model.order.next_seq
                op.turn.set_exception(
                    InvalidRequest(
                        f"seq_id {op.seq_id} waited {self.patience.order_s:.0f} s for seq_id {missing}, which never "
                        "came: it was not executed",
                        "seq_id",
                    )
                )
