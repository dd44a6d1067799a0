"""What `tandem serve` prints: a bar while weights load, lines when ready, one every few seconds of traffic."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from tandem.config import ServerConfig
from tandem.work import EngineReport, EngineStats


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


def ready_lines(report: EngineReport, config: ServerConfig, port: int, seconds: float) -> list[str]:
    """What the engine is and how to reach it, ending with lines to paste into a shell. Never prints the API key."""
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
        f"Device   {report.device}, {report.isa}, {report.num_threads} threads{invariance}",
        f"Kernels  {report.kernels}",
        f"KV cache {report.num_blocks:,} blocks x {report.block_size} = {tokens:,} tokens ({size(report.kv_bytes)}); "
        f"context {report.max_model_len:,}: {tokens / report.max_model_len:.1f} full ones, "
        f"{report.max_num_seqs} sequences at most",
        f"Adapters {', '.join(report.adapter_names)}",
        f"Ready    after {seconds:.1f} s: {url}/v1 (docs: {url}/docs, metrics: {url}/metrics)",
        f"export OPENAI_BASE_URL={url}/v1",
        f"export OPENAI_API_KEY={key}",
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


async def print_stats(engine: Any, period_s: float) -> None:
    """One line every `period_s` seconds while tokens flow or requests are open; never returns."""
    before, then = engine.stats, time.monotonic()
    while True:
        await asyncio.sleep(period_s)
        stats, now = engine.stats, time.monotonic()
        line = stats_line(before, stats, now - then)
        if line:
            say(line)
        before, then = stats, now


def stats_line(before: EngineStats, stats: EngineStats, seconds: float) -> str | None:
    """What happened between two readings of the engine's counters; None when nothing did."""
    prompt = stats.prompt_tokens - before.prompt_tokens
    generated = stats.generation_tokens - before.generation_tokens
    if not (prompt or generated or stats.num_running or stats.num_waiting):
        return None
    queries = stats.prefix_queries - before.prefix_queries
    hit_rate = (stats.prefix_hits - before.prefix_hits) / queries if queries else 0.0
    return (
        f"Avg prompt throughput: {prompt / seconds:.1f} tokens/s, "
        f"Avg generation throughput: {generated / seconds:.1f} tokens/s, "
        f"Running: {stats.num_running} reqs, Waiting: {stats.num_waiting} reqs, "
        f"KV cache usage: {100 * stats.blocks_used / max(stats.blocks_total, 1):.1f}%, "
        f"Prefix cache hit rate: {100 * hit_rate:.1f}%"
    )
