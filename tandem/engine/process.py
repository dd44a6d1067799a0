"""The engine process: messages in, steps, messages out. Started by `engine/client`; ends when its parent does."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from tandem.engine import messages
from tandem.errors import BudgetError, ConfigError, ModelError, TandemError
from tandem.scheduler import replay
from tandem.work import Adapter, SizeReport, TokenEvent, TrainReport

if TYPE_CHECKING:
    from tandem.engine.engine import Engine
    from tandem.model.adapter import AdapterWeights

IDLE_POLL_MS = 20
PARENT_POLL_S = 0.5
FIGURES_PERIOD_S = 0.2
EXIT_CRASH, EXIT_MODEL = 1, 4
EXIT_CODES: dict[type[TandemError], int] = {ConfigError: 3, BudgetError: 5}
log = logging.getLogger("tandem.engine")


def main(inbox_address: str, outbox_address: str, parent: int) -> int:
    """Serve one HTTP process until it says Shutdown or dies. Returns the exit code."""
    # Signals to the whole process group reach both; the HTTP process decides when the engine stops.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    folder = Path(inbox_address.removeprefix("ipc://")).parent
    clean_up: list[Callable[[], object]] = [lambda: shutil.rmtree(folder, ignore_errors=True)]
    threading.Thread(target=_die_with_parent, args=(parent, clean_up), daemon=True).start()
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.connect(inbox_address)
    outbox.connect(outbox_address)

    def send(message: messages.FromEngine) -> None:
        outbox.send(messages.encode(message))

    try:
        return _serve(inbox, send, clean_up)
    except TandemError as error:
        send(messages.Failed(messages.Error.of(error)))
        return EXIT_CODES.get(type(error), EXIT_MODEL)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        send(messages.Failed(messages.Error("EngineDead", f"the engine crashed: {type(error).__name__}: {error}")))
        return EXIT_CRASH
    finally:
        context.destroy(linger=1000)


def _die_with_parent(parent: int, clean_up: Sequence[Callable[[], object]]) -> None:
    """End the process, and remove its files and the sockets' folder, which the parent can no longer do.

    The parent says who it is: it may have died before this process could ask.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    for remove in clean_up:
        remove()
    os._exit(EXIT_CRASH)


def _serve(inbox: zmq.Socket, send: Callable[[messages.FromEngine], None], clean_up: list[Callable[[], object]]) -> int:
    start = messages.decode_to_engine(inbox.recv())
    assert isinstance(start, messages.Start), start
    from tandem.engine.engine import Engine  # torch: 2.5 s that a malformed command line should not wait for

    engine = Engine(start.config, lambda done, total: send(messages.Progress(done, total)), owns_process=True)
    for module in start.config.adapters.lora_modules:
        name, separator, path = module.partition("=")
        if not separator:
            raise ConfigError(f"--lora-modules {module!r}: write name=path")
        engine.load_adapter(name, path)
    send(messages.Ready(engine.report, engine.published()))
    clean_up.append(engine.training.residents.remove_files)
    try:
        return _Loop(engine, inbox, send).run()
    finally:
        engine.close()


