"""ggml's blocks -> numbers: one function per type, in torch, so that the processor's threads and vectors do it.

Every block is a few bytes that hold 32 or 256 numbers of one row: small codes, and the scales they are multiplied by.
Values are ggml's own in float32, bit for bit. Not here: where blocks lie (`tandem/gguf/container.py`), whose they are
(`gguf_weights.py`).

Shape letters: N blocks, C bytes of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The 16 levels of the IQ4 types: closer to each other around zero, where most weights are.
_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def dequantize(blocks_NC: Tensor, kind: str) -> Tensor:
    """uint8 [N, C] of type `kind` -> float32 [N, numbers in a block]; F16 and BF16 keep their own dtype."""
    return _READERS[kind](blocks_NC).reshape(len(blocks_NC), -1)


def _half(blocks_NC: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of every block, as float32 [N, 1]."""
    return blocks_NC[:, at : at + 2].view(torch.float16).float()


def _nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., B] -> [..., 2, B]: the low halves of the bytes, then the high ones."""
    return torch.stack((codes & 15, codes >> 4), dim=-2)


def _bits(codes: Tensor, width: int, count: int) -> Tensor:
    """uint8 [..., B] -> [..., count, B]: bits 0 to width of every byte, then the next, `count` times."""
    shifts = torch.arange(0, width * count, width, dtype=torch.uint8, device=codes.device)
    return (codes.unsqueeze(-2) >> shifts[:, None]) & (2**width - 1)


def _q8_0(blocks_NC: Tensor) -> Tensor:
    return blocks_NC[:, 2:].view(torch.int8) * _half(blocks_NC, 0)


def _q4_0(blocks_NC: Tensor) -> Tensor:
    codes = _nibbles(blocks_NC[:, 2:]).view(torch.int8) - 8
    return codes.flatten(1) * _half(blocks_NC, 0)


def _q4_1(blocks_NC: Tensor) -> Tensor:
    return _nibbles(blocks_NC[:, 4:]).flatten(1) * _half(blocks_NC, 0) + _half(blocks_NC, 2)


def _fifth_bits(blocks_NC: Tensor, at: int) -> Tensor:
    """Bit i of the four bytes at `at` is the uppermost of code i: uint8 [N, 32], 0 or 16."""
    bits = (blocks_NC[:, at : at + 4, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1) << 4


def _q5_0(blocks_NC: Tensor) -> Tensor:
    codes = _nibbles(blocks_NC[:, 6:]).flatten(1) | _fifth_bits(blocks_NC, 2)
    return (codes.view(torch.int8) - 16) * _half(blocks_NC, 0)


def _q5_1(blocks_NC: Tensor) -> Tensor:
    codes = _nibbles(blocks_NC[:, 8:]).flatten(1) | _fifth_bits(blocks_NC, 4)
    return codes * _half(blocks_NC, 0) + _half(blocks_NC, 2)


def _q2_k(blocks_NC: Tensor) -> Tensor:
    scales, codes = blocks_NC[:, :16], blocks_NC[:, 16:80]
    scale = _half(blocks_NC, 80) * (scales & 15)
    least = _half(blocks_NC, 82) * (scales >> 4)
    codes = _bits(codes.unflatten(1, (2, 32)), 2, 4).reshape(-1, 16, 16)
    return scale[..., None] * codes - least[..., None]


def _q3_k(blocks_NC: Tensor) -> Tensor:
    high, low, packed = blocks_NC[:, :32], blocks_NC[:, 32:96], blocks_NC[:, 96:108]
    # 16 scales of 6 bits: 8 bytes hold the low four bits of two each, 4 bytes the high two bits of four each.
    scales = _nibbles(packed[:, :8]).flatten(1) | (_bits(packed[:, 8:], 2, 4).flatten(1) << 4)
    scale = _half(blocks_NC, 108) * (scales.view(torch.int8) - 32)
    codes = _bits(low.unflatten(1, (2, 32)), 2, 4).flatten(1)
    is_low = _bits(high, 1, 8).flatten(1) ^ 1
    return scale[..., None] * (codes.view(torch.int8) - (is_low << 2).view(torch.int8)).unflatten(1, (16, 16))


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minimums of Q4_K and Q5_K, 6 bits each, out of 12 bytes: uint8 [N, 8] both."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
    mins = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    return scales, mins


def _k_blocks(blocks_NC: Tensor, codes: Tensor) -> Tensor:
    """Q4_K and Q5_K once their codes [N, 8, 32] are known."""
    scales, mins = _scales_and_mins(blocks_NC[:, 4:16])
    scale, least = _half(blocks_NC, 0) * scales, _half(blocks_NC, 2) * mins
    return scale[..., None] * codes - least[..., None]


def _q4_k(blocks_NC: Tensor) -> Tensor:
    return _k_blocks(blocks_NC, _nibbles(blocks_NC[:, 16:].unflatten(1, (4, 32))).flatten(1, 2))


def _q5_k(blocks_NC: Tensor) -> Tensor:
    codes = _nibbles(blocks_NC[:, 48:].unflatten(1, (4, 32))).flatten(1, 2)
    return _k_blocks(blocks_NC, codes | (_bits(blocks_NC[:, 16:48], 1, 8) << 4))


def _q6_k(blocks_NC: Tensor) -> Tensor:
    low = _nibbles(blocks_NC[:, :128].unflatten(1, (2, 64))).flatten(1)
    high = _bits(blocks_NC[:, 128:192].unflatten(1, (2, 32)), 2, 4).flatten(1)
    codes = (low | (high << 4)).view(torch.int8) - 32
    scale = _half(blocks_NC, 208) * blocks_NC[:, 192:208].view(torch.int8)
    return scale[..., None] * codes.unflatten(1, (16, 16))


def _levels(codes: Tensor) -> Tensor:
    return torch.tensor(_IQ4_LEVELS, dtype=torch.float32, device=codes.device)[codes.int()]


def _iq4_nl(blocks_NC: Tensor) -> Tensor:
    return _levels(_nibbles(blocks_NC[:, 2:]).flatten(1)) * _half(blocks_NC, 0)


def _iq4_xs(blocks_NC: Tensor) -> Tensor:
    high = _bits(blocks_NC[:, 2:4], 2, 4).transpose(1, 2).flatten(1)
    low = _nibbles(blocks_NC[:, 4:8]).transpose(1, 2).flatten(1)
    scale = _half(blocks_NC, 0) * ((low | (high << 4)).view(torch.int8) - 32)
    codes = _nibbles(blocks_NC[:, 8:].unflatten(1, (8, 16))).flatten(2)
    return scale[..., None] * _levels(codes)


_READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": lambda blocks_NC: blocks_NC.view(torch.float32),
    "F16": lambda blocks_NC: blocks_NC.view(torch.float16),
    "BF16": lambda blocks_NC: blocks_NC.view(torch.bfloat16),
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
