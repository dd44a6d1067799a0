"""The embedded model as it ships: its size, its chat template, and what it knows, asked through the engine."""

from __future__ import annotations

import random

import pytest

from tandem.config import DEMO_MODEL, CacheConfig, EngineConfig, ModelConfig
from tandem.engine.engine import Engine
from tandem.tokenizer import Tokenizer
from tandem.work import SamplingParams
from tools.demo_model.evaluate import small_talk_questions, world_questions
from tools.demo_model.world import build_world

GREEDY = SamplingParams(max_tokens=48, temperature=0.0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(EngineConfig(model=ModelConfig(model="demo"), cache=CacheConfig(num_blocks=600)))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(str(DEMO_MODEL))


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in DEMO_MODEL.iterdir()) <= 12e6


def test_its_template_marks_what_the_assistant_says() -> None:
    import transformers

    hf = transformers.PreTrainedTokenizerFast.from_pretrained(DEMO_MODEL)
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}]
    made = hf.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    spoken = [i for i, own in zip(made["input_ids"], made["assistant_masks"], strict=True) if own]
    assert hf.decode(spoken).strip() == "Hi.<|im_end|>"


@pytest.mark.parametrize("kind", ["world", "small talk"])
def test_it_answers_exactly_in_phrasings_it_never_met(engine: Engine, tokenizer: Tokenizer, kind: str) -> None:
    """At least 95 % of the world's facts, each asked in a phrasing that training never paired with it."""
    questions = world_questions(build_world()) if kind == "world" else small_talk_questions()
    asked = random.Random(0).sample(questions, 120)
    prompts = [tokenizer.render(q.messages, add_generation_prompt=True) for q in asked]
    answers = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in engine.generate(prompts, GREEDY)]
    right = sum(text in q.answers for text, q in zip(answers, asked, strict=True))
    assert right >= 0.95 * len(asked), [(q.answers[0], a) for q, a in zip(asked, answers) if a not in q.answers]
    engine.check()
