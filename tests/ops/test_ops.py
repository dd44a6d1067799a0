"""Each op against its reference or against plain torch, at odd sizes."""

from __future__ import annotations

import pytest
import torch
from paged import MIXES, NUM_BLOCKS, attention_case, layout_of

from tandem import ops
from tandem.ops.attention import SCRATCH_BYTES, attention, attention_reference, prepare_attention
from tandem.ops.linear import can_pack, keep_plain, linear, pack, unpack
from tandem.ops.lora import Part, Stack, add
from tandem.ops.pointwise import gelu_tanh_mul, rms_norm, rope, rope_angles, silu_mul, softcap


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("block_size", [2, 16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (6, None), (None, 2.0), (6, 2.0), (1, None)])
def test_attention_equals_reference(
    mix: str, block_size: int, heads: tuple[int, int], window: int | None, cap: float | None
) -> None:
    q, k, v, cache, layout = attention_case(mix, block_size, heads, torch.float32)
    expected_cache = cache.clone()
    expected = attention_reference(q, k, v, expected_cache, layout, scale=0.4, window=window, softcap=cap)
    found = attention(q, k, v, cache, layout, scale=0.4, window=window, softcap=cap)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache[:, 1:], expected_cache[:, 1:], rtol=0, atol=0)


@pytest.mark.parametrize("mix", MIXES)
def test_attention_in_bfloat16(mix: str) -> None:
    q, k, v, cache, layout = attention_case(mix, 4, (6, 2), torch.bfloat16)
    expected = attention_reference(q, k, v, cache.clone(), layout, scale=0.4, window=11)
    found = attention(q, k, v, cache, layout, scale=0.4, window=11)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_padding_rows_are_zero_and_write_only_block_zero() -> None:
    q, k, v, cache, layout = attention_case("one single", 4, (4, 2), torch.float32)
    before = cache.clone()
    found = attention(q, k, v, cache, layout, scale=1.0)
    assert len(found) == 4
    assert found[0].abs().sum() > 0
    assert not found[1:].any()
    own = int(layout.single_blocks_BN[0, 0])
    others = [block for block in range(1, NUM_BLOCKS) if block != own]
    assert torch.equal(cache[:, others], before[:, others])


def test_attention_does_not_read_other_sequences() -> None:
    """What is not in the row's table changes nothing; block 0 is read (and masked), so it stays finite."""
    q, k, v, cache, layout = attention_case("singles and chunks", 4, (4, 2), torch.float32)
    expected = attention(q, k, v, cache.clone(), layout, scale=1.0)
    used = set(layout.single_blocks_BN.flatten().tolist())
    used.update(*(chunk.blocks_N.tolist() for chunk in layout.chunks))
    for block in set(range(NUM_BLOCKS)) - used - {0}:
        cache[:, block] = float("nan")
    cache[:, 0] = 1e4
    torch.testing.assert_close(attention(q, k, v, cache, layout, scale=1.0), expected, rtol=0, atol=0)


def test_a_row_is_the_same_whoever_its_batch_mates_are() -> None:
    q, k, v, cache, layout = attention_case("singles of all lengths", 4, (4, 2), torch.bfloat16)
    together = attention(q, k, v, cache, layout, scale=0.3)
    table, context = layout.single_blocks_BN[6:7], layout.single_context_B[6:7]
    alone = type(layout)(layout.positions_T[6:7], layout.slots_T[6:7], table, context, ())
    found = attention(q[6:7], k[6:7], v[6:7], cache, alone, scale=0.3)
    torch.testing.assert_close(found[0], together[6], rtol=0, atol=0)


def test_a_window_gathers_only_the_blocks_it_reaches() -> None:
    _, _, _, cache, layout = attention_case("singles of all lengths", 4, (4, 2), torch.float32)
    assert max(group.mask_B11L.shape[-1] for group in prepare_attention(layout, cache, window=6).groups) == 3 * 4
    _, _, _, cache, layout = attention_case("chunk after context", 2, (4, 2), torch.float32)
    (chunk,) = prepare_attention(layout, cache, window=4).chunks
    assert chunk.gather_N is not None
    assert len(chunk.gather_N) == 2 * 2 * 4  # keys and values, two heads, positions 10 to 17


def test_one_long_row_does_not_widen_the_others() -> None:
    layout = layout_of([(4000, 1, list(range(1, 252)))] + [(20, 1, [300, 301])] * 31, 16)
    reads = prepare_attention(layout, torch.zeros(2, 400, 2, 16, 8))
    assert sum(len(group.gather_N) for group in reads.groups) <= 2 * 2 * (31 * 2 + 256)


