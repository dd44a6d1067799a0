"""Each optimizer against torch's, or its paper's rule written out; in pieces, saved and gone on with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tandem.errors import Diverged, InvalidRequest, ModelError
from tandem.finetune import checkpoint
from tandem.finetune.inputs import KINDS, check_update
from tandem.finetune.optimizer import BLOCK, Optimizer, code, dequantized, orthogonalised, quantized
from tandem.finetune.run import Run
from tandem.work import LoraConfig, OptimParams

SHAPES = [(4, 60), (4, 100), (4, 3), (1, 40), (7, 7), (4, 130)]
NUM = sum(r * c for r, c in SHAPES)
CPU = torch.device("cpu")
PARAMS = {
    "adamw": OptimParams(learning_rate=3e-3, beta2=0.98, weight_decay=0.1),
    "adamw8bit": OptimParams(learning_rate=3e-3, kind="adamw8bit", beta2=0.98, weight_decay=0.1),
    "sgd": OptimParams(learning_rate=0.1, kind="sgd", momentum=0.9, weight_decay=0.01),
    "lion": OptimParams(learning_rate=1e-3, kind="lion", beta2=0.99, weight_decay=0.1),
    "adafactor": OptimParams(learning_rate=0.05, kind="adafactor", weight_decay=0.1),
    "muon": OptimParams(learning_rate=3e-3, kind="muon", weight_decay=0.1),
}


def start() -> Tensor:
    return torch.randn(NUM, generator=torch.Generator().manual_seed(0))


def gradient(step: int) -> Tensor:
    """Some matrices have much larger gradients than others, and some numbers are exactly zero."""
    g = torch.randn(NUM, generator=torch.Generator().manual_seed(step + 1))
    g *= torch.logspace(-4, 1, NUM)
    g[::17] = 0.0
    return g


def run(params: OptimParams, num_steps: int, piece: int = NUM) -> list[Tensor]:
    """The weights after each step."""
    optimizer, weights, found = Optimizer(SHAPES, CPU), start(), []
    for step in range(num_steps):
        gradients = gradient(step)
        norm = optimizer.norm(gradients, params)
        for at in range(0, NUM, piece):
            optimizer.update(weights, gradients, at, min(at + piece, NUM), params, norm)
        optimizer.step += 1
        assert not gradients.any()
        found.append(weights.clone())
    return found


def run_torch(
    make: Callable[[Sequence[Tensor]], torch.optim.Optimizer], num_steps: int, clip: float = 0.0
) -> list[Tensor]:
    parameters = [torch.nn.Parameter(t.view(s)) for t, s in zip(split(start()), SHAPES, strict=True)]
    optimizer, found = make(parameters), []
    for step in range(num_steps):
        for parameter, g in zip(parameters, split(gradient(step)), strict=True):
            parameter.grad = g.view_as(parameter).clone()
        torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
        optimizer.step()
        found.append(torch.cat([p.detach().flatten().clone() for p in parameters]))
    return found


def split(flat: Tensor) -> Sequence[Tensor]:
    return flat.split([r * c for r, c in SHAPES])


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Changes of the weights, step by step and matrix by matrix."""
    for before_f, before_e, f, e in zip([start(), *found], [start(), *expected], found, expected, strict=False):
        for change, right in zip(split(f - before_f), split(e - before_e), strict=True):
            assert (change - right).norm() < tolerance * right.norm(), float((change - right).norm() / right.norm())


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adafactor"])
@pytest.mark.parametrize("clip", [0.0, 20.0])
def test_updates_are_torchs(kind: str, clip: float) -> None:
    p = PARAMS[kind]
    makers: dict[str, Callable[[Sequence[Tensor]], torch.optim.Optimizer]] = {
        "adamw": lambda w: torch.optim.AdamW(
            w, lr=p.learning_rate, betas=(p.beta1, p.beta2), eps=p.eps, weight_decay=p.weight_decay
        ),
        "sgd": lambda w: torch.optim.SGD(w, lr=p.learning_rate, momentum=0.9, weight_decay=p.weight_decay),
        "adafactor": lambda w: torch.optim.Adafactor(w, lr=p.learning_rate, weight_decay=p.weight_decay),
    }
    clipped = OptimParams(**{name: getattr(p, name) for name in p.__struct_fields__} | {"max_grad_norm": clip})
    assert_near(run(clipped, 6), run_torch(makers[kind], 6, clip), 2e-4)


def test_sgd_without_momentum_is_torchs() -> None:
    found = run(OptimParams(learning_rate=0.1, kind="sgd"), 3)
    assert_near(found, run_torch(lambda w: torch.optim.SGD(w, lr=0.1), 3), 1e-5)


def test_muon_is_torchs_up_to_its_bfloat16() -> None:
    p = PARAMS["muon"]
    expected = run_torch(
        lambda w: torch.optim.Muon(
            w, lr=p.learning_rate, weight_decay=p.weight_decay, adjust_lr_fn="match_rms_adamw", momentum=0.95
        ),
        4,
    )
    assert_near(run(p, 4), expected, 0.03)


