"""The compiled small operations: each stands in for the function of its name in `ops/pointwise.py`, which says what it
means; here is only what a call must get right.

Tensors are float32 or bfloat16, weights and angles of the same dtype. Rows may be strided. Arithmetic is float32, and
a row's result has the same bits whatever the number of rows and threads.

Shape letters: those of `ops/pointwise.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tandem.ops import pointwise
from tandem.ops.cpu.library import Library

MAX_HEAD = 1024  # features of a head that is normed and rotated in one pass
_Functions = Mapping[torch.dtype, Callable[..., None]]


class Pointwise:
    """The functions of `ops.pointwise` on one library."""

    def __init__(self, library: Library) -> None:
        def both(name: str, signature: str) -> _Functions:
            return {
                torch.float32: library.bind(f"tandem_{name}_f32", signature),
                torch.bfloat16: library.bind(f"tandem_{name}_bf16", signature),
            }

        self._rms_norm = both("rms_norm", "ppp" + "l" * 5 + "ff")
        self._rms_norm_backward = both("rms_norm_backward", "pppp" + "l" * 7 + "ff")
        self._add_rms_norm = both("add_rms_norm", "ppppp" + "l" * 4 + "ff")
        self._rope = both("rope", "pppppp" + "l" * 9 + "ff")
        self._rope_backward = both("rope_backward", "ppppppp" + "l" * 9 + "ff")
        self._silu_mul = both("silu_mul", "pplll")
        self._silu_mul_backward = both("silu_mul_backward", "ppp" + "l" * 4)
        self._gelu_tanh_mul = both("gelu_tanh_mul", "pplll")
        self._gelu_tanh_mul_backward = both("gelu_tanh_mul_backward", "ppp" + "l" * 4)
        self._cross_entropy = both("cross_entropy", "ppppplllf")

    # ------------------------------------------------------------ norms

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float, plus_one: bool) -> Tensor:
        """Differentiable with respect to x only."""
        if x.requires_grad:
            return _RmsNorm.apply(x, self, weight_D, eps, plus_one)
        y = x.new_empty(x.shape)
        x, width, *extent, row_stride, head_stride = _heads(x)
        self._rms_norm[x.dtype](
            x.data_ptr(), _weight(weight_D, x.dtype, width), y.data_ptr(), *extent, row_stride, head_stride, width, eps,
            plus_one,
        )  # fmt: skip
        return y

    def rms_norm_backward(self, grad: Tensor, x: Tensor, weight_D: Tensor, eps: float, plus_one: bool) -> Tensor:
        """The gradient of x, given that of the norm's output."""
        y = x.new_empty(x.shape)
        x, width, *extent, row_stride, head_stride = _heads(x)
        grad, *strides = _like(grad, x)
        self._rms_norm_backward[x.dtype](
            grad.data_ptr(), x.data_ptr(), _weight(weight_D, x.dtype, width), y.data_ptr(), *extent, *strides,
            row_stride, head_stride, width, eps, plus_one,
        )  # fmt: skip
        return y

    def add_rms_norm(
        self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, plus_one: bool
    ) -> tuple[Tensor, Tensor]:
        """In a graph it is an addition and a norm."""
        if x_TD.requires_grad or residual_TD.requires_grad:
            total_TD = x_TD + residual_TD
            return total_TD, self.rms_norm(total_TD, weight_D, eps, plus_one)
        total_TD, y_TD = x_TD.new_empty(x_TD.shape), x_TD.new_empty(x_TD.shape)
        x_TD, width, rows, _, stride, _ = _heads(x_TD, 2)
        residual_TD, residual_stride, _ = _like(residual_TD, x_TD)
        self._add_rms_norm[x_TD.dtype](
            x_TD.data_ptr(), residual_TD.data_ptr(), _weight(weight_D, x_TD.dtype, width), total_TD.data_ptr(),
            y_TD.data_ptr(), rows, stride, residual_stride, width, eps, plus_one,
        )  # fmt: skip
        return total_TD, y_TD

    # ------------------------------------------------------------ rotary positions

    def rope(self, x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        return self.norm_rope(x_THD, x_THD.shape[1], None, None, (cos_TR, sin_TR), 0.0, False)

    def norm_rope(
        self,
        x_THD: Tensor,
        num_queries: int,
        query_D: Tensor | None,
        key_D: Tensor | None,
        angles: tuple[Tensor, Tensor] | None,
        eps: float,
        plus_one: bool,
        in_place: bool = False,
    ) -> Tensor:
        if x_THD.requires_grad:
            return _NormRope.apply(x_THD, self, num_queries, query_D, key_D, angles, eps, plus_one)
        if in_place and x_THD.stride(-1) != 1:
            raise ValueError("norm_rope in place: the features of a head must be neighbours in memory")
        y_THD = x_THD if in_place else x_THD.new_empty(x_THD.shape)
        x_THD, width, rows, heads, *strides = _heads(x_THD)
        cos, sin, rotated = _angles(angles, x_THD.dtype, rows, width)
        query, key = _head_norms(query_D, key_D, x_THD.dtype, width)
        self._rope[x_THD.dtype](
            x_THD.data_ptr(), y_THD.data_ptr(), cos, sin, query, key, rows, heads, num_queries, width, rotated,
            *strides, *(strides if in_place else (heads * width, width)), eps, plus_one,
        )  # fmt: skip
        return y_THD

    def norm_rope_backward(
        self,
        grad_THD: Tensor,
        x_THD: Tensor,
        num_queries: int,
        query_D: Tensor | None,
        key_D: Tensor | None,
        angles: tuple[Tensor, Tensor] | None,
        eps: float,
        plus_one: bool,
    ) -> Tensor:
        """The gradient of x, given that of `norm_rope`'s output. Without norms the values of x do not matter."""
        y_THD = x_THD.new_empty(x_THD.shape)
        x_THD, width, rows, heads, *strides = _heads(x_THD)
        grad_THD, *grad_strides = _like(grad_THD, x_THD)
        cos, sin, rotated = _angles(angles, x_THD.dtype, rows, width)
        query, key = _head_norms(query_D, key_D, x_THD.dtype, width)
        self._rope_backward[x_THD.dtype](
            grad_THD.data_ptr(), x_THD.data_ptr(), y_THD.data_ptr(), cos, sin, query, key, rows, heads, num_queries,
            width, rotated, *grad_strides, *strides, eps, plus_one,
        )  # fmt: skip
        return y_THD

    rope_angles = staticmethod(pointwise.rope_angles)

    # ------------------------------------------------------------ gated activations

    def silu_mul(self, gate_up_T2I: Tensor) -> Tensor:
        return self._gated(gate_up_T2I, self._silu_mul, self._silu_mul_backward)

    def gelu_tanh_mul(self, gate_up_T2I: Tensor) -> Tensor:
        return self._gated(gate_up_T2I, self._gelu_tanh_mul, self._gelu_tanh_mul_backward)

    def _gated(self, gate_up_T2I: Tensor, forward: _Functions, backward: _Functions) -> Tensor:
        if gate_up_T2I.requires_grad:
            return _Gated.apply(gate_up_T2I, forward, backward)
        return _gated(gate_up_T2I, forward)

    softcap = staticmethod(pointwise.softcap)

    # ------------------------------------------------------------ training

    def cross_entropy_(
        self, logits_MV: Tensor, targets_M: Tensor, weights_M: Tensor | None, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        num_rows, vocab = logits_MV.shape
        pointwise.check_targets(targets_M, vocab)
        if logits_MV.stride(1) != 1 or len(targets_M) != num_rows:
            raise ValueError("cross_entropy_ needs a target a row, whose logits must be neighbours in memory")
        targets_M = targets_M.contiguous()
        weights = None if weights_M is None else weights_M.float().expand(num_rows).contiguous()
        nll_M, is_best_M = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.bool)
        self._cross_entropy[logits_MV.dtype](
            logits_MV.data_ptr(), targets_M.data_ptr(), None if weights is None else weights.data_ptr(),
            nll_M.data_ptr(), is_best_M.data_ptr(), num_rows, logits_MV.stride(0), vocab, softcap or 0.0,
        )  # fmt: skip
        return nll_M, is_best_M


def _heads(x: Tensor, most: int = 3) -> tuple[Tensor, int, int, int, int, int]:
    """x with dense features: itself, its features, rows, heads, and the strides of these two. Two axes are rows of one
    head; more axes than `most` are rows, too."""
    shape, strides = x.shape, x.stride()
    if strides[-1] == 1 or shape[-1] == 1:
        if len(shape) == 2:
            return x, shape[1], shape[0], 1, strides[0], 0
        if len(shape) == 3 == most:
            return x, shape[2], shape[0], shape[1], strides[0], strides[1]
    x = x.contiguous()
    return _heads(x if 2 <= len(shape) <= most else x.view(-1, shape[-1]), most)


def _like(other: Tensor, x: Tensor) -> tuple[Tensor, int, int]:
    """A gradient or summand of x with dense features, and its strides."""
    if other.dtype != x.dtype or other.numel() != x.numel():
        raise ValueError(f"expected {x.dtype} {tuple(x.shape)}, got {other.dtype} {tuple(other.shape)}")
    other, *_, row_stride, head_stride = _heads(other.reshape(x.shape), x.dim())
    return other, row_stride, head_stride


def _weight(weight_D: Tensor, dtype: torch.dtype, width: int) -> int:
    """Its address."""
    if weight_D.dtype != dtype or weight_D.numel() != width or not weight_D.is_contiguous():
        raise ValueError(
            f"expected {dtype} weights for rows of {width}, got {weight_D.dtype} {tuple(weight_D.shape)}, "
            f"strides {weight_D.stride()}"
        )
    return weight_D.data_ptr()


def _angles(
    angles: tuple[Tensor, Tensor] | None, dtype: torch.dtype, rows: int, width: int
) -> tuple[int | None, int | None, int]:
    """The addresses of cos and sin, and how many features are rotated."""
    if angles is None:
        return None, None, 0
    cos_TR, sin_TR = angles
    rotated = cos_TR.shape[-1]
    if cos_TR.dtype != dtype or sin_TR.dtype != dtype or not cos_TR.numel() == sin_TR.numel() == rows * rotated:
        raise ValueError(f"expected {dtype} angles of {rows} rows, got {cos_TR.dtype} {tuple(cos_TR.shape)}")
    if rotated % 2 or rotated > width or not (cos_TR.is_contiguous() and sin_TR.is_contiguous()):
        raise ValueError(f"cannot rotate {rotated} of {width} features with strides {cos_TR.stride()}")
    return cos_TR.data_ptr(), sin_TR.data_ptr(), rotated


def _head_norms(
    query_D: Tensor | None, key_D: Tensor | None, dtype: torch.dtype, width: int
) -> tuple[int | None, int | None]:
    if query_D is None or key_D is None:
        return None, None
    if width > MAX_HEAD:
        raise ValueError(f"heads of {width} features are too long for norm_rope: {MAX_HEAD} at most")
    return _weight(query_D, dtype, width), _weight(key_D, dtype, width)


def _gated(gate_up_T2I: Tensor, forward: _Functions) -> Tensor:
    shape = gate_up_T2I.shape
    y = gate_up_T2I.new_empty(*shape[:-1], shape[-1] // 2)
    x, width, rows, _, stride, _ = _heads(gate_up_T2I, 2)
    forward[x.dtype](x.data_ptr(), y.data_ptr(), rows, stride, width // 2)
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ops: Pointwise, weight_D: Tensor, eps: float, plus_one: bool) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.rest = (eps, plus_one)
        ctx.ops = ops
        return ops.rms_norm(x.detach(), weight_D, eps, plus_one)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D = ctx.saved_tensors
        return ctx.ops.rms_norm_backward(gradients[0], x, weight_D, *ctx.rest), None, None, None, None


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, ops: Pointwise, *rest: Any) -> Tensor:
        ctx.save_for_backward(x_THD)
        ctx.ops, ctx.rest = ops, rest
        return ops.norm_rope(x_THD.detach(), *rest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x_THD,) = ctx.saved_tensors
        return ctx.ops.norm_rope_backward(gradients[0], x_THD, *ctx.rest), *[None] * 7


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_T2I: Tensor, forward: _Functions, backward: _Functions) -> Tensor:
        ctx.save_for_backward(gate_up_T2I)
        ctx.backward_functions = backward
        return _gated(gate_up_T2I.detach(), forward)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up_T2I,) = ctx.saved_tensors
        found = gate_up_T2I.new_empty(gate_up_T2I.shape)
        x, _, _, _, stride, _ = _heads(gate_up_T2I, 2)
        grad, width, rows, _, grad_stride, _ = _heads(gradients[0], 2)
        ctx.backward_functions[x.dtype](
            grad.data_ptr(), x.data_ptr(), found.data_ptr(), rows, grad_stride, stride, width
        )
        return found, None, None