def test_what_is_gathered_at_once_is_bounded() -> None:
    layout = layout_of([(4000, 1, list(range(1, 252)))] * 40, 16)
    cache = torch.zeros(2, 300, 8, 16, 64, dtype=torch.bfloat16)
    reads = prepare_attention(layout, cache)
    assert reads.scratch_NE.nbytes <= SCRATCH_BYTES
    assert sorted(row for g in reads.groups for row in range(40)[g.rows_B]) == list(range(40))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [4, 5, 33])
def test_linear(rows: int, dtype: torch.dtype, bias: bool) -> None:
    weight_OI, bias_O = torch.randn(48, 32).to(dtype), torch.randn(48).to(dtype) if bias else None
    packed = pack(weight_OI.clone(), bias_O)
    assert packed.format == ("onednn" if can_pack("cpu", dtype) else "plain")
    assert (packed.in_features, packed.out_features) == (32, 48)
    assert packed.nbytes == weight_OI.nbytes + (bias_O.nbytes if bias_O is not None else 0)
    x_TI = torch.randn(rows, 64).to(dtype)[:, :32]
    expected = torch.nn.functional.linear(x_TI.float(), weight_OI.float(), None if bias_O is None else bias_O.float())
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(linear(x_TI, packed).float(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(linear(x_TI, keep_plain(weight_OI, bias_O)).float(), expected, rtol=0, atol=tolerance)
    assert torch.equal(unpack(packed), weight_OI)


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(plus_one: bool, dtype: torch.dtype) -> None:
    x, weight = (torch.randn(5, 3, 24) * 3).to(dtype), torch.randn(24).to(dtype)
    x64 = x.double()
    expected = x64 / (x64.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (weight.double() + plus_one)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(rms_norm(x, weight, 1e-3, plus_one).double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("num_rotated", [4, 12, 16])
def test_rope_turns_pairs_of_features(num_rotated: int) -> None:
    positions, frequencies = torch.tensor([0, 3, 50]), torch.rand(num_rotated // 2)
    x = torch.randn(3, 2, 16)
    found = rope(x, *rope_angles(positions, frequencies, 1.5, torch.float32))
    half = num_rotated // 2
    turned = torch.complex(x[..., :half], x[..., half:num_rotated])
    turned = turned * torch.polar(torch.full((3, half), 1.5), positions[:, None] * frequencies)[:, None]
    expected = torch.cat((turned.real, turned.imag, x[..., num_rotated:]), -1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gated_activations_and_softcap() -> None:
    gate_up = torch.randn(5, 14) * 3
    gate, up = gate_up[:, :7], gate_up[:, 7:]
    torch.testing.assert_close(silu_mul(gate_up), gate / (1 + (-gate).exp()) * up)
    cubic = 0.7978845608028654 * (gate + 0.044715 * gate**3)
    torch.testing.assert_close(gelu_tanh_mul(gate_up), 0.5 * gate * (1 + torch.tanh(cubic)) * up)
    torch.testing.assert_close(softcap(gate_up, 2.0), 2 * torch.tanh(gate_up / 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_keeps_adapters_apart(dtype: torch.dtype) -> None:
    """Rows of adapter 0 (rank 2), of adapter 1 (rank 3) and of none, into a slice of a wider tensor."""
    x, a, b = torch.randn(6, 10).to(dtype), torch.randn(5, 10).to(dtype), torch.randn(5, 7).to(dtype)
    foreign = torch.ones(6, 5, dtype=torch.bool)
    foreign[:2, :2] = False
    foreign[2:4, 2:] = False
    wide = torch.randn(6, 20).to(dtype)
    expected = wide.float()
    expected[:2, 4:11] += x[:2].float() @ a[:2].float().T @ b[:2].float()
    expected[2:4, 4:11] += x[2:4].float() @ a[2:].float().T @ b[2:].float()
    untouched = wide[4:].clone()
    add(wide, x, Stack([Part(4, a, b)]), foreign)
    torch.testing.assert_close(wide.float(), expected, rtol=2e-2, atol=1e-5 if dtype == torch.float32 else 0.3)
    assert torch.equal(wide[4:], untouched)


def test_lora_that_overflows_stays_with_its_own_rows() -> None:
    x, b = torch.ones(4, 8), torch.ones(4, 3)
    a = torch.ones(4, 8)
    a[:2] = 3e38
    foreign = torch.ones(4, 4, dtype=torch.bool)
    foreign[0, :2] = foreign[1, 2:] = False
    y = torch.zeros(4, 3)
    add(y, x, Stack([Part(0, a, b)]), foreign)
    assert y[0].isinf().all() and torch.equal(y[1], torch.full((3,), 16.0)) and not y[2:].any()


def test_load_names_what_it_chose() -> None:
    assert ops.load("cpu", torch.float32, "torch").name == "torch"
    packed = can_pack("cpu", torch.bfloat16)
    assert ("oneDNN" in ops.load("cpu", torch.bfloat16, "torch").name) == packed
    assert ops.load("cuda:0", torch.bfloat16).name == "torch"
