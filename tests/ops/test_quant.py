"""int8 and int4 weights: what quantising costs, the bytes, and every compiled kernel against the torch reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tandem import ops
from tandem.ops import quant
from tandem.ops.cpu import library
from tandem.ops.cpu.quant import QuantLinears
from tandem.ops.lora import Part, Stack
from tandem.ops.quant import Format, Int4Codes

FORMATS: tuple[Format, ...] = ("int8", "int4")
ISAS = library.available()[0]
# (outputs, inputs): whole blocks, ends of blocks and groups, more than one span of inputs, next to nothing.
SHAPES = [(64, 128), (96, 704), (33, 200), (300, 33), (40, 1056), (1, 1)]
ROWS = (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 47, 64, 70)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def compiled(format: Format, isa: str) -> QuantLinears:
    return QuantLinears(format, library.load(isa), ops.load("cpu", torch.bfloat16, isa), torch.bfloat16)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.fixture
def dirty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN: what a kernel does not write shows."""
    plain = torch.empty

    def filled(*args, **kwargs):  # noqa: ANN002, ANN003, ANN202
        made = plain(*args, **kwargs)
        return made.fill_(float("nan")) if made.dtype.is_floating_point else made.fill_(0xA5)

    monkeypatch.setattr(torch, "empty", filled)


# Relative errors of llama.cpp's formats on the same Gaussian weights: groups of 32, int8 and 16 levels.
def q8_0(weight: Tensor) -> Tensor:
    groups = weight.float().view(-1, 32)
    scale = groups.abs().amax(1, keepdim=True) / 127
    return (torch.round(groups / scale) * scale.half().float()).view(weight.shape)


def q4_0(weight: Tensor) -> Tensor:
    groups = weight.float().view(-1, 32)
    scale = groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -8
    return ((torch.trunc(groups / scale + 8.5).clamp(0, 15) - 8) * scale.half().float()).view(weight.shape)


