"""How long attention takes on this CPU: own kernels beside torch, and what a shared prefix saves.

    python bench/attention.py                      one layer of a 1B-shaped model: decode, prefill, training
    python bench/attention.py --model DIRECTORY    whole decode steps of 16 requests with a common prefix, and without

Medians of --repeats runs; give it an idle machine. Keys and values lie in scattered blocks, as in a server that has
run for a while.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tandem import ops
from tandem.config import AdapterConfig, CacheConfig, ModelConfig, SchedulerConfig, TrainingConfig
from tandem.engine.sampler import Draw
from tandem.engine.worker import RowInput, Worker
from tandem.memory import arena
from tandem.ops.attention import Chunk, Layout, Span
from tandem.ops.kv_cache import FORMATS, QuantizedCache
from tandem.work import SamplingParams, Segment, StepPlan

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 64, 16
PREFIXES = (1024, 2048, 4096, 7168)
TAIL = 64  # own tokens of each request behind the prefix


def median_ms(function: Callable[[], object], repeats: int) -> float:
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3


def layout_of(parts: Sequence[tuple[int, int, Sequence[int]]]) -> Layout:
    """Sequences of (start, tokens, blocks): all of one token, or one of many."""
    spans = [range(start, start + length) for start, length, _ in parts]
    tables = [table for _, _, table in parts]
    slots = [t[p // BLOCK] * BLOCK + p % BLOCK for t, span in zip(tables, spans, strict=True) for p in span]
    singles = [(start + 1, table) for start, length, table in parts if length == 1]
    chunks = [
        Chunk(0, length, start + length, torch.tensor(table)) for start, length, table in parts if length > 1
    ]
    return Layout(
        torch.tensor([p for span in spans for p in span]),
        torch.tensor(slots),
        torch.tensor([table for _, table in singles], dtype=torch.int64).view(len(singles), len(tables[0])),
        torch.tensor([context for context, _ in singles], dtype=torch.int64),
        tuple(chunks),
    )


def random_rows(rows: int, heads: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(rows, heads, HEAD_DIM)).bfloat16()


def paged(repeats: int, isa: str) -> None:
    """One layer over a paged cache, every format."""
    num_blocks = 4200
    free = list(range(1, num_blocks))
    random.Random(0).shuffle(free)
    caches: dict[str, Tensor | QuantizedCache] = {}
    for name in ("auto", *FORMATS):
        bits = FORMATS.get(name, 0)
        kv = arena.allocate_kv(
            1, num_blocks, BLOCK, KV_HEADS, HEAD_DIM, torch.bfloat16, torch.device("cpu"), bits
        )[0]  # fmt: skip
        caches[name] = QuantizedCache(kv[0].fill_(1), bits, BLOCK, HEAD_DIM) if bits else kv.normal_()
    own, plain = ops.load("cpu", torch.bfloat16, isa), ops.load("cpu", torch.bfloat16, "torch")
    print(f"{'ms for one layer':>24} {'torch':>9} {'own':>9} {'int8':>9} {'int4':>9}   {own.name}")
    shapes = [(batch, context - 1, 1) for batch in (1, 16, 32) for context in (64, 512, 2048)]
    for batch, start, length in [*shapes, (1, 0, 512), (1, 3584, 512), (1, 0, 4000)]:
        needed = -(-(start + length) // BLOCK)
        layout = layout_of([(start, length, free[i * needed : (i + 1) * needed]) for i in range(batch)])
        rows = batch * length
        q, k, v = random_rows(rows, HEADS), random_rows(rows, KV_HEADS), random_rows(rows, KV_HEADS)
        times = []
        for kernels, cache in ((plain, caches["auto"]), *((own, c) for c in caches.values())):
            reads = kernels.prepare_attention(layout, cache, None, HEADS // KV_HEADS)
            call = lambda: kernels.attention(q, k, v, cache, layout, scale=0.125, reads=reads)  # noqa: B023, E731
            times.append(median_ms(call, repeats))
        name = f"decode {batch} x {start + 1}" if length == 1 else f"prefill {length} after {start}"
        print(f"{name:>24} " + " ".join(f"{t:9.3f}" for t in times))


def training(repeats: int, isa: str) -> None:
    """One layer without a cache, forward and backward."""
    print(f"{'ms for one layer':>24} {'torch':>9} {'':>9} {'own':>9}\n{'':>24} {'forward':>9} {'backward':>9} "
          f"{'forward':>9} {'backward':>9}")  # fmt: skip
    for lengths, earlier in (([512], 0), ([512], 512), ([128] * 4, 0), ([300, 150, 62], 0)):
        rows, spans, at = sum(lengths), [], 0
        for i, length in enumerate(lengths):
            spans.append(Span(at, at + length, at + (earlier if i else 0), at + length + earlier))
            at += length
        shapes = ((rows, HEADS), (rows + earlier, KV_HEADS), (rows + earlier, KV_HEADS))
        leaves = [random_rows(*shape).requires_grad_() for shape in shapes]
        grad, times = random_rows(rows, HEADS), []
        for kernels in (ops.load("cpu", torch.bfloat16, "torch"), ops.load("cpu", torch.bfloat16, isa)):
            attend = lambda: kernels.causal_attention(*leaves, spans, scale=0.125, window=None, softcap=None)  # noqa: B023, E731
            out = attend()
            times.append(median_ms(attend, repeats))
            times.append(median_ms(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), repeats))  # noqa: B023
        name = "+".join(map(str, lengths)) + (f" after {earlier}" if earlier else "")
        print(f"{name:>24} " + " ".join(f"{t:9.2f}" for t in times))


def steps(model: str, repeats: int, isa: str, kv_cache_dtype: str, batch: int) -> None:
    """Whole decode steps: every request has `prefix` tokens in common with the others, or of its own."""
    worker = Worker(
        ModelConfig(model=model, cpu_isa=isa),
        CacheConfig(kv_cache_dtype=kv_cache_dtype, num_blocks=batch * (PREFIXES[-1] + TAIL) // BLOCK + 2),
        SchedulerConfig(), AdapterConfig(), TrainingConfig(),
    )  # fmt: skip
    print(f"ms for a decode step of {batch} requests, {worker.kernels.name}\n{'prefix':>8} {'shared':>9} {'apart':>9}")
    first = 0.0
    for prefix in PREFIXES:
        times = []
        for is_shared in (True, False):
            plan, rows = step_of(batch, prefix, is_shared, worker.num_blocks)
            times.append(median_ms(lambda: worker.step(plan, rows), repeats))  # noqa: B023
        first = first or times[0]
        print(f"{prefix:>8} {times[0]:9.1f} {times[1]:9.1f}   {times[0] / first:.2f} x the first")


def step_of(batch: int, prefix: int, is_shared: bool, num_blocks: int) -> tuple[StepPlan, dict[int, RowInput]]:
    free = list(range(1, num_blocks))
    random.Random(0).shuffle(free)
    context, at = prefix + TAIL, 0
    tokens = [5] * context
    draw = Draw(SamplingParams(temperature=0.0), 0, 0, tokens, 1)
    common, at = free[: prefix // BLOCK], prefix // BLOCK
    rows = {}
    for row in range(batch):
        mine = free[at : at + (TAIL if is_shared or not row else context) // BLOCK]
        at += len(mine)
        rows[row] = RowInput(tokens, [*common, *mine] if is_shared or not row else mine, 0, draw)
    return StepPlan(tuple(Segment(row, context - 1, 1, True) for row in range(batch))), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="whole decode steps of this model, instead of one layer's attention")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", *FORMATS))
    parser.add_argument("--cpu-isa", default="auto", choices=("auto", "amx", "avx512", "avx2"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model:
        steps(args.model, args.repeats, args.cpu_isa, args.kv_cache_dtype, args.batch)
        return
    with torch.inference_mode():
        paged(args.repeats, args.cpu_isa)
    training(args.repeats, args.cpu_isa)


if __name__ == "__main__":
    main()
