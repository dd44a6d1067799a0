"""Steps without gradients in the engine: MeZO's rule with PEFT's losses, riding with requests, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import finetune_oracle as oracle
import pytest
import torch

from tandem.engine.engine import Engine
from tandem.errors import Diverged, InvalidRequest
from tandem.finetune.optimizer import matrices_of
from tandem.finetune.zeroth import direction, nudge
from tandem.work import LoraConfig, OptimParams, Probe, Request, SamplingParams

TinyModel = Callable[[str], Path]
MakeEngine = Callable[..., Engine]
LORA = LoraConfig(rank=4, alpha=8.0, seed=3)
PARAMS = OptimParams(learning_rate=1e-3, weight_decay=0.1)
RADIUS = 0.01


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return oracle.gentle_models(tmp_path_factory.mktemp("models"))


def mean_examples() -> list:  # type: ignore[type-arg]
    return oracle.examples(3, (12, 17, 25), scale=0.1)


def opened(make_engine: MakeEngine, tiny_model: TinyModel, tmp_path: Path, **options: object) -> Engine:
    parent = tmp_path / "parent"
    if not parent.exists():
        oracle.random_adapter(tiny_model("llama"), parent, LORA, seed=4)
    engine = make_engine("llama", **options)
    engine.open_run("r", LORA, init_from=str(parent))
    return engine


def test_directions_are_standard_normal_and_their_own() -> None:
    matrices = matrices_of([(8, 2000), (8, 2000)])
    one, other = torch.zeros(32000), torch.zeros(32000)
    for at in range(0, 32000, 4096):  # whatever the pieces
        nudge(one, torch.zeros(32000), matrices, at, min(at + 4096, 32000), 7, 1.0)
    nudge(other, torch.zeros(32000), matrices, 0, 32000, 7, 1.0)
    assert torch.equal(one, other)
    assert abs(one.mean()) < 0.02 and abs(one.std() - 1) < 0.02
    assert not torch.equal(one[:16000], one[16000:])
    assert not torch.equal(direction(matrices[0], 1), direction(matrices[0], 2))


def test_a_probe_is_mezos_step(make_engine: MakeEngine, tiny_model: TinyModel, tmp_path: Path) -> None:
    engine = opened(make_engine, tiny_model, tmp_path)
    before = oracle.copied(engine.weights("r"))
    flat = engine.training.device_run("r").weights_P.clone()
    z = torch.zeros_like(flat)
    nudge(z, z.clone(), engine.training.device_run("r").optimizer.matrices, 0, len(z), 11, 1.0)
    run = oracle.PeftRun(tiny_model("llama"), tmp_path / "parent")
    losses = []
    device_run = engine.training.device_run("r")
    for sign in (1, -1):
        device_run.weights_P.copy_(flat + sign * RADIUS * z)
        for (layer, target), (a, b) in engine.weights("r").items():
            run.parameter(layer, target, "A").data.copy_(a)
            run.parameter(layer, target, "B").data.copy_(b.T)
        losses.append(run.forward(mean_examples()).loss)
    device_run.weights_P.copy_(flat)
    slope = (losses[0] - losses[1]) / (2 * RADIUS)
    report = engine.probe("r", mean_examples(), PARAMS, 11, RADIUS)
    assert report.loss == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert report.metrics["slope"] == pytest.approx(slope, rel=0.01, abs=1e-3) and abs(slope) > 0.05
    expected = flat - 1e-3 * (report.metrics["slope"] * z + 0.1 * flat)
    torch.testing.assert_close(device_run.weights_P, expected, rtol=1e-6, atol=1e-7)
    assert not oracle.is_same(engine.weights("r"), before)


def test_probes_learn_and_ride_with_requests(make_engine: MakeEngine, tiny_model: TinyModel, tmp_path: Path) -> None:
    """The same steps alone and beside requests, up to rounding; no backward slice is ever planned."""
    weights = []
    for serves in (False, True):
        engine = opened(make_engine, tiny_model, tmp_path)
        ridden = 0
        for step in range(3):
            if serves:
                sampling = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
                engine.submit(Request(request_id=f"q{step}", prompt=[5, 6, 7], sampling=sampling))
            engine.probe("r", mean_examples(), PARAMS, step, RADIUS)
        while engine.has_work:
            engine.step()
        kinds = {piece.kind for record in engine.plan_log for piece in record.plan.slices}
        ridden += sum(s.length for record in engine.plan_log for s in record.plan.segments if s.row < 0)
        assert "backward" not in kinds and (ridden > 0) == serves
        weights.append(oracle.copied(engine.weights("r")))
    oracle.assert_near(weights[0], weights[1], 1e-3)


def test_a_probe_that_cannot_step_leaves_the_weights(
    make_engine: MakeEngine, tiny_model: TinyModel, tmp_path: Path
) -> None:
    engine = opened(make_engine, tiny_model, tmp_path)
    engine.forward_backward("r", mean_examples())
    before, gradients = oracle.copied(engine.weights("r")), oracle.copied(engine.gradients("r"))
    with pytest.raises(Diverged, match="the weights are those before this step"):
        engine.probe("r", mean_examples(), OptimParams(learning_rate=1e38), 1, RADIUS)
    assert oracle.is_same(engine.weights("r"), before) and oracle.is_same(engine.gradients("r"), gradients)
    for bad in ({"radius": 0.0}, {"seed": -1}):
        with pytest.raises(InvalidRequest):
            engine.enqueue(Probe("r", mean_examples(), PARAMS, **({"seed": 1} | bad)))
    engine.enqueue(Probe("r", mean_examples(), PARAMS, 1))
    engine.step()
    engine.close_run("r")
    while engine.has_work:
        engine.step()
    assert len(engine.take_reports()) == 1
