"""The compiled attention kernels against the reference and against torch in float64, on every instruction set here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from paged import MIXES, attention_case, layout_of
from torch import Tensor

from tandem.ops import attention as reference
from tandem.ops.attention import Layout, Span, attention_reference
from tandem.ops.cpu import attention as wrappers
from tandem.ops.cpu import library
from tandem.ops.cpu.attention import CpuAttention, Plan

DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = [(None, None), (6, None), (None, 2.0), (6, 2.0), (1, None)]
BLOCK = 16


@pytest.fixture(scope="module")
def kernels(compiled: library.Library) -> CpuAttention:
    return CpuAttention(compiled)


@pytest.fixture(autouse=True)
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for results holds NaN, so that what is not written shows."""
    empty = torch.empty

    def filled(*shape: object, **options: object) -> Tensor:
        made = empty(*shape, **options)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(wrappers.torch, "empty", filled)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def poison_unread(cache: Tensor, layout: Layout) -> None:
    """NaN wherever no row may look: blocks of nobody, block 0, slots behind a sequence's last token."""
    tables = [
        (row.tolist(), int(context))
        for row, context in zip(layout.single_blocks_BN, layout.single_context_B, strict=True)
    ]
    tables += [(chunk.blocks_N.tolist(), chunk.context) for chunk in layout.chunks]
    seen = torch.zeros(cache.shape[1], cache.shape[3], dtype=torch.bool)
    for blocks, context in tables:
        for position in range(context):
            seen[blocks[position // cache.shape[3]], position % cache.shape[3]] = True
    cache.permute(1, 3, 0, 2, 4)[~seen] = float("nan")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("window", "cap"), OPTIONS)
def test_equals_reference(
    kernels: CpuAttention, mix: str, window: int | None, cap: float | None, dtype: torch.dtype
) -> None:
    for block_size, heads in [(2, (4, 4)), (16, (6, 2)), (3, (4, 1))]:
        q, k, v, cache, layout = attention_case(mix, block_size, heads, dtype)
        expected_cache = cache.clone()
        expected = attention_reference(q, k, v, expected_cache, layout, scale=0.4, window=window, softcap=cap)
        poison_unread(cache, layout)
        found = kernels.attention(q, k, v, cache, layout, scale=0.4, window=window, softcap=cap)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        poison_unread(expected_cache, layout)
        torch.testing.assert_close(cache, expected_cache, rtol=0, atol=0, equal_nan=True)


class Sequence:
    """Random queries, keys and values of one sequence, and its blocks."""

    def __init__(self, length: int, blocks: list[int], dtype: torch.dtype, seed: int, dim: int = 32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.q, self.k, self.v = (
            torch.randn(length, heads, dim, generator=generator).to(dtype) for heads in (4, 2, 2)
        )
        self.blocks = blocks


def attend(
    kernels: CpuAttention, sequences: list[Sequence], spans: list[tuple[int, int]], cache: Tensor, **options: object
) -> list[Tensor]:
    """Rows start:stop of each sequence in one batch; earlier keys and values are in the cache."""
    layout = layout_of([(a, b - a, s.blocks) for s, (a, b) in zip(sequences, spans, strict=True)], BLOCK)
    missing = len(layout.slots_T) - sum(b - a for a, b in spans)
    parts = []
    for name in "qkv":
        rows = torch.cat([getattr(s, name)[a:b] for s, (a, b) in zip(sequences, spans, strict=True)])
        parts.append(torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))))
    found = kernels.attention(*parts, cache, layout, scale=0.2, **options)
    return list(found[: len(found) - missing].split([b - a for a, b in spans]))


def new_cache(dtype: torch.dtype, num_blocks: int = 200, dim: int = 32) -> Tensor:
    return torch.full((2, num_blocks, 2, BLOCK, dim), float("nan"), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "cap"), [(None, None), (300, None), (None, 3.0)])
