"""What `tandem serve` prints: a bar while weights load, lines when ready, one every few seconds of traffic."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tandem.config import JobsConfig, ServerConfig
from tandem.work import EngineReport, EngineStats

if TYPE_CHECKING:
    from tandem.jobs.records import Job
    from tandem.jobs.service import Jobs

log = logging.getLogger("tandem.cli")
PAGE = 1000


def say(line: str) -> None:
    """One line on standard output, at once, also when it goes to a file or a pipe."""
    print(line, flush=True)


def size(num_bytes: float) -> str:
    """1234567 -> '1.2 MB' (decimal units)."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"


def ready_lines(report: EngineReport, config: ServerConfig, port: int, seconds: float, jobs: JobsConfig) -> list[str]:
    """What the engine is and how to reach it, ending with lines to paste into a shell. Never prints the API
    key, nor the password of a database."""
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    tokens = report.num_blocks * report.block_size
    name = config.served_model_name[0] if config.served_model_name else report.model
    key = "your-api-key" if config.api_key else "none"
    auth = ' -H "Authorization: Bearer $OPENAI_API_KEY"' if config.api_key else ""
    message = f'{{"model":"{name}","messages":[{{"role":"user","content":"Hello!"}}]}}'
    invariance = "" if report.batch_invariant else ", text may depend on the batch"
    lines = [
        f"Model    {report.architecture}, {report.num_parameters / 1e6:,.1f} M parameters, {report.dtype}, "
        f"{size(report.weight_bytes)} loaded in {report.load_s:.1f} s",
        f"Device   {report.device}, {report.isa}, {report.num_threads} threads{invariance}; "
        f"calibration {report.calibration}",
        f"Kernels  {report.kernels}",
        f"KV cache {report.num_blocks:,} blocks x {report.block_size} = {tokens:,} tokens ({size(report.kv_bytes)}); "
        f"context {report.max_model_len:,}: {tokens / report.max_model_len:.1f} full ones, "
        f"{report.max_num_seqs} sequences at most",
        f"Adapters {', '.join(report.adapter_names)}",
        f"State    {jobs.state_dir}; database {database(jobs.database_url)}",
        f"Ready    after {seconds:.1f} s: {url}/v1 (docs: {url}/docs, metrics: {url}/metrics)",
        f"export OPENAI_BASE_URL={url}/v1",
        f"export OPENAI_API_KEY={key}",
        f"export TINKER_BASE_URL={url} TINKER_API_KEY=tml-{key}",
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{auth} -d '{message}'",
    ]
    return [line for line in lines if line.split(maxsplit=1)[1:]]


@contextlib.contextmanager
def loading_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar for `advance(done, total)` on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("weights", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def database(url: str | None) -> str:
    """What to call the database on a screen: its URL without password and parameters."""
    if url is None:
        return "SQLite, in there"
    parts = urlsplit(url)
    user = f"{parts.username}@" if parts.username else ""
    return f"{parts.scheme}://{user}{parts.netloc.rpartition('@')[2]}{parts.path}"


async def print_stats(engine: Any, period_s: float, jobs: Jobs, stopping: asyncio.Event) -> None:
    """One line every `period_s` seconds while tokens flow or requests are open, until `stopping`."""
    before, then = engine.stats, time.monotonic()
    while not stopping.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), period_s)
            return
        stats, now = engine.stats, time.monotonic()
        training = await _training(jobs, stopping) if stats.train_tokens > before.train_tokens else []
        line = stats_line(before, stats, now - then, training)
        if line:
            say(line)
        before, then = stats, now


async def _training(jobs: Jobs, stopping: asyncio.Event) -> list[str]:
    """A few words on each running job. A database that refuses costs only those."""
    try:
        return [job_words(job, await _newest_metrics(jobs, job)) for job in await _running(jobs)]
    except Exception:
        if not stopping.is_set():
            log.exception("cannot read the running jobs for the periodic line")
        return []


async def _running(jobs: Jobs) -> list[Job]:
    running: list[Job] = []
    after, has_more = None, True
    while has_more:
        page, has_more = await jobs.jobs(after, PAGE, None)
        running += [job for job in page if job.status == "running"]
        after = page[-1].job_id if page else None
    return running


async def _newest_metrics(jobs: Jobs, job: Job) -> dict[str, Any]:
    events, _ = await jobs.events(job.job_id, None, 10)
    return next((event.data for event in events if event.type == "metrics" and event.data), {})


def job_words(job: Job, metrics: dict[str, Any]) -> str:
    """'job=ftjob-x step 40/200 loss 1.83 310 tok/s', with as much of it as is known."""
    words = [f"job={job.job_id} step {job.step}/{job.total_steps}"]
    if (loss := metrics.get("train_loss")) is not None:
        words.append(f"loss {loss:.2f}")
    if (speed := metrics.get("tokens_per_s")) is not None:
        words.append(f"{speed:.0f} tok/s")
    return " ".join(words)


def stats_line(before: EngineStats, stats: EngineStats, seconds: float, training: Sequence[str] = ()) -> str | None:
    """What happened between two readings of the engine's counters; None when nothing did. `training`: the jobs."""
    prompt = stats.prompt_tokens - before.prompt_tokens
    generated = stats.generation_tokens - before.generation_tokens
    trained = stats.train_tokens - before.train_tokens
    if not (prompt or generated or trained or stats.num_running or stats.num_waiting):
        return None
    queries = stats.prefix_queries - before.prefix_queries
    hit_rate = (stats.prefix_hits - before.prefix_hits) / queries if queries else 0.0
    return (
        f"Avg prompt throughput: {prompt / seconds:.1f} tokens/s, "
        f"Avg generation throughput: {generated / seconds:.1f} tokens/s, "
        f"Running: {stats.num_running} reqs, Waiting: {stats.num_waiting} reqs, "
        f"KV cache usage: {100 * stats.blocks_used / max(stats.blocks_total, 1):.1f}%, "
        f"Prefix cache hit rate: {100 * hit_rate:.1f}%" + "".join(f", train: {words}" for words in training)
    )
