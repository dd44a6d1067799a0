"""What adapters cost a decode step: a batch over many adapters against the same batch on the base model alone.

    python bench/adapters.py --model DIR [--resident 100] [--batch 16] [--rank 8] [--rounds 5]

Random adapters on all seven linears; the two kinds of batch take turns, and the median decode steps are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from collections.abc import Sequence

from tandem.config import AdapterConfig, CacheConfig, EngineConfig, ModelConfig
from tandem.engine import client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--resident", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    config = EngineConfig(
        model=ModelConfig(model=args.model, dtype=args.dtype),
        cache=CacheConfig(enable_prefix_caching=False),
        adapters=AdapterConfig(max_cpu_loras=args.resident),
    )
    os.environ.update(client.environment(config))
    import torch

    from tandem.engine.engine import Engine
    from tandem.model.adapter import AdapterWeights
    from tandem.model.spec import targets
    from tandem.work import Request, SamplingParams

    engine = Engine(config)
    shapes = targets(engine.worker.spec)
    for i in range(args.resident):
        layers = tuple(
            {
                name: (
                    (torch.randn(args.rank, t.in_features) * 0.02).to(engine.worker.dtype),
                    (torch.randn(args.rank, t.out_features) * 0.02).to(engine.worker.dtype),
                )
                for name, t in shapes.items()
            }
            for _ in engine.worker.spec.layers
        )
        engine.load_adapter(f"adapter-{i}", "random", AdapterWeights(args.rank, layers))
    rng = random.Random(0)

    def step_ms(names: Sequence[str | None], tag: str) -> float:
        sampling = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
        for i, name in enumerate(names):
            prompt = [rng.randrange(10, engine.report.vocab_size) for _ in range(64)]
            engine.submit(Request(request_id=f"{tag}-{i}", prompt=prompt, sampling=sampling, adapter=name))
        engine.plan_log.clear()
        for _ in engine.run():
            pass
        alike = [s for p, s, *_ in engine.plan_log if p.num_tokens == len(p.segments) == len(names)]
        return 1e3 * statistics.median(alike)

    rows = []
    for turn in range(args.rounds):
        base = step_ms([None] * args.batch, f"base-{turn}")
        chosen = rng.sample(range(args.resident), args.batch)
        mixed = step_ms([f"adapter-{i}" for i in chosen], f"mixed-{turn}")
        rows.append((base, mixed))
    base, mixed = (statistics.median(column) for column in zip(*rows, strict=True))
    report = engine.report
    figures = {"base_ms": round(base, 1), "adapters_ms": round(mixed, 1), "ratio": round(mixed / base, 3)}
    print(
        json.dumps(
            vars(args) | figures | {"isa": report.isa, "threads": report.num_threads, "load": os.getloadavg()[0]}
        )
    )


if __name__ == "__main__":
    main()