def test_muon_orthogonalises() -> None:
    """The quintic map on singular values, in float64, leaves the singular vectors alone."""
    for shape in ((4, 60), (60, 4), (5, 5)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        torch.testing.assert_close(orthogonalised(x).double(), u * s @ v, rtol=1e-4, atol=1e-4)
    assert not orthogonalised(torch.zeros(3, 8)).any()


def test_lion_is_its_papers() -> None:
    """Algorithm 2, a line for a line."""
    p, m, w, expected = PARAMS["lion"], torch.zeros(NUM), start(), []
    for step in range(5):
        g = gradient(step)
        c = p.beta1 * m + (1 - p.beta1) * g
        w = w - p.learning_rate * (c.sign() + p.weight_decay * w)
        m = p.beta2 * m + (1 - p.beta2) * g
        expected.append(w)
    assert_near(run(p, 5), expected, 1e-4)


def test_the_code_of_8_bits() -> None:
    for signed in (True, False):
        numbers = code(signed)
        assert len(numbers) == len(set(numbers.tolist())) == 256 and numbers.max() == 1.0 and 0.0 in numbers
        assert numbers.min() == pytest.approx(-0.993, abs=0.01) if signed else numbers.min() == 0.0
    x = torch.cat([gradient(3), torch.zeros(BLOCK + 3)])
    for signed in (True, False):
        values = x if signed else x.abs()
        found, scale = quantized(values, signed)
        assert len(scale) == -(-len(x) // BLOCK) and found.dtype == torch.uint8
        for k, block in enumerate(values.split(BLOCK)):
            assert scale[k] == block.abs().max()
            each = (block[:, None] - code(signed) * scale[k]).abs()
            back = dequantized(found, scale, signed)[k * BLOCK : (k + 1) * BLOCK]
            small = (block > 0) & (block < 1e-7 * scale[k]) if not signed else torch.zeros_like(block, dtype=torch.bool)
            assert torch.allclose((back - block).abs()[~small], each.min(1).values[~small], atol=1e-9)
            assert (back[block > 0] > 0).all() or signed, "a second moment that is not zero stays so"


def test_8_bit_adamw_is_its_papers() -> None:
    """Each step: moments from 8 bits, torch's AdamW, and back to 8 bits."""
    p, weights, expected = PARAMS["adamw8bit"], start(), []
    packed = [quantized(torch.zeros(NUM), signed) for signed in (True, False)]
    for step in range(6):
        parameter = torch.nn.Parameter(weights.clone())
        parameter.grad = gradient(step)
        adamw = torch.optim.AdamW([parameter], lr=p.learning_rate, betas=(p.beta1, p.beta2), weight_decay=0.1)
        mean, square = (dequantized(*pack, signed) for pack, signed in zip(packed, (True, False), strict=True))
        adamw.state[parameter] = {"step": torch.tensor(float(step)), "exp_avg": mean, "exp_avg_sq": square}
        adamw.step()
        packed = [quantized(mean, True), quantized(square, False)]
        weights = parameter.detach()
        expected.append(weights.clone())
    found = run(p, 6)
    assert_near(found, expected, 2e-3)
    exact = run(PARAMS["adamw"], 6)
    assert (found[-1] - exact[-1]).norm() < 0.15 * (exact[-1] - start()).norm(), "8 bits are near 32"


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_no_difference(kind: str) -> None:
    for found, expected in zip(run(PARAMS[kind], 4, BLOCK), run(PARAMS[kind], 4), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_run_goes_on_as_if_it_had_not_stopped(kind: str, tmp_path: Path) -> None:
    def make() -> Run:
        return Run(LoraConfig(rank=3, seed=1), 2, {"q_proj": (24, 40), "up_proj": (24, 20)}, CPU)

    def step(run: Run, seed: int) -> None:
        run.gradients_P.copy_(torch.randn(run.num_parameters, generator=torch.Generator().manual_seed(seed)))
        norm = run.optimizer.norm(run.gradients_P, PARAMS[kind])
        run.optimizer.update(run.weights_P, run.gradients_P, 0, run.num_parameters, PARAMS[kind], norm)
        run.optimizer.step += 1

    straight = make()
    for seed in range(5):
        step(straight, seed)
        if seed == 2:
            checkpoint.save(straight, tmp_path / "point", lambda layer, target: f"layers.{layer}.{target}", "base")
    resumed = make()
    checkpoint.restore(resumed, tmp_path / "point")
    assert (resumed.optimizer.kind, resumed.optimizer.step) == (kind, 3)
    for seed in (3, 4):
        step(resumed, seed)
    assert torch.equal(resumed.weights_P, straight.weights_P)
    assert all(torch.equal(resumed.optimizer.state[n], t) for n, t in straight.optimizer.state.items())
    other = Run(LoraConfig(rank=2, seed=1), 2, {"q_proj": (24, 40)}, CPU)
    with pytest.raises(ModelError, match="of another shape"):
        checkpoint.restore(other, tmp_path / "point")


def test_a_run_keeps_its_kind() -> None:
    optimizer = Optimizer(SHAPES, CPU)
    optimizer.norm(gradient(0), PARAMS["lion"])
    with pytest.raises(InvalidRequest, match="this run's optimizer is lion"):
        optimizer.norm(gradient(0), PARAMS["muon"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wild", [math.inf, math.nan, 1e30])
def test_no_update_leaves_float32(kind: str, wild: float) -> None:
    """Either it is refused with nothing changed, or its outcome is finite."""
    optimizer, weights = Optimizer(SHAPES, CPU), start()
    gradients = gradient(0) * wild if wild == 1e30 else gradient(0).index_fill(0, torch.tensor([5]), wild)
    for rate in (1e-3, 1e20, math.nan):
        params = OptimParams(learning_rate=rate, kind=kind)
        try:
            norm = optimizer.norm(gradients, params)
        except Diverged as error:
            assert "the weights are those before this step" in str(error)
            continue
        assert wild == 1e30 and rate < 1e36
        optimizer.update(weights, gradients.clone(), 0, NUM, params, norm)
        assert weights.isfinite().all(), (kind, rate)


@pytest.mark.parametrize(
    "fields", [{"kind": "adam"}, {"beta1": 1.0}, {"eps": 0.0}, {"momentum": 1.5}, {"weight_decay": math.nan}]
)
def test_parameters_out_of_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        check_update(OptimParams(learning_rate=1e-3, **fields))
