"""The quantised KV cache: what it keeps, what attention makes of it, and that blocks stay apart."""

from __future__ import annotations

import pytest
import torch
from paged import MIXES, attention_case, layout_of
from torch import Tensor

from tandem import ops
from tandem.ops import kv_cache
from tandem.ops.attention import Layout, attention, attention_reference
from tandem.ops.cpu import library
from tandem.ops.cpu.attention import CpuAttention
from tandem.ops.kv_cache import QuantizedCache

BITS = [8, 4]


@pytest.fixture(scope="module")
def kernels(compiled: library.Library) -> CpuAttention:
    return CpuAttention(compiled)


def made(bits: int, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int) -> QuantizedCache:
    shape = (num_blocks, num_kv_heads, kv_cache.head_bytes(bits, block_size, head_dim))
    return QuantizedCache(torch.zeros(shape, dtype=torch.uint8), bits, block_size, head_dim)


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Keys as models have them: some channels are far larger than the others."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[..., 1] = 20 + 0.1 * x[..., 1]
    return x


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [8, 24, 7])
@pytest.mark.parametrize("pieces", [[16], [5, 11], [1] * 16])
def test_what_is_written_is_read(bits: int, head_dim: int, pieces: list[int]) -> None:
    """To half a step of the channel's, or the token's range; a little more where a block filled token by token."""
    cache, k, v = made(bits, 3, 2, 16, head_dim), rows(16, 2, head_dim), rows(16, 2, head_dim, seed=1)
    at = 0
    for count in pieces:
        span = slice(at, at + count)
        kv_cache.write(cache, k[span], v[span], torch.arange(at, at + count) + 2 * 16)
        at += count
    found_k, found_v = kv_cache.read(cache, torch.tensor([2]), torch.float32)[:, 0].transpose(1, 2)
    # The range begins at a bfloat16 number.
    step_k, step_v = (
        (x.amax(d, True) - x.amin(d, True) + x.abs().amax(d, True) / 64) / cache.levels for x, d in ((k, 0), (v, 2))
    )
    assert ((found_k - k).abs() <= step_k * (0.52 if len(pieces) == 1 else 1.6)).all()
    assert ((found_v - v).abs() <= step_v * 0.52).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_write_the_same_bytes_and_read_the_same_numbers(
    kernels: CpuAttention, mix: str, bits: int, dtype: torch.dtype
) -> None:
    for block_size, heads, (window, cap) in [(2, (4, 4), (None, None)), (16, (6, 2), (6, 2.0)), (3, (4, 1), (6, None))]:
        q, k, v, plain, layout = attention_case(mix, block_size, heads, dtype)
        caches = [made(bits, plain.shape[1], heads[1], block_size, q.shape[2]) for _ in range(2)]
        fill(caches, layout, plain)
        options = {"scale": 0.4, "window": window, "softcap": cap}
        expected = attention(q, k, v, caches[0], layout, **options)
        found = kernels.attention(q, k, v, caches[1], layout, **options)
        assert torch.equal(caches[0].bytes_NKB[1:], caches[1].bytes_NKB[1:])
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-5 if dtype == torch.float32 else 2e-2)
        dense = kv_cache.read(caches[0], torch.arange(plain.shape[1]), torch.float32)
        blocks, slots = layout.slots_T // block_size, layout.slots_T % block_size
        k_read, v_read = dense[:, blocks, :, slots].transpose(0, 1).to(dtype)
        meaning = attention_reference(q, k_read, v_read, dense.to(dtype), layout, **options)
        torch.testing.assert_close(found, meaning, rtol=2e-2, atol=1e-5 if dtype == torch.float32 else 2e-2)


def fill(caches: list[QuantizedCache], layout: Layout, plain: Tensor) -> None:
    """The contexts that a layout's rows come after, token by token, taken from a plain cache."""
    tables = [
        (row, int(context) - 1) for row, context in zip(layout.single_blocks_BN, layout.single_context_B, strict=True)
    ]
    tables += [(chunk.blocks_N, chunk.context - chunk.length) for chunk in layout.chunks]
    size = plain.shape[3]
    for blocks, length in tables:
        slots = torch.tensor([int(blocks[p // size]) * size + p % size for p in range(length)], dtype=torch.int64)
        k, v = plain[:, slots // size, :, slots % size].transpose(0, 1)
        for cache in caches:
            kv_cache.write(cache, k, v, slots)


@pytest.mark.parametrize("bits", BITS)
def test_close_to_a_plain_cache(kernels: CpuAttention, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(200, heads, 64, generator=generator) for heads in (4, 2, 2))
    layout = layout_of([(0, 200, list(range(1, 14)))], 16)
    exact = kernels.attention(q, k, v, torch.zeros(2, 14, 2, 16, 64), layout, scale=0.125)
    found = kernels.attention(q, k, v, made(bits, 14, 2, 16, 64), layout, scale=0.125)
    assert ((found - exact).norm() / exact.norm()).item() < (0.01 if bits == 8 else 0.15)


@pytest.mark.parametrize("bits", BITS)
def test_another_owner_leaves_no_trace(kernels: CpuAttention, bits: int) -> None:
    """A block that held NaN, or anything else, gives the bits of a fresh one."""
    q, k, v, _, layout = attention_case("singles and chunks", 4, (4, 2), torch.float32)
    used, fresh = made(bits, 64, 2, 4, 8), made(bits, 64, 2, 4, 8)
    used.bytes_NKB.random_(generator=torch.Generator().manual_seed(5))  # any bytes, NaN among the scales
    plain = torch.randn(2, 64, 2, 4, 8, generator=torch.Generator().manual_seed(3))
    fill([used, fresh], layout, plain)
    expected = kernels.attention(q, k, v, fresh, layout, scale=0.4)
    assert expected.isfinite().all()
    assert torch.equal(kernels.attention(q, k, v, used, layout, scale=0.4), expected)


@pytest.mark.parametrize("bits", BITS)
def test_nan_stays_visible(kernels: CpuAttention, bits: int) -> None:
    q, k, v, _, layout = attention_case("chunk alone", 4, (4, 2), torch.float32)
    k[2, 0, 3], v[2, 1, 3] = float("nan"), float("nan")
    for attend in (attention, kernels.attention):
        found = attend(q, k, v, made(bits, 64, 2, 4, 8), layout, scale=0.4)
        assert found[2:, :2].isnan().any() and found[2:, 2:].isnan().any()


def test_int4_is_a_third_of_bfloat16() -> None:
    plain = 2 * 16 * 64 * 2
    assert kv_cache.head_bytes(8, 16, 64) / plain < 0.58
    assert kv_cache.head_bytes(4, 16, 64) / plain < 0.33


def test_kernels_offer_both() -> None:
    kernels = ops.load("cpu", torch.float32, "torch")
    cache = made(8, 4, 1, 4, 8)
    assert kernels.prepare_attention(attention_case("one single", 4, (1, 1), torch.float32)[4], cache) is None
