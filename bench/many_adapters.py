"""Several adapters training on one base together, against one after the other: total tokens/s.

    python bench/many_adapters.py --model DIR [--adapters 8] [--lengths 64,32,16] [--batch 1] [--rounds 5]

Each adapter makes optimiser steps of `--batch` sequences of so many tokens, its own rank, targets, loss and optimizer
as `--mixed` says. Together: a step of every adapter is in the engine's queue at once. The two take turns, and the
median over the rounds of the ratio of their tokens/s is the figure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Sequence

from tandem.config import CacheConfig, EngineConfig, ModelConfig
from tandem.engine import client

LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "cross_entropy", "ppo")
KINDS = ("adamw", "sgd", "lion", "muon", "adafactor", "adamw8bit", "adamw", "adamw")
TARGETS = (("all-linear",), ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ("down_proj",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--lengths", default="64,32,16")
    parser.add_argument("--batch", type=int, default=1, help="sequences in an adapter's step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of each adapter in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mixed", action="store_true", help="ranks, targets, losses and optimizers all different")
    args = parser.parse_args()
    config = EngineConfig(
        model=ModelConfig(model=args.model, dtype=args.dtype, num_threads=args.threads),
        cache=CacheConfig(num_blocks=64),
    )
    os.environ.update(client.environment(config))
    from tandem.engine.engine import Engine
    from tandem.errors import TandemError
    from tandem.work import Example, LoraConfig, OptimParams, Pass, Update

    engine = Engine(config)
    names = [f"run-{i}" for i in range(args.adapters)]
    for i, name in enumerate(names):
        shape = {"rank": args.rank >> i % 3, "target_modules": TARGETS[i % len(TARGETS)]} if args.mixed else {}
        engine.open_run(name, LoraConfig(**({"rank": args.rank, "alpha": 2.0 * args.rank, "seed": i} | shape)))
    vocab, rng = engine.worker.spec.vocab_size, random.Random(0)

    def example(length: int) -> Example:
        ids = [rng.randrange(3, vocab) for _ in range(length + 1)]
        return Example(ids[:-1], ids[1:], [1.0 / length] * length, [-8.0] * length, [1.0] * length)

    def enqueue(i: int, length: int) -> list[int]:
        loss, kind = (LOSSES[i % len(LOSSES)], KINDS[i % len(KINDS)]) if args.mixed else ("cross_entropy", "adamw")
        batch = [example(length) for _ in range(args.batch)]
        params = OptimParams(learning_rate=1e-5, kind=kind)
        return [engine.enqueue(Pass(names[i], batch, loss=loss)), engine.enqueue(Update(names[i], params))]

    def finish(ids: Sequence[int]) -> None:
        left = set(ids)
        while left:
            engine.step()
            for op_id, report in engine.take_reports():
                if isinstance(report, TandemError):
                    raise report
                left.discard(op_id)

    def seconds(length: int, together: bool) -> float:
        start = time.perf_counter()
        for _ in range(args.steps):
            if together:
                finish([op_id for i in range(args.adapters) for op_id in enqueue(i, length)])
            else:
                for i in range(args.adapters):
                    finish(enqueue(i, length))
        return time.perf_counter() - start

    figures = {}
    for length in map(int, args.lengths.split(",")):
        tokens = args.adapters * args.steps * args.batch * length
        for together in (True, False):  # shapes are seen for the first time
            seconds(length, together)
        pairs = [(tokens / seconds(length, True), tokens / seconds(length, False)) for _ in range(args.rounds)]
        figures[length] = {
            "together_tokens_per_s": round(statistics.median(t for t, _ in pairs), 1),
            "in_turns_tokens_per_s": round(statistics.median(a for _, a in pairs), 1),
            "ratio": round(statistics.median(t / a for t, a in pairs), 2),
        }
    print(json.dumps({"asked": vars(args), "by_length": figures}, indent=1))


if __name__ == "__main__":
    main()
