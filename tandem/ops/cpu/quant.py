"""Linear layers with int8 and int4 weights: the compiled kernels where they were built, else the reference.

What the numbers mean stands in `ops/quant.py`, what the operations mean in `ops/linear.py` and `ops/lora.py`;
`csrc/quant_*.cpp` do the work. A row's result does not depend on the other rows, bit for bit. Gradients come from the
same bytes. Weights in another format, and LoRA, go to `base`.

Shape letters: T rows, I input features, O output features, R rank rows, P parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tandem.ops import lora, quant
from tandem.ops.cpu.library import Library
from tandem.ops.linear import LinearWeight
from tandem.ops.lora import Masks, Stack
from tandem.ops.quant import Format

# Bytes of a block of 32 outputs by the number of steps of 64 inputs.
BLOCK_BYTES: dict[Format, Callable[[int], int]] = {
    "int8": lambda steps: steps * quant.INT8_BYTES,
    "int4": lambda steps: steps * quant.INT4_BYTES + quant.INT4_HEAD,
}


class QuantLinears:
    """The operations for weights of one format. `base` does those of other formats and LoRA's."""

    def __init__(self, format: Format, library: Library | None, base: Any) -> None:
        self.format: Format = format
        self.base = base
        self.is_compiled = library is not None
        if library is not None:
            self._pack = library.bind(f"tandem_{format}_pack", "plllp")
            self._unpack = library.bind(f"tandem_{format}_unpack", "pllpl")
            self._forward = library.bind(f"tandem_{format}_forward", "plllplppl")
            self._backward = library.bind(f"tandem_{format}_backward", "plllplpl")

    def pack(self, weight_OI: Tensor, bias: Tensor | None = None) -> LinearWeight:
        """A quantised copy; drop the original to keep one. ValueError where a number is not finite."""
        if not self.is_compiled or weight_OI.dtype != torch.bfloat16:
            return quant.pack(weight_OI, bias, self.format)
        weight_OI = _rows(weight_OI)
        # The sum is finite only if its terms are; those of a weight never come near the largest float32.
        if not weight_OI.sum(dtype=torch.float32).isfinite():
            raise ValueError(f"a number that is not finite cannot be stored as {self.format}")
        out_features, in_features = weight_OI.shape
        blocks, steps = -(-out_features // quant.OUTPUTS), -(-in_features // quant.INT8_GROUP)
        shape = (blocks, steps, quant.INT8_BYTES) if self.format == "int8" else (blocks, BLOCK_BYTES["int4"](steps))
        packed = torch.empty(shape, dtype=torch.uint8)
        self._pack(weight_OI.data_ptr(), weight_OI.stride(0), out_features, in_features, packed.data_ptr())
        return LinearWeight(in_features, out_features, bias, packed, self.format)

    def unpack(self, w: LinearWeight) -> Tensor:
        if w.format != self.format:
            return self.base.unpack(w)
        if not self.is_compiled:
            return quant.unpack(w)
        dense_OI = torch.empty(w.out_features, w.in_features, dtype=torch.bfloat16)
        self._unpack(w.weight.data_ptr(), w.out_features, w.in_features, dense_OI.data_ptr(), w.in_features)
        return dense_OI

    def linear(self, x_TI: Tensor, w: LinearWeight) -> Tensor:
        if w.format != self.format:
            return self.base.linear(x_TI, w)
        if not self._calls(x_TI):
            return quant.linear(x_TI, w)
        x_TI = _rows(x_TI)
        y_TO = torch.empty(len(x_TI), w.out_features, dtype=torch.bfloat16)
        self._forward(
            x_TI.data_ptr(), x_TI.stride(0), len(x_TI), w.in_features, w.weight.data_ptr(), w.out_features,
            None if w.bias is None else w.bias.data_ptr(), y_TO.data_ptr(), w.out_features,
        )  # fmt: skip
        return y_TO

    def adapted(
        self, x_TI: Tensor, w: LinearWeight, stack: Stack, foreign_TR: Tensor | None, masks: Masks | None = None
    ) -> tuple[Tensor, Tensor]:
        if w.format != self.format:
            return self.base.adapted(x_TI, w, stack, foreign_TR, masks)
        y_TO = self.linear(x_TI, w)
        h_PTR = self.base.hidden(x_TI, stack, foreign_TR, masks)
        for part, h_TR in zip(stack.parts, h_PTR, strict=True):
            y_TO[:, part.offset : part.offset + part.b_RW.shape[1]].addmm_(h_TR, part.b_RW)
        return y_TO, h_PTR

    def adapted_gradient(
        self,
        grad_TO: Tensor,
        w: LinearWeight,
        stack: Stack | None,
        foreign_TR: Tensor | None,
        dense: Callable[[], Tensor],
        masks: Masks | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if w.format != self.format:
            return self.base.adapted_gradient(grad_TO, w, stack, foreign_TR, dense, masks)
        grad_TI = self.gradient(grad_TO, w)
        if stack is None:
            return grad_TI, None
        return grad_TI, lora.add_gradient(grad_TI, grad_TO, stack, foreign_TR, masks)

    def gradient(self, grad_TO: Tensor, w: LinearWeight) -> Tensor:
        """grad_y @ weight, [T, I]: the weight as it is stored, the gradient in full precision."""
        if not self._calls(grad_TO):
            return grad_TO @ quant.unpack(w).to(grad_TO.dtype)
        grad_TO = _rows(grad_TO)
        grad_TI = torch.empty(len(grad_TO), w.in_features, dtype=torch.bfloat16)
        self._backward(
            grad_TO.data_ptr(), grad_TO.stride(0), len(grad_TO), w.out_features, w.weight.data_ptr(), w.in_features,
            grad_TI.data_ptr(), w.in_features,
        )  # fmt: skip
        return grad_TI

    def hidden(self, x_TI: Tensor, stack: Stack, foreign_TR: Tensor | None, masks: Masks | None = None) -> Tensor:
        return self.base.hidden(x_TI, stack, foreign_TR, masks)

    def factor_gradient(self, left_TR: Tensor, right_TW: Tensor, scale: float, out_RW: Tensor) -> None:
        self.base.factor_gradient(left_TR, right_TW, scale, out_RW)

    def _calls(self, x: Tensor) -> bool:
        return self.is_compiled and x.dtype == torch.bfloat16


def _rows(x: Tensor) -> Tensor:
    """Rows may lie apart, what is in a row may not."""
    return x if x.stride(-1) == 1 else x.contiguous()
