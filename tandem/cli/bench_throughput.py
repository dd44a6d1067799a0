"""`tandem bench throughput`: the engine alone, in this process, on fixed workloads; no HTTP, no process border.

One JSON line per workload on standard output, with the time the machine's own limits would allow beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tandem.cli import options, serve, workload
from tandem.config import EngineConfig, option

if TYPE_CHECKING:
    from tandem.engine.engine import Engine

# The prompts other engines are measured with draw from this many token ids.
VOCABULARY = 32000
WARM_UP = (1, 16, 4)


@dataclass(frozen=True)
class ThroughputOptions:
    """The measurement."""

    workloads: str = option(
        ",".join("x".join(map(str, w)) for w in workload.OFFLINE), "BATCHxPROMPTxGENERATED, comma separated"
    )
    repeat: int = option(1, "runs of each workload; the median counts", low=1)
    json: str | None = option(None, "append the JSON lines to this file too", metavar="FILE")
    roofline: bool = option(True, "measure the machine's limits first and report the share reached")


@dataclass(frozen=True)
class Limits:
    """What machine and model allow: bytes/s, FLOP/s, and what one token costs."""

    bandwidth: float
    matmul_rate: float
    weight_bytes: int
    kv_bytes_per_token: float
    flops_per_token: float
    flops_per_sample: float

    def seconds(self, batch: int, prompt: int, generated: int) -> float:
        """The shortest time a workload could take: weights read once for all prompts, then once per further token."""
        prompt_s = max(
            self.weight_bytes / self.bandwidth,
            batch * (prompt * self.flops_per_token + self.flops_per_sample) / self.matmul_rate,
        )
        flops = batch * (self.flops_per_token + self.flops_per_sample)
        decode_s = 0.0
        for step in range(generated - 1):
            read = self.weight_bytes + batch * (prompt + step) * self.kv_bytes_per_token
            decode_s += max(read / self.bandwidth, flops / self.matmul_rate)
        return prompt_s + decode_s


def parser(prog: str) -> options.Parser:
    """The engine's options and those of the measurement."""
    made = options.Parser(prog=prog, description="Measure the engine alone, offline.")
    serve.add_model(made)
    options.add_config_file(made)
    options.add(made, ThroughputOptions)
    options.add(made, EngineConfig, skip=("model",))
    return made


def run(namespace: argparse.Namespace) -> int:
    """Measure each workload and print its line."""
    serve.one_model(namespace)
    wanted, config = options.resolve(namespace, ThroughputOptions, EngineConfig)
    workloads = workload.parse_offline(wanted.workloads)
    # The same random prompts come again with --repeat; finding them in the cache is not what is measured.
    config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, enable_prefix_caching=False))
    from tandem.engine import client

    # What the engine's own process would be started with; here it has to be set before torch loads.
    os.environ.update(client.environment(config))
    from tandem.engine.engine import Engine

    engine = Engine(config)
    report = engine.report
    options.note(f"{report.model}: {report.dtype}, {report.isa}, {report.num_threads} threads, {report.kernels}")
    limits = _limits(engine) if wanted.roofline else None
    if limits:
        rates = f"{limits.bandwidth / 1e9:.1f} GB/s, {limits.matmul_rate / 1e9:.0f} GFLOP/s"
        options.note(f"limits measured here: {rates}; weights {limits.weight_bytes / 1e9:.3f} GB")
    _run(engine, *WARM_UP, tag="warm-up")
    for shape in workloads:
        seconds = statistics.median(_run(engine, *shape, tag=f"{shape}-{i}") for i in range(wanted.repeat))
        line = json.dumps(row(*shape, seconds, limits))
        print(line, flush=True)
        if wanted.json:
            with open(wanted.json, "a", encoding="utf-8") as stream:
                stream.write(line + "\n")
    return 0


def row(batch: int, prompt: int, generated: int, seconds: float, limits: Limits | None) -> dict[str, Any]:
    """The figures of one workload; the first seven keys are those every engine's benchmark prints."""
    line: dict[str, Any] = {
        "engine": "tandem", "batch": batch, "prompt": prompt, "generated": generated, "seconds": round(seconds, 3),
        "generated_tokens_per_s": round(batch * generated / seconds, 1),
        "total_tokens_per_s": round(batch * (prompt + generated) / seconds, 1),
    }  # fmt: skip
    if limits:
        ideal = limits.seconds(batch, prompt, generated)
        line |= {"roofline_seconds": round(ideal, 3), "roofline_share": round(ideal / seconds, 3)}
    return line


def _run(engine: Engine, batch: int, prompt: int, generated: int, tag: str) -> float:
    """Seconds from the first submit to the last token."""
    from tandem.work import Request, SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=generated, ignore_eos=True)
    vocabulary = min(VOCABULARY, engine.report.vocab_size)
    requests = [
        Request(request_id=f"{tag}-{i}", prompt=tokens, sampling=sampling)
        for i, tokens in enumerate(workload.prompts(batch, prompt, vocabulary))
    ]
    start = time.perf_counter()
    for request in requests:
        engine.submit(request)
    num = sum(event.token_id is not None for _ in iter(lambda: engine.has_work, False) for event in engine.step())
    seconds = time.perf_counter() - start
    assert num == batch * generated, f"{num} tokens came out, not {batch * generated}"
    return seconds


def _limits(engine: Engine) -> Limits:
    from tandem.ops import roofline

    report, worker = engine.report, engine.worker
    spec = worker.spec
    head = spec.hidden_size * spec.vocab_size
    # Every step multiplies by the head; an embedding table of its own is only looked up.
    looked_up = head if not spec.tie_embeddings else 0
    matmul_params = spec.num_parameters - looked_up
    num_bytes = report.weight_bytes - looked_up * worker.dtype.itemsize
    return Limits(
        bandwidth=roofline.read_bandwidth(min(num_bytes, 2**30), worker.device),
        matmul_rate=roofline.matmul_rate(worker.dtype, worker.device),
        weight_bytes=num_bytes,
        kv_bytes_per_token=report.kv_bytes / (report.num_blocks * report.block_size),
        flops_per_token=2.0 * (matmul_params - head),
        flops_per_sample=2.0 * head,
    )
