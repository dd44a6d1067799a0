"""Fine-tuning without a backward pass: MeZO on the embedded model, its forward passes riding in those of a chat.

Every step asks for the loss at both ends of a random line through the adapter's weights and goes down along it. There
is no gradient, no optimizer state and nothing kept for one; it takes many steps instead, and a model that knows the
task already. Prints the loss on questions that it never trains on, before and after, and how many of the training
tokens rode with requests. Exit code 0 where the loss has fallen.

    python examples/without_gradients.py --steps 300
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from random import Random

from tandem.config import DEMO_MODEL, CacheConfig, EngineConfig, ModelConfig, TrainingConfig
from tandem.engine.engine import Engine
from tandem.errors import TandemError
from tandem.tokenizer import Tokenizer
from tandem.work import Example, LoraConfig, OptimParams, Probe, Request, SamplingParams

RUN = "mezo"
BATCH, HELD_OUT = 16, 64
LORA = LoraConfig(rank=4, alpha=16.0, target_modules=("q_proj", "v_proj"))
RATE, RADIUS = 5e-3, 1e-2


def questions(tokenizer: Tokenizer, rng: Random, count: int) -> list[Example]:
    """Three numbers to sort, and to write down in a new way. Weighted so that the loss is a mean over tokens."""
    found = []
    for _ in range(count):
        numbers = rng.sample(range(10, 100), 3)
        ask = {"role": "user", "content": "Sort these numbers: " + ", ".join(map(str, numbers))}
        prompt = tokenizer.render([ask])
        answer = [*tokenizer.encode(" < ".join(map(str, sorted(numbers)))), tokenizer.eos_id]
        ids = prompt + answer
        weights = [0.0] * (len(prompt) - 1) + [1 / len(answer) / count] * len(answer)
        found.append(Example(ids[:-1], ids[1:], weights))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--alone", action="store_true", help="without a chat to ride with")
    args = parser.parse_args()
    tokenizer, rng = Tokenizer.load(str(DEMO_MODEL)), Random(1)
    engine = Engine(
        EngineConfig(
            model=ModelConfig(model=str(DEMO_MODEL), num_threads=args.threads),
            cache=CacheConfig(num_blocks=512),
            training=TrainingConfig(slo_tpot_ms=200.0),
        )
    )
    engine.open_run(RUN, LORA)
    held_out = questions(tokenizer, rng, HELD_OUT)
    before = engine.forward(RUN, held_out).loss
    greeting = tokenizer.render([{"role": "user", "content": "Tell me about yourself."}])
    chats = itertools.count()
    start, ridden, trained = time.monotonic(), 0, 0
    for step in range(args.steps):
        batch = questions(tokenizer, rng, BATCH)
        params = OptimParams(learning_rate=args.rate * (1 - step / args.steps))
        op_id = engine.enqueue(Probe(RUN, batch, params, seed=step, radius=RADIUS))
        trained += 2 * sum(len(example.tokens) for example in batch)
        while True:
            if not args.alone and not engine.is_serving:
                sampling = SamplingParams(max_tokens=200, temperature=1.0, ignore_eos=True)
                engine.submit(Request(request_id=f"chat-{next(chats)}", prompt=greeting, sampling=sampling))
            engine.step()
            ridden += sum(s.length for s in engine.plan_log[-1].plan.segments if s.row < 0)
            report = dict(engine.take_reports()).get(op_id)
            if isinstance(report, TandemError):
                raise report
            if report is not None:
                break
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: {time.monotonic() - start:.0f} s, loss {report.loss:.3f}", flush=True)
    while engine.has_work:
        engine.step()
    after = engine.forward(RUN, held_out).loss
    print(f"held-out loss {before:.3f} -> {after:.3f}; {ridden} of {trained} training tokens rode with requests")
    return 0 if after < before else 1


if __name__ == "__main__":
    sys.exit(main())
