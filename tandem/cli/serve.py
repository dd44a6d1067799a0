"""`tandem serve`: put the parts together (port, engine process, tokenizer, jobs, HTTP app) and watch over them.

What the HTTP routes do is in `api/`, what the engine does in `engine/`; here is only start, stop and the lines printed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem import __version__
from tandem.cli import options, startup
from tandem.cli.door import FrontDoor, bind
from tandem.config import DEMO_MODEL, EngineConfig, JobsConfig, ServerConfig
from tandem.errors import ConfigError

if TYPE_CHECKING:
    import uvicorn

    from tandem.engine.client import EngineClient
    from tandem.jobs.service import Jobs
    from tandem.tokenizer import Tokenizer

GRACE_S = 10
DEATH_GRACE_S = 1
INTERRUPTED = 130
STATS_PERIOD_S = 10.0


def parser(prog: str) -> options.Parser:
    """All options of the engine and the server."""
    made = options.Parser(prog=prog, description="Serve a model over the OpenAI API, and fine-tune it there.")
    add_model(made)
    options.add_config_file(made)
    options.add(made, EngineConfig, ServerConfig, JobsConfig, skip=("model",))
    return made


def run(namespace: argparse.Namespace) -> int:
    """Serve until a signal or the engine's death. 0 after SIGTERM, 130 after Ctrl-C, 1 after the engine's death."""
    one_model(namespace)
    engine_config, server_config, jobs_config = options.resolve(namespace, EngineConfig, ServerConfig, JobsConfig)
    check_names(engine_config, server_config)
    engine_config = with_spill_dir(engine_config, jobs_config)
    return asyncio.run(_serve(engine_config, server_config, jobs_config))


def with_spill_dir(engine_config: EngineConfig, jobs_config: JobsConfig) -> EngineConfig:
    """Runs that are not in memory go to the state directory's disk, unless somebody says where."""
    training = engine_config.training
    folder = training.train_spill_dir or str(Path(jobs_config.state_dir).expanduser() / "runs")
    return replace(engine_config, training=replace(training, train_spill_dir=folder))


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


async def _serve(engine_config: EngineConfig, config: ServerConfig, jobs_config: JobsConfig) -> int:
    began = time.perf_counter()
    with bind(config.host, config.port) as listener:
        startup.say(f"Tandem {__version__}: loading {engine_config.model.model}")
        if config.host not in ("127.0.0.1", "localhost", "::1") and not config.api_key:
            startup.say(f"Warning: {config.host} is open to the network and there is no --api-key: anybody may use it.")
        door = FrontDoor()
        server = _http_server(door, config)
        signals = _on_signals(server, door, asyncio.current_task())
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            engine, tokenizer = await _load(engine_config, config)
            try:
                async with _training(jobs_config, engine, tokenizer, config, signals) as jobs:
                    await _open(door, engine, tokenizer, engine_config, config, jobs, jobs_config)
                    port = listener.getsockname()[1]
                    seconds = time.perf_counter() - began
                    for line in startup.ready_lines(engine.report, config, port, seconds, jobs_config):
                        startup.say(line)
                    await _attend(server, serving, engine, config, jobs, signals.first)
            finally:
                died = engine.dead is not None
                await engine.close()
        except asyncio.CancelledError:
            # A signal during start-up; later ones drain the server and do not come here.
            if not signals.received:
                raise
            return 128 + signals.received[0]
        finally:
            server.should_exit = server.force_exit = True
            await serving
    if died:
        return 1
    return INTERRUPTED if signals.received and signals.received[0] == signal.SIGINT else 0


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
    import tandem.api.app
    import tandem.jobs.service  # noqa: F401
    from tandem.tokenizer import Tokenizer

    model = engine_config.model
    name = model.tokenizer or model.model
    path = str(DEMO_MODEL) if name == "demo" else name
    revision = model.revision if name == model.model else None
    return Tokenizer.load(path, chat_template=config.chat_template, revision=revision)


@contextlib.asynccontextmanager
async def _training(
    jobs_config: JobsConfig, engine: EngineClient, tokenizer: Tokenizer, config: ServerConfig, signals: Signals
) -> AsyncIterator[Jobs]:
    """The jobs of the state directory. From the first signal on they save where they are, while requests drain.

    A second signal, or the engine's death, leaves them hardly any time: they go on from their last resume point then.
    """
    from tandem.jobs.service import Jobs

    names = dict.fromkeys([*config.served_model_name, engine.report.model])
    jobs = await Jobs.open(jobs_config, engine, tokenizer, list(names))
    closing = asyncio.create_task(_close_at(signals.first, jobs))
    try:
        yield jobs
    finally:
        signals.first.set()
        hurry = asyncio.create_task(signals.second.wait())
        patience_s = DEATH_GRACE_S if engine.dead is not None else GRACE_S
        await asyncio.wait((closing, hurry), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not closing.done():
            startup.say("The jobs could not save in time: they go on from their last resume point at the next start.")
            closing.cancel()
            await asyncio.wait((closing,))
        elif not closing.cancelled():
            closing.result()


async def _close_at(stopping: asyncio.Event, jobs: Jobs) -> None:
    await stopping.wait()
    await jobs.close()


async def _open(
    door: FrontDoor, engine: EngineClient, tokenizer: Tokenizer, engine_config: EngineConfig, config: ServerConfig,
    jobs: Jobs, jobs_config: JobsConfig,
) -> None:  # fmt: skip
    from tandem.api.app import build_app

    adapters = engine_config.adapters
    door.open(build_app(engine, tokenizer, config, adapters.lora_root, adapters.max_loras, jobs, jobs_config))


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


@dataclass
class Signals:
    """Those received so far, and whether there was a first and a second one."""

    received: list[int] = field(default_factory=list)
    first: asyncio.Event = field(default_factory=asyncio.Event)
    second: asyncio.Event = field(default_factory=asyncio.Event)


def _on_signals(server: uvicorn.Server, door: FrontDoor, loading: asyncio.Task[Any] | None) -> Signals:
    """The first signal drains the server, or ends the loading; the next one kills. Returns where they are kept."""
    signals = Signals()

    def stop(number: int) -> None:
        signals.received.append(number)
        (signals.second if signals.first.is_set() else signals.first).set()
        server.should_exit = True
        server.force_exit = len(signals.received) > 1
        if not door.is_open and loading:
            loading.cancel()
        elif len(signals.received) == 1:
            startup.say(
                f"Stopping: finishing running requests and saving jobs for up to {GRACE_S} s (again to stop at once)."
            )

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    return signals


async def _attend(
    server: uvicorn.Server, serving: asyncio.Task[None], engine: EngineClient, config: ServerConfig, jobs: Jobs,
    stopping: asyncio.Event,
) -> None:  # fmt: skip
    """Until the server has stopped: print figures, and stop it when the engine dies."""
    tasks = [asyncio.create_task(_watch(server, engine))]
    if not config.disable_log_stats:
        tasks.append(asyncio.create_task(startup.print_stats(engine, STATS_PERIOD_S, jobs, stopping)))
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
