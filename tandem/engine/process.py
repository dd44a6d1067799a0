"""The engine process: messages in, steps, messages out. Started by `engine/client`; ends when its parent does."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from tandem.engine import messages
from tandem.errors import ConfigError, TandemError

if TYPE_CHECKING:
    from tandem.engine.engine import Engine

IDLE_POLL_MS = 200
PARENT_POLL_S = 0.5
EXIT_CONFIG, EXIT_MODEL, EXIT_CRASH = 3, 4, 1
log = logging.getLogger("tandem.engine")


def main(inbox_address: str, outbox_address: str) -> int:
    """Serve one HTTP process until it says Shutdown or dies. Returns the exit code."""
    # Ctrl-C reaches the whole process group; the HTTP process decides when the engine stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder = Path(inbox_address.removeprefix("ipc://")).parent
    threading.Thread(target=_die_with_parent, args=(os.getppid(), folder), daemon=True).start()
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.connect(inbox_address)
    outbox.connect(outbox_address)

    def send(message: messages.FromEngine) -> None:
        outbox.send(messages.encode(message))

    try:
        return _serve(inbox, send)
    except TandemError as error:
        send(messages.Failed(messages.Error.of(error)))
        return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_MODEL
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        send(messages.Failed(messages.Error("EngineDead", f"the engine crashed: {type(error).__name__}: {error}")))
        return EXIT_CRASH
    finally:
        context.destroy(linger=1000)


def _die_with_parent(parent: int, folder: Path) -> None:
    """End the process, and remove the sockets' folder, which the parent can no longer do."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(EXIT_CRASH)


def _serve(inbox: zmq.Socket, send: Callable[[messages.FromEngine], None]) -> int:
    start = messages.decode_to_engine(inbox.recv())
    assert isinstance(start, messages.Start), start
    from tandem.engine.engine import Engine  # torch: 2.5 s that a malformed command line should not wait for

    engine = Engine(start.config, lambda done, total: send(messages.Progress(done, total)))
    for module in start.config.adapters.lora_modules:
        name, separator, path = module.partition("=")
        if not separator:
            raise ConfigError(f"--lora-modules {module!r}: write name=path")
        engine.load_adapter(name, path)
    send(messages.Ready(engine.report, engine.published()))
    return _Loop(engine, inbox, send).run()


class _Loop:
    """Between two steps: take in what arrived; after a step: send what came out."""

    def __init__(self, engine: Engine, inbox: zmq.Socket, send: Callable[[messages.FromEngine], None]) -> None:
        self.engine = engine
        self.inbox = inbox
        self.send = send
        # Reading an adapter from disk would stall every stream, so a thread reads and the loop publishes.
        self.reads: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def run(self) -> int:
        while True:
            if not self._receive():
                return 0
            while not self.reads.empty():
                self.reads.get()()
            if self.engine.has_work:
                events = self.engine.step()
                self.send(messages.Stepped(events, self.engine.stats))

    def _receive(self) -> bool:
        """Handle all that waits; wait for something when there is nothing to do. False: time to stop."""
        busy = self.engine.has_work or not self.reads.empty()
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
            case messages.LoadAdapter(call_id=call_id, name=name, path=path):
                threading.Thread(target=self._read_adapter, args=(call_id, name, path), daemon=True).start()
            case messages.UnloadAdapter(call_id=call_id, name=name):
                self._reply(call_id, lambda: self.engine.unload_adapter(name))
            case _:
                raise AssertionError(f"unexpected message {message!r}")

    def _read_adapter(self, call_id: int, name: str, path: str) -> None:
        try:
            weights = self.engine.worker.read_adapter(path)
        except Exception as error:
            failure = error
            self.reads.put(lambda: self._reply(call_id, lambda: _raise(failure)))
        else:
            self.reads.put(lambda: self._reply(call_id, lambda: self.engine.load_adapter(name, path, weights)))

    def _reply(self, call_id: int, work: Callable[[], object]) -> None:
        error = None
        try:
            work()
        except TandemError as failure:
            error = messages.Error.of(failure)
        self.send(messages.Replied(call_id, self.engine.published(), error))


def _raise(error: Exception) -> None:
    raise error


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
