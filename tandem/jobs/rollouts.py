"""A step of reinforcement before it is learnt: groups of answers, what each was worth, and examples from both.

Answers to the same prompt are compared with each other (Shao et al. 2024, arXiv 2402.03300): better than the group's
mean becomes likelier, worse less likely. When which step happens is said in `reinforcement.py`.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from tandem.finetune import data
from tandem.finetune.graders import Grader
from tandem.jobs import sampling
from tandem.jobs.grading import Grade, Grading, together
from tandem.jobs.sampling import Answer
from tandem.tokenizer import Tokenizer
from tandem.work import Example, SamplingParams

if TYPE_CHECKING:
    from tandem.engine.client import EngineClient

TOGETHER = 8  # answers of one request, which share their prompt's computation
SAME = 1e-9  # rewards closer than this are the same


@dataclass(frozen=True)
class Group:
    """The answers to one prompt, and their grades."""

    prompt: list[int]
    answers: list[Answer]
    grades: list[Grade]

    @property
    def rewards(self) -> list[float]:
        return [grade.reward for grade in self.grades]


@dataclass(frozen=True)
class Explorer:
    """Samples and grades. `adapter` is the name under which the engine has the newest version of what learns; of the
    job's answers so many are under way at once as there are `seats`."""

    engine: EngineClient
    tokenizer: Tokenizer
    grading: Grading
    grader: Grader
    adapter: str
    max_tokens: int
    seats: asyncio.Semaphore

    async def groups(
        self, prompts: data.Dataset, numbers: Sequence[int], count: int, seed: str,
        learn: Callable[[Group], None] | None = None,
    ) -> list[Group]:  # fmt: skip
        """`count` answers to each of the prompts `numbers`; what is drawn depends on `seed` and the weights alone.
        `learn` is called with each group as soon as that is graded.

        Raises grading.GraderFailed, EngineDead.
        """
        return await together(
            self._group(prompts.rows[number].tokens, prompts.items[number], count, Random(f"{seed}/{place}"), learn)
            for place, number in enumerate(numbers)
        )

    async def _group(
        self, prompt: list[int], item: dict[str, Any], count: int, random: Random, learn: Callable[[Group], None] | None
    ) -> Group:
        sizes = [min(TOGETHER, count - first) for first in range(0, count, TOGETHER)]
        seeds = [random.getrandbits(32) for _ in sizes]
        parts = await together(
            self._part(prompt, item, size, seed, learn is not None) for size, seed in zip(sizes, seeds, strict=True)
        )  # fmt: skip
        answers, grades = ([one for part in parts for one in part[i]] for i in range(2))
        group = Group(prompt, answers, grades)
        if learn is not None:
            learn(group)
        return group

    async def _part(
        self, prompt: list[int], item: dict[str, Any], size: int, seed: int, is_learnt: bool
    ) -> tuple[list[Answer], list[Grade]]:
        params = SamplingParams(max_tokens=self.max_tokens, temperature=1.0, logprobs=0, n=size, seed=seed)
        async with self.seats:
            answers = await sampling.sample(self.engine, self.tokenizer, prompt, self.adapter, params, is_learnt)
        return answers, await together(self.grading.grade(self.grader, item, answer.text) for answer in answers)


def advantages(rewards: Sequence[float]) -> list[float] | None:
    """How many standard deviations above the mean each is. None where all are the same: there is nothing to learn."""
    mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    if spread <= SAME * max(1.0, abs(mean)):
        return None
    return [(reward - mean) / spread for reward in rewards]


def examples(group: Group, weight: float) -> list[Example]:
    """What is learnt: all tokens of an answer have its advantage, and all count the same, `weight`: long answers more
    than short ones, then (Liu et al. 2025, arXiv 2503.20783)."""
    gains = advantages(group.rewards) or []
    pairs = zip(group.answers, gains)
    return [_example(group.prompt, answer, gain, weight) for answer, gain in pairs if answer.tokens]


def _example(prompt: list[int], answer: Answer, advantage: float, weight: float) -> Example:
    ids, unjudged, judged = prompt + answer.tokens, len(prompt) - 1, len(answer.tokens)
    return Example(
        ids[:-1], ids[1:], [0.0] * unjudged + [weight] * judged,
        logprobs=[0.0] * unjudged + answer.logprobs, advantages=[0.0] * unjudged + [advantage] * judged,
    )  # fmt: skip
