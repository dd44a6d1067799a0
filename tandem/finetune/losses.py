"""Losses over final hidden states, in chunks of tokens: the logits of a whole sequence never exist.

Here: what a loss is and its gradient. Not here: the head that makes logits (`model/decoder.py`), which tokens count
(`data.py`).

Shape letters: M tokens that count, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy

# float32 logits at once, in numbers.
CHUNK_LOGITS = 2**23


class Loss(NamedTuple):
    """Per token that counts: -log p of its target, and whether the target was the likeliest token."""

    nll_M: Tensor
    is_best_M: Tensor


def cross_entropy(
    x_MD: Tensor,
    targets_M: Tensor,
    weights_M: Tensor,
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    grad_MD: Tensor | None,
) -> Loss:
    """-log softmax(head(x))[target]; the gradient of sum(weight * that) with respect to x goes into `grad_MD` (None:
    not wanted). `head` maps [M, D] to float32 logits [M, V] and is differentiable."""
    found: list[Tensor] = []
    best: list[Tensor] = []
    rows = max(1, CHUNK_LOGITS // vocab_size)
    for start in range(0, len(x_MD), rows):
        chunk = slice(start, start + rows)
        with torch.set_grad_enabled(grad_MD is not None):
            x = x_MD[chunk].detach().requires_grad_(grad_MD is not None)
            logits_MV = head(x)
            nll_M = torch_cross_entropy(logits_MV, targets_M[chunk], reduction="none")
            weighted = (nll_M * weights_M[chunk]).sum()
        if grad_MD is not None:
            (grad_MD[chunk],) = torch.autograd.grad(weighted, x)
        found.append(nll_M.detach())
        best.append(logits_MV.detach().argmax(-1) == targets_M[chunk])
    return Loss(torch.cat(found), torch.cat(best))
