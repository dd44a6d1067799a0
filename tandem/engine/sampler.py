"""Logits -> tokens and log-probabilities. Knows rows by their parameters and their history, nothing of blocks or text.

Shape letters: M sampled rows, V vocabulary, K candidates.
Random numbers depend on (seed, choice, position) only, so a request draws the same ones whatever its batch mates,
and a preempted row draws the same ones again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.work import SamplingParams, TopLogprobs

# Candidates looked at before a full sort: top-p of a peaked distribution rarely needs more.
FIRST_LOOK = 256
# A smaller temperature overflows the logits; the draw would be the largest one anyway.
GREEDY_BELOW = 1e-5
MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """One row to sample: its parameters, choice index, history (prompt, then generated ids), where generation began."""

    params: SamplingParams
    seed: int
    index: int
    tokens: Sequence[int]
    num_prompt: int
    eos_token_ids: Sequence[int] = ()

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) from a counter: splitmix64 (Steele, Lea, Flood 2014) over seed, choice and position."""
    x = _mix(_mix(_mix(seed & MASK64) ^ (index & MASK64)) ^ (position & MASK64))
    return (x >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def sample(logits_MV: Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[TopLogprobs | None]]:
    """Choose one token per row of float32 `logits_MV` (changed in place), in this order: penalties, logit_bias,
    min_tokens, temperature, top-k, top-p, min-p. Log-probabilities are of the model's own logits, before all of these.
    """
    wanted = [i for i, draw in enumerate(draws) if draw.params.logprobs is not None]
    raw_MV = logits_MV[wanted] if wanted else None
    for i, draw in enumerate(draws):
        _adjust(logits_MV[i], draw)
    greedy_M = logits_MV.argmax(-1)
    chosen = greedy_M.tolist()
    random_rows = [i for i, draw in enumerate(draws) if draw.params.temperature >= GREEDY_BELOW]
    if random_rows:
        picked = _draw_rows(logits_MV[random_rows], [draws[i] for i in random_rows])
        for i, token in zip(random_rows, picked, strict=True):
            chosen[i] = token
    reports: list[TopLogprobs | None] = [None] * len(chosen)
    if raw_MV is not None:
        found = top_logprobs(raw_MV, [chosen[i] for i in wanted], [draws[i].params.logprobs or 0 for i in wanted])
        for i, report in zip(wanted, found, strict=True):
            reports[i] = report
    return chosen, reports


def _adjust(logits_V: Tensor, draw: Draw) -> None:
    params, device = draw.params, logits_V.device
    if params.repetition_penalty != 1.0:
        seen_V = torch.bincount(torch.tensor(draw.tokens, device=device), minlength=len(logits_V)) > 0
        penalty = params.repetition_penalty
        penalised_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
        torch.where(seen_V, penalised_V, logits_V, out=logits_V)
    if (params.presence_penalty or params.frequency_penalty) and draw.num_generated:
        generated = torch.tensor(draw.tokens[draw.num_prompt :], device=device)
        counts_V = torch.bincount(generated, minlength=len(logits_V))
        logits_V -= params.presence_penalty * (counts_V > 0) + params.frequency_penalty * counts_V
    if params.logit_bias:
        logits_V[list(params.logit_bias)] += torch.tensor(list(params.logit_bias.values()), device=device)
    if draw.num_generated < params.min_tokens:
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else draw.eos_token_ids)}
        if ends:
            logits_V[list(ends)] = -torch.inf


def _draw_rows(logits_MV: Tensor, draws: Sequence[Draw]) -> list[int]:
    device = logits_MV.device
    temperature_M = torch.tensor([d.params.temperature for d in draws], device=device)
    scaled_MV = logits_MV / temperature_M[:, None]
    u_M = torch.tensor([uniform(d.seed, d.index, d.num_generated) for d in draws], device=device, dtype=torch.float64)
    filtered = [i for i, d in enumerate(draws) if d.params.top_k > 0 or d.params.top_p < 1 or d.params.min_p > 0]
    plain = [i for i in range(len(draws)) if i not in set(filtered)]
    tokens = [0] * len(draws)
    if plain:
        probs_MV = torch.softmax(scaled_MV[plain], -1)
        for i, place in zip(plain, _invert(probs_MV, u_M[plain]).tolist(), strict=True):
            tokens[i] = place
    if filtered:
        for i, token in zip(filtered, _draw_filtered(scaled_MV[filtered], [draws[i] for i in filtered], u_M[filtered])):
            tokens[i] = token
    return tokens


