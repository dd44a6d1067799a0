"""Several adapters training on one base together, against one after the other: total tokens/s.

    python bench/many_adapters.py --model DIR [--adapters 8] [--lengths 64,32,16] [--batch 1] [--rounds 5]
    python bench/many_adapters.py --model DIR --adapters 200 --resident 16 [--steps 2] [--spill-dir DIR]

Each adapter makes optimiser steps of `--batch` sequences of so many tokens, its own rank, targets, loss and optimizer
as `--mixed` says. Together: a step of every adapter is in the engine's queue at once. The two take turns, and the
median over the rounds of the ratio of their tokens/s is the figure.

With `--resident`: there is room in memory for so many adapters' state, and all of them train their steps, so that most
have to be written to disk and read back; against the same number of steps by as many adapters as there is room for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import psutil

from tandem.config import CacheConfig, EngineConfig, ModelConfig, TrainingConfig
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
    parser.add_argument("--resident", type=int, default=None, help="adapters whose state may be in memory at once")
    parser.add_argument("--spill-dir", default=None, help="directory for the others (default: a temporary one)")
    args = parser.parse_args()
    if args.resident is not None and not 1 <= args.resident <= args.adapters:
        parser.error("--resident must be 1 to the number of --adapters")
    config = EngineConfig(
        model=ModelConfig(model=args.model, dtype=args.dtype, num_threads=args.threads),
        cache=CacheConfig(num_blocks=64),
        training=TrainingConfig(
            max_resident_runs=args.resident or args.adapters, train_resident_bytes=2**60, train_spill_dir=args.spill_dir
        ),
    )
    os.environ.update(client.environment(config))
    trainees = Trainees(config, args)
    try:
        lengths = list(map(int, args.lengths.split(",")))
        compare = spilled_against_resident if args.resident else together_against_turns
        figures = {length: compare(trainees, args, length) for length in lengths}
        print(json.dumps({"asked": vars(args), "by_length": figures}, indent=1))
    finally:
        trainees.engine.close()


class Trainees:
    """An engine and its runs. `longest_s` is that of the steps since it was last reset."""

    def __init__(self, config: EngineConfig, args: argparse.Namespace) -> None:
        from tandem.engine.engine import Engine
        from tandem.work import LoraConfig

        self.engine = Engine(config)
        self.args = args
        self.longest_s = 0.0
        self._rng = random.Random(0)
        for i in range(args.adapters):
            shape = {"rank": args.rank >> i % 3, "target_modules": TARGETS[i % len(TARGETS)]} if args.mixed else {}
            lora = LoraConfig(**({"rank": args.rank, "alpha": 2.0 * args.rank, "seed": i} | shape))
            self.engine.open_run(f"run-{i}", lora)

    def enqueue(self, i: int, length: int) -> list[int]:
        """One optimiser step of adapter `i`."""
        from tandem.work import OptimParams, Pass, Update

        mixed, run_id = self.args.mixed, f"run-{i}"
        loss, kind = (LOSSES[i % len(LOSSES)], KINDS[i % len(KINDS)]) if mixed else ("cross_entropy", "adamw")
        batch = [self._example(length) for _ in range(self.args.batch)]
        params = OptimParams(learning_rate=1e-5, kind=kind)
        return [self.engine.enqueue(Pass(run_id, batch, loss=loss)), self.engine.enqueue(Update(run_id, params))]

    def _example(self, length: int) -> Any:
        from tandem.work import Example

        vocab = self.engine.worker.spec.vocab_size
        ids = [self._rng.randrange(3, vocab) for _ in range(length + 1)]
        return Example(ids[:-1], ids[1:], [1.0 / length] * length, [-8.0] * length, [1.0] * length)

    def finish(self, ids: Sequence[int]) -> None:
        """Step until these operations are done."""
        from tandem.errors import TandemError

        left = set(ids)
        while left:
            start = time.perf_counter()
            if self.engine.has_work:
                self.engine.step()
                self.longest_s = max(self.longest_s, time.perf_counter() - start)
            else:
                self.engine.training.wait()
            for op_id, report in self.engine.take_reports():
                if isinstance(report, TandemError):
                    raise report
                left.discard(op_id)

    def seconds(self, groups: Iterable[Sequence[int]], length: int) -> float:
        """How long it takes when the steps of each group of adapters are in the queue at once."""
        start = time.perf_counter()
        for group in groups:
            self.finish([op_id for i in group for op_id in self.enqueue(i, length)])
        return time.perf_counter() - start


def together_against_turns(trainees: Trainees, args: argparse.Namespace, length: int) -> dict[str, float]:
    """All adapters' steps at once, and one by one."""
    everybody = range(args.adapters)
    together = [everybody] * args.steps
    in_turns = [[i] for _ in range(args.steps) for i in everybody]
    tokens = args.adapters * args.steps * args.batch * length
    for groups in (together, in_turns):  # shapes are seen for the first time
        trainees.seconds(groups[: max(1, len(groups) // args.steps)], length)
    pairs = [
        (tokens / trainees.seconds(together, length), tokens / trainees.seconds(in_turns, length))
        for _ in range(args.rounds)
    ]
    return {
        "together_tokens_per_s": round(statistics.median(t for t, _ in pairs), 1),
        "in_turns_tokens_per_s": round(statistics.median(a for _, a in pairs), 1),
        "ratio": round(statistics.median(t / a for t, a in pairs), 2),
    }


def spilled_against_resident(trainees: Trainees, args: argparse.Namespace, length: int) -> dict[str, float]:
    """All adapters' steps, each adapter's in a row in the queue, and as many steps of those there is room for."""
    steps = [i for i in range(args.adapters) for _ in range(args.steps)]
    resident = sorted(itertools.islice(itertools.cycle(range(args.resident)), len(steps)))
    tokens = len(steps) * args.batch * length
    residency, found = trainees.engine.training.residents, []
    for number in range(args.rounds + 1):
        trainees.finish([op_id for i in range(args.resident) for op_id in trainees.enqueue(i, length)])
        trainees.longest_s = 0.0
        resident_s, resident_step_s = trainees.seconds([resident], length), trainees.longest_s
        moves, trainees.longest_s = residency.num_moves, 0.0
        spilled_s, spilled_step_s = trainees.seconds([steps], length), trainees.longest_s
        if number:  # shapes are seen for the first time in the first one
            found.append((resident_s, spilled_s, resident_step_s, spilled_step_s, residency.num_moves - moves))
    resident_s, spilled_s, resident_step_s, spilled_step_s, num_moves = map(statistics.median, zip(*found, strict=True))
    stats = trainees.engine.refresh_stats()
    return {
        "resident_tokens_per_s": round(tokens / resident_s, 1),
        "spilled_tokens_per_s": round(tokens / spilled_s, 1),
        "ratio": round(statistics.median(r / s for r, s, *_ in found), 2),
        "resident_longest_step_ms": round(1e3 * resident_step_s, 1),
        "spilled_longest_step_ms": round(1e3 * spilled_step_s, 1),
        "moves_of_a_round": num_moves,
        "state_megabytes": round(stats.run_bytes / 1e6, 1),
        "state_of_all_megabytes": round(stats.run_bytes / 1e6 * args.adapters / args.resident, 1),
        "process_megabytes": round(psutil.Process().memory_info().rss / 1e6, 1),
    }


if __name__ == "__main__":
    main()
