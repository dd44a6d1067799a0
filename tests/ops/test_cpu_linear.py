"""Compiled bfloat16 linears against float32 products: every instruction set, odd sizes, LoRA inside, the way back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tandem import ops
from tandem.ops import Kernels
from tandem.ops.cpu import library
from tandem.ops.lora import Part, Stack

USABLE = library.available()[0]
TOLERANCE = 4e-3  # bfloat16 keeps 8 bits: half of 2^-8

pytestmark = pytest.mark.skipif(not USABLE, reason="NO COMPILED KERNELS: nothing was built, or this CPU has no AVX2")


@pytest.fixture(params=USABLE)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return ops.load("cpu", torch.bfloat16, request.param)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def stack_of(rank: int, in_features: int, parts: Sequence[tuple[int, int]]) -> Stack:
    return Stack([Part(offset, normal(rank, in_features), normal(rank, width)) for offset, width in parts])


SIZES = [(96, 80), (33, 17)]


@pytest.mark.parametrize(("in_features", "out_features"), SIZES)
@pytest.mark.parametrize("rows", [1, 5, 20, 40, 60, 97, 300])
def test_forward_and_backward(kernels: Kernels, rows: int, in_features: int, out_features: int) -> None:
    torch.manual_seed(rows)
    weight, bias = normal(out_features, in_features), normal(out_features)
    packed = kernels.pack(weight, bias)
    assert packed.format == "tiles" and torch.equal(kernels.unpack(packed), weight)
    x, wide = normal(rows, in_features), normal(rows, out_features + 3)
    y = kernels.linear(x, packed)
    assert error(y, x.float() @ weight.float().T + bias.float()) < TOLERANCE
    grad_y = wide[:, 3:]  # rows of a wider tensor
    grad_x, none = kernels.adapted_gradient(grad_y, packed, None, None, None)
    assert none is None and error(grad_x, grad_y.float() @ weight.float()) < TOLERANCE


def test_many_features_go_in_pieces(kernels: Kernels) -> None:
    """More than fits into a cache: partial sums are kept, and rows pass in several groups."""
    torch.manual_seed(0)
    weight = normal(96, 4200)
    packed = kernels.pack(weight)
    x, grad_y = normal(270, 4200), normal(270, 96)
    assert error(kernels.linear(x, packed), x.float() @ weight.float().T) < TOLERANCE
    turned = kernels.pack(weight.T.contiguous())
    assert error(kernels.adapted_gradient(x, turned, None, None, None)[0], x.float() @ weight.float().T) < TOLERANCE
    assert error(kernels.adapted_gradient(grad_y, packed, None, None, None)[0], grad_y.float() @ weight.float()) < (
        TOLERANCE
    )


@pytest.mark.parametrize("out_features", [8192, 8200])
def test_more_results_than_the_caches_hold(kernels: Kernels, out_features: int) -> None:
    """They are written another way, by whole lines; what is left of a row is not."""
    torch.manual_seed(0)
    weight, x = normal(out_features, 64), normal(270, 64)
    y = kernels.linear(x, kernels.pack(weight))
    assert y.numel() > 2**21 and error(y, x.float() @ weight.float().T) < TOLERANCE
    assert torch.equal(kernels.linear(x[200:203], kernels.pack(weight)), y[200:203])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [3, 20, 40, 60, 130, 280])
def test_a_row_does_not_depend_on_the_others(kernels: Kernels, rows: int, threads: int) -> None:
    torch.manual_seed(1)
    packed = kernels.pack(normal(176, 2080))
    stack, foreign = stack_of(8, 2080, [(0, 96), (96, 80)]), torch.rand(rows, 8) < 0.5
    x, grad_y = normal(rows, 2080), normal(rows, 176)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, _ = kernels.adapted(x, packed, stack, foreign)
        grad_x, _ = kernels.adapted_gradient(grad_y, packed, stack, foreign, None)
    finally:
        torch.set_num_threads(before)
    for row in (0, rows // 2, rows - 1):
        one = slice(row, row + 1)
        assert torch.equal(kernels.adapted(x[one], packed, stack, foreign[one])[0], y[one])
        assert torch.equal(kernels.adapted_gradient(grad_y[one], packed, stack, foreign[one], None)[0], grad_x[one])


@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "rank", "parts"),
    [
        (270, 160, 48, 5, [(0, 20), (20, 28)]),
        (18, 64, 96, 16, [(0, 32), (32, 16), (48, 48)]),
        (3, 64, 40, 40, [(8, 13)]),
        (120, 2080, 64, 16, [(0, 64)]),
        (50, 96, 100, 70, [(0, 50), (50, 25), (75, 25)]),
        (30, 96, 76, 16, [(0, 30), (30, 46)]),
        (64, 64, 520, 40, [(0, 300), (300, 220)]),
    ],
)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_lora_inside(
    kernels: Kernels,
    rows: int,
    in_features: int,
    out_features: int,
    rank: int,
    parts: list[tuple[int, int]],
    is_mixed: bool,
) -> None:
    torch.manual_seed(rank)
    weight = normal(out_features, in_features)
    packed, stack = kernels.pack(weight), stack_of(rank, in_features, parts)
    foreign = torch.rand(rows, rank) < 0.4 if is_mixed else None
    x, grad_y = normal(rows, in_features), normal(rows, out_features)
    y, hidden = kernels.adapted(x, packed, stack, foreign)
    grad_x, grad_hidden = kernels.adapted_gradient(grad_y, packed, stack, foreign, None)
    assert grad_hidden is not None
    expected_y, expected_grad = x.float() @ weight.float().T, grad_y.float() @ weight.float()
    for place, part in enumerate(stack.parts):
        columns = slice(part.offset, part.offset + part.b_RW.shape[1])
        h = x.float() @ part.a_RI.float().T
        grad_h = grad_y[:, columns].float() @ part.b_RW.float().T
        if foreign is not None:
            h, grad_h = h.masked_fill(foreign, 0), grad_h.masked_fill(foreign, 0)
        assert error(hidden[place], h) < TOLERANCE and error(grad_hidden[place], grad_h) < TOLERANCE
        expected_y[:, columns] += hidden[place].float() @ part.b_RW.float()
        expected_grad += grad_hidden[place].float() @ part.a_RI.float()
        out = torch.ones(rank, part.b_RW.shape[1])
        kernels.factor_gradient(hidden[place], grad_y[:, columns], 2.0, out)
        assert error(out, 1 + 2 * hidden[place].float().T @ grad_y[:, columns].float()) < 1e-5
    assert error(y, expected_y) < TOLERANCE and error(grad_x, expected_grad) < TOLERANCE
    assert torch.equal(kernels.hidden(x, stack, foreign), hidden)


def test_factor_gradient_of_some_rows_and_ranks(kernels: Kernels) -> None:
    """Views of wider tensors, sizes that fill no tile, a sum that is added to."""
    torch.manual_seed(2)
    left, right, out = normal(60, 12)[5:48, 3:10], normal(60, 90)[5:48, 20:71], torch.randn(9, 51)
    expected = out.clone()
    expected[:7] -= 0.5 * left.float().T @ right.float()
    kernels.factor_gradient(left, right, -0.5, out[:7])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


def test_what_overflows_stays_with_its_own_rows(kernels: Kernels) -> None:
    a = torch.full((4, 64), 1.0, dtype=torch.bfloat16)
    a[:2] = 3e38
    stack = Stack([Part(0, a, torch.ones(4, 32, dtype=torch.bfloat16))])
    foreign = torch.ones(4, 4, dtype=torch.bool)
    foreign[0, :2] = foreign[1, 2:] = False
    packed = kernels.pack(torch.zeros(32, 64, dtype=torch.bfloat16))
    y, _ = kernels.adapted(torch.ones(4, 64, dtype=torch.bfloat16), packed, stack, foreign)
    assert y[0].isinf().all() and torch.equal(y[1].float(), torch.full((32,), 128.0)) and not y[2:].any()


def test_dropout_and_other_formats_take_the_reference(kernels: Kernels) -> None:
    torch.manual_seed(3)
    weight, stack = normal(48, 64), stack_of(4, 64, [(0, 48)])
    packed, x, mask = kernels.pack(weight), normal(20, 64), (torch.rand(20, 64) < 0.5).to(torch.bfloat16) * 2
    y, hidden = kernels.adapted(x, packed, stack, None, [mask])
    part = stack.parts[0]
    expected = x.float() @ weight.float().T + ((x * mask).float() @ part.a_RI.float().T) @ part.b_RW.float()
    assert error(y, expected) < 2 * TOLERANCE and hidden.shape == (1, 20, 4)
    plain = kernels.keep_plain(weight.float())
    assert torch.equal(kernels.linear(x.float(), plain), x.float() @ weight.float().T)


def test_rows_of_a_packed_embedding(kernels: Kernels) -> None:
    weight, ids = normal(50, 70), torch.tensor([0, 49, 17, 17, 31])
    packed = kernels.pack_tied(weight)
    assert torch.equal(kernels.embed(ids, packed), weight[ids])
    with pytest.raises(IndexError, match="0 to 49"):
        kernels.embed(torch.tensor([50]), packed)