def test_long_contexts(kernels: CpuAttention, window: int | None, cap: float | None, dtype: torch.dtype) -> None:
    s, cache = Sequence(700, list(range(150, 100, -1)), dtype, seed=0), new_cache(dtype)
    spans = [(0, 690), (690, 699), (699, 700)]
    found = torch.cat([attend(kernels, [s], [span], cache, window=window, softcap=cap)[0] for span in spans])
    q, k, v = (x.double() for x in (s.q, s.k, s.v))
    expected = reference.causal_attention(q, k, v, [Span(0, 700, 0, 700)], scale=0.2, window=window, softcap=cap)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_however_it_is_computed(
    kernels: CpuAttention, dtype: torch.dtype, two_threads: None
) -> None:
    """In one chunk, in many, as single rows, beside others, with a shared prefix; with one thread and with two."""
    prefix = list(range(1, 33))  # 512 tokens in common: two splits
    ours = Sequence(600, [*prefix, 40, 41, 42, 43, 44, 45], dtype, seed=0)
    twin = Sequence(600, [*prefix, 50, 51, 52, 53, 54, 55], dtype, seed=1)
    for name in "qkv":
        getattr(twin, name)[:512] = getattr(ours, name)[:512]
    other = Sequence(90, list(range(60, 66)), dtype, seed=2)
    (whole,) = attend(kernels, [ours], [(0, 600)], new_cache(dtype))
    cache = new_cache(dtype)
    pieces = [attend(kernels, [ours], [span], cache)[0] for span in [(0, 7), (7, 300), (300, 513), (513, 590)]]
    pieces += [attend(kernels, [ours], [(i, i + 1)], cache)[0] for i in range(590, 600)]
    assert torch.equal(torch.cat(pieces), whole)
    attend(kernels, [twin], [(512, 599)], cache)
    attend(kernels, [other], [(0, 89)], cache)
    torch.set_num_threads(1)
    alone = attend(kernels, [twin], [(599, 600)], cache)[0]
    torch.set_num_threads(2)
    mixed = attend(kernels, [other, twin, ours], [(89, 90), (599, 600), (599, 600)], cache)
    assert torch.equal(mixed[2], whole[-1:])
    assert torch.equal(mixed[1], alone)


def num_units(plan: Plan) -> int:
    return int(plan.numbers[1])


def test_rows_that_share_blocks_read_them_once(kernels: CpuAttention) -> None:
    cache = new_cache(torch.float32, 400)

    def units(tables: list[list[int]], window: int | None = None) -> int:
        length = len(tables[0]) * BLOCK
        layout = layout_of([(length - 1, 1, table) for table in tables], BLOCK)
        plan = kernels.prepare_attention(layout, cache, window, 2)
        assert isinstance(plan, Plan)
        return num_units(plan)

    common, other = list(range(1, 33)), list(range(33, 65))
    assert units([[*common, 100 + i] for i in range(16)]) == 2 + 16
    two_groups = [[*common, 100 + i] for i in range(8)] + [[*other, 120 + i] for i in range(8)]
    assert units(two_groups) == 4 + 16
    assert units([[200 + i, *common[1:], 100 + i] for i in range(4)]) == 4 + 1 + 4, "the first split differs"
    assert units([[*common, 100 + i] for i in range(16)], window=20) == 1 + 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_diverged_stays_with_its_owner(kernels: CpuAttention, dtype: torch.dtype) -> None:
    """A row of NaN shares a prefix with the others and changes none of their bits."""
    prefix = list(range(1, 17))
    rows = [Sequence(270, [*prefix, 20 + i], dtype, seed=0) for i in range(3)]
    cache = new_cache(dtype)
    attend(kernels, [rows[0]], [(0, 260)], cache)
    for i in (1, 2):
        cache[:, 20 + i] = cache[:, 20]
    spans = [(260, 261)] * 3
    expected = attend(kernels, rows, spans, cache)
    rows[1].q[260], rows[1].k[260], rows[1].v[260] = (float("nan"),) * 3
    found = attend(kernels, rows, spans, cache)
    assert found[1].isnan().all()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])


def test_an_infinite_score_is_not_hidden(kernels: CpuAttention) -> None:
    s = Sequence(5, [3], torch.float32, seed=0)
    s.k[2] = float("inf")
    found = attend(kernels, [s], [(0, 5)], new_cache(torch.float32))[0]
    assert found[:2].isfinite().all()
    assert not found[2:].isfinite().all(-1).any()


