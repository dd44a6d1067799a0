"""`tandem train` without a server: an engine and a job store of its own, one job, and the adapter in a directory.

What is in that directory is in `train_output.py`; how training goes is the business of `jobs/` and `engine/`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import signal
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from tandem.cli import follow, options, startup
from tandem.cli.train import Task, ended_badly
from tandem.cli.train_output import METRICS_FILE, Output, digest
from tandem.config import DEMO_MODEL, EngineConfig, JobsConfig
from tandem.errors import ConfigError, EngineDead, TandemError
from tandem.finetune import graders
from tandem.jobs.adapters import read_shape
from tandem.jobs.recipe import check
from tandem.jobs.records import Job, JobRequest, TandemExtras

if TYPE_CHECKING:
    from tandem.engine.client import EngineClient
    from tandem.jobs.records import Event
    from tandem.jobs.service import Jobs
    from tandem.tokenizer import Tokenizer

START_NAME = "start"
CHUNK_BYTES = 2**20
MAX_FILE_BYTES = 2**40
TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Run:
    """One call of the verb, its paths absolute. `request` names no files yet."""

    engine: EngineConfig
    task: Task
    request: JobRequest
    data: Path
    validation: Path | None
    init_from: Path | None
    output: Output


def run(
    engine: EngineConfig, task: Task, extras: dict[str, Any], hyperparameters: dict[str, Any],
    grader: dict[str, Any] | None,
) -> int:  # fmt: skip
    """Train to the end, or until a signal: then what is done so far waits in the output directory for the same command.

    Raises ConfigError, ModelError, BudgetError or InvalidRequest for what cannot be trained, TandemError where the job
    fails; checkpoints that it made are in the output directory then.
    """
    assert task.data is not None
    data, validation, init_from = _path(task.data), task.validation and _path(task.validation), None
    shape: dict[str, Any] = {}
    if task.init_from is not None:
        init_from = _path(task.init_from)
        shape = dataclasses.asdict(read_shape(init_from))
    request = JobRequest(
        model=engine.model.model, training_file="", suffix=task.suffix, seed=engine.model.seed,
        tandem=msgspec.convert(shape | extras, TandemExtras), method=task.method, grader=grader, **hyperparameters,
    )  # fmt: skip
    check(request)
    signature = {
        **_plain(request, "seed", "suffix", "n_epochs", "batch_size"),
        **({} if task.method == "supervised" else _plain(request, "method", "beta", "grader", "eval_interval")),
        **_plain(request.tandem),
        **_plain(engine.model, "model", "revision", "tokenizer", "dtype", "max_model_len"),
        **_plain(task, "init_from", "chat_template"),
        "data": digest(data),
        "validation": validation and digest(validation),
    }
    output = Output(_path(task.output or f"tandem-{task.suffix or data.stem}"), signature)
    with output.opened():
        if output.has_job:
            options.note(f"Going on with the interrupted run in {output.path}")
        return asyncio.run(_until_signal(Run(engine, task, request, data, validation or None, init_from, output)))


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _plain(record: Any, *names: str) -> dict[str, Any]:
    """The fields `names` (none: all) of a record as JSON gives them back."""
    fields = json.loads(msgspec.json.encode(record))
    return {name: fields[name] for name in names or fields}


async def _until_signal(this: Run) -> int:
    """Ctrl-C and SIGTERM cancel the run, which saves its progress on the way out."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    received: list[int] = []
    assert task is not None

    def stop() -> None:
        received.append(signal.SIGTERM)
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop)
    try:
        job = await _train(this)
    except asyncio.CancelledError:
        if this.output.has_job:
            options.note(f"\nStopped; the same command goes on from the progress saved in {this.output.path}")
        if received:
            return TERMINATED
        raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
    left = this.output.finish()
    if job.status != "succeeded":
        raise TandemError(ended_badly(job.status, job.error) + (f"; {this.output.path} has {left}" if left else ""))
    print("\n".join(_summary(this, job)))
    return 0


