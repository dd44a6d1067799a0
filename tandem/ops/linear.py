"""Linear layers: one copy of a weight, in the layout that the device multiplies fastest.

Here: packing, multiplying, unpacking. Not here: where weights come from (`model/weights.py`), LoRA (`ops/lora.py`).

Shape letters: T rows, I input features, O output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.nn.functional import linear as dense_linear

# Libraries have other kernels for fewer rows, which add up in another order.
MIN_ROWS = 4


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """The weight of one linear layer. `weight` is [out_features, in_features], or packed: oneDNN's form, tiles
    (`ops/cpu/linear.py`), or the bytes of int8 and int4 weights (`ops/quant.py`)."""

    in_features: int
    out_features: int
    bias: Tensor | None
    weight: Tensor
    format: Literal["plain", "onednn", "tiles", "int8", "int4"]

    @property
    def nbytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.nbytes
        if self.format in ("int8", "int4"):
            return self.weight.nbytes + bias
        return self.in_features * self.out_features * self.weight.dtype.itemsize + bias


def can_pack(device: str, dtype: torch.dtype) -> bool:
    """Whether this machine multiplies by oneDNN-packed weights of this type."""
    if device != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def keep_plain(weight_OI: Tensor, bias: Tensor | None = None) -> LinearWeight:
    """Use the weight as it is, without copying: any device, any dtype, shared with other users of the tensor."""
    out_features, in_features = weight_OI.shape
    return LinearWeight(in_features, out_features, bias, weight_OI, "plain")


def pack(weight_OI: Tensor, bias: Tensor | None = None) -> LinearWeight:
    """A packed copy where that is faster (`can_pack`), else the weight itself. Drop the original to keep one copy."""
    if not can_pack(weight_OI.device.type, weight_OI.dtype):
        return keep_plain(weight_OI, bias)
    out_features, in_features = weight_OI.shape
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), None)
    return LinearWeight(in_features, out_features, bias, packed, "onednn")


def linear(x_TI: Tensor, w: LinearWeight) -> Tensor:
    """x @ weight.T + bias: [T, O]. Give at least MIN_ROWS rows where equal rows must be equal in any batch."""
    if w.format == "onednn":
        return torch.ops.mkldnn._linear_pointwise(x_TI, w.weight, w.bias, "none", [], "")
    return dense_linear(x_TI, w.weight, w.bias)


def embed(ids_T: Tensor, w: LinearWeight) -> Tensor:
    """Rows `ids_T` (int64) of the weight, [T, I]: a token embedding, which may be the head's weight too."""
    return embedding(ids_T, w.weight)


def unpack(w: LinearWeight) -> Tensor:
    """The dense [O, I] weight: a copy when packed, the weight itself otherwise."""
    return w.weight.to_dense() if w.format == "onednn" else w.weight