def test_large_head_dims_go_to_torch_with_one_log_line(kernels: CpuAttention, caplog: pytest.LogCaptureFixture) -> None:
    wrappers._leave_to_torch.cache_clear()
    s = Sequence(40, [1, 2, 3], torch.float32, seed=0, dim=272)
    with caplog.at_level(logging.WARNING):
        found = attend(kernels, [s], [(0, 40)], torch.zeros(2, 10, 2, BLOCK, 272))[0]
        expected = kernels.causal_attention(s.q, s.k, s.v, [Span(0, 40, 0, 40)], scale=0.2, window=None, softcap=None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [record.getMessage() for record in caplog.records] == [
        "attention: head_dim 272 is beyond the compiled kernels' 256, torch does it"
    ]


def training_case(
    dim: int, heads: tuple[int, int], lengths: list[int], earlier: int
) -> tuple[list[Tensor], list[Span]]:
    generator = torch.Generator().manual_seed(0)
    rows, (num_heads, num_kv_heads) = sum(lengths), heads
    shapes = [(rows, num_heads), (rows + earlier, num_kv_heads), (rows + earlier, num_kv_heads), (rows, num_heads)]
    # Values are columns of a wider tensor, as they come out of the fused projection.
    tensors = [torch.randn(a, b * dim + 5, generator=generator)[:, : b * dim].unflatten(1, (b, dim)) for a, b in shapes]
    spans, at = [], 0
    for i, length in enumerate(lengths):
        spans.append(Span(at, at + length, at + (earlier if i else 0), at + length + earlier))
        at += length
    return tensors, spans


def gradients(
    attention: Callable[..., Tensor], tensors: list[Tensor], spans: list[Span], dtype: torch.dtype, **options: object
) -> list[Tensor]:
    *inputs, grad = (x.to(dtype) for x in tensors)
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(*leaves, spans, scale=0.3, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def distance(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Relative errors; of what is zero but for rounding, absolute ones."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return [((a - b).norm() / max(b.norm(), 1.0)).item() for a, b in pairs]


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 5.0)])
def test_every_sequence_may_have_earlier_keys(
    kernels: CpuAttention, window: int | None, softcap: float | None
) -> None:
    """Together as each alone: queries, keys before the first of them."""
    sizes, spans, at, key = [(30, 0), (4, 25), (1, 90), (17, 0), (8, 0), (12, 300)], [], 0, 0
    for length, earlier in sizes:
        spans.append(Span(at, at + length, key, key + earlier + length))
        at, key = at + length, key + earlier + length
    generator = torch.Generator().manual_seed(0)
    shapes = [(at, 4), (key, 2), (key, 2), (at, 4)]
    tensors = [torch.randn(rows, heads, 16, generator=generator) for rows, heads in shapes]
    options = {"window": window, "softcap": softcap}
    alone = []
    for start, stop, first, last in spans:
        own = [x[first:last] if len(x) == key else x[start:stop] for x in tensors]
        span = [Span(0, stop - start, 0, last - first)]
        alone.append(gradients(reference.causal_attention, own, span, torch.float64, **options))
    expected = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    for attention in (reference.causal_attention, kernels.causal_attention):
        found = gradients(attention, tensors, spans, torch.float32, **options)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (50, None), (None, 5.0), (20, 3.0), (1, None)])
@pytest.mark.parametrize(
    ("dim", "heads", "lengths", "earlier"),
    [(16, (4, 2), [70], 0), (24, (6, 2), [5, 130, 1], 0), (64, (4, 1), [33, 64], 100), (96, (2, 2), [1], 70)],
)
def test_gradients_equal_autograd(
    kernels: CpuAttention, dim: int, heads: tuple[int, int], lengths: list[int], earlier: int, window: int | None,
    softcap: float | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    tensors, spans = training_case(dim, heads, lengths, earlier)
    options = {"window": window, "softcap": softcap}
    tensors = [x.to(dtype) for x in tensors]
    expected = gradients(reference.causal_attention, tensors, spans, torch.float64, **options)
    found = gradients(kernels.causal_attention, tensors, spans, dtype, **options)
    if dtype == torch.float32:
        scale = max(x.abs().max().item() for x in expected[1:])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * max(1.0, scale))
    else:
        torchs = gradients(reference.causal_attention, tensors, spans, dtype, **options)
        for mine, theirs in zip(distance(found, expected), distance(torchs, expected), strict=True):
            assert mine <= 1.2 * theirs + 1e-3


def test_backward_is_deterministic(kernels: CpuAttention, two_threads: None) -> None:
    tensors, spans = training_case(32, (4, 2), [150, 40], 30)
    options = {"window": None, "softcap": None}
    first = gradients(kernels.causal_attention, tensors, spans, torch.bfloat16, **options)
    torch.set_num_threads(1)
    second = gradients(kernels.causal_attention, tensors, spans, torch.bfloat16, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_is_kept_without_gradients(kernels: CpuAttention) -> None:
    tensors, spans = training_case(32, (4, 2), [50], 0)
    q, k, v = (x.requires_grad_() for x in tensors[:3])
    options = {"scale": 0.3, "window": None, "softcap": None}
    with torch.no_grad():
        without = kernels.causal_attention(q, k, v, spans, **options)
    with_graph = kernels.causal_attention(q, k, v, spans, **options)
    assert without.grad_fn is None and with_graph.grad_fn is not None
    assert torch.equal(without, with_graph)
