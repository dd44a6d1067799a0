"""LoRA inside a linear layer, for a batch whose rows use different adapters, and its gradients.

Here: what the operations mean, written with torch's own. Not here: which adapter sits in which rank rows (`memory/`,
`engine/batch.py`), whose gradients they are (`model/gradients.py`), file formats.

Shape letters: T rows, I input features, O output features of a linear, W those of one part, R rank rows of all adapters
in the batch together, P parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from tandem.ops.linear import LinearWeight, linear


@dataclass(frozen=True, slots=True)
class Part:
    """What adapters add to the outputs offset : offset + W of a linear; b holds the scaling already and is finite."""

    offset: int
    a_RI: Tensor
    b_RW: Tensor


class Stack:
    """The parts of one linear, all with the same rank rows. `table` is where they lie, for compiled kernels."""

    __slots__ = ("parts", "rank", "table")

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.rank = len(parts[0].a_RI)
        assert all(len(p.a_RI) == len(p.b_RW) == self.rank for p in parts)
        assert all(t.is_contiguous() for p in parts for t in (p.a_RI, p.b_RW))
        self.table = torch.tensor([(p.a_RI.data_ptr(), p.b_RW.data_ptr(), p.offset, p.b_RW.shape[1]) for p in parts])


# For each part what its input is multiplied by before a (dropout), or None.
Masks = Sequence[Tensor | None]


def adapted(
    x_TI: Tensor, w: LinearWeight, stack: Stack, foreign_TR: Tensor | None, masks: Masks | None = None
) -> tuple[Tensor, Tensor]:
    """y = linear(x, w), plus h @ b of every part in its columns, with h = where(foreign, 0, (x * mask) @ a.T).

    foreign (bool, None: nowhere) is true where rank row r is not of row t's adapter. Returns y_TO and h_PTR.
    """
    y_TO = linear(x_TI, w)
    return y_TO, add(y_TO, x_TI, stack, foreign_TR, masks)


def add(y_TO: Tensor, x_TI: Tensor, stack: Stack, foreign_TR: Tensor | None, masks: Masks | None = None) -> Tensor:
    """What `adapted` does after the linear: y is changed in place, h_PTR returned."""
    h_PTR = hidden(x_TI, stack, foreign_TR, masks)
    for part, h_TR in zip(stack.parts, h_PTR, strict=True):
        y_TO[:, part.offset : part.offset + part.b_RW.shape[1]].addmm_(h_TR, part.b_RW)
    return h_PTR


def hidden(x_TI: Tensor, stack: Stack, foreign_TR: Tensor | None, masks: Masks | None = None) -> Tensor:
    """h of `adapted`, [P, T, R]."""
    found = []
    for part, mask_TI in zip(stack.parts, masks or [None] * len(stack.parts), strict=True):
        found.append(dense_linear(x_TI if mask_TI is None else x_TI * mask_TI, part.a_RI))
    return _own(torch.stack(found), foreign_TR)


def adapted_gradient(
    grad_TO: Tensor,
    w: LinearWeight,
    stack: Stack | None,
    foreign_TR: Tensor | None,
    dense: Callable[[], Tensor],
    masks: Masks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of x, [T, I], and that of h, [P, T, R], from that of y. `dense` gives the weight as [O, I]."""
    grad_TI = grad_TO @ dense()
    return grad_TI, None if stack is None else add_gradient(grad_TI, grad_TO, stack, foreign_TR, masks)


def add_gradient(
    grad_TI: Tensor, grad_TO: Tensor, stack: Stack, foreign_TR: Tensor | None, masks: Masks | None = None
) -> Tensor:
    """The parts' share of `adapted_gradient`: the gradient of x is changed in place, that of h returned."""
    columns = [grad_TO[:, part.offset : part.offset + part.b_RW.shape[1]] for part in stack.parts]
    pairs = zip(columns, stack.parts, strict=True)
    grad_PTR = _own(torch.stack([grad_TW @ part.b_RW.T for grad_TW, part in pairs]), foreign_TR)
    for part, grad_TR, mask_TI in zip(stack.parts, grad_PTR, masks or [None] * len(columns), strict=True):
        if mask_TI is None:
            grad_TI.addmm_(grad_TR, part.a_RI)
        else:
            grad_TI.addcmul_(grad_TR @ part.a_RI, mask_TI)
    return grad_PTR


def factor_gradient(left_TR: Tensor, right_TW: Tensor, scale: float, out_RW: Tensor) -> None:
    """out += scale * left.T @ right, out being float32: the gradient of a (left: of h, right: x) or of b (h, of y)."""
    out_RW.add_(left_TR.T @ right_TW, alpha=scale)


def _own(h_PTR: Tensor, foreign_TR: Tensor | None) -> Tensor:
    # Filled, not multiplied: what overflowed in one adapter's rows must not reach another's as inf * 0.
    return h_PTR if foreign_TR is None else h_PTR.masked_fill_(foreign_TR, 0.0)
