"""LoRA for a batch whose rows use different adapters: all of them in two matrix products.

Here: the operation. Not here: which adapter sits in which rank rows (`memory/`, `engine/batch.py`), file formats.

Shape letters: T rows, I input features, O output features, R rank rows of all adapters in the batch together.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lora(y_TO: Tensor, x_TI: Tensor, a_RI: Tensor, b_RO: Tensor, mask_TR: Tensor) -> None:
    """y += where(mask, x @ a.T, 0) @ b, in place; `y_TO` may be a slice of a wider tensor.

    mask (bool) is true where rank row r belongs to the adapter of row t; b is finite and holds the scaling already.
    """
    # Chosen, not multiplied: what overflowed in one adapter's rows must not reach another's as inf * 0.
    y_TO.addmm_(torch.where(mask_TR, x_TI @ a_RI.T, 0.0), b_RO)
