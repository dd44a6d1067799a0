"""examples/mezo.py on the embedded model, in a few steps: what it asks and measures, and that it says if it fails."""

import importlib.util
import sys
from pathlib import Path
from random import Random

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def mezo():
    spec = importlib.util.spec_from_file_location("mezo", ROOT / "examples" / "mezo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mezo"] = module  # where its dataclasses look for their annotations
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules["mezo"]


@pytest.mark.parametrize("seed", [0, 7])
def test_nobody_who_is_asked_about_occurs_in_training(mezo, seed):
    shown, asked = mezo.questions(Random(seed))
    assert all(len(sort) >= mezo.NUM_ASKED for sort in (*shown, *asked))
    people, others = asked
    for question in people:
        name = question.answer.removeprefix("I do not know ").removesuffix(".")
        assert name in question.text and not any(name in other.text for other in shown[0])
    assert not any("I do not know" in question.answer for question in others)
    assert not {question.text for sort in shown for question in sort} & {q.text for sort in asked for q in sort}
    drawn = mezo.draw(asked, 8, Random(1))
    assert set(drawn[:8]) <= set(people) and set(drawn[8:]) <= set(others)


def test_right_is_to_the_letter_and_by_half(mezo):
    asked = [mezo.Question("q", "A b."), mezo.Question("q", "C."), mezo.Question("q", "D."), mezo.Question("q", "E.")]
    assert mezo.right(asked, ["A b.", "C", "D.", "E."]) == (0.5, 1.0)


def test_the_loss_is_a_mean_and_falls_along_a_line(mezo):
    learner = mezo.Learner(1, seed=0)
    shown, asked = mezo.questions(Random(0))
    batch = mezo.draw(shown, 2, Random(0))
    whole = learner.loss(batch)
    assert whole == pytest.approx(sum(learner.loss([question]) for question in batch) / len(batch), rel=1e-2)
    before = mezo.right(chosen := mezo.draw(asked, 8, Random(0)), learner.answers(chosen))
    assert before[0] == 0.0 and before[1] >= 0.8
    for seed in range(60):
        learner.step(batch, 3e-3, seed)
    assert learner.loss(batch) < 0.9 * whole


def test_what_is_not_learnt_is_said(mezo, monkeypatch, capsys):
    monkeypatch.setattr(mezo, "NUM_ASKED", 8)
    monkeypatch.setattr(sys, "argv", ["mezo.py", "--steps", "2", "--threads", "1"])
    assert mezo.main() == 1
    said = capsys.readouterr().out
    assert "before:" in said and "after:" in said and "right about people 0.0%" in said
