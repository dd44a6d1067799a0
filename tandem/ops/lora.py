"""LoRA for a batch whose rows use different adapters: all of them in two matrix products.

Here: the operation. Not here: which adapter sits in which rank rows (`memory/`, `engine/batch.py`), file formats.

Shape letters: T rows, I input features, O output features, R rank rows of all adapters in the batch together.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


def lora(y_TO: Tensor, x_TI: Tensor, a_RI: Tensor, b_RO: Tensor, foreign_TR: Tensor) -> None:
    """y += where(foreign, 0, x @ a.T) @ b, in place; `y_TO` may be a slice of a wider tensor.

    foreign (bool) is true where rank row r is not of row t's adapter; b is finite and holds the scaling already.
    """
    # Filled, not multiplied: what overflowed in one adapter's rows must not reach another's as inf * 0.
    y_TO.addmm_(linear(x_TI, a_RI).masked_fill_(foreign_TR, 0.0), b_RO)
