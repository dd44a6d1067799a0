"""Answers sampled by a job, in the same engine as everybody's requests and behind them in the queue.

Here: one prompt's answers. What is done with them is in `rollouts.py` and `grading.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tandem.errors import Overloaded
from tandem.jobs.records import new_id
from tandem.tokenizer import Detokenizer, Tokenizer
from tandem.work import Request, SamplingParams

if TYPE_CHECKING:
    from tandem.engine.client import EngineClient, Stream

PRIORITY = 1  # users' requests have 0, which goes first
RETRY_S = 0.25
CONTEXT = 8  # tokens of the prompt that decide how an answer's first one is written


@dataclass
class Answer:
    """`logprobs` are the sampler's own, a number for each token; the one that ends the text is among the tokens."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    is_cut: bool = False


async def sample(
    engine: EngineClient, tokenizer: Tokenizer, prompt: Sequence[int], adapter: str | None, sampling: SamplingParams,
    keep_for_training: bool = False,
) -> list[Answer]:  # fmt: skip
    """`sampling.n` answers to a prompt. Waits while the engine is overloaded; cancelled, it leaves nothing behind.

    Raises ContextTooLong, NotFound, EngineDead.
    """
    request = Request(
        request_id=new_id("rollout-"), prompt=list(prompt), adapter=adapter, priority=PRIORITY, sampling=sampling,
        keep_for_training=keep_for_training,
    )  # fmt: skip
    stream = await _submitted(engine, request)
    answers = [Answer() for _ in range(sampling.n)]
    ends = [0] * sampling.n
    try:
        async for events in stream:
            for event in events:
                answer = answers[event.index]
                if event.token_id is not None:
                    answer.tokens.append(event.token_id)
                    answer.logprobs.append(event.logprob.logprob if event.logprob is not None else 0.0)
                    ends[event.index] = event.stop_token
                answer.is_cut = event.finish_reason == "length"
    finally:
        await stream.aclose()
    for answer, ends_itself in zip(answers, ends, strict=True):
        answer.text = _text(tokenizer, prompt, answer.tokens[: len(answer.tokens) - ends_itself])
    return answers


async def _submitted(engine: EngineClient, request: Request) -> Stream:
    while True:
        try:
            return engine.submit(request)
        except Overloaded:
            await asyncio.sleep(RETRY_S)


def _text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """What a chat request would have been answered."""
    detokenizer = Detokenizer(tokenizer, True, prompt[-CONTEXT:])
    return "".join(map(detokenizer.push, tokens)) + detokenizer.finish()
