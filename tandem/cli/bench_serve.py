"""`tandem bench serve`: requests at a running server as they would come from the world, in an open loop.

What is asked is in `workload.py`, how it is sent and timed in `open_loop.py`, what the times mean in `latency.py`; here
are the options, the run and its report. Flags and result keys are those of `vllm bench serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tandem.cli import client, latency, open_loop, options, workload
from tandem.cli.latency import Trial
from tandem.cli.workload import Arrival
from tandem.config import option
from tandem.errors import ConfigError, TandemError

if TYPE_CHECKING:
    import httpx

# Words whose token ids make up random prompts: any server with /tokenize then gets ids of its own vocabulary.
SAMPLE_TEXT = " ".join(f"{a}{b}" for a in "abcdefghijklmnoprstuvwy" for b in ("a", "an", "er", "ing", "o", "ent"))


@dataclass(frozen=True)
class Target:
    """What is measured."""

    base_url: str = option(client.DEFAULT_SERVER, "the server, without /v1")
    endpoint: str = option("/v1/completions", "route of text completions")
    model: str | None = option(None, "model or adapter (default: the first the server lists)")
    api_key: str | None = option(None, "the server's API key", env="OPENAI_API_KEY")


@dataclass(frozen=True)
class Load:
    """What is asked."""

    dataset_name: str = option("random", "where prompts come from", choices=("random", "sharegpt", "trace"))
    dataset_path: str | None = option(None, "ShareGPT JSON, or a trace as CSV or JSON lines")
    num_prompts: int = option(100, "requests at most", low=1)
    request_rate: float = option(
        math.inf, "requests per second, Poisson (inf: all at once, or as the trace says)", low=1e-9
    )
    max_concurrency: int | None = option(None, "requests open at once; later ones wait on this side", low=1)
    random_input_len: int = option(256, "prompt tokens of the random data set", low=1)
    random_output_len: int = option(64, "tokens to generate of the random data set", low=1)
    random_range_ratio: float = option(0.0, "spread of the random lengths, 0 to 1", low=0.0, high=1.0)
    vocab_size: int = option(0, "draw random token ids below this (default: ids the server's /tokenize gives)", low=0)
    trace_scale: float = option(1.0, "divide a trace's lengths by this", low=1e-9)
    trace_speed: float = option(1.0, "replay a trace this many times as fast", low=1e-9)
    ignore_eos: bool = option(False, "generate the full length whatever the model says")
    temperature: float = option(0.0, "sampling temperature", low=0.0)
    seed: int = option(0, "of prompts and arrival times")
    long_prompt_at: float | None = option(None, "send one long prompt this many seconds in, and report stalls", low=0.0)
    long_prompt_len: int = option(4000, "its tokens", low=1)


@dataclass(frozen=True)
class Output:
    """What is reported."""

    goodput: list[str] = option([], "latency goals in ms of a good request: ttft, tpot, e2el", metavar="METRIC:MS")
    percentile_metrics: str = option("ttft,tpot,itl,e2el", "metrics to print")
    save_result: bool = option(False, "write all figures as JSON")
    result_filename: str = option("bench-serve.json", "where to")
    plot: str | None = option(None, "draw latencies over time into this PNG (needs matplotlib)")


def parser(prog: str) -> options.Parser:
    """Target, load and output."""
    made = options.Parser(prog=prog, description="Measure a running server under open-loop load.")
    options.add(made, Target, Load, Output)
    return made


def run(namespace: argparse.Namespace) -> int:
    """Run, print, save. 1 when nothing at all was answered."""
    target, load, output = options.resolve(namespace, Target, Load, Output)
    goals, metrics = _goals(output.goodput), output.percentile_metrics.split(",")
    if unknown := set(metrics) - latency.METRICS.keys():
        raise options.UsageError(f"--percentile-metrics knows {', '.join(latency.METRICS)}, not {', '.join(unknown)}")
    if output.plot and not importlib.util.find_spec("matplotlib"):
        raise ConfigError("--plot needs matplotlib: pip install 'tandem-llm[bench]', or leave --plot out")
    figures, trials = asyncio.run(_measure(target, load, goals))
    print("\n".join(latency.table(figures, metrics)))
    _print_stall(figures)
    if output.save_result:
        with open(output.result_filename, "w", encoding="utf-8") as stream:
            json.dump({**figures, "trials": [asdict(trial) for trial in trials]}, stream)
    if output.plot:
        from tandem.cli.plot import latencies

        latencies(trials, output.plot)
    return 0 if figures["completed"] else 1


def _goals(pairs: list[str]) -> dict[str, float]:
    """['tpot:50', 'ttft:500'] -> {'tpot': 50.0, 'ttft': 500.0}."""
    goals = {}
    for pair in pairs:
        name, _, limit = pair.partition(":")
        try:
            goals[name] = float(limit)
        except ValueError:
            raise options.UsageError(f"--goodput wants METRIC:MILLISECONDS, not {pair!r}") from None
        if name not in ("ttft", "tpot", "e2el"):
            raise options.UsageError(f"--goodput knows ttft, tpot and e2el, not {name!r}")
    return goals


async def _measure(target: Target, load: Load, goals: dict[str, float]) -> tuple[dict[str, Any], list[Trial]]:
    import httpx

    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=target.base_url, headers=headers, timeout=None, limits=limits) as http:
        model = await _model(http, target)
        body = {"model": model, "temperature": load.temperature, "ignore_eos": load.ignore_eos}
        arrivals, long_prompt = await _arrivals(http, load)
        await open_loop.warm_up(http, target.endpoint, body, arrivals[0])
        rate = "as traced" if load.dataset_name == "trace" and math.isinf(load.request_rate) else load.request_rate
        options.note(f"{len(arrivals)} requests to {model} at {target.base_url}, rate {rate} per second")
        begin = time.perf_counter()
        late_one = open_loop.send_at(http, target.endpoint, body, long_prompt, begin) if long_prompt else None
        stalling = asyncio.create_task(late_one) if late_one else None
        trials = await open_loop.send_all(http, target.endpoint, body, arrivals, load.max_concurrency, begin)
        figures = latency.summarise(trials, time.perf_counter() - begin, goals)
        if stalling and long_prompt:
            late = await stalling
            if not late.completed:
                raise TandemError(f"the long prompt failed: {late.error}")
            figures["long_prompt_len"] = len(long_prompt.prompt)
            figures["long_prompt_ttft_ms"] = late.ttft * 1e3
            figures |= latency.stall(trials, late.sent, late.chunks[0])
    return {"model_id": model, "num_prompts": len(arrivals), "request_rate": str(rate), **figures}, trials


async def _model(http: httpx.AsyncClient, target: Target) -> str:
    import httpx

    try:
        response = await http.get("/v1/models")
    except httpx.TransportError as error:
        raise client.unreachable(target.base_url, error) from error
    if response.status_code != 200:
        raise TandemError(client.failure(response.status_code, response.content))
    return target.model or response.json()["data"][0]["id"]


async def _arrivals(http: httpx.AsyncClient, load: Load) -> tuple[list[Arrival], Arrival | None]:
    """The requests of the run, and the long prompt if one was asked for."""
    if load.dataset_name != "random" and not load.dataset_path:
        raise options.UsageError(f"--dataset-name {load.dataset_name} needs --dataset-path")
    rng = random.Random(load.seed)
    found: list[Arrival] = []
    times = workload.poisson(load.num_prompts, load.request_rate, rng)
    if load.dataset_name == "sharegpt":
        pairs = workload.read_sharegpt(str(load.dataset_path), load.num_prompts, rng)
        lengths = [len(await _tokenize(http, reply)) for _, reply in pairs]
        found = [Arrival(at, text, max(1, n)) for at, (text, _), n in zip(times, pairs, lengths, strict=True)]
        if load.long_prompt_at is None:
            return found, None
    vocabulary = list(range(10, load.vocab_size)) or sorted(set(await _tokenize(http, SAMPLE_TEXT)))
    if load.dataset_name == "random":
        ratio = load.random_range_ratio
        for at in times:
            prompt = workload.random_prompt(workload.varied(load.random_input_len, ratio, rng), vocabulary, rng)
            found.append(Arrival(at, prompt, workload.varied(load.random_output_len, ratio, rng)))
    elif load.dataset_name == "trace":
        shapes = workload.read_trace(str(load.dataset_path), load.num_prompts, load.trace_scale)
        if math.isinf(load.request_rate):
            times = [shape.at_s / load.trace_speed for shape in shapes]
        found = [
            Arrival(at, workload.random_prompt(shape.prompt_len, vocabulary, rng), shape.output_len)
            for at, shape in zip(times, shapes, strict=False)
        ]
    if load.long_prompt_at is None:
        return found, None
    return found, Arrival(load.long_prompt_at, workload.random_prompt(load.long_prompt_len, vocabulary, rng), 4)


async def _tokenize(http: httpx.AsyncClient, text: str) -> list[int]:
    response = await http.post("/tokenize", json={"prompt": text, "add_special_tokens": False})
    if response.status_code != 200:
        raise ConfigError(
            f"the server has no /tokenize ({response.status_code}): use the random or trace data set with --vocab-size"
        )
    return response.json()["tokens"]


def _print_stall(figures: dict[str, Any]) -> None:
    if "long_prompt_len" not in figures:
        return
    ttft_ms = figures["long_prompt_ttft_ms"]
    print(f"Long prompt: {figures['long_prompt_len']} tokens, first token after {ttft_ms:.0f} ms")
    for name in ("before", "during"):
        median, p99, most = (figures[f"{name}_{key}_gap_ms"] for key in ("median", "p99", "max"))
        print(f"  gaps of the streams {name + ' it:':<11} median {median:.1f}  p99 {p99:.1f}  max {most:.1f} ms")
