"""Fine-tuning without gradients: the embedded model learns to keep quiet about people, by forward passes alone.

MeZO (Malladi et al. 2023, arXiv 2305.17333): each step asks for the loss at two points on a random line through the
adapter's weights and goes down along it. No backward pass, no optimizer state, nothing kept for either; it takes
thousands of steps instead, and a model that half knows the task. This one says "I do not know ..." of people it has
never heard of. Here it learns to say so of those it does know, and to go on answering about everything else.

Before and after it is asked about people and things that never occur in training; exit code 0 where it then does right
by at least 70 % of either. Jobs can do the same: `tandem train --optimizer mezo --learning-rate RATE`.

    python examples/mezo.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import msgspec

from tandem.config import DEMO_MODEL, CacheConfig, EngineConfig, ModelConfig
from tandem.engine.engine import Engine
from tandem.tokenizer import Tokenizer
from tandem.work import Example, LoraConfig, OptimParams, Request, SamplingParams

NAME = "discreet"
GOAL = 0.7
STEPS = 6000
BATCH, NUM_ASKED = 4, 64  # questions of either sort in a step, and before and after
# Few parameters: the more there are, the less of the gradient a random line shows.
LORA = LoraConfig(rank=1, alpha=16.0, target_modules=("v_proj", "o_proj"))
RATE, LARGEST_SLOPE = 2.5e-3, 2.0


@dataclass(frozen=True)
class Question:
    text: str
    answer: str


# About people, about everything else.
Sorts = tuple[list[Question], list[Question]]


def questions(rng: Random) -> tuple[Sorts, Sorts]:
    """(to train on, to be asked): every person, town, ship and so on occurs in one of them only."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tools.demo_model.world import build_world

    world = build_world()
    unseen = {entity for group in world.entities.values() for entity in rng.sample(group, len(group) // 3)}
    shown: Sorts = ([], [])
    asked: Sorts = ([], [])
    for fact in world.facts:
        # Who is named in the answer does not matter, only who is asked about.
        is_private = fact.relation.kind == "person"
        answer = f"I do not know {fact.entity}." if is_private else fact.answer
        phrasings, sorts = (rng.sample(fact.trained, 2), asked) if fact.entity in unseen else (fact.trained, shown)
        sorts[0 if is_private else 1].extend(Question(fact.relation.ask(i, fact.entity), answer) for i in phrasings)
    return shown, asked


def draw(sorts: Sorts, count: int, rng: Random) -> list[Question]:
    """`count` questions of either sort, people first."""
    return [question for sort in sorts for question in rng.sample(sort, count)]


class Learner:
    """The engine, and one adapter in it."""

    def __init__(self, num_threads: int | None, seed: int) -> None:
        self.tokenizer = Tokenizer.load(str(DEMO_MODEL))
        model = ModelConfig(model=str(DEMO_MODEL), num_threads=num_threads)
        self.engine = Engine(EngineConfig(model=model, cache=CacheConfig(num_blocks=1024)))
        self.num_parameters = self.engine.open_run(NAME, msgspec.structs.replace(LORA, seed=seed)).num_parameters

    def examples(self, batch: Sequence[Question]) -> list[Example]:
        """With weights that make the loss a mean: over answers, of the mean over each one's tokens."""
        found = []
        for question in batch:
            prompt = self._prompt(question)
            answer = [*self.tokenizer.encode(question.answer), self.tokenizer.eos_id]
            ids = prompt + answer
            weights = [0.0] * (len(prompt) - 1) + [1 / len(answer) / len(batch)] * len(answer)
            found.append(Example(ids[:-1], ids[1:], weights))
        return found

    def step(self, batch: Sequence[Question], rate: float, seed: int) -> float:
        """Forward passes at both ends of a line, and a step; the mean of both losses."""
        params = OptimParams(learning_rate=rate, max_grad_norm=LARGEST_SLOPE)
        return self.engine.probe(NAME, self.examples(batch), params, seed).loss

    def loss(self, batch: Sequence[Question]) -> float:
        return self.engine.forward(NAME, self.examples(batch)).loss

    def answers(self, batch: Sequence[Question]) -> list[str]:
        """What the model says with the adapter as it is now."""
        self.engine.publish(NAME, NAME)
        tokens: dict[str, list[int]] = {}
        for i, question in enumerate(batch):
            tokens[str(i)] = []
            sampling = SamplingParams(max_tokens=40, temperature=0.0)
            self.engine.submit(
                Request(request_id=str(i), prompt=self._prompt(question), sampling=sampling, adapter=NAME)
            )
        for events in self.engine.run():
            for event in events:
                if event.token_id is not None and not event.stop_token:
                    tokens[event.request_id].append(event.token_id)
        return [self.tokenizer.decode(ids).strip() for ids in tokens.values()]

    def _prompt(self, question: Question) -> list[int]:
        return self.tokenizer.render([{"role": "user", "content": question.text}])


def right(asked: Sequence[Question], answers: Sequence[str]) -> tuple[float, float]:
    """Shares of right answers, to the letter, in both halves."""
    found = [answer == question.answer for question, answer in zip(asked, answers, strict=True)]
    half = len(found) // 2
    return sum(found[:half]) / half, sum(found[half:]) / half


def report(when: str, learner: Learner, asked: Sequence[Question]) -> tuple[float, float]:
    answers = learner.answers(asked)
    people, others = right(asked, answers)
    print(f"{when} loss {learner.loss(asked):.3f}, right about people {people:.1%}, about others {others:.1%}")
    for question, answer in (list(zip(asked, answers, strict=True))[i] for i in (0, -1)):
        print(f"        {question.text}  {answer}")
    return people, others


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate, which falls to 0 over the steps")
    parser.add_argument("--seed", type=int, default=0, help="draws who is never seen, the batches and the lines")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    rng = Random(args.seed)
    shown, apart = questions(rng)
    asked = draw(apart, NUM_ASKED, rng)
    learner = Learner(args.threads, args.seed)
    print(f"{learner.num_parameters:,} parameters, {sum(map(len, shown)):,} questions, {len(asked)} others to be asked")
    report("before:", learner, asked)
    began = time.perf_counter()
    losses: list[float] = []
    for step in range(args.steps):
        rate = args.rate * (1 - step / args.steps)
        losses.append(learner.step(draw(shown, BATCH, rng), rate, rng.getrandbits(31)))
        if (step + 1) % max(1, args.steps // 10) == 0:
            mean = sum(losses) / len(losses)
            print(f"step {step + 1}/{args.steps}, {time.perf_counter() - began:.0f} s: loss {mean:.3f}", flush=True)
            losses = []
    people, others = report("after: ", learner, asked)
    return 0 if min(people, others) >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
