"""Losses through the engine: gradients in the factors against PEFT and autograd, references, many runs at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import finetune_oracle as oracle
import msgspec
import pytest
import tiny_models
import torch
from torch import Tensor

from tandem.engine.engine import Engine
from tandem.errors import InvalidRequest, ModelError
from tandem.work import Example, LoraConfig, OptimParams, Pass, PassReport

TinyModel = Callable[[str], Path]
MakeEngine = Callable[..., Engine]
LORA = LoraConfig(rank=4, alpha=8.0, seed=3)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return oracle.gentle_models(tmp_path_factory.mktemp("models"))


def sampled(seed: int, lengths: Sequence[int]) -> list[Example]:
    """Examples with made-up log-probabilities of the policy that sampled them, and advantages."""
    rng = random.Random(seed)
    return [
        msgspec.structs.replace(
            example,
            weights=[float(w != 0) for w in example.weights],
            logprobs=[-rng.uniform(4.0, 6.0) for _ in example.tokens],
            advantages=[rng.gauss(0, 1) for _ in example.tokens],
        )
        for example in oracle.examples(seed, lengths)
    ]


def logprobs_of(model: torch.nn.Module, example: Example) -> Tensor:
    logits_LV = model(input_ids=torch.tensor([example.tokens])).logits[0]
    return logits_LV.log_softmax(-1).gather(1, torch.tensor(example.targets)[:, None])[:, 0]


def dpo_loss(model: torch.nn.Module, base: torch.nn.Module, batch: Sequence[Example], beta: float) -> Tensor:
    gains = []
    for example in batch:
        with torch.no_grad():
            reference_L = logprobs_of(base, example)
        gains.append(((logprobs_of(model, example) - reference_L) * torch.tensor(example.weights)).sum())
    return sum(
        (-torch.nn.functional.logsigmoid(beta * (c - r)) for c, r in zip(gains[0::2], gains[1::2], strict=True)),
        torch.zeros(()),
    )


def two_updates(engine: Engine, run_id: str, init_from: str | None = None) -> None:
    """A run that is no longer what it began as."""
    engine.open_run(run_id, LORA, init_from=init_from)
    for seed in range(2):
        engine.forward_backward(run_id, oracle.examples(seed, (9, 14)))
        engine.optim_step(run_id, OptimParams(learning_rate=5e-3))


@pytest.mark.parametrize("training", [{}, {"train_window": 13, "train_batch_tokens": 40}], ids=["whole", "windows"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_dpo_against_the_base_model(
    make_engine: MakeEngine, tiny_model: TinyModel, tmp_path: Path, family: str, training: dict[str, int]
) -> None:
    """The engine finds the reference's log-probabilities itself; pairs are never torn apart."""
    engine = make_engine(family, **training)
    two_updates(engine, "r")
    engine.save_run("r", str(tmp_path / "start"))
    batch = [
        msgspec.structs.replace(e, weights=[float(w != 0) for w in e.weights])
        for e in oracle.examples(7, (12, 17, 25, 8, 31, 16))
    ]
    found = engine.forward_backward("r", batch, "dpo", {"beta": 0.4})
    run = oracle.PeftRun(tiny_model(family), tmp_path / "start")
    loss = dpo_loss(run.model, tiny_models.oracle(tiny_model(family), torch.float32), batch, 0.4)
    loss.backward()
    assert found.loss == pytest.approx(loss.item(), abs=1e-4)
    assert found.metrics["num_pairs"] == 3 and found.metrics["chosen_reward"] != 0
    oracle.assert_near(engine.gradients("r"), run.gradients(), 1e-4)
    assert engine.forward("r", batch, "dpo", {"beta": 0.4}).loss == pytest.approx(found.loss, abs=1e-5)
    given = engine.forward("r", batch, wants_logprobs=True).logprobs
    known = [msgspec.structs.replace(e, logprobs=lp) for e, lp in zip(batch, given, strict=True)]
    assert engine.forward("r", known, "dpo").loss == pytest.approx(3 * 0.693147, abs=1e-4), "its own reference"


