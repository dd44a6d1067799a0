"""The compiled small operations against their references, on every instruction set this machine has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tandem.ops import pointwise
from tandem.ops.cpu import library
from tandem.ops.cpu.pointwise import Pointwise

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [1, 5, 8, 16, 31, 64, 100, 515, 2049]
# Of a bfloat16 result the reference rounds several times on the way.
CLOSE = {torch.float32: {"rtol": 2e-6, "atol": 2e-6}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}}


@pytest.fixture(scope="module")
def ops(compiled: library.Library) -> Pointwise:
    return Pointwise(compiled)


@pytest.fixture(autouse=True)
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for results holds NaN, so that what is not written shows."""
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *shape: object, **options: object) -> Tensor:
        return new_empty(self, *shape, **options).fill_(float("nan"))  # type: ignore[call-overload]

    monkeypatch.setattr(Tensor, "new_empty", filled)


def random(*shape: int, dtype: torch.dtype, seed: int = 0, spread: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def strided(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows within wider rows, whose other elements are NaN."""
    wide = torch.full((*shape[:-1], shape[-1] + 7), float("nan"), dtype=dtype)
    wide[..., 3 : 3 + shape[-1]] = random(*shape, dtype=dtype, seed=seed)
    return wide[..., 3 : 3 + shape[-1]]


def same(found: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    limits = CLOSE[dtype]
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=limits["rtol"] * scale, atol=limits["atol"] * scale
    )


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, grad)[0]


def with_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(ops: Pointwise, dtype: torch.dtype, plus_one: bool) -> None:
    for width in WIDTHS:
        x, weight = strided(7, width, dtype=dtype), random(width, dtype=dtype, seed=1)
        exact = pointwise.rms_norm(x.double(), weight.double(), 1e-5, plus_one)
        same(ops.rms_norm(x, weight, 1e-5, plus_one), exact, dtype)
        grad = strided(7, width, dtype=dtype, seed=2)
        found = gradient(lambda x: ops.rms_norm(x, weight, 1e-5, plus_one), x, grad)  # noqa: B023
        exact = gradient(
            lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (weight.double() + plus_one),  # noqa: B023
            x.double(), grad.double(),
        )  # fmt: skip
        same(found, exact, dtype, scale=max(1.0, exact.abs().max().item()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads(ops: Pointwise, dtype: torch.dtype) -> None:
    heads = strided(5, 3, 24, dtype=dtype)[:, 1:]
    weight = random(24, dtype=dtype, seed=1)
    found = ops.rms_norm(heads, weight, 1e-6, False)
    assert found.shape == heads.shape
    same(found, pointwise.rms_norm(heads.double(), weight.double(), 1e-6, False), dtype)
    grad = random(5, 2, 24, dtype=dtype, seed=2).transpose(0, 1).contiguous().transpose(0, 1)
    same(
        gradient(lambda x: ops.rms_norm(x, weight, 1e-6, False), heads, grad),
        gradient(lambda x: pointwise.rms_norm(x, weight.double(), 1e-6, False), heads.double(), grad.double()),
        dtype, scale=4,
    )  # fmt: skip
    deep = random(2, 3, 4, 24, dtype=dtype)
    same(ops.rms_norm(deep, weight, 1e-6, True), pointwise.rms_norm(deep.double(), weight, 1e-6, True), dtype)
    assert gradient(lambda x: ops.rms_norm(x, weight, 1e-6, True), deep, deep).shape == deep.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(ops: Pointwise, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        x, residual = strided(6, width, dtype=dtype), strided(6, width, dtype=dtype, seed=1)
        weight = random(width, dtype=dtype, seed=2)
        total, normed = ops.add_rms_norm(x, residual, weight, 1e-5, False)
        assert torch.equal(total, x + residual)
        # The norm is of the sum as stored: bitwise that of the two steps apart, which training takes.
        assert torch.equal(normed, ops.rms_norm(total, weight, 1e-5, False))
        leaf = x.clone().requires_grad_()
        in_graph = ops.add_rms_norm(leaf, residual, weight, 1e-5, False)
        assert torch.equal(in_graph[0], total) and torch.equal(in_graph[1], normed)
        (found,) = torch.autograd.grad(in_graph, leaf, (residual, x))
        expected = residual + ops.rms_norm_backward(x, total, weight, 1e-5, False)
        torch.testing.assert_close(found, expected)


ROTATIONS = [(8, 8), (64, 64), (80, 32), (30, 14), (128, 128), (16, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "rotated"), ROTATIONS)
@pytest.mark.parametrize("norms", ["none", "plain", "plus one"])
def test_rope(ops: Pointwise, dtype: torch.dtype, width: int, rotated: int, norms: str) -> None:
    rows, num_queries, heads = 9, 3, 5
    qkv = strided(rows, heads + 2, width, dtype=dtype)
    x = qkv[:, :heads]
    frequencies = torch.logspace(0, -3, rotated // 2)
    angles = pointwise.rope_angles(torch.arange(rows) * 37, frequencies, 1.5, dtype) if rotated else None
    query, key = (None, None) if norms == "none" else (random(width, dtype=dtype, seed=s) for s in (1, 2))
    rest = (num_queries, query, key, angles, 1e-6, norms == "plus one")
    exact = tuple(t if t is None else t.double() for t in (query, key))
    wide_angles = None if angles is None else (angles[0].double(), angles[1].double())
    wide = (num_queries, *exact, wide_angles, 1e-6, norms == "plus one")
    found = ops.norm_rope(x, *rest)
    assert found.is_contiguous()
    same(found, pointwise.norm_rope(x.double(), *wide), dtype)
    grad = strided(rows, heads, width, dtype=dtype, seed=3)
    same(
        gradient(lambda x: ops.norm_rope(x, *rest), x, grad),
        gradient(lambda x: pointwise.norm_rope(x, *wide), x.double(), grad.double()),
        dtype, scale=6,
    )  # fmt: skip
    if norms == "none" and angles is not None:
        assert torch.equal(ops.rope(x, *angles), found)
        same(ops.rope(x, *angles), pointwise.rope(x, *angles), dtype)
    before = qkv.clone()
    assert ops.norm_rope(x, *rest, in_place=True) is x
    assert torch.equal(x, found) and torch.equal(qkv[:, heads:], before[:, heads:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu_mul", "gelu_tanh_mul"])
def test_gated_activations(ops: Pointwise, dtype: torch.dtype, name: str) -> None:
    ours, reference = getattr(ops, name), getattr(pointwise, name)
    for width in WIDTHS:
        x = strided(5, 2 * width, dtype=dtype) * 4
        same(ours(x), reference(x.double()), dtype)
        grad = strided(5, width, dtype=dtype, seed=1)
        same(gradient(ours, x, grad), gradient(lambda x: _plain(name, x), x.double(), grad.double()), dtype, scale=4)
    extremes = torch.tensor([[-200.0, -100.0, 0.0, 100.0, 200.0, float("inf"), 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]).to(dtype)
    torch.testing.assert_close(ours(extremes), reference(extremes))
    assert torch.isfinite(gradient(ours, extremes[:, [0, 1, 2, 3, 4, 6]], torch.ones(1, 3, dtype=dtype))).all()
    grad = random(1, 1, dtype=dtype).expand(5, 3)
    x = random(5, 6, dtype=dtype)
    torch.testing.assert_close(gradient(ours, x, grad), gradient(ours, x, grad.contiguous()), rtol=0, atol=0)
    deep = random(2, 3, 10, dtype=dtype)
    assert torch.equal(ours(deep), ours(deep.view(6, 10)).view(2, 3, 5))


def _plain(name: str, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    functional = torch.nn.functional
    return (functional.silu(gate) if name == "silu_mul" else functional.gelu(gate, approximate="tanh")) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("vocab", [1, 7, 1024, 3001])
def test_cross_entropy(ops: Pointwise, dtype: torch.dtype, cap: float | None, vocab: int) -> None:
    rows = 9
    logits = strided(rows, vocab, dtype=dtype)
    logits[:3] *= 30
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(1))
    targets[1], targets[4] = logits[1].argmax(), vocab - 1
    weights = random(rows, dtype=torch.float32, seed=2)
    leaf = logits.double().requires_grad_()
    capped = leaf if cap is None else cap * torch.tanh(leaf / cap)
    expected = torch.nn.functional.cross_entropy(capped, targets, reduction="none")
    (grad,) = torch.autograd.grad((expected * weights.double()).sum(), leaf)
    for function in (ops.cross_entropy_, pointwise.cross_entropy_):
        found = logits.clone()
        nll, is_best = function(found, targets, None, cap)
        assert torch.equal(found, logits)
        assert nll.dtype == torch.float32 and is_best.dtype == torch.bool
        torch.testing.assert_close(nll.double(), expected.detach(), rtol=2e-6, atol=2e-5)
        assert torch.equal(is_best, logits.float().argmax(-1) == targets)
        again = function(found, targets, weights, cap)
        assert torch.equal(again[0], nll) and torch.equal(again[1], is_best)
        torch.testing.assert_close(found.double(), grad, rtol=5e-3 if dtype == torch.bfloat16 else 2e-5, atol=2e-6)


def test_cross_entropy_works_inside_a_wider_tensor(ops: Pointwise) -> None:
    logits = strided(4, 37, dtype=torch.bfloat16)
    around = logits._base
    assert around is not None
    ops.cross_entropy_(logits, torch.zeros(4, dtype=torch.int64), torch.ones(4))
    assert around.isnan().sum() == 4 * 7 and not logits.isnan().any()


def test_cross_entropy_of_odd_logits(ops: Pointwise) -> None:
    inf = float("inf")
    rows = [[0.0, 0.0, 0.0], [-inf, 1.0, 2.0], [-inf, -inf, 3.0], [inf, 0.0, 0.0], [float("nan"), 0.0, 0.0], [-inf] * 3]
    logits = torch.tensor(rows).repeat_interleave(3, 0)
    targets = torch.tensor([0, 1, 2] * len(rows))
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    found = logits.clone()
    nll, is_best = ops.cross_entropy_(found, targets, torch.ones(len(targets)))
    torch.testing.assert_close(nll, expected, equal_nan=True)
    assert is_best.tolist()[:9] == [True, False, False, False, False, True, False, False, True]
    assert torch.isfinite(found[:9]).all() and found[12:15].isnan().all()
    for wrong in ([3], [-1]):
        with pytest.raises(ValueError, match="below 3"):
            ops.cross_entropy_(logits[:1], torch.tensor(wrong), None)
    nll, is_best = ops.cross_entropy_(logits[:0], targets[:0], None)
    assert nll.shape == is_best.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_whatever_rows_and_threads(ops: Pointwise, dtype: torch.dtype) -> None:
    width, rows = 515, 67
    x, other = random(rows, 2 * width, dtype=dtype), random(rows, 2 * width, dtype=dtype, seed=1)
    weight = random(2 * width, dtype=dtype, seed=2)
    cos, sin = pointwise.rope_angles(torch.arange(rows), torch.logspace(0, -3, 32), 1.0, dtype)
    targets, ones = torch.arange(rows), torch.ones(rows)

    def results(low: int, high: int) -> list[Tensor]:
        part, heads = x[low:high], x[low:high, :1024].reshape(high - low, 16, 64)
        logits = part.clone()
        found = [
            ops.rms_norm(part, weight, 1e-5, False), ops.rms_norm_backward(other[low:high], part, weight, 1e-5, True),
            *ops.add_rms_norm(part, other[low:high], weight, 1e-5, False),
            ops.norm_rope(heads, 9, weight[:64], weight[64:128], (cos[low:high], sin[low:high]), 1e-6, False),
            ops.silu_mul(part), ops.gelu_tanh_mul(part),
            gradient(ops.silu_mul, part, other[low:high, :width]),
            *ops.cross_entropy_(logits, targets[low:high], ones[low:high]), logits,
        ]  # fmt: skip
        return found

    whole: list[Tensor] = []
    for threads in (1, 2, 3):
        for _ in with_threads(threads):
            found = results(0, rows)
            whole = whole or found
            assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
            for low, high in ((0, 1), (5, 9), (33, 66)):
                parts = results(low, high)
                assert all(torch.equal(a, b[low:high]) for a, b in zip(parts, whole, strict=True))


def test_no_rows_are_no_work(ops: Pointwise) -> None:
    none = torch.zeros(0, 16)
    assert ops.rms_norm(none, torch.ones(16), 1e-5, False).shape == (0, 16)
    assert ops.silu_mul(none).shape == (0, 8)
    angles = (torch.zeros(0, 16), torch.zeros(0, 16))
    assert ops.rope(torch.zeros(0, 2, 16), *angles).shape == (0, 2, 16)


def test_what_does_not_fit_is_refused(ops: Pointwise) -> None:
    x = torch.ones(4, 16)
    for weight in (torch.ones(15), torch.ones(16, dtype=torch.bfloat16), torch.ones(32)[::2]):
        with pytest.raises(ValueError, match="rows of 16"):
            ops.rms_norm(x, weight, 1e-5, False)
    heads = torch.ones(4, 2, 8)
    for angles in ((torch.ones(3, 8),) * 2, (torch.ones(4, 8, dtype=torch.bfloat16),) * 2):
        with pytest.raises(ValueError, match="angles"):
            ops.rope(heads, *angles)
    with pytest.raises(ValueError, match="cannot rotate 10 of 8"):
        ops.rope(heads, torch.ones(4, 10), torch.ones(4, 10))