def _draw_filtered(scaled_MV: Tensor, draws: Sequence[Draw], u_M: Tensor) -> list[int]:
    """Draw among the kept candidates of each row; a row whose kept ones may reach beyond the first look is sorted."""
    filters = _Filters.of(draws, scaled_MV)
    vocab = scaled_MV.shape[1]
    values_MK, ids_MK = scaled_MV.topk(min(FIRST_LOOK, vocab), -1)
    # Equal values in the order of their ids, as in the full sort: a draw must not depend on how topk breaks ties.
    ids_MK, order_MK = ids_MK.sort(-1)
    values_MK, order_MK = torch.sort(values_MK.gather(1, order_MK), dim=-1, descending=True, stable=True)
    probs_MK = filters.kept(values_MK)
    tokens = ids_MK.gather(1, order_MK).gather(1, _invert(probs_MK, u_M)[:, None])[:, 0].tolist()
    if vocab > FIRST_LOOK:
        reaches_end_M = ((probs_MK > 0) & (values_MK == values_MK[:, -1:])).any(-1)
        # A top-k beyond the first look also needs the mass of what was not seen.
        for i in (reaches_end_M | (filters.top_k_M > FIRST_LOOK) & (filters.top_k_M < vocab)).nonzero()[:, 0].tolist():
            values_1V, ids_1V = torch.sort(scaled_MV[i : i + 1], dim=-1, descending=True, stable=True)
            place = _invert(filters.row(i).kept(values_1V), u_M[i : i + 1])
            tokens[i] = int(ids_1V[0, place])
    return tokens


@dataclass(frozen=True, slots=True)
class _Filters:
    """top-k, top-p and min-p of some rows, and the log of each row's whole mass."""

    top_k_M: Tensor
    top_p_M: Tensor
    min_p_M: Tensor
    total_M: Tensor

    @classmethod
    def of(cls, draws: Sequence[Draw], scaled_MV: Tensor) -> _Filters:
        device, vocab = scaled_MV.device, scaled_MV.shape[1]
        return cls(
            torch.tensor([min(d.params.top_k or vocab, vocab) for d in draws], device=device),
            torch.tensor([d.params.top_p for d in draws], device=device),
            torch.tensor([d.params.min_p for d in draws], device=device),
            scaled_MV.logsumexp(-1),
        )

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


def _invert(probs_MK: Tensor, u_M: Tensor) -> Tensor:
    """Inverse of the cumulative distribution at u (need not be normalised); never a place of probability 0."""
    cumulative_MK = probs_MK.double().cumsum(-1)
    target_M = u_M.to(cumulative_MK.dtype) * cumulative_MK[:, -1]
    places_M = torch.searchsorted(cumulative_MK, target_M[:, None], right=True)[:, 0]
    last_M = (probs_MK > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(places_M, last_M)


def top_logprobs(logits_MV: Tensor, chosen: Sequence[int], wanted: Sequence[int]) -> list[TopLogprobs]:
    """Log-probability and rank of `chosen` in each row, and the `wanted` best alternatives."""
    logprobs_MV = logits_MV.log_softmax(-1)
    chosen_M = torch.tensor(chosen, device=logits_MV.device)
    own_M = logprobs_MV.gather(1, chosen_M[:, None])
    ranks = ((logprobs_MV > own_M).sum(-1) + 1).tolist()
    best, ids = logprobs_MV.topk(min(max(max(wanted), 1), logprobs_MV.shape[1]), -1)
    best_rows, id_rows, own = best.tolist(), ids.tolist(), own_M[:, 0].tolist()
    return [
        TopLogprobs(own[i], ranks[i], id_rows[i][: wanted[i]], best_rows[i][: wanted[i]]) for i in range(len(chosen))
    ]
