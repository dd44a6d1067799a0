"""From logits to tokens: the likeliest of each row, and a draw from its distribution.

Here: their meaning, written with torch's own operations. Not here: what a request may ask for (`engine/sampler.py`).

Shape letters: M rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Candidates looked at before a full sort: top-p of a peaked distribution rarely needs more.
FIRST_LOOK = 256


def argmax(logits_MV: Tensor) -> Tensor:
    """The first of the largest of each row, int64 [M]; of a row with NaN, any token."""
    return logits_MV.argmax(-1)


def draw(logits_MV: Tensor, temperature_M: Tensor, u_M: Tensor) -> Tensor:
    """Inverse of the cumulative distribution of softmax(logits / temperature) at u in [0, 1), int64 [M].

    Temperatures are float32 and above 0, u float64. Never a token of probability 0, unless there is no other.
    """
    return invert(torch.softmax(logits_MV.float() / temperature_M[:, None], -1), u_M)


def invert(probs_MV: Tensor, u_M: Tensor) -> Tensor:
    """Inverse of the cumulative distribution at u (need not be normalised); never a place of probability 0."""
    cumulative_MV = probs_MV.double().cumsum(-1)
    target_M = u_M.to(cumulative_MV.dtype) * cumulative_MV[:, -1]
    places_M = torch.searchsorted(cumulative_MV, target_M[:, None], right=True)[:, 0]
    last_M = (probs_MV > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(places_M, last_M)


def draw_filtered(
    logits_MV: Tensor, temperature_M: Tensor, top_k_M: Tensor, top_p_M: Tensor, min_p_M: Tensor, u_M: Tensor
) -> Tensor:
    """`draw` among the likeliest only: the first `top_k`; of these, renormalised, those before which the others have
    less than `top_p` together, and that have at least `min_p` times the likeliest's probability. The likeliest stays.

    Equal ones count in the order of their ids, and u goes from the likeliest down. top_k (int64) is from 1 to V;
    top_p and min_p are float32. Returns int64 [M].
    """
    scaled_MV = logits_MV.float() / temperature_M[:, None]
    filters = _Filters(top_k_M, top_p_M, min_p_M, scaled_MV.logsumexp(-1))
    vocab = scaled_MV.shape[1]
    values_MK, ids_MK = scaled_MV.topk(min(FIRST_LOOK, vocab), -1)
    # Equal values in the order of their ids, as in the full sort: a draw must not depend on how topk breaks ties.
    ids_MK, order_MK = ids_MK.sort(-1)
    values_MK, order_MK = torch.sort(values_MK.gather(1, order_MK), dim=-1, descending=True, stable=True)
    probs_MK = filters.kept(values_MK)
    tokens_M = ids_MK.gather(1, order_MK).gather(1, invert(probs_MK, u_M)[:, None])[:, 0]
    if vocab > FIRST_LOOK:
        reaches_end_M = ((probs_MK > 0) & (values_MK == values_MK[:, -1:])).any(-1)
        # A top-k beyond the first look also needs the mass of what was not seen.
        for i in (reaches_end_M | (top_k_M > FIRST_LOOK) & (top_k_M < vocab)).nonzero()[:, 0].tolist():
            values_1V, ids_1V = torch.sort(scaled_MV[i : i + 1], dim=-1, descending=True, stable=True)
            place = invert(filters.row(i).kept(values_1V), u_M[i : i + 1])
            tokens_M[i] = ids_1V[0, place]
    return tokens_M


@dataclass(frozen=True, slots=True)
class _Filters:
    """top-k, top-p and min-p of some rows, and the log of each row's whole mass."""

    top_k_M: Tensor
    top_p_M: Tensor
    min_p_M: Tensor
    total_M: Tensor

    def row(self, i: int) -> _Filters:
        return _Filters(*(x[i : i + 1] for x in (self.top_k_M, self.top_p_M, self.min_p_M, self.total_M)))

    def kept(self, values_MK: Tensor) -> Tensor:
        """Probabilities of the candidates (scaled logits, best first), 0 for those filtered away.

        top-p and min-p act on what top-k left over, renormalised, as in transformers; the best one always stays.
        """
        in_k_MK = torch.arange(values_MK.shape[1], device=values_MK.device)[None] < self.top_k_M[:, None]
        probs_MK = torch.where(in_k_MK, (values_MK - self.total_M[:, None]).exp(), 0.0)
        is_cut_M = self.top_k_M <= values_MK.shape[1]
        probs_MK = probs_MK / torch.where(is_cut_M, probs_MK.sum(-1), 1.0)[:, None]
        before_MK = probs_MK.cumsum(-1) - probs_MK
        keep_MK = in_k_MK & (before_MK < self.top_p_M[:, None])
        keep_MK &= probs_MK >= self.min_p_M[:, None] * probs_MK[:, :1]
        keep_MK[:, 0] = True
        return torch.where(keep_MK, probs_MK, 0.0)
