"""The small operations between the matrix products: norms, rotary positions, gated activations, soft caps.

Here: their meaning, written with torch's own operations. Not here: which model uses which (`model/spec.py`).

Shape letters: T rows, H heads, D features (of a head, or of the hidden state), R rotated features, I intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, plus_one: bool) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, times weight (`plus_one`: times 1 + weight, in float32).

    Differentiable with respect to x only: norms are frozen.
    """
    if x.requires_grad:
        return _RmsNorm.apply(x, weight_D, eps, plus_one)
    if plus_one:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        return (normed * (1.0 + weight_D.float())).to(x.dtype)
    return functional.rms_norm(x, weight_D.shape, weight_D, eps)


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, plus_one: bool
) -> tuple[Tensor, Tensor]:
    """x + residual, and its `rms_norm`."""
    total_TD = x_TD + residual_TD
    return total_TD, rms_norm(total_TD, weight_D, eps, plus_one)


def rope(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the first R features of every head; feature i turns with feature i + R/2. The others pass through.

    cos and sin hold each angle twice, once per half, in x's dtype; the sign of the rotation is in `sin_TR`: its first
    half is -sin (see `rope_angles`).
    """
    num_rotated = cos_TR.shape[-1]
    cos_T1R, sin_T1R = cos_TR[:, None], sin_TR[:, None]
    if num_rotated == x_THD.shape[-1]:
        return _rotate(x_THD, cos_T1R, sin_T1R)
    rotated = _rotate(x_THD[..., :num_rotated], cos_T1R, sin_T1R)
    return torch.cat((rotated, x_THD[..., num_rotated:]), -1)


def norm_rope(
    x_THD: Tensor,
    num_queries: int,
    query_D: Tensor | None,
    key_D: Tensor | None,
    angles: tuple[Tensor, Tensor] | None,
    eps: float,
    plus_one: bool,
    in_place: bool = False,
) -> Tensor:
    """Queries, then keys, normed with their own weights and rotated; what is None is left out.

    `in_place` writes the result over x, for a caller that needs x no more and no gradient.
    """
    y_THD = x_THD
    if query_D is not None and key_D is not None:
        q_THD, k_THD = x_THD[:, :num_queries], x_THD[:, num_queries:]
        y_THD = torch.cat((rms_norm(q_THD, query_D, eps, plus_one), rms_norm(k_THD, key_D, eps, plus_one)), 1)
    if angles is not None:
        y_THD = rope(y_THD, *angles)
    if in_place:
        return x_THD if y_THD is x_THD else x_THD.copy_(y_THD)
    return y_THD


def rope_angles(positions_T: Tensor, frequencies_F: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin as `rope` wants them: [T, 2F] each, computed in float32, times `scale`."""
    angles_TF = positions_T[:, None].float() * frequencies_F
    cos_TF, sin_TF = angles_TF.cos() * scale, angles_TF.sin() * scale
    return torch.cat((cos_TF, cos_TF), -1).to(dtype), torch.cat((-sin_TF, sin_TF), -1).to(dtype)


def silu_mul(gate_up_T2I: Tensor) -> Tensor:
    """silu(gate) * up, gate being the first half of the features: [T, I]."""
    if gate_up_T2I.requires_grad:
        return _SiluMul.apply(gate_up_T2I)
    gate_TI, up_TI = gate_up_T2I.chunk(2, -1)
    return functional.silu(gate_TI) * up_TI


def gelu_tanh_mul(gate_up_T2I: Tensor) -> Tensor:
    """gelu(gate) * up with the tanh approximation, gate being the first half of the features: [T, I]."""
    gate_TI, up_TI = gate_up_T2I.chunk(2, -1)
    return functional.gelu(gate_TI, approximate="tanh") * up_TI


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)."""
    return cap * torch.tanh(x / cap)


def cross_entropy_(
    logits_MV: Tensor, targets_M: Tensor, weights_M: Tensor | None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """-log p of every row's target in float32, and whether it is the (first of the) likeliest, as bool: [M] each.

    With weights, the logits become the gradient of sum(weight * nll) with respect to them. `softcap`: p is of the
    soft-capped logits, the gradient still of the given ones. Raises ValueError for targets that are no tokens.
    """
    check_targets(targets_M, logits_MV.shape[1])
    capped_MV = logits_MV.float()
    if softcap is not None:
        capped_MV = softcap * torch.tanh(capped_MV / softcap)
    nll_M = functional.cross_entropy(capped_MV, targets_M, reduction="none")
    is_best_M = logits_MV.argmax(-1) == targets_M  # not of the capped ones, which may be equal to the last bit
    if weights_M is not None:
        grad_MV = capped_MV.softmax(-1)
        grad_MV[torch.arange(len(targets_M), device=targets_M.device), targets_M] -= 1.0
        grad_MV *= weights_M[:, None].float()
        if softcap is not None:
            grad_MV *= 1.0 - (capped_MV / softcap).square()
        logits_MV.copy_(grad_MV)
    return nll_M, is_best_M


def check_targets(targets_M: Tensor, vocab: int) -> None:
    """Raises ValueError unless all are from 0 to below `vocab`."""
    if targets_M.dtype != torch.int64 or (len(targets_M) and not 0 <= targets_M.min() <= targets_M.max() < vocab):
        raise ValueError(f"targets must be int64 token ids below {vocab}")


def _rotate(x_THR: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    half = x_THR.shape[-1] // 2
    swapped = torch.cat((x_THR[..., half:], x_THR[..., :half]), -1)
    return torch.addcmul(x_THR * cos_T1R, swapped, sin_T1R)


class _RmsNorm(torch.autograd.Function):
    """Autograd's own way through `rms_norm` takes twice as many passes over the activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, plus_one: bool) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.eps, ctx.plus_one = eps, plus_one
        return rms_norm(x.detach(), weight_D, eps, plus_one)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D = ctx.saved_tensors
        x32 = x.float()
        scaled = gradients[0] * (1.0 + weight_D.float() if ctx.plus_one else weight_D.float())
        inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + ctx.eps)
        along = (scaled * x32).mean(-1, keepdim=True) * inverse.square()
        return scaled.addcmul_(x32, along, value=-1).mul_(inverse).to(x.dtype), None, None, None


class _SiluMul(torch.autograd.Function):
    """Keeps nothing but its input, and writes both gradients where they belong."""

    @staticmethod
    def forward(ctx: Any, gate_up_T2I: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_T2I)
        return silu_mul(gate_up_T2I.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor]:
        (gate_up_T2I,) = ctx.saved_tensors
        gate_TI, up_TI = gate_up_T2I.chunk(2, -1)
        found = torch.empty_like(gate_up_T2I)
        grad_gate_TI, grad_up_TI = found.chunk(2, -1)
        torch.mul(gradients[0], functional.silu(gate_TI), out=grad_up_TI)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up_TI, gate_TI, grad_input=grad_gate_TI)
        return (found,)