def test_dpo_against_the_adapter_it_began_from(make_engine: MakeEngine, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Also in a run that goes on from a resume point."""
    parent = oracle.random_adapter(tiny_model("llama"), tmp_path / "parent", LORA, seed=4)
    engine = make_engine("llama")
    engine.open_run("fresh", LORA, init_from=str(parent))
    batch = oracle.examples(8, (12, 17, 25, 8))
    assert engine.forward("fresh", batch, "dpo").loss == pytest.approx(2 * 0.693147, abs=1e-4)
    two_updates(engine, "r", str(parent))
    found = engine.forward_backward("r", batch, "dpo", {"beta": 0.4})
    engine.save_run("r", str(tmp_path / "point"))
    theirs = oracle.PeftRun(tiny_model("llama"), tmp_path / "point")
    loss = dpo_loss(theirs.model, oracle.PeftRun(tiny_model("llama"), parent).model, batch, 0.4)
    loss.backward()
    assert found.loss == pytest.approx(loss.item(), abs=1e-4)
    oracle.assert_near(engine.gradients("r"), theirs.gradients(), 1e-4)
    engine.open_run("resumed", LORA, init_from=str(parent), resume_from=str(tmp_path / "point"))
    assert engine.forward("resumed", batch, "dpo", {"beta": 0.4}).loss == pytest.approx(found.loss, abs=1e-5)
    engine.open_run("orphan", LORA, init_from=str(parent))
    (parent / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError):
        engine.forward("orphan", batch, "dpo")
    assert engine.forward("orphan", batch).num_tokens > 0, "the run goes on"


def test_logprobs_come_for_every_position(make_engine: MakeEngine, tiny_model: TinyModel) -> None:
    engine = make_engine("llama", train_batch_tokens=20)
    engine.open_run("r", LORA)
    batch = oracle.examples(3, (5, 30, 9, 1))
    base = tiny_models.oracle(tiny_model("llama"), torch.float32)
    plain = engine.forward_backward("r", batch)
    gradients = oracle.copied(engine.gradients("r"))
    report = engine.forward_backward("r", batch, wants_logprobs=True)
    for example, found in zip(batch, report.logprobs, strict=True):
        with torch.no_grad():
            assert found == pytest.approx(logprobs_of(base, example).tolist(), abs=2e-5)
    assert (report.num_tokens, report.num_correct) == (plain.num_tokens, plain.num_correct)
    assert report.loss == pytest.approx(plain.loss, rel=1e-6) and report.nll == pytest.approx(plain.nll, rel=1e-6)
    doubled = {key: (2 * a, 2 * b) for key, (a, b) in gradients.items()}
    oracle.assert_near(engine.gradients("r"), doubled, 1e-5)


def test_runs_with_losses_of_their_own_share_microbatches(make_engine: MakeEngine) -> None:
    """What each finds is what it finds alone, whoever is beside it."""
    losses = ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "dpo"]
    loras = [LoraConfig(rank=2 + i, alpha=4.0 * i + 1, seed=i) for i in range(len(losses))]
    batches = [sampled(20 + i, (9, 14, 5, 11)) for i in range(len(losses))]

    def run(together: bool) -> tuple[dict[str, PassReport], dict[str, oracle.Factors]]:
        engine = make_engine("llama", train_batch_tokens=400)
        for loss, lora in zip(losses, loras, strict=True):
            engine.open_run(loss, lora)
            engine.forward_backward(loss, oracle.examples(1, (9,)))
            engine.optim_step(loss, OptimParams(learning_rate=5e-3))
        reports, ids = {}, {}
        for loss, batch in zip(losses, batches, strict=True):
            ids[engine.enqueue(Pass(loss, batch, loss=loss))] = loss
            while not together and engine.has_work:
                engine.step()
        while engine.has_work:
            engine.step()
        for op_id, report in engine.take_reports():
            assert isinstance(report, PassReport)
            reports[ids[op_id]] = report
        return reports, {loss: oracle.copied(engine.gradients(loss)) for loss in losses}

    alone, alone_gradients = run(together=False)
    shared, shared_gradients = run(together=True)
    assert alone.keys() == shared.keys() == set(losses)
    for loss in losses:
        assert shared[loss].loss == pytest.approx(alone[loss].loss, rel=1e-5), loss
        assert shared[loss].metrics == pytest.approx(alone[loss].metrics, rel=1e-4, abs=1e-4), loss
        oracle.assert_near(shared_gradients[loss], alone_gradients[loss], 1e-5)


def test_bad_input_changes_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine("llama")
    engine.open_run("r", LORA)
    batch = sampled(1, (9, 14))
    engine.forward_backward("r", batch, "ppo")
    gradients = oracle.copied(engine.gradients("r"))
    wrong = msgspec.structs.replace(batch[1], advantages=[float("nan")] * 14)
    with pytest.raises(InvalidRequest, match="example 1 has an advantage that is not a finite number"):
        engine.forward_backward("r", [batch[0], wrong], "ppo")
    with pytest.raises(InvalidRequest, match="a frozen adapter cannot learn"):
        engine.enqueue(Pass("r", batch, frozen=True))
    assert oracle.is_same(engine.gradients("r"), gradients) and not engine.has_work


def test_a_run_closed_between_reference_and_loss_leaves_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine("llama", train_batch_tokens=30)
    engine.open_run("r", LORA)
    op_id = engine.enqueue(Pass("r", oracle.examples(7, (12, 17, 25, 8)), loss="dpo"))
    for _ in range(3):
        engine.step()
    engine.close_run("r")
    while engine.has_work:
        engine.step()
    assert [found for found, _ in engine.take_reports()] == [op_id]
