"""A KV cache in 8 or 4 bits (KIVI, arXiv 2402.02750): its layout, and the torch code that writes and reads it.

A block of one kv head holds its keys, quantised per channel over the block's tokens, then its values, quantised per
token; a number is low + step * code, low and step bfloat16. While a block fills, a channel whose range grows is
quantised again. Not here: attention itself (`attention.py`), the compiled form (`cpu/csrc/kv_format.h`).

Shape letters: N blocks, K key/value heads, S slots of a block, D head_dim, B bytes, T rows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

FORMATS = {"int8": 8, "int4": 4}  # --kv-cache-dtype, beside "auto": the weights' own dtype


@dataclass(frozen=True, slots=True)
class QuantizedCache:
    """One layer's cache: bytes_NKB are uint8 (a leading dimension of 1 is left away)."""

    bytes_NKB: Tensor
    bits: int
    block_size: int
    head_dim: int

    @property
    def levels(self) -> int:
        return 2**self.bits - 1


def code_bytes(bits: int, head_dim: int) -> int:
    """Bytes of one token's codes, keys or values of one head."""
    return -(-head_dim * bits // 8)


def head_bytes(bits: int, block_size: int, head_dim: int) -> int:
    """Bytes of one block of one kv head, keys and values with their scales."""
    return 4 * head_dim + 4 * block_size + 2 * block_size * code_bytes(bits, head_dim)


def write(cache: QuantizedCache, k_TKD: Tensor, v_TKD: Tensor, slots_T: Tensor) -> None:
    """Put rows at their slots; the slots of one block that follow each other are quantised together."""
    slots = slots_T.tolist()
    starts = [i for i, s in enumerate(slots) if i == 0 or s % cache.block_size == 0 or s != slots[i - 1] + 1]
    for start, stop in itertools.pairwise([*starts, len(slots)]):
        _write_keys(cache, k_TKD[start:stop].float().transpose(0, 1), slots[start])
        _write_values(cache, v_TKD[start:stop].float().transpose(0, 1), slots[start])


def read(cache: QuantizedCache, blocks_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole blocks as a plain cache holds them: [2, N, K, S, D]."""
    bytes_NKB = cache.bytes_NKB[blocks_N]
    (low_k, step_k, codes_k), (low_v, step_v, codes_v) = _parts(cache, bytes_NKB)
    keys = torch.addcmul(low_k[..., None, :], step_k[..., None, :], _decode(cache, codes_k))
    values = torch.addcmul(low_v[..., None], step_v[..., None], _decode(cache, codes_v))
    return torch.stack((keys, values)).to(dtype)


def _parts(cache: QuantizedCache, bytes_xB: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """low and step (float32 copies), and codes [..., S, code bytes] (a view), of keys and of values."""
    size, dim, slots = code_bytes(cache.bits, cache.head_dim), cache.head_dim, cache.block_size
    cuts = [2 * dim, 2 * dim, slots * size, 2 * slots, 2 * slots, slots * size]
    low_k, step_k, codes_k, low_v, step_v, codes_v = bytes_xB.split(cuts, -1)
    low_k, step_k, low_v, step_v = (x.contiguous().view(torch.bfloat16).float() for x in (low_k, step_k, low_v, step_v))
    return (low_k, step_k, codes_k.unflatten(-1, (slots, size))), (low_v, step_v, codes_v.unflatten(-1, (slots, size)))


def _write_keys(cache: QuantizedCache, rows_KTD: Tensor, first_slot: int) -> None:
    block, slot = divmod(first_slot, cache.block_size)
    mine = cache.bytes_NKB[block]
    (old_low, old_step, codes), _ = _parts(cache, mine)
    least, most, levels = rows_KTD.amin(1), rows_KTD.amax(1), cache.levels
    old_most = old_low + levels * old_step
    if slot:
        grows = (least < old_low) | (most > old_most)
        low, step = _cover(torch.minimum(least, old_low), torch.maximum(most, old_most), levels)
        low, step = torch.where(grows, low, old_low), torch.where(grows, step, old_step)
    else:
        low, step = _cover(least, most, levels)
    low = torch.where(rows_KTD.isnan().any(1), float("nan"), low)
    kept = _decode(cache, codes[:, :slot])
    again = _encode(torch.addcmul(old_low[:, None], old_step[:, None], kept), low[:, None], step[:, None], levels)
    same = (low == old_low) & (step == old_step)
    new = _encode(rows_KTD, low[:, None], step[:, None], levels)
    both = torch.cat((torch.where(same[:, None], kept, again), new), 1)
    codes[:, : both.shape[1]] = _pack(cache, both)
    mine[:, : 2 * cache.head_dim] = low.bfloat16().view(torch.uint8)
    mine[:, 2 * cache.head_dim : 4 * cache.head_dim] = step.bfloat16().view(torch.uint8)


def _write_values(cache: QuantizedCache, rows_KTD: Tensor, first_slot: int) -> None:
    block, slot = divmod(first_slot, cache.block_size)
    mine, number = cache.bytes_NKB[block], rows_KTD.shape[1]
    low, step = _cover(rows_KTD.amin(2), rows_KTD.amax(2), cache.levels)
    low = torch.where(rows_KTD.isnan().any(2), float("nan"), low)
    _, (_, _, codes) = _parts(cache, mine)
    codes[:, slot : slot + number] = _pack(cache, _encode(rows_KTD, low[..., None], step[..., None], cache.levels))
    at = head_bytes(cache.bits, cache.block_size, cache.head_dim) // 2 + 2 * cache.head_dim - 2 * cache.block_size
    for scales in (low, step):
        mine[:, at + 2 * slot : at + 2 * (slot + number)] = scales.bfloat16().view(torch.uint8)
        at += 2 * cache.block_size


def _cover(least: Tensor, most: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """low and step, bfloat16 numbers in float32, whose range holds least to most."""
    low = least.bfloat16().float()
    low = torch.where(low > least, (low - low.abs() * 2**-7).bfloat16().float(), low)
    wanted = (most - low) / levels
    step = wanted.bfloat16().float()
    return low, torch.where(step < wanted, (step + step.abs() * 2**-7).bfloat16().float(), step)


def _encode(x: Tensor, low: Tensor, step: Tensor, levels: int) -> Tensor:
    codes = torch.where(step > 0, (x - low) / step, 0.0)
    return codes.nan_to_num(0.0).round().clamp(0, levels)


def _pack(cache: QuantizedCache, codes: Tensor) -> Tensor:
    codes = codes.to(torch.uint8)
    if cache.bits == 8:
        return codes
    half = code_bytes(4, cache.head_dim)
    high = torch.nn.functional.pad(codes[..., half:], (0, 2 * half - cache.head_dim))
    return codes[..., :half] | high << 4


def _decode(cache: QuantizedCache, codes: Tensor) -> Tensor:
    if cache.bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), -1)[..., : cache.head_dim]
    return codes.float()
