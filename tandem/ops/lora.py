"""LoRA for a batch whose rows use different adapters: all of them in two matrix products.

Here: the operation. Not here: which adapter sits in which rank rows (`memory/`, `engine/batch.py`), file formats.

Shape letters: T rows, I input features, O output features, R rank rows of all adapters in the batch together.
"""

from __future__ import annotations

from torch import Tensor


def lora(y_TO: Tensor, x_TI: Tensor, a_RI: Tensor, b_RO: Tensor, mask_TR: Tensor) -> None:
    """y += ((x @ a.T) * mask) @ b, in place; `y_TO` may be a slice of a wider tensor.

    mask is 1 where rank row r belongs to the adapter of row t and 0 elsewhere; b holds the adapter's scaling already.
    """
    y_TO.addmm_((x_TI @ a_RI.T) * mask_TR, b_RO)