async def _train(this: Run) -> Job:
    """The job as it ended; all that is worth keeping is in the output directory then."""
    from tandem.jobs.service import Jobs

    async with _engine(this) as (engine, tokenizer):
        config = JobsConfig(
            state_dir=str(this.output.state), max_running_jobs=1, max_file_bytes=MAX_FILE_BYTES,
            grader_hosts=_hosts(this.request),
        )  # fmt: skip
        jobs = await Jobs.open(config, engine, tokenizer, [this.request.model])
        try:
            job_id = await _job(jobs, this)
            with follow.display() as show:
                await _alive(engine, follow.follow(_source(jobs, job_id), show))
            await this.output.keep(jobs, job_id)
            return await jobs.job(job_id)
        finally:
            await jobs.close()


def _hosts(request: JobRequest) -> list[str]:
    """Whom the grader asks: whoever gives the command may allow it."""
    leaves = graders.leaves(graders.parse(request.grader)).values() if request.grader else ()
    return [urlsplit(leaf.url).hostname or "" for leaf in leaves if isinstance(leaf, graders.Endpoint)]


@contextlib.asynccontextmanager
async def _engine(this: Run) -> AsyncIterator[tuple[EngineClient, Tokenizer]]:
    from tandem.engine.client import EngineClient
    from tandem.tokenizer import Tokenizer

    model = this.engine.model
    name = model.tokenizer or model.model
    revision = model.revision if name == model.model else None
    path = str(DEMO_MODEL) if name == "demo" else name
    with startup.loading_bar() as advance:
        engine = await EngineClient.start(this.engine, advance)
    try:
        report = engine.report
        startup.say(
            f"Model    {report.architecture}, {report.num_parameters / 1e6:,.1f} M parameters, {report.dtype}, "
            f"on {report.device} with {report.num_threads} threads"
        )
        yield engine, await asyncio.to_thread(Tokenizer.load, path, this.task.chat_template, revision)
    finally:
        await engine.close()


async def _job(jobs: Jobs, this: Run) -> str:
    """The interrupted run's job, which the store has taken up again by itself; else a new one."""
    if this.output.has_job:
        (job,), _ = await jobs.jobs()
        return job.job_id
    request = this.request
    if this.init_from is not None:
        await jobs.import_adapter(START_NAME, this.init_from)
        request = msgspec.structs.replace(request, model=START_NAME)
    training = await jobs.save_file(this.data.name, "fine-tune", _chunks(this.data), None)
    request = msgspec.structs.replace(request, training_file=training.file_id)
    if this.validation is not None:
        validation = await jobs.save_file(this.validation.name, "fine-tune", _chunks(this.validation), None)
        request = msgspec.structs.replace(request, validation_file=validation.file_id)
    job = await jobs.create(request)
    await asyncio.to_thread(this.output.remember)
    return job.job_id


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    try:
        with path.open("rb") as stream:
            while chunk := await asyncio.to_thread(stream.read, CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _source(jobs: Jobs, job_id: str) -> follow.Source:
    async def status() -> str:
        return (await jobs.job(job_id)).status

    async def page(after: str | None) -> tuple[list[Event], bool]:
        return await jobs.events(job_id, after, 100)

    return follow.Source(status, page)


async def _alive(engine: EngineClient, work: Awaitable[Any]) -> None:
    """Await `work` unless the engine dies first."""
    working, dying = asyncio.ensure_future(work), asyncio.ensure_future(engine.wait_dead())
    try:
        await asyncio.wait((working, dying), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise EngineDead(f"{dying.result()}; the same command goes on from the last saved progress")
        working.result()
    finally:
        working.cancel()
        dying.cancel()
        await asyncio.gather(working, dying, return_exceptions=True)


def _summary(this: Run, job: Job) -> list[str]:
    base, output = this.request.model, this.output.path
    name = this.task.suffix or output.name
    return [
        f"Adapter  {output} (rank {job.tandem.rank}), {job.trained_tokens or 0:,} tokens trained on "
        f"in {job.total_steps} steps; figures of each in {METRICS_FILE}",
        f"Serve    tandem serve {base} --lora-modules {name}={output}",
        f"Try it   tandem chat --model-name {name}",
        f"Merge    tandem adapters merge {output} --model {base} --output {output}-merged",
    ]
