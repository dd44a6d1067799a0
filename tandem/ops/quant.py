"""Weights of 8 and 4 bits: what the numbers mean, how they are chosen, and the bytes that they are stored in.

int8: groups of 64 inputs share a bfloat16 scale; activations stay in bfloat16. int4: a group of 32 inputs has sixteen
levels `multiplier * code + offset`, which are 8-bit integers on the output's own float32 scale (progressive groups, as
in QServe, arXiv 2405.04532), so that a product of integers needs no scale per group; activations are rounded to 8 bits
with a scale for every 512 inputs. Everything here is torch, slow and the truth; `ops/cpu/quant.py` has the kernels.

A sum of products depends on the order of its terms, so kernels may differ from this in the last bits of a result.

Shape letters: T rows, I input features, O output features, B blocks of 32 outputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear
from torch.nn.functional import pad

from tandem.ops.linear import LinearWeight

Format = Literal["int8", "int4"]
FORMATS: tuple[Format, ...] = ("int8", "int4")
# A head's errors go into the logits as they are, and its rows are read as embeddings where the two are tied.
HEAD: Format = "int8"

OUTPUTS = 32  # of a block
INT8_GROUP = 64
INT4_GROUP = 32
INT4_STEP = 64  # inputs of a step, two groups
INT4_SPAN = 512  # inputs of a row that share a scale
INT8_BYTES = 2 * OUTPUTS + OUTPUTS * INT8_GROUP
INT4_BYTES = 4 * OUTPUTS + OUTPUTS * INT4_STEP // 2
INT4_HEAD = 4 * OUTPUTS
# An int4 group's multipliers that are tried: the one that reaches its extremes, and so many smaller ones.
TRIED = 4


@dataclass(frozen=True, slots=True)
class Int8Codes:
    """weight[o, i] = codes[o, i] * scales[o, i // 64], rounded to bfloat16."""

    codes_OI: Tensor
    scales_OG: Tensor

    def dense(self) -> Tensor:
        """bfloat16 [O, I]."""
        scales_OI = self.scales_OG.float().repeat_interleave(INT8_GROUP, 1)[:, : self.codes_OI.shape[1]]
        return (self.codes_OI.float() * scales_OI).bfloat16()


@dataclass(frozen=True, slots=True)
class Int4Codes:
    """weight[o, i] = scales[o] * (multipliers[o, i // 32] * codes[o, i] + offsets[o, i // 32])."""

    codes_OI: Tensor
    multipliers_OG: Tensor
    offsets_OG: Tensor
    scales_O: Tensor

    def integers(self) -> Tensor:
        """The levels without the scale, int8 [O, I]."""
        inputs = self.codes_OI.shape[1]
        multipliers_OI, offsets_OI = (
            part.short().repeat_interleave(INT4_GROUP, 1)[:, :inputs] for part in (self.multipliers_OG, self.offsets_OG)
        )
        return (self.codes_OI.short() * multipliers_OI + offsets_OI).to(torch.int8)

    def dense(self) -> Tensor:
        """bfloat16 [O, I]."""
        return (self.integers().float() * self.scales_O[:, None]).bfloat16()


def quantise_int8(weight_OI: Tensor) -> Int8Codes:
    """The nearest codes in -127..127; a scale is the group's largest magnitude / 127, rounded up to bfloat16."""
    inputs = weight_OI.shape[1]
    padded_OGI = pad(weight_OI.float(), (0, -inputs % INT8_GROUP)).unflatten(1, (-1, INT8_GROUP))
    wanted_OG = padded_OGI.abs().amax(-1) / 127
    scales_OG = wanted_OG.bfloat16()
    scales_OG = torch.where(scales_OG.float() < wanted_OG, _next(scales_OG), scales_OG)
    divisors_OG1 = torch.where(scales_OG == 0, 1.0, scales_OG.float())[..., None]
    codes_OI = torch.round(padded_OGI / divisors_OG1).flatten(1)[:, :inputs]
    return Int8Codes(codes_OI.to(torch.int8), scales_OG)


def quantise_int4(weight_OI: Tensor) -> Int4Codes:
    """Multipliers and offsets with the least squared error among those tried, codes nearest to them."""
    out_features, inputs = weight_OI.shape
    largest_O = weight_OI.abs().amax(1).float()
    scales_O = torch.where(largest_O == 0, 1.0, largest_O) / 127
    levels_OGI = pad(weight_OI.float() / scales_O[:, None], (0, -inputs % INT4_GROUP)).unflatten(1, (-1, INT4_GROUP))
    low, high = levels_OGI.amin(-1, keepdim=True), levels_OGI.amax(-1, keepdim=True)
    widest = torch.ceil((high - low) / 15).clamp(1, 17)
    least = torch.full_like(low, float("inf"))
    best = [torch.zeros_like(levels_OGI), torch.ones_like(low), torch.zeros_like(low)]
    for smaller in range(TRIED):
        multiplier = (widest - smaller).clamp(min=1)
        # The group's middle in the middle of the levels; then the mean error taken out.
        offset = torch.round((low + high) / 2 - multiplier * 7.5)
        codes = torch.round((levels_OGI - offset) / multiplier).clamp(0, 15)
        offset = torch.round((levels_OGI - codes * multiplier).sum(-1, keepdim=True) / INT4_GROUP)
        offset = offset.clamp(min=-128).minimum(127 - 15 * multiplier).clamp(min=-128)
        codes = torch.round((levels_OGI - offset) / multiplier).clamp(0, 15)
        error = (levels_OGI - codes * multiplier - offset).square().sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = [torch.where(better, new, old) for new, old in zip((codes, multiplier, offset), best)]
    codes, multiplier, offset = best
    return Int4Codes(
        codes.flatten(1)[:, :inputs].to(torch.uint8),
        multiplier[..., 0].to(torch.uint8),
        offset[..., 0].to(torch.int8),
        scales_O,
    )


def pack_int8(weight: Int8Codes) -> Tensor:
    """The bytes of a weight, [B, G, 2112]: by group 32 scales, then codes + 128 as [2 halves of the inputs][2 halves of
    the outputs][16 pairs of inputs][16 outputs][2]."""
    out_features, inputs = weight.codes_OI.shape
    codes = pad(weight.codes_OI, (0, -inputs % INT8_GROUP, 0, -out_features % OUTPUTS))
    scales = pad(weight.scales_OG, (0, 0, 0, -out_features % OUTPUTS))
    blocks, groups = len(codes) // OUTPUTS, scales.shape[1]
    ordered = codes.view(blocks, 2, 16, groups, 2, 16, 2).permute(0, 3, 4, 1, 5, 2, 6)
    heads = scales.view(blocks, OUTPUTS, groups).transpose(1, 2).contiguous().view(torch.uint8)
    return torch.cat((heads, ordered.reshape(blocks, groups, -1).view(torch.uint8) ^ 128), -1)


def unpack_int8(packed_BGn: Tensor, out_features: int, in_features: int) -> Int8Codes:
    """The reverse of `pack_int8`."""
    blocks, groups, _ = packed_BGn.shape
    heads, codes = packed_BGn.split((2 * OUTPUTS, OUTPUTS * INT8_GROUP), -1)
    ordered = (codes ^ 128).reshape(blocks, groups, 2, 2, 16, 16, 2).permute(0, 3, 5, 1, 2, 4, 6)
    codes_OI = ordered.reshape(blocks * OUTPUTS, groups * INT8_GROUP).view(torch.int8)
    scales = heads.contiguous().view(torch.bfloat16).transpose(1, 2).reshape(blocks * OUTPUTS, groups)
    return Int8Codes(codes_OI[:out_features, :in_features], scales[:out_features])


def pack_int4(weight: Int4Codes) -> Tensor:
    """The bytes of a weight, [B, 128 + 1152 for every 64 inputs]: 32 float32 scales, then by step [2 halves of the
    outputs][2 groups][multipliers, offsets][16 outputs] and codes as [2 halves of the outputs][8 fours of inputs][16
    outputs][4], the step's first 32 inputs in the low bits, the others in the high ones."""
    out_features, inputs = weight.codes_OI.shape
    more_outputs, more_inputs = -out_features % OUTPUTS, -inputs % INT4_STEP
    codes = pad(weight.codes_OI, (0, more_inputs, 0, more_outputs))
    blocks, steps = len(codes) // OUTPUTS, codes.shape[1] // INT4_STEP
    lacking = 2 * steps - weight.multipliers_OG.shape[1]
    multipliers, offsets = (
        pad(part.view(torch.uint8), (0, lacking, 0, more_outputs)).view(blocks, 2, 16, steps, 2).permute(0, 3, 1, 4, 2)
        for part in (weight.multipliers_OG, weight.offsets_OG)
    )
    parameters = torch.stack((multipliers, offsets), 4).reshape(blocks, steps, -1)
    low, high = codes.view(blocks, 2, 16, steps, 2, 8, 4).permute(4, 0, 3, 1, 5, 2, 6).reshape(2, blocks, steps, -1)
    body = torch.cat((parameters, low | high << 4), -1).flatten(1)
    heads = pad(weight.scales_O, (0, more_outputs)).view(blocks, OUTPUTS).view(torch.uint8)
    return torch.cat((heads, body), -1)


def unpack_int4(packed_Bn: Tensor, out_features: int, in_features: int) -> Int4Codes:
    """The reverse of `pack_int4`."""
    blocks = len(packed_Bn)
    heads, body = packed_Bn.split((INT4_HEAD, packed_Bn.shape[1] - INT4_HEAD), -1)
    steps = body.shape[1] // INT4_BYTES
    parameters, codes = body.reshape(blocks, steps, -1).split((4 * OUTPUTS, OUTPUTS * INT4_STEP // 2), -1)
    groups = -(-in_features // INT4_GROUP)
    multipliers, offsets = (
        part.permute(0, 2, 4, 1, 3).reshape(blocks * OUTPUTS, -1)[:out_features, :groups].contiguous()
        for part in parameters.reshape(blocks, steps, 2, 2, 2, 16).unbind(4)
    )
    both = torch.stack((codes & 15, codes >> 4)).view(2, blocks, steps, 2, 8, 16, 4)
    codes_OI = both.permute(1, 3, 5, 2, 0, 4, 6).reshape(blocks * OUTPUTS, -1)[:out_features, :in_features]
    scales_O = heads.contiguous().view(torch.float32).flatten()[:out_features]
    return Int4Codes(codes_OI, multipliers, offsets.view(torch.int8), scales_O)


def packed_shape(out_features: int, in_features: int, format: Format) -> tuple[int, ...]:
    """Of the bytes of a weight."""
    blocks, steps = -(-out_features // OUTPUTS), -(-in_features // INT4_STEP)
    return (blocks, steps, INT8_BYTES) if format == "int8" else (blocks, INT4_HEAD + steps * INT4_BYTES)


def pack(weight_OI: Tensor, bias: Tensor | None, format: Format) -> LinearWeight:
    """A quantised copy of finite numbers; drop the original to keep one."""
    out_features, in_features = weight_OI.shape
    packed = pack_int8(quantise_int8(weight_OI)) if format == "int8" else pack_int4(quantise_int4(weight_OI))
    return LinearWeight(in_features, out_features, bias, packed, format)


def codes(w: LinearWeight) -> Int8Codes | Int4Codes:
    """What the bytes of a weight say."""
    unpacked = unpack_int8 if w.format == "int8" else unpack_int4
    return unpacked(w.weight, w.out_features, w.in_features)


def unpack(w: LinearWeight) -> Tensor:
    """The weight that the bytes stand for, bfloat16 [O, I]."""
    return codes(w).dense()


def rows(w: LinearWeight, ids_T: Tensor) -> Tensor:
    """Rows of an int8 weight, bfloat16 [T, I]."""
    blocks = unpack_int8(w.weight[ids_T // OUTPUTS], len(ids_T) * OUTPUTS, w.in_features).dense()
    return blocks.view(len(ids_T), OUTPUTS, -1)[torch.arange(len(ids_T)), ids_T % OUTPUTS]


def linear(x_TI: Tensor, w: LinearWeight) -> Tensor:
    """x @ weight.T + bias in float32, [T, O] in x's type. For int4, x is rounded to 8 bits first."""
    if w.format == "int8":
        y_TO = dense_linear(x_TI.float(), unpack(w).float())
    else:
        weight = unpack_int4(w.weight, w.out_features, w.in_features)
        y_TO = dense_linear(round_rows(x_TI), weight.integers().float()) * weight.scales_O
    return (y_TO if w.bias is None else y_TO + w.bias.float()).to(x_TI.dtype)


def round_rows(x_TI: Tensor) -> Tensor:
    """x as int4's products see it, float32: in every row, each 512 inputs are whole multiples of a 127th of their
    largest magnitude."""
    parts = []
    for part in x_TI.float().split(INT4_SPAN, 1):
        largest_T1 = part.abs().amax(1, keepdim=True)
        inverse_T1 = torch.where(largest_T1 < 1e-30, 0.0, 127 / largest_T1)
        parts.append(torch.round(part * inverse_T1) * torch.where(largest_T1 < 1e-30, 0.0, largest_T1 / 127))
    return torch.cat(parts, 1)


def _next(x: Tensor) -> Tensor:
    """The next larger bfloat16 of positive numbers."""
    return (x.view(torch.int16) + 1).view(torch.bfloat16)