class _Loop:
    """Between two steps: take in what arrived; after a step: send what came out."""

    def __init__(self, engine: Engine, inbox: zmq.Socket, send: Callable[[messages.FromEngine], None]) -> None:
        self.engine = engine
        self.inbox = inbox
        self.send = send
        # Reading an adapter from disk would stall every stream: one thread reads, in order; the loop publishes.
        self.to_read: queue.SimpleQueue[messages.LoadAdapter] = queue.SimpleQueue()
        self.to_publish: queue.SimpleQueue[tuple[messages.LoadAdapter, AdapterWeights | TandemError]] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._read_adapters, daemon=True).start()
        self.training: dict[int, int] = {}  # operation -> call
        self.told_s, self.is_behind = 0.0, False  # when the client last got figures; whether they have changed since

        self.wants_plans = False
        signal.signal(signal.SIGUSR1, self._want_plans)

    def _want_plans(self, number: int, frame: object) -> None:
        self.wants_plans = True

    def _write_plans(self) -> None:
        """After SIGUSR1: the last plans go to a file, for `tandem.scheduler.replay`."""
        self.wants_plans = False
        path = Path(tempfile.gettempdir()) / f"tandem-plans-{os.getpid()}-{int(time.time())}.msgpack"
        try:
            replay.save(self.engine.plan_log, path)
        except OSError as error:
            print(f"The plans cannot be written to {path}: {error}", file=sys.stderr, flush=True)
        else:
            print(f"The last {len(self.engine.plan_log)} plans are in {path}", file=sys.stderr, flush=True)

    def run(self) -> int:
        while True:
            if not self._receive():
                return 0
            while not self.to_publish.empty():
                self._publish(*self.to_publish.get())
            if self.wants_plans:
                self._write_plans()
            if self.engine.has_work:
                self.engine.step(self._deliver, self._somebody_waits)
            elif self.is_behind and time.monotonic() - self.told_s > FIGURES_PERIOD_S:
                self._tell([])
            self._report()

    def _somebody_waits(self) -> bool:
        return bool(self.inbox.poll(0))

    def _deliver(self, events: list[TokenEvent]) -> None:
        """News of a step; without any, the figures alone are sent now and then."""
        self.is_behind = True
        if events or time.monotonic() - self.told_s > FIGURES_PERIOD_S:
            self._tell(events)

    def _tell(self, events: list[TokenEvent]) -> None:
        self.told_s, self.is_behind = time.monotonic(), self.engine.has_work
        self.send(messages.Stepped(events, self.engine.refresh_stats()))

    def _report(self) -> None:
        for op_id, report in self.engine.take_reports():
            call_id = self.training.pop(op_id)
            if isinstance(report, TandemError):
                self.send(messages.Trained(call_id, error=messages.Error.of(report)))
            else:
                self.send(messages.Trained(call_id, report))

    def _receive(self) -> bool:
        """Handle all that waits; wait for something when there is nothing to do. False: time to stop."""
        busy = self.engine.has_work or not self.to_publish.empty()
        if not self.inbox.poll(0 if busy else IDLE_POLL_MS):
            return True
        while True:
            try:
                message = messages.decode_to_engine(self.inbox.recv(zmq.NOBLOCK))
            except zmq.Again:
                return True
            if isinstance(message, messages.Shutdown):
                return False
            self._handle(message)

    def _handle(self, message: messages.ToEngine) -> None:
        match message:
            case messages.Submit(request=request):
                try:
                    self.engine.submit(request)
                except TandemError as error:
                    self.send(messages.Refused(request.request_id, messages.Error.of(error)))
            case messages.Cancel(request_id=request_id, index=index):
                events = self.engine.cancel(request_id, index)
                self.send(messages.Stepped(events, self.engine.refresh_stats()))
            case messages.LoadAdapter():
                self.to_read.put(message)
            case messages.UnloadAdapter(call_id=call_id, name=name):
                try:
                    self.engine.unload_adapter(name)
                except TandemError as error:
                    self._reply(call_id, error=error)
                else:
                    self._reply(call_id)
            case messages.CheckRun() | messages.OpenRun() | messages.Train() | messages.CloseRun():
                try:
                    self._train(message)
                except TandemError as error:
                    self.send(messages.Trained(message.call_id, error=messages.Error.of(error)))
            case _:
                raise AssertionError(f"unexpected message {message!r}")

    def _train(self, message: messages.CheckRun | messages.OpenRun | messages.Train | messages.CloseRun) -> None:
        report: TrainReport | None = None
        match message:
            case messages.CheckRun(lora=lora, longest=longest):
                report = SizeReport(bytes_needed=self.engine.check_run(lora, longest))
            case messages.OpenRun(run_id=run_id, lora=lora):
                try:
                    report = self.engine.open_run(
                        run_id, lora, init_from=message.init_from, resume_from=message.resume_from,
                        priority=message.priority,
                    )  # fmt: skip
                except (ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
                    if isinstance(error, TandemError):
                        raise
                    traceback.print_exc(file=sys.stderr)  # whatever an adapter made by a stranger can cause
                    reason = f"the training run cannot be opened: {type(error).__name__}: {error}"
                    raise ModelError(reason) from error
            case messages.Train(call_id=call_id, op=op):
                self.training[self.engine.enqueue(op)] = call_id
                return
            case messages.CloseRun(run_id=run_id):
                self.engine.close_run(run_id)
                self.is_behind = True
                self._report()  # what it had queued fails before the closing is confirmed
        self.send(messages.Trained(message.call_id, report))

    def _read_adapters(self) -> None:
        while True:
            message = self.to_read.get()
            try:
                self.to_publish.put((message, self.engine.worker.read_adapter(message.path)))
            except TandemError as error:
                self.to_publish.put((message, error))
            except Exception as error:  # whatever a file made by a stranger can cause must not end the engine
                traceback.print_exc(file=sys.stderr)
                reason = f"adapter {message.path} cannot be read: {type(error).__name__}: {error}"
                self.to_publish.put((message, ModelError(reason)))

    def _publish(self, message: messages.LoadAdapter, weights: AdapterWeights | TandemError) -> None:
        try:
            if isinstance(weights, TandemError):
                raise weights
            adapter = self.engine.load_adapter(message.name, message.path, weights)
        except TandemError as error:
            self._reply(message.call_id, error=error)
        else:
            self._reply(message.call_id, adapter)

    def _reply(self, call_id: int, adapter: Adapter | None = None, error: TandemError | None = None) -> None:
        failure = messages.Error.of(error) if error is not None else None
        self.send(messages.Replied(call_id, self.engine.published(), failure, adapter))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
