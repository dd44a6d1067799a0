"""Linear layers on the compiled kernels: packed bfloat16 tiles, LoRA inside the product, gradients from the same bytes.

The meaning of each operation stands in `ops/linear.py` and `ops/lora.py`; `csrc/matmul.cpp` does the work. A row's
result does not depend on the other rows, bit for bit. Weights in another format go to the reference.

Shape letters: T rows, I input features, O output features, R rank rows, P parts.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

from tandem.ops import linear as reference
from tandem.ops import lora
from tandem.ops.cpu.library import Library
from tandem.ops.linear import LinearWeight
from tandem.ops.lora import Masks, Stack

TILE_NUMBERS = 512  # of a tile of 32 input by 16 output features
# From here on a weight lies on large pages where the system has them: it is read through in every step.
LARGE_BYTES = 4 * 2**20


class TileLinears:
    """The operations, bound to one library."""

    def __init__(self, library: Library) -> None:
        bind = library.bind
        self._pack = bind("tandem_matmul_pack", "plllp")
        self._forward = bind("tandem_matmul_forward", "plllplpplpllplp")
        self._backward = bind("tandem_matmul_backward", "plllplplpllplp")
        self._unpack = bind("tandem_matmul_unpack", "pllpl")
        self._rows_of = bind("tandem_matmul_rows", "plplp")
        self._outer = bind("tandem_matmul_outer", "plpllllfpl")

    def pack(self, weight_OI: Tensor, bias: Tensor | None = None) -> LinearWeight:
        """A packed copy; drop the original to keep one."""
        if weight_OI.dtype != torch.bfloat16:
            return reference.keep_plain(weight_OI, bias)
        weight_OI = weight_OI if weight_OI.stride(1) == 1 else weight_OI.contiguous()
        out_features, in_features = weight_OI.shape
        shape = (2 * -(-out_features // 32), -(-in_features // 32), TILE_NUMBERS)
        tiles = empty_weight(shape, torch.bfloat16)
        self._pack(weight_OI.data_ptr(), weight_OI.stride(0), out_features, in_features, tiles.data_ptr())
        return LinearWeight(in_features, out_features, bias, tiles, "tiles")

    def embed(self, ids_T: Tensor, w: LinearWeight) -> Tensor:
        if w.format != "tiles":
            return reference.embed(ids_T, w)
        if len(ids_T) and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < w.out_features:
            raise IndexError(f"token ids must be 0 to {w.out_features - 1}")
        rows_TI = torch.empty(len(ids_T), w.in_features, dtype=torch.bfloat16)
        ids_T = ids_T.contiguous()
        self._rows_of(w.weight.data_ptr(), w.in_features, ids_T.data_ptr(), len(ids_T), rows_TI.data_ptr())
        return rows_TI

    def linear(self, x_TI: Tensor, w: LinearWeight) -> Tensor:
        if w.format != "tiles":
            return reference.linear(x_TI, w)
        y_TO = torch.empty(len(x_TI), w.out_features, dtype=torch.bfloat16)
        self._multiply(x_TI, w, y_TO, None, None, None)
        return y_TO

    def adapted(
        self, x_TI: Tensor, w: LinearWeight, stack: Stack, foreign_TR: Tensor | None, masks: Masks | None = None
    ) -> tuple[Tensor, Tensor]:
        if w.format != "tiles" or masks is not None:
            y_TO = self.linear(x_TI, w)
            return y_TO, lora.add(y_TO, x_TI, stack, foreign_TR, masks)
        y_TO = torch.empty(len(x_TI), w.out_features, dtype=torch.bfloat16)
        h_PTR = torch.empty(len(stack.parts), len(x_TI), stack.rank, dtype=torch.bfloat16)
        self._multiply(x_TI, w, y_TO, stack, foreign_TR, h_PTR)
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
        if w.format != "tiles":
            return lora.adapted_gradient(grad_TO, w, stack, foreign_TR, dense, masks)
        inside = stack if masks is None else None
        grad_TO = rows_together(grad_TO)
        grad_TI = torch.empty(len(grad_TO), w.in_features, dtype=torch.bfloat16)
        grad_PTR = None
        if inside is not None:
            grad_PTR = torch.empty(len(inside.parts), len(grad_TO), inside.rank, dtype=torch.bfloat16)
        self._backward(
            grad_TO.data_ptr(), grad_TO.stride(0), len(grad_TO), w.out_features, w.weight.data_ptr(), w.in_features,
            grad_TI.data_ptr(), w.in_features, *lora_arguments(inside, foreign_TR),
            None if grad_PTR is None else grad_PTR.data_ptr(),
        )  # fmt: skip
        if stack is not None and inside is None:
            grad_PTR = lora.add_gradient(grad_TI, grad_TO, stack, foreign_TR, masks)
        return grad_TI, grad_PTR

    def hidden(self, x_TI: Tensor, stack: Stack, foreign_TR: Tensor | None, masks: Masks | None = None) -> Tensor:
        if x_TI.dtype != torch.bfloat16 or masks is not None:
            return lora.hidden(x_TI, stack, foreign_TR, masks)
        x_TI = rows_together(x_TI)
        h_PTR = torch.empty(len(stack.parts), len(x_TI), stack.rank, dtype=torch.bfloat16)
        # A linear without outputs: what LoRA reads is all that is computed.
        self._forward(
            x_TI.data_ptr(), x_TI.stride(0), len(x_TI), x_TI.shape[1], None, 0, None, None, 0,
            *lora_arguments(stack, foreign_TR), h_PTR.data_ptr(),
        )  # fmt: skip
        return h_PTR

    def factor_gradient(self, left_TR: Tensor, right_TW: Tensor, scale: float, out_RW: Tensor) -> None:
        if left_TR.dtype != torch.bfloat16:
            lora.factor_gradient(left_TR, right_TW, scale, out_RW)
            return
        left_TR, right_TW = rows_together(left_TR), rows_together(right_TW)
        self._outer(
            left_TR.data_ptr(), left_TR.stride(0), right_TW.data_ptr(), right_TW.stride(0), len(left_TR),
            left_TR.shape[1], right_TW.shape[1], scale, out_RW.data_ptr(), out_RW.stride(0),
        )  # fmt: skip

    def unpack(self, w: LinearWeight) -> Tensor:
        if w.format != "tiles":
            return reference.unpack(w)
        dense_OI = torch.empty(w.out_features, w.in_features, dtype=torch.bfloat16)
        self._unpack(w.weight.data_ptr(), w.out_features, w.in_features, dense_OI.data_ptr(), w.in_features)
        return dense_OI

    def _multiply(
        self,
        x_TI: Tensor,
        w: LinearWeight,
        y_TO: Tensor,
        stack: Stack | None,
        foreign_TR: Tensor | None,
        h_PTR: Tensor | None,
    ) -> None:
        x_TI = rows_together(x_TI)
        self._forward(
            x_TI.data_ptr(), x_TI.stride(0), len(x_TI), w.in_features, w.weight.data_ptr(), w.out_features,
            None if w.bias is None else w.bias.data_ptr(), y_TO.data_ptr(), w.out_features,
            *lora_arguments(stack, foreign_TR), None if h_PTR is None else h_PTR.data_ptr(),
        )  # fmt: skip


def rows_together(x: Tensor) -> Tensor:
    """Rows may lie apart, what is in a row may not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def lora_arguments(stack: Stack | None, foreign_TR: Tensor | None) -> tuple[int | None, int, int, int | None, int]:
    """parts, num_parts, rank, foreign and foreign_stride of a compiled product."""
    if stack is None:
        return None, 0, 0, None, 0
    foreign = None if foreign_TR is None else foreign_TR.data_ptr()
    return stack.table.data_ptr(), len(stack.parts), stack.rank, foreign, stack.rank


def empty_weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor with anything in it, whose memory is nobody else's."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < LARGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=dtype, count=count).view(shape)