def test_a_product_is_closer_than_in_llama_cpp_formats() -> None:
    weight, x = random(256, 2048), random(64, 2048, seed=1)
    exact = x.float() @ weight.float().T
    for format, theirs in (("int8", q8_0), ("int4", q4_0)):
        expected = q8_0(x) @ theirs(weight).T
        found = quant.linear(x.float(), quant.pack(weight, None, format))
        assert relative(found, exact) < relative(expected, exact), format


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_and_codes_are_each_others_reverse(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    for quantised, packed in (
        (quant.quantise_int8(weight), quant.pack_int8(quant.quantise_int8(weight))),
        (quant.quantise_int4(weight), quant.pack_int4(quant.quantise_int4(weight))),
    ):
        unpack = quant.unpack_int4 if isinstance(quantised, Int4Codes) else quant.unpack_int8
        found = unpack(packed, *shape)
        for name in quantised.__slots__:
            assert torch.equal(getattr(found, name), getattr(quantised, name)), name


def test_int8_codes_are_the_nearest() -> None:
    weight = random(40, 200)
    found = quant.quantise_int8(weight)
    scales = found.scales_OG.float().repeat_interleave(64, 1)[:, :200]
    assert found.codes_OI.abs().max() == 127
    off = (found.codes_OI * scales - weight.float()).abs()
    assert (off <= scales * 0.5001).all()


def test_int4_levels_fit_eight_bits_whatever_the_weights() -> None:
    weight = random(64, 96)
    weight[0] = 0
    weight[1, :32] = 1e-30
    weight[2, 5] = 1000.0
    weight[3, ::2] = weight[3].abs().max()
    weight[3, 1::2] = -weight[3].abs().max()
    found = quant.quantise_int4(weight)
    wide = found.codes_OI.int() * found.multipliers_OG.int().repeat_interleave(32, 1)
    wide += found.offsets_OG.int().repeat_interleave(32, 1)
    assert wide.min() >= -128
    assert wide.max() <= 127
    assert torch.equal(found.dense()[0], torch.zeros(96).bfloat16())
    torch.testing.assert_close(found.dense()[3], weight[3], rtol=0.01, atol=0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(format: Format, bad: float) -> None:
    weight = random(8, 64)
    weight[3, 3] = bad
    for isa in (*ISAS, "torch"):
        with pytest.raises(ValueError, match="not finite"):
            ops.load("cpu", torch.bfloat16, isa, format).pack(weight)


@pytest.mark.parametrize("isa", [*ISAS, "torch"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_head_is_int8_and_its_rows_are_embeddings(isa: str, format: Format, dtype: torch.dtype) -> None:
    kernels = ops.load("cpu", dtype, isa, format)
    head = kernels.pack_tied(random(70, 100).to(dtype))
    assert head.format == "int8"
    ids = torch.tensor([69, 0, 31, 32, 32, 5])
    found = kernels.embed(ids, head)
    assert found.dtype == dtype
    assert torch.equal(found.bfloat16(), quant.unpack(head)[ids])
    for wrong in (-1, 70):
        with pytest.raises(IndexError, match="0 to 69"):
            kernels.embed(torch.tensor([wrong]), head)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_int8_bytes_equal_the_reference(isa: str, shape: tuple[int, int], dirty_memory: None) -> None:
    weight = random(*shape)
    weight[0] = 0
    kernels = compiled("int8", isa)
    packed = kernels.pack(weight)
    assert torch.equal(packed.weight, quant.pack(weight, None, "int8").weight)
    assert torch.equal(kernels.unpack(packed), quant.unpack(packed))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_int4_bytes_are_as_good_as_the_reference(isa: str, shape: tuple[int, int], dirty_memory: None) -> None:
    weight = random(*shape)
    kernels = compiled("int4", isa)
    packed, expected = kernels.pack(weight), quant.pack(weight, None, "int4")
    # Sums of 32 numbers in another order: now and then another of two equally good choices.
    same = (packed.weight == expected.weight).float().mean()
    assert same > 0.98
    assert relative(quant.unpack(packed), weight) < relative(quant.unpack(expected), weight) * 1.01 + 1e-4
    assert torch.equal(kernels.unpack(packed), quant.unpack(packed))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_the_reference(isa: str, format: Format, shape: tuple[int, int], dirty_memory: None) -> None:
    outputs, inputs = shape
    kernels = compiled(format, isa)
    bias = random(outputs, seed=2)
    w = kernels.pack(random(*shape), bias)
    x = random(70, inputs + 8, seed=1)[:, :inputs]  # rows lie apart
    expected = quant.linear(x.float(), w)
    whole = kernels.linear(x, w)
    assert relative(whole, expected) < 4e-3
    for rows in ROWS:
        assert torch.equal(kernels.linear(x[:rows], w), whole[:rows]), rows
        assert torch.equal(kernels.linear(x[70 - rows :], w), whole[70 - rows :]), rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_the_reference(isa: str, format: Format, shape: tuple[int, int], dirty_memory: None) -> None:
    kernels = compiled(format, isa)
    w = kernels.pack(random(*shape))
    grad = random(70, shape[0] + 8, seed=3)[:, : shape[0]]
    expected = grad.float() @ quant.unpack(w).float()
    whole = kernels.gradient(grad, w)
    assert relative(whole, expected) < 4e-3
    for rows in ROWS:
        assert torch.equal(kernels.gradient(grad[:rows], w), whole[:rows]), rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_results_do_not_depend_on_threads_or_on_many_rows(isa: str, format: Format) -> None:
    kernels = compiled(format, isa)
    w = kernels.pack(random(320, 96))
    x, grad = random(1100, 96, seed=1), random(1100, 320, seed=2)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((kernels.linear(x, w), kernels.gradient(grad, w)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
    assert torch.equal(kernels.linear(x[1050:1060], w), found[0][0][1050:1060])
    assert torch.equal(kernels.gradient(grad[1050:1060], w), found[0][1][1050:1060])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("outputs", [8192, 8200])
def test_more_results_than_the_caches_hold(isa: str, format: Format, outputs: int) -> None:
    """They are written another way, by whole lines; what is left of a row is not."""
    kernels = compiled(format, isa)
    w, x = kernels.pack(random(outputs, 64)), random(270, 64, seed=1)
    y = kernels.linear(x, w)
    assert y.numel() > 2**21 and relative(y, quant.linear(x.float(), w)) < 4e-3
    assert torch.equal(kernels.linear(x[200:203], w), y[200:203])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_one_row_that_overflowed_stays_alone(isa: str, format: Format) -> None:
    kernels = compiled(format, isa)
    w = kernels.pack(random(64, 128))
    x = random(20, 128, seed=1)
    expected = kernels.linear(x, w)
    x[7, 3] = float("nan")
    found = kernels.linear(x, w)
    assert found[7].isnan().all()
    assert torch.equal(torch.cat((found[:7], found[8:])), torch.cat((expected[:7], expected[8:])))


@pytest.mark.parametrize("isa", [*ISAS, "torch"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("foreign", [False, True])
def test_adapters_are_added_and_get_their_gradients(isa: str, format: Format, foreign: bool) -> None:
    kernels = ops.load("cpu", torch.bfloat16, isa, format)
    w = kernels.pack(random(96, 64))
    stack = Stack([Part(32, random(8, 64, seed=4), random(8, 64, seed=5))])
    x, grad = random(20, 64, seed=1), random(20, 96, seed=2)
    mask = torch.rand(20, 8, generator=torch.Generator().manual_seed(0)) < 0.5 if foreign else None
    a, b = stack.parts[0].a_RI.float(), stack.parts[0].b_RW.float()
    keep = 1.0 if mask is None else (~mask).float()
    y, h = kernels.adapted(x, w, stack, mask)
    expected = quant.linear(x.float(), w)
    expected[:, 32:96] += ((x.float() @ a.T) * keep) @ b
    assert relative(y, expected) < 8e-3
    assert relative(h[0], (x.float() @ a.T) * keep) < 8e-3
    grad_x, grad_h = kernels.adapted_gradient(grad, w, stack, mask, lambda: pytest.fail("no dense copy"))
    expected_h = (grad.float()[:, 32:96] @ b.T) * keep
    assert relative(grad_h[0], expected_h) < 8e-3
    assert relative(grad_x, grad.float() @ quant.unpack(w).float() + expected_h @ a) < 8e-3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rank", [8, 40])
@pytest.mark.parametrize("shape", [(96, 704), (77, 200), (300, 33)])
def test_adapters_inside_do_not_depend_on_other_rows(
    isa: str, format: Format, rank: int, shape: tuple[int, int], dirty_memory: None
) -> None:
    """Parts that begin and end inside blocks, some rank rows foreign; few rows, many, and rows that lie apart."""
    outputs, inputs = shape
    kernels = compiled(format, isa)
    bias = random(outputs, seed=8)
    w = kernels.pack(random(*shape), bias)
    widths = (outputs // 3, outputs - outputs // 3 - 5)
    parts = [
        Part(offset, random(rank, inputs, seed=4 + i), random(rank, width, seed=6 + i))
        for i, (offset, width) in enumerate(zip((0, outputs // 3 + 5), widths, strict=True))
    ]
    stack = Stack(parts)
    x = random(600, inputs + 8, seed=1)[:, :inputs]
    grad = random(600, outputs + 8, seed=2)[:, :outputs]
    foreign = torch.rand(600, rank, generator=torch.Generator().manual_seed(0)) < 0.4
    y, h = kernels.adapted(x, w, stack, foreign)
    grad_x, grad_h = kernels.adapted_gradient(grad, w, stack, foreign, lambda: pytest.fail("no dense copy"))
    expected_y, expected_x = quant.linear(x.float(), w), grad.float() @ quant.unpack(w).float()
    for place, part in enumerate(parts):
        columns = slice(part.offset, part.offset + part.b_RW.shape[1])
        own_h = (x.float() @ part.a_RI.float().T).masked_fill(foreign, 0)
        own_grad = (grad[:, columns].float() @ part.b_RW.float().T).masked_fill(foreign, 0)
        assert relative(h[place], own_h) < 4e-3
        assert relative(grad_h[place], own_grad) < 4e-3
        expected_y[:, columns] += h[place].float() @ part.b_RW.float()
        expected_x += grad_h[place].float() @ part.a_RI.float()
    assert relative(y, expected_y) < 4e-3
    assert relative(grad_x, expected_x) < 4e-3
    for rows in (slice(0, 1), slice(3, 35), slice(40, 111), slice(500, 600)):
        some_y, some_h = kernels.adapted(x[rows], w, stack, foreign[rows])
        some_x, some_grad = kernels.adapted_gradient(grad[rows], w, stack, foreign[rows], None)
        for found, whole in ((some_y, y[rows]), (some_h, h[:, rows]), (some_x, grad_x[rows]),
                             (some_grad, grad_h[:, rows])):  # fmt: skip
            assert torch.equal(found, whole), rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_foreign_factors_that_overflowed_stay_out(isa: str, format: Format) -> None:
    kernels = compiled(format, isa)
    w = kernels.pack(random(64, 64))
    a = random(16, 64, seed=4)
    a[8:] = 3e38
    stack = Stack([Part(0, a, random(16, 64, seed=5))])
    foreign = torch.zeros(40, 16, dtype=torch.bool)
    foreign[:20, 8:] = True
    x = random(40, 64, seed=1).abs() + 1
    y, _ = kernels.adapted(x, w, stack, foreign)
    assert y[:20].isfinite().all()
    assert not y[20:].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_dropout_masks_reach_only_the_adapters(isa: str, format: Format) -> None:
    kernels = compiled(format, isa)
    w = kernels.pack(random(64, 96))
    stack = Stack([Part(16, random(8, 96, seed=4), random(8, 48, seed=5))])
    x, grad = random(50, 96, seed=1), random(50, 64, seed=2)
    mask = (torch.rand(50, 96, generator=torch.Generator().manual_seed(0)) < 0.5).bfloat16() * 2
    a, b = stack.parts[0].a_RI.float(), stack.parts[0].b_RW.float()
    y, _ = kernels.adapted(x, w, stack, None, [mask])
    expected = quant.linear(x.float(), w)
    expected[:, 16:64] += ((x * mask).float() @ a.T) @ b
    assert relative(y, expected) < 8e-3
    grad_x, grad_h = kernels.adapted_gradient(grad, w, stack, None, lambda: pytest.fail("no dense copy"), [mask])
    expected_x = grad.float() @ quant.unpack(w).float() + (grad_h[0].float() @ a) * mask.float()
    assert relative(grad_x, expected_x) < 8e-3


@pytest.mark.parametrize("format", FORMATS)
def test_float32_takes_the_reference(format: Format) -> None:
    kernels = ops.load("cpu", torch.float32, "auto", format)
    weight, x = random(48, 100).float(), random(9, 100, seed=1).float()
    w = kernels.pack(weight, random(48, seed=2).float())
    assert kernels.linear(x, w).dtype == torch.float32
    assert relative(kernels.linear(x, w), x @ weight.T + w.bias) < (0.01 if format == "int8" else 0.12)


def test_what_a_weight_holds() -> None:
    for format, bits in (("int8", 8.25), ("int4", 4.5625)):
        w = quant.pack(random(64, 512), None, format)
        assert w.nbytes == w.weight.nbytes == 64 * 512 * bits / 8
