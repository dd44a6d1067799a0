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
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tandem import __version__
from tandem.cli import options, startup
from tandem.config import DEMO_MODEL, EngineConfig, ServerConfig
from tandem.errors import ConfigError

if TYPE_CHECKING:
    import uvicorn

    from tandem.engine.client import EngineClient
    from tandem.tokenizer import Tokenizer

GRACE_S = 10
DEATH_GRACE_S = 1
INTERRUPTED = 130
STATS_PERIOD_S = 10.0


def parser(prog: str) -> options.Parser:
    """All options of the engine and the server."""
    made = options.Parser(prog=prog, description="Serve a model over the OpenAI API.")
    add_model(made)
    options.add_config_file(made)
    options.add(made, EngineConfig, ServerConfig, skip=("model",))
    return made


def run(namespace: argparse.Namespace) -> int:
    """Serve until a signal or the engine's death. 0 after SIGTERM, 130 after Ctrl-C, 1 after the engine's death."""
    one_model(namespace)
    engine_config, server_config = options.resolve(namespace, EngineConfig, ServerConfig)
    check_names(engine_config, server_config)
    return asyncio.run(_serve(engine_config, server_config))


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL, --model MODEL and --demo: three spellings of one option, folded by `one_model`."""
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL",
                        help="Hugging Face directory or hub id (default: demo, the embedded model)")  # fmt: skip
    parser.add_argument("--model", dest="model_flag", default=argparse.SUPPRESS, metavar="MODEL", help="the same")
    parser.add_argument("--demo", action="store_true", help="use the embedded model")


def one_model(namespace: argparse.Namespace) -> None:
    """Fold MODEL, --model and --demo into `namespace.model`; UsageError where they contradict each other."""
    given = {getattr(namespace, name) for name in ("model", "model_flag") if hasattr(namespace, name)}
    if namespace.demo:
        given.add("demo")
    if len(given) > 1:
        raise options.UsageError(f"one model at a time, not {' and '.join(sorted(given))}")
    if given:
        namespace.model = given.pop()


def check_names(engine_config: EngineConfig, config: ServerConfig) -> None:
    """Raise ConfigError where a name would stand for two models; what the base was loaded from is a name of it too."""
    model, served = engine_config.model.model, config.served_model_name
    adapters = [module.partition("=")[0] for module in engine_config.adapters.lora_modules]
    for flag, names in (("--served-model-name", served), ("--lora-modules", adapters)):
        if "" in names:
            raise ConfigError(f"{flag} has an empty name")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{flag} names {', '.join(twice)} twice: choose different names")
    if both := sorted({model, *served} & set(adapters)):
        raise ConfigError(f"--lora-modules {', '.join(both)}: that is the base model's name, choose another")


async def _serve(engine_config: EngineConfig, config: ServerConfig) -> int:
    began = time.perf_counter()
    with bind(config.host, config.port) as listener:
        startup.say(f"Tandem {__version__}: loading {engine_config.model.model}")
        if config.host not in ("127.0.0.1", "localhost", "::1") and not config.api_key:
            startup.say(f"Warning: {config.host} is open to the network and there is no --api-key: anybody may use it.")
        door = FrontDoor()
        server = _http_server(door, config)
        received = _on_signals(server, door, asyncio.current_task())
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            engine, tokenizer = await _load(engine_config, config)
            try:
                await _open(door, engine, tokenizer, engine_config, config)
                port = listener.getsockname()[1]
                for line in startup.ready_lines(engine.report, config, port, time.perf_counter() - began):
                    startup.say(line)
                await _attend(server, serving, engine, config)
            finally:
                died = engine.dead is not None
                await engine.close()
        except asyncio.CancelledError:
            # A signal during start-up; later ones drain the server and do not come here.
            if not received:
                raise
            return 128 + received[0]
        finally:
            server.should_exit = server.force_exit = True
            await serving
    if died:
        return 1
    return INTERRUPTED if received and received[0] == signal.SIGINT else 0


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


class FrontDoor:
    """The ASGI app of the whole life: while the engine loads it answers probes and lets everything else wait."""

    def __init__(self) -> None:
        self._app: Any = None
        self._opened = asyncio.Event()

    @property
    def is_open(self) -> bool:
        return self._opened.is_set()

    def open(self, app: Any) -> None:
        """Let everybody through to `app`."""
        self._app = app
        self._opened.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self.is_open and scope.get("path") in ("/health", "/ready"):
            status = 200 if scope["path"] == "/health" else 503
            headers = [(b"content-length", b"0"), (b"retry-after", b"1")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return
        await self._opened.wait()
        await self._app(scope, receive, send)


async def _load(engine_config: EngineConfig, config: ServerConfig) -> tuple[EngineClient, Tokenizer]:
    """The engine process and the tokenizer, started side by side. If one fails the other is stopped.

    Both verdicts are awaited: of a model that does not exist, the engine's complaint is the one to show.
    """
    from tandem.engine.client import EngineClient

    with startup.loading_bar() as advance:
        starting = asyncio.create_task(EngineClient.start(engine_config, advance))
        tokenizing = asyncio.create_task(asyncio.to_thread(_load_tokenizer, engine_config, config))
        try:
            await asyncio.wait((starting, tokenizing))
            return starting.result(), tokenizing.result()
        except BaseException:
            starting.cancel()
            tokenizing.cancel()
            engine, _ = await asyncio.gather(starting, tokenizing, return_exceptions=True)
            if isinstance(engine, EngineClient):
                await engine.close()
            raise


def _load_tokenizer(engine_config: EngineConfig, config: ServerConfig) -> Tokenizer:
    # Imported here because this thread has the time: what the routes need takes as long as a small model's weights.
    import tandem.api.app  # noqa: F401
    from tandem.tokenizer import Tokenizer

    model = engine_config.model
    name = model.tokenizer or model.model
    path = str(DEMO_MODEL) if name == "demo" else name
    revision = model.revision if name == model.model else None
    return Tokenizer.load(path, chat_template=config.chat_template, revision=revision)


async def _open(
    door: FrontDoor, engine: EngineClient, tokenizer: Tokenizer, engine_config: EngineConfig, config: ServerConfig
) -> None:
    from tandem.api.app import build_app

    adapters = engine_config.adapters
    door.open(build_app(engine, tokenizer, config, lora_root=adapters.lora_root, max_loras=adapters.max_loras))


def _http_server(door: FrontDoor, config: ServerConfig) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn without its signal handlers: draining and exit codes are decided here."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Server(
        uvicorn.Config(
            door,
            log_level=config.uvicorn_log_level,
            root_path=config.root_path,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=GRACE_S,
            server_header=False,
        )  # fmt: skip
    )


def _on_signals(server: uvicorn.Server, door: FrontDoor, loading: asyncio.Task[Any] | None) -> list[int]:
    """The first signal drains the server, or ends the loading; the next one kills. Returns the list they go to."""
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        server.should_exit = True
        server.force_exit = len(received) > 1
        if not door.is_open and loading:
            loading.cancel()
        elif len(received) == 1:
            startup.say(f"Stopping: finishing running requests for up to {GRACE_S} s (again to stop at once).")

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    return received


async def _attend(
    server: uvicorn.Server, serving: asyncio.Task[None], engine: EngineClient, config: ServerConfig
) -> None:
    """Until the server has stopped: print figures, and stop it when the engine dies."""
    tasks = [asyncio.create_task(_watch(server, engine))]
    if not config.disable_log_stats:
        tasks.append(asyncio.create_task(startup.print_stats(engine, STATS_PERIOD_S)))
    try:
        await serving
    finally:
        for task in tasks:
            task.cancel()


async def _watch(server: uvicorn.Server, engine: EngineClient) -> None:
    """End the server soon after the engine process has ended: its requests get their errors, then it is over."""
    startup.say(f"The engine is gone ({await engine.wait_dead()}): stopping the server.")
    server.config.timeout_graceful_shutdown = DEATH_GRACE_S
    server.should_exit = True
    await asyncio.sleep(DEATH_GRACE_S)
    server.force_exit = True
