"""`tandem serve`: put the parts together (port, engine process, tokenizer, HTTP app) and watch over them.

What the HTTP routes do is in `api/`, what the engine does in `engine/`; here is only start, stop and the lines printed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

from tandem import __version__
from tandem.cli import options, startup
from tandem.config import EngineConfig, ServerConfig
from tandem.errors import ConfigError

if TYPE_CHECKING:
    import uvicorn

GRACE_S = 10.0
DEATH_GRACE_S = 1.0
STATS_PERIOD_S = 10.0


def parser(prog: str) -> options.Parser:
    """All options of the engine and the server."""
    made = options.Parser(prog=prog, description="Serve a model over the OpenAI API.")
    made.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL",
                      help="Hugging Face directory or hub id (default: demo, the embedded model)")  # fmt: skip
    made.add_argument("--model", dest="model_flag", default=argparse.SUPPRESS, metavar="MODEL", help="the same")
    made.add_argument("--demo", action="store_true", help="serve the embedded model")
    options.add_config_file(made)
    options.add(made, EngineConfig, ServerConfig, skip=("model",))
    return made


def run(namespace: argparse.Namespace) -> int:
    """Serve until a signal or the engine's death. 0 after SIGTERM, 130 after Ctrl-C, 1 after the engine's death."""
    one_model(namespace)
    engine_config, server_config = options.resolve(namespace, EngineConfig, ServerConfig)
    return asyncio.run(_serve(engine_config, server_config))


def one_model(namespace: argparse.Namespace) -> None:
    """Fold MODEL, --model and --demo into `namespace.model`; UsageError where they contradict each other."""
    given = {getattr(namespace, name) for name in ("model", "model_flag") if hasattr(namespace, name)}
    if namespace.demo:
        given.add("demo")
    if len(given) > 1:
        raise options.UsageError(f"one model at a time, not {' and '.join(sorted(given))}")
    if given:
        namespace.model = given.pop()


async def _serve(engine_config: EngineConfig, config: ServerConfig) -> int:
    began = time.perf_counter()
    with bind(config.host, config.port) as listener:
        port = listener.getsockname()[1]
        startup.say(f"Tandem {__version__}: loading {engine_config.model.model}")
        if config.host not in ("127.0.0.1", "localhost", "::1") and not config.api_key:
            startup.say(f"Warning: {config.host} is open to the network and there is no --api-key: anybody may use it.")
        engine, tokenizer = await _load(engine_config, config)
        try:
            from tandem.api.app import build_app

            app = build_app(engine, tokenizer, config, lora_root=engine_config.adapters.lora_root)
            server = _http_server(app, config)
            for line in startup.ready_lines(engine.report, config, port, time.perf_counter() - began):
                startup.say(line)
            return await _run_until_stopped(server, listener, engine, config)
        finally:
            await engine.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, taken before anything slow happens. ConfigError says what is wrong with the address."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {error}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; try another --port (0: any free one)") from error
    listener.setblocking(False)
    return listener


async def _load(engine_config: EngineConfig, config: ServerConfig) -> tuple[Any, Any]:
    """The engine process and the tokenizer, started side by side. If one fails the other is stopped."""
    from tandem.engine.client import EngineClient

    starting = asyncio.create_task(EngineClient.start(engine_config, on_line=startup.say))
    tokenizing = asyncio.create_task(asyncio.to_thread(_load_tokenizer, engine_config, config))
    try:
        tokenizer = await tokenizing
        return await starting, tokenizer
    except BaseException:
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await (await starting).close()
        raise


def _load_tokenizer(engine_config: EngineConfig, config: ServerConfig) -> Any:
    from tandem.tokenizer import Tokenizer

    model = engine_config.model
    return Tokenizer.load(model.tokenizer or model.model, chat_template=config.chat_template)


def _http_server(app: Any, config: ServerConfig) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn without its signal handlers: draining and exit codes are decided here."""

        def capture_signals(self) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

    return Server(
        uvicorn.Config(
            app, log_level=config.uvicorn_log_level, root_path=config.root_path, access_log=False,
            timeout_graceful_shutdown=int(GRACE_S), server_header=False,
        )  # fmt: skip
    )


async def _run_until_stopped(server: Any, listener: socket.socket, engine: Any, config: ServerConfig) -> int:
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            startup.say(f"Stopping: finishing running requests for up to {GRACE_S:.0f} s (again to stop at once).")
        server.should_exit = True
        server.force_exit = len(received) > 1

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    watch = asyncio.create_task(_watch(server, engine))
    stats = None if config.disable_log_stats else asyncio.create_task(startup.print_stats(engine, STATS_PERIOD_S))
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in filter(None, (watch, stats)):
            task.cancel()
    if engine.dead:
        return 1
    return 130 if received and received[0] == signal.SIGINT else 0


async def _watch(server: Any, engine: Any) -> None:
    """End the server soon after the engine process has ended: its requests get their errors, then it is over."""
    reason = await engine.wait_dead()
    startup.say(f"The engine process ended: {reason}. Stopping the server.")
    server.config.timeout_graceful_shutdown = DEATH_GRACE_S
    server.should_exit = True
    await asyncio.sleep(DEATH_GRACE_S)
    server.force_exit = True
