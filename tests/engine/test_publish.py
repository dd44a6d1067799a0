"""A run in training is published as immutable versions, saved and loaded into open runs, in the order asked for."""

from __future__ import annotations

import finetune_oracle as oracle
import pytest
import torch

from tandem.errors import Conflict, InvalidRequest, ModelError, NotFound
from tandem.work import LoraConfig, OptimParams, Pass, Publish, PublishReport, SamplingParams, Update

LORA = LoraConfig(rank=4, alpha=8.0, seed=3)
ADAM = OptimParams(learning_rate=2e-2)
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return oracle.gentle_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def engine(make_engine):
    made = make_engine(max_cpu_loras=4)
    made.open_run("r", LORA)
    yield made
    for run in ("r", "other"):
        try:
            made.close_run(run)
        except NotFound:
            pass


def train(engine, steps=1, run="r"):
    for _ in range(steps):
        engine.forward_backward(run, oracle.examples(0, [9, 12]))
        engine.optim_step(run, ADAM)


def said(engine, name):
    return engine.generate([PROMPT], GREEDY, name)[0]


def flat(engine, run="r"):
    return torch.cat([t.flatten() for pair in engine.weights(run).values() for t in pair])


def test_a_version_stays_what_it_was(engine):
    train(engine)
    engine.publish("r", "first")
    before = said(engine, "first")
    train(engine, 4)
    engine.publish("r", "second")
    assert said(engine, "first") == before != said(engine, "second")
    engine.close_run("r")
    assert said(engine, "first") == before
    for name in ("first", "second"):
        engine.unload_adapter(name)
    assert engine.adapters.num_resident == 0


def test_a_published_run_says_what_its_saved_files_say(engine, tmp_path):
    train(engine, 3)
    report = engine.publish("r", "live")
    assert isinstance(report, PublishReport) and report.adapter.name == "live" and report.adapter.rank == 4
    engine.save_run("r", tmp_path / "saved")
    engine.load_adapter("files", str(tmp_path / "saved"))
    assert said(engine, "live") == said(engine, "files")


def test_publications_take_their_turn_in_the_runs_order(engine):
    """All queued at once: the version is that after the first update and before the second."""
    batch = oracle.examples(0, [9, 12])
    ops = [Pass("r", batch), Update("r", ADAM), Publish("r", "between"), Pass("r", batch), Update("r", ADAM)]
    for op in ops:
        engine.enqueue(op)
    engine.publish("r", "after")
    apart = said(engine, "between")
    engine.open_run("other", LORA)
    train(engine, run="other")
    engine.publish("other", "alone")
    assert said(engine, "alone") == apart
    train(engine, run="other")
    engine.publish("other", "alone")
    assert said(engine, "alone") == said(engine, "after")


def test_a_name_again_is_a_new_version_and_the_old_one_goes(engine):
    versions = []
    for _ in range(6):  # more than may be resident at once
        train(engine)
        versions.append(engine.publish("r", "same").adapter.version)
    assert versions == sorted(set(versions)) and engine.adapters.num_resident == 2  # it, and the run's own


def test_where_no_more_may_be_resident(engine):
    for i in range(4):
        engine.publish("r", f"n{i}")
    with pytest.raises(Conflict, match="--max-cpu-loras"):
        engine.publish("r", "one too many")
    train(engine)  # the run goes on


def test_names_that_are_none(engine):
    for name in ("", engine.config.model.model):
        with pytest.raises(InvalidRequest):
            engine.publish("r", name)
    with pytest.raises(NotFound):
        engine.publish("nobody", "x")


def test_loading_into_an_open_run(engine, tmp_path):
    train(engine, 2)
    engine.save_run("r", tmp_path / "two")
    at_two = flat(engine)
    train(engine)
    at_three = flat(engine)
    engine.forward_backward("r", oracle.examples(3, [7]))  # gradients that loading forgets
    engine.load_run("r", tmp_path / "two")
    assert torch.equal(flat(engine), at_two)
    train(engine)
    assert torch.equal(flat(engine), at_three), "the optimizer's state came with the weights"
    engine.load_run("r", tmp_path / "two", with_optimizer=False)
    assert torch.equal(flat(engine), at_two)
    train(engine)
    assert not torch.allclose(flat(engine), at_three, atol=1e-4), "without its state Adam's step is another"


def test_what_serves_after_loading_is_what_was_loaded(engine, tmp_path):
    train(engine, 2)
    engine.save_run("r", tmp_path / "two")
    engine.publish("r", "two")
    train(engine, 3)
    engine.load_run("r", tmp_path / "two")
    engine.publish("r", "again")
    assert said(engine, "again") == said(engine, "two")


def test_loading_what_does_not_fit_changes_nothing(engine, tmp_path):
    engine.open_run("other", LoraConfig(rank=2))
    engine.save_run("other", tmp_path / "small")
    train(engine)
    before = flat(engine)
    for with_optimizer, error in ((True, ModelError), (False, InvalidRequest)):
        with pytest.raises(error, match="rank"):
            engine.load_run("r", tmp_path / "small", with_optimizer)
    with pytest.raises(ModelError):
        engine.load_run("r", tmp_path / "nowhere")
    assert torch.equal(flat(engine), before)
    train(engine)
