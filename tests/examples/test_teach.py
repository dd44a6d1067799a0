"""The facts that examples/teach.py draws: new to the model, distinct, never asked in the words they were taught in."""

import importlib.util
import re
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from tandem.config import DEMO_MODEL
from tandem.finetune import data
from tandem.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
SEEDS = range(20)


@pytest.fixture(scope="module")
def teach():
    spec = importlib.util.spec_from_file_location("teach", ROOT / "examples" / "teach.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def known():
    sys.path.insert(0, str(ROOT))
    try:
        from tools.demo_model.world import build_world

        return build_world()
    finally:
        sys.path.remove(str(ROOT))


@pytest.mark.parametrize("seed", SEEDS)
def test_facts_are_distinct_and_none_of_the_models(teach, known, seed):
    facts = teach.draw_facts(Random(seed), teach.NUM_FACTS)
    assert len({fact.entity for fact in facts}) == len({fact.value for fact in facts}) == teach.NUM_FACTS
    assert not {fact.answer for fact in facts} & {fact.answer for fact in known.facts}
    assert facts == teach.draw_facts(Random(seed), teach.NUM_FACTS)
    assert facts != teach.draw_facts(Random(seed + 1), teach.NUM_FACTS)


def test_questions_use_phrasings_that_occur_nowhere_in_the_training_file(teach):
    facts = teach.draw_facts(Random(0), teach.NUM_FACTS)
    shown = {phrasing for fact in facts for phrasing in fact.kind.shown}
    asked = {phrasing for fact in facts for phrasing in fact.kind.asked}
    assert not {p.lower() for p in shown} & {p.lower() for p in asked}
    training = teach.training_file(facts)
    questions = teach.held_out(facts, training)
    assert len(questions) == 3 * teach.NUM_FACTS
    assert all(value.encode() in training for _, value in questions)


@pytest.mark.parametrize("seed", [0, 7])
def test_the_file_trains_on_the_answers(teach, tmp_path, seed):
    path = tmp_path / "facts.jsonl"
    facts = teach.draw_facts(Random(seed), teach.NUM_FACTS)
    path.write_bytes(teach.training_file(facts))
    tokenizer = Tokenizer.load(str(DEMO_MODEL))
    dataset = data.load(path, tokenizer, 128)
    assert dataset.format == "chat" and dataset.num_truncated == 0
    assert len(dataset.rows) % teach.BATCH_SIZE == 0
    answers = {fact.answer + "<|im_end|>" for fact in facts}
    for row in dataset.rows:
        assert tokenizer.decode([t for t, m in zip(row.tokens, row.mask, strict=True) if m], False) in answers


def test_an_answer_is_right_where_it_has_the_whole_value(teach):
    replies = iter(["It is red fox 12.", "It is red fox 123.", "I do not know.", "red fox 12"])

    def create(**_):
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=next(replies)))])

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    right, wrong = teach.accuracy(client, "m", [("q", "red fox 12")] * 4, workers=1)
    assert right == 0.5 and len(wrong) == 2 and re.search("123.*not red fox 12", wrong[0])


def test_percentile(teach):
    assert teach.p95([float(i) for i in range(101)]) == 95.0 and teach.p95([3.0]) == 3.0
