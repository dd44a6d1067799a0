"""The HTTP process's view of the engine: submit, cancel, adapters, figures. Async; imports no torch.

Owns the engine process: `start` spawns it, `close` ends it, and its death reaches every open stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from tandem.config import EngineConfig
from tandem.engine import messages
from tandem.errors import EngineDead, Overloaded, TandemError
from tandem.work import (
    Adapter,
    EngineReport,
    EngineStats,
    Example,
    LoraConfig,
    OptimParams,
    Pass,
    PassReport,
    Probe,
    Publish,
    PublishReport,
    Request,
    Restore,
    RunReport,
    Save,
    TokenEvent,
    Update,
    UpdateReport,
)

STOP_GRACE_S = 5.0


class Stream:
    """The news of one request: an async iterator of lists of events, one list a step, until all choices are done.

    Raises the TandemError with which the engine refused the request, or EngineDead.
    """

    def __init__(self, client: EngineClient, request: Request) -> None:
        self._client = client
        self._queue: asyncio.Queue[list[TokenEvent] | TandemError] = asyncio.Queue()
        self._open = request.sampling.n
        self.request_id = request.request_id

    def put(self, news: list[TokenEvent] | TandemError) -> None:
        self._queue.put_nowait(news)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        if self._open <= 0:
            raise StopAsyncIteration
        news = await self._queue.get()
        if isinstance(news, TandemError):
            self._open = 0
            raise news
        self._open -= sum(event.finish_reason is not None for event in news)
        return news

    async def aclose(self) -> None:
        """Cancel what still runs. Idempotent."""
        if self._open > 0:
            self._open = 0
            self._client.cancel(self.request_id)
        self._client.forget(self.request_id)


class EngineClient:
    """One engine process. Attributes: `report`, `stats` (newest), `adapters` by name, `dead` (reason, once it died)."""

    def __init__(
        self, config: EngineConfig, folder: Path, inbox: zmq.asyncio.Socket, outbox: zmq.asyncio.Socket,
        process: asyncio.subprocess.Process,
    ) -> None:  # fmt: skip
        """Use `start`."""
        self.report: EngineReport
        self.stats = EngineStats()
        self.adapters: dict[str, Adapter] = {}
        self.dead: str | None = None
        self.process = process
        self._config = config
        self._folder = folder
        self._inbox = inbox
        self._outbox = outbox
        self._streams: dict[str, Stream] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count(1)
        self._died = asyncio.Event()
        self._closing = False
        self._unseen = 0
        self._starting: asyncio.Future[Any] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._watcher = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, config: EngineConfig, on_progress: Callable[[int, int], None] | None = None) -> EngineClient:
        """Spawn the engine and wait until it can serve; `on_progress(done, total)` while weights load.

        Raises what the engine failed with (ModelError, ConfigError, ...), or EngineDead.
        """
        folder = Path(tempfile.mkdtemp(prefix="tandem-"))
        context = zmq.asyncio.Context()
        addresses = [f"ipc://{folder}/{name}" for name in ("to-engine", "from-engine")]
        outbox, inbox = _bound(context, zmq.PUSH, addresses[0]), _bound(context, zmq.PULL, addresses[1])
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tandem.engine.process", *addresses, str(os.getpid()), env=environment(config)
        )
        client = cls(config, folder, inbox, outbox, process)
        try:
            # Waits for the process to connect, unless that dies first.
            client._starting = asyncio.ensure_future(outbox.send(messages.encode(messages.Start(config))))
            await client._until_ready(on_progress)
        except BaseException:
            await client.close()
            raise
        client._reader = asyncio.create_task(client._read())
        client._reader.add_done_callback(client._on_reader_done)
        return client

    async def _until_ready(self, on_progress: Callable[[int, int], None] | None) -> None:
        while True:
            receive = asyncio.ensure_future(self._inbox.recv())
            died = asyncio.ensure_future(self._died.wait())
            await asyncio.wait((receive, died), return_when=asyncio.FIRST_COMPLETED)
            died.cancel()
            if not receive.done():
                # The last words may still be on their way when the process is already gone.
                await asyncio.wait((receive,), timeout=0.5)
            if not receive.done():
                receive.cancel()
                raise EngineDead(self.dead or "the engine process ended during start-up")
            match messages.decode_from_engine(receive.result()):
                case messages.Ready(report=report, adapters=adapters):
                    self.report = report
                    self.adapters = {adapter.name: adapter for adapter in adapters}
                    return
                case messages.Failed(error=error):
                    raise error.restore()
                case messages.Progress(done=done, total=total):
                    if on_progress is not None:
                        on_progress(done, total)

    # ------------------------------------------------------------ what callers use

    @property
    def max_num_queued_reqs(self) -> int:
        return self._config.scheduler.max_num_queued_reqs

    @property
    def max_resident_adapters(self) -> int:
        return self._config.adapters.max_cpu_loras

    def submit(self, request: Request) -> Stream:
        """Hand a request to the engine. Raises Overloaded or EngineDead at once; never waits."""
        if self.dead is not None:
            raise EngineDead(self.dead)
        limits = self._config.scheduler
        waiting = self.stats.num_waiting + self._unseen
        free_seats = max(0, self.report.max_num_seqs - self.stats.num_running)
        if waiting + request.sampling.n > limits.max_num_queued_reqs + free_seats:
            raise Overloaded(f"{waiting} requests wait already (limit {limits.max_num_queued_reqs}): try again later")
        if self.stats.predicted_wait_s > limits.max_wait_s:
            wait_s = self.stats.predicted_wait_s
            raise Overloaded(f"a new request would wait about {wait_s:.0f} s: try again later", retry_after=wait_s)
        if request.request_id in self._streams:
            raise TandemError(f"request id {request.request_id} is in use")
        self._send(messages.Submit(request))
        stream = self._streams[request.request_id] = Stream(self, request)
        self._unseen += request.sampling.n
        return stream

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Drop a request or one choice; unknown ids do nothing."""
        if self.dead is None:
            with contextlib.suppress(EngineDead):  # gone with everything it ran
                self._send(messages.Cancel(request_id, index))

    def forget(self, request_id: str) -> None:
        """Take no more news of a request."""
        self._streams.pop(request_id, None)

    async def load_adapter(self, name: str, path: str) -> Adapter:
        """Publish a PEFT directory under `name`. Raises ModelError, InvalidRequest, Conflict, EngineDead."""
        adapter = await self._call(lambda call_id: messages.LoadAdapter(call_id, name, str(path)))
        assert adapter is not None
        return adapter

    async def unload_adapter(self, name: str) -> None:
        """Unpublish `name`; requests that use it finish with it. Raises NotFound, EngineDead."""
        await self._call(lambda call_id: messages.UnloadAdapter(call_id, name))

    def retire_adapter(self, name: str) -> asyncio.Future[None]:
        """`unload_adapter` whose message goes out at once, before that of any call that follows."""
        self.adapters.pop(name, None)
        return self._ask(lambda call_id: messages.UnloadAdapter(call_id, name))

    # ------------------------------------------------------------ training
    # The message goes out when the method is called; a run's operations are executed in the order of the calls. All
    # futures may raise EngineDead, those of operations Cancelled once their run is closed.

    async def check_run(self, lora: LoraConfig, longest: int) -> int:
        """Bytes that a run with examples of up to `longest` tokens needs. Raises BudgetError where it cannot fit,
        InvalidRequest for a shape the model cannot have."""
        return (await self._ask(lambda call_id: messages.CheckRun(call_id, lora, longest))).bytes_needed

    def open_run(
        self,
        run_id: str,
        lora: LoraConfig,
        *,
        init_from: str | None = None,
        resume_from: str | None = None,
        priority: int = 0,
    ) -> asyncio.Future[RunReport]:
        """Begin a training run: fresh, from a PEFT directory of its shape, or from a directory of `save_run`."""
        return self._ask(
            lambda call_id: messages.OpenRun(call_id, run_id, lora, init_from, resume_from, priority)
        )  # fmt: skip

    def forward_backward(
        self, run_id: str, examples: list[Example], loss: str = "cross_entropy",
        loss_params: dict[str, float] | None = None, wants_logprobs: bool = False,
    ) -> asyncio.Future[PassReport]:  # fmt: skip
        """Loss and gradients of some examples; gradients add up until the next `optim_step`. Raises InvalidRequest
        for examples that do not fit the loss; nothing has been changed then."""
        op = Pass(run_id, examples, True, loss, loss_params or {}, wants_logprobs)
        return self._ask(lambda call_id: messages.Train(call_id, op))

    def forward(
        self, run_id: str, examples: list[Example], loss: str = "cross_entropy",
        loss_params: dict[str, float] | None = None, wants_logprobs: bool = False,
    ) -> asyncio.Future[PassReport]:  # fmt: skip
        """The loss alone."""
        op = Pass(run_id, examples, False, loss, loss_params or {}, wants_logprobs)
        return self._ask(lambda call_id: messages.Train(call_id, op))

    def optim_step(self, run_id: str, params: OptimParams) -> asyncio.Future[UpdateReport]:
        """One update with the gradients added up so far. Raises Diverged; the weights are those before it then."""
        return self._ask(lambda call_id: messages.Train(call_id, Update(run_id, params)))

    def probe(
        self, run_id: str, examples: list[Example], params: OptimParams, seed: int, radius: float = 1e-2
    ) -> asyncio.Future[PassReport]:
        """One step without gradients: forward passes alone, which ride in serving's (see `work.Probe`)."""
        return self._ask(
            lambda call_id: messages.Train(call_id, Probe(run_id, examples, params, seed, radius))
        )  # fmt: skip

    def save_run(self, run_id: str, path: str, with_optimizer: bool = True) -> asyncio.Future[None]:
        """Write the run to a new directory, whole or not at all. Raises TandemError."""
        return self._ask(lambda call_id: messages.Train(call_id, Save(run_id, str(path), with_optimizer)))

    def load_run(self, run_id: str, path: str, with_optimizer: bool = True) -> asyncio.Future[None]:
        """Put what `save_run` wrote into the run, which has the same shape. Without its optimizer's state that starts
        afresh. Raises ModelError, InvalidRequest; the run is as it was then."""
        return self._ask(lambda call_id: messages.Train(call_id, Restore(run_id, str(path), with_optimizer)))

    def publish(self, run_id: str, name: str) -> asyncio.Future[PublishReport]:
        """Let requests use the run as it is now, as the newest version of the adapter `name`. In memory only. Raises
        Conflict where no more adapters may be resident."""
        return self._ask(lambda call_id: messages.Train(call_id, Publish(run_id, name)))

    def close_run(self, run_id: str) -> asyncio.Future[None]:
        """End a run. What it has queued fails with Cancelled."""
        return self._ask(lambda call_id: messages.CloseRun(call_id, run_id))

    async def wait_dead(self) -> str:
        """Return the reason once the engine process has ended."""
        await self._died.wait()
        return self.dead or "the engine was closed"

    async def close(self) -> None:
        """End the engine process and clean up. Idempotent."""
        if self._closing:
            return
        self._closing = True
        if self.process.returncode is None:
            if not await self._stopped_by_itself():
                self.process.kill()
                await self.process.wait()
        await self._watcher
        for task in (self._starting, self._reader):
            if task is not None:
                task.cancel()
        self._inbox.close(linger=0)
        self._outbox.close(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _stopped_by_itself(self) -> bool:
        if self._reader is None:  # still loading, when it listens to nobody
            return False
        try:
            self._send(messages.Shutdown())
            await asyncio.wait_for(self.process.wait(), STOP_GRACE_S)
        except (EngineDead, TimeoutError):
            return False
        return True

    # ------------------------------------------------------------ the border

    def _send(self, message: messages.ToEngine) -> None:
        # No high-water mark: the bounded queue is kept above, so only a process that is gone cannot take more.
        try:
            zmq.Socket.send(self._outbox, messages.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            raise EngineDead(self.dead or "the engine process is gone") from None

    async def _call(self, build: Callable[[int], messages.ToEngine]) -> Adapter | None:
        if self.dead is not None:
            raise EngineDead(self.dead)
        call_id = next(self._call_ids)
        future = self._calls[call_id] = asyncio.get_running_loop().create_future()
        self._send(build(call_id))
        try:
            return await future
        finally:
            del self._calls[call_id]

    def _ask(self, build: Callable[[int], messages.ToEngine]) -> asyncio.Future[Any]:
        """Send a call now; its answer comes with the future."""
        call_id, future = next(self._call_ids), asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: self._calls.pop(call_id, None))
        future.add_done_callback(_noticed)
        self._calls[call_id] = future
        try:
            if self.dead is not None:
                raise EngineDead(self.dead)
            self._send(build(call_id))
        except EngineDead as error:
            future.set_exception(error)
        return future

    async def _read(self) -> None:
        while True:
            self._receive(messages.decode_from_engine(await self._inbox.recv()))

    def _receive(self, message: messages.FromEngine) -> None:
        match message:
            case messages.Stepped(events=events, stats=stats):
                self.stats = stats
                self._unseen = 0
                self._deliver(events)
            case messages.Refused(request_id=request_id, error=error):
                self._unseen = 0
                if stream := self._streams.pop(request_id, None):
                    stream.put(error.restore())
            case messages.Replied(call_id=call_id, adapters=adapters, error=error, adapter=adapter):
                self.adapters = {adapter.name: adapter for adapter in adapters}
                if (future := self._calls.get(call_id)) and not future.done():
                    if error is None:
                        future.set_result(adapter)
                    else:
                        future.set_exception(error.restore())
            case messages.Trained(call_id=call_id, report=report, error=error):
                if isinstance(report, PublishReport):
                    self.adapters[report.adapter.name] = report.adapter
                if (future := self._calls.get(call_id)) and not future.done():
                    if error is None:
                        future.set_result(report)
                    else:
                        future.set_exception(error.restore())
            case messages.Failed(error=error):
                self._die(error.message)

    def _deliver(self, events: list[TokenEvent]) -> None:
        grouped: dict[str, list[TokenEvent]] = {}
        for event in events:
            grouped.setdefault(event.request_id, []).append(event)
        for request_id, news in grouped.items():
            if stream := self._streams.get(request_id):
                stream.put(news)

    def _on_reader_done(self, reader: asyncio.Task[None]) -> None:
        """Without its reader the client would leave every stream hanging."""
        if not reader.cancelled() and (error := reader.exception()) is not None:
            self._die(f"the engine sent something unreadable: {type(error).__name__}: {error}")

    async def _watch(self) -> None:
        code = await self.process.wait()
        self._die("the engine was closed" if self._closing else f"the engine process ended with code {code}")

    def _die(self, reason: str) -> None:
        self.dead = self.dead or reason
        for stream in self._streams.values():
            stream.put(EngineDead(self.dead))
        self._streams.clear()
        for future in list(self._calls.values()):
            if not future.done():
                future.set_exception(EngineDead(self.dead))
        self._died.set()


def _noticed(future: asyncio.Future[Any]) -> None:
    """An operation whose run was closed fails with nobody left to ask; that is no reason for a warning at exit."""
    if not future.cancelled():
        future.exception()


def _bound(context: zmq.asyncio.Context, kind: int, address: str) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.bind(address)
    return socket


def environment(config: EngineConfig) -> dict[str, str]:
    """What the numerical libraries read once, when they load; what the user has set stays.

    OpenMP threads that wait by spinning steal the cores of whoever they wait for as soon as anything else runs, so
    they spin for less long than libgomp's default; OMP_WAIT_POLICY=PASSIVE is for machines shared with other work.
    """
    # Large pages, and large buffers kept for the next step instead of being mapped anew: page faults took a tenth of
    # the time of training.
    defaults = {
        "THP_MEM_ALLOC_ENABLE": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**33),
        "MALLOC_TRIM_THRESHOLD_": str(2**33),
        "MALLOC_TOP_PAD_": str(2**26),
    }
    if "OMP_WAIT_POLICY" not in os.environ:
        defaults["GOMP_SPINCOUNT"] = "30000"
    threads = config.model.num_threads
    return defaults | os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
