"""Linear layers with int8 and int4 weights: the compiled kernels where they were built, else the reference.

What the numbers mean stands in `ops/quant.py`, what the operations mean in `ops/linear.py` and `ops/lora.py`;
`csrc/quant_*.cpp` do the work. A row's result does not depend on the other rows, bit for bit. Gradients come from the
same bytes, LoRA is inside both. Weights in another format go to `base`.

Shape letters: T rows, I input features, O output features, R rank rows, P parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tandem.ops import lora, quant
from tandem.ops.cpu.library import Library
from tandem.ops.cpu.linear import empty_weight, lora_arguments, rows_together
from tandem.ops.linear import LinearWeight
from tandem.ops.lora import Masks, Stack
from tandem.ops.quant import FORMATS, HEAD, Format


class QuantLinears:
    """The operations for models of `dtype` whose weights are packed as `format`. `base` does those of plain and packed
    bfloat16 weights, and LoRA's."""

    def __init__(self, format: Format, library: Library | None, base: Any, dtype: torch.dtype) -> None:
        self.format: Format = format
        self.base = base
        self.dtype = dtype
        self.is_compiled = library is not None and dtype == torch.bfloat16
        if library is not None:
            bind = library.bind
            names: tuple[str, ...] = FORMATS
            self._pack = {name: bind(f"tandem_{name}_pack", "plllp") for name in names}
            self._unpack = {name: bind(f"tandem_{name}_unpack", "pllpl") for name in names}
            self._forward = {name: bind(f"tandem_{name}_forward", "plllplpplpllplp") for name in names}
            self._backward = {name: bind(f"tandem_{name}_backward", "plllplplpllplp") for name in names}
            self._rows = bind("tandem_int8_rows", "plplp")

    def pack(self, weight_OI: Tensor, bias: Tensor | None = None) -> LinearWeight:
        """A quantised copy; drop the original to keep one. ValueError where a number is not finite."""
        return self._packed(weight_OI, bias, self.format)

    def pack_head(self, weight_OI: Tensor) -> LinearWeight:
        """A quantised copy for logits, of which rows can be looked up; as `pack`."""
        return self._packed(weight_OI, None, HEAD)

    def _packed(self, weight_OI: Tensor, bias: Tensor | None, format: Format) -> LinearWeight:
        # The sum is finite only if its terms are; those of a weight never come near the largest float32.
        if not weight_OI.sum(dtype=torch.float32).isfinite():
            raise ValueError(f"a number that is not finite cannot be stored as {format}")
        if not self.is_compiled:
            return quant.pack(weight_OI, bias, format)
        weight_OI = rows_together(weight_OI)
        out_features, in_features = weight_OI.shape
        packed = empty_weight(quant.packed_shape(out_features, in_features, format), torch.uint8)
        self._pack[format](weight_OI.data_ptr(), weight_OI.stride(0), out_features, in_features, packed.data_ptr())
        return LinearWeight(in_features, out_features, bias, packed, format)

    def unpack(self, w: LinearWeight) -> Tensor:
        if w.format not in FORMATS:
            return self.base.unpack(w)
        if not self.is_compiled:
            return quant.unpack(w).to(self.dtype)
        dense_OI = torch.empty(w.out_features, w.in_features, dtype=torch.bfloat16)
        self._unpack[w.format](w.weight.data_ptr(), w.out_features, w.in_features, dense_OI.data_ptr(), w.in_features)
        return dense_OI

    def embed(self, ids_T: Tensor, w: LinearWeight) -> Tensor:
        """Rows of a weight that `pack_head` made."""
        if w.format not in FORMATS:
            return self.base.embed(ids_T, w)
        if len(ids_T) and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < w.out_features:
            raise IndexError(f"token ids must be 0 to {w.out_features - 1}")
        if not self.is_compiled:
            return quant.rows(w, ids_T).to(self.dtype)
        ids_T = ids_T.contiguous()
        rows_TI = torch.empty(len(ids_T), w.in_features, dtype=torch.bfloat16)
        self._rows(w.weight.data_ptr(), w.in_features, ids_T.data_ptr(), len(ids_T), rows_TI.data_ptr())
        return rows_TI

    def linear(self, x_TI: Tensor, w: LinearWeight) -> Tensor:
        if w.format not in FORMATS:
            return self.base.linear(x_TI, w)
        if not self.is_compiled:
            return quant.linear(x_TI, w)
        return self._multiply(x_TI, w, None, None, None)

    def adapted(
        self, x_TI: Tensor, w: LinearWeight, stack: Stack, foreign_TR: Tensor | None, masks: Masks | None = None
    ) -> tuple[Tensor, Tensor]:
        if w.format not in FORMATS:
            return self.base.adapted(x_TI, w, stack, foreign_TR, masks)
        if not self.is_compiled or masks is not None:
            y_TO = self.linear(x_TI, w)
            return y_TO, lora.add(y_TO, x_TI, stack, foreign_TR, masks)
        h_PTR = torch.empty(len(stack.parts), len(x_TI), stack.rank, dtype=torch.bfloat16)
        return self._multiply(x_TI, w, stack, foreign_TR, h_PTR), h_PTR

    def adapted_gradient(
        self,
        grad_TO: Tensor,
        w: LinearWeight,
        stack: Stack | None,
        foreign_TR: Tensor | None,
        dense: Callable[[], Tensor],
        masks: Masks | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if w.format not in FORMATS:
            return self.base.adapted_gradient(grad_TO, w, stack, foreign_TR, dense, masks)
        inside = stack if self.is_compiled and masks is None else None
        grad_PTR = None
        if inside is not None:
            grad_PTR = torch.empty(len(inside.parts), len(grad_TO), inside.rank, dtype=torch.bfloat16)
        grad_TI = self._gradient(grad_TO, w, inside, foreign_TR, grad_PTR)
        if stack is not None and inside is None:
            grad_PTR = lora.add_gradient(grad_TI, grad_TO, stack, foreign_TR, masks)
        return grad_TI, grad_PTR

    def gradient(self, grad_TO: Tensor, w: LinearWeight) -> Tensor:
        """grad_y @ weight, [T, I]: the weight as it is stored, the gradient in full precision."""
        return self._gradient(grad_TO, w, None, None, None)

    def hidden(self, x_TI: Tensor, stack: Stack, foreign_TR: Tensor | None, masks: Masks | None = None) -> Tensor:
        return self.base.hidden(x_TI, stack, foreign_TR, masks)

    def factor_gradient(self, left_TR: Tensor, right_TW: Tensor, scale: float, out_RW: Tensor) -> None:
        self.base.factor_gradient(left_TR, right_TW, scale, out_RW)

    def _multiply(
        self, x_TI: Tensor, w: LinearWeight, stack: Stack | None, foreign_TR: Tensor | None, h_PTR: Tensor | None
    ) -> Tensor:
        x_TI = rows_together(x_TI)
        y_TO = torch.empty(len(x_TI), w.out_features, dtype=torch.bfloat16)
        self._forward[w.format](
            x_TI.data_ptr(), x_TI.stride(0), len(x_TI), w.in_features, w.weight.data_ptr(), w.out_features,
            None if w.bias is None else w.bias.data_ptr(), y_TO.data_ptr(), w.out_features,
            *lora_arguments(stack, foreign_TR), None if h_PTR is None else h_PTR.data_ptr(),
        )  # fmt: skip
        return y_TO

    def _gradient(
        self, grad_TO: Tensor, w: LinearWeight, stack: Stack | None, foreign_TR: Tensor | None, grad_PTR: Tensor | None
    ) -> Tensor:
        if not self.is_compiled:
            return grad_TO @ quant.unpack(w).to(grad_TO.dtype)
        grad_TO = rows_together(grad_TO)
        grad_TI = torch.empty(len(grad_TO), w.in_features, dtype=torch.bfloat16)
        self._backward[w.format](
            grad_TO.data_ptr(), grad_TO.stride(0), len(grad_TO), w.out_features, w.weight.data_ptr(), w.in_features,
            grad_TI.data_ptr(), w.in_features, *lora_arguments(stack, foreign_TR),
            None if grad_PTR is None else grad_PTR.data_ptr(),
        )  # fmt: skip
        return grad_TI
