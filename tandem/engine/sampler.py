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
    random_rows = [i for i, draw in enumerate(draws) if draw.params.temperature > 0]
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
    params = draw.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(draw.tokens)), device=logits_V.device)
        scores = logits_V[seen]
        penalised = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
        logits_V[seen] = penalised
    if (params.presence_penalty or params.frequency_penalty) and draw.num_generated:
        generated = torch.tensor(draw.tokens[draw.num_prompt :], device=logits_V.device)
        ids, counts = generated.unique(return_counts=True)
        logits_V[ids] -= params.presence_penalty + params.frequency_penalty * counts.to(logits_V.dtype)
    for token, bias in params.logit_bias.items():
        logits_V[token] += bias
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
        for i, place in zip(plain, _invert(probs_MV, u_M[plain]), strict=True):
            tokens[i] = place
    if filtered:
        for i, token in zip(filtered, _draw_filtered(scaled_MV[filtered], [draws[i] for i in filtered], u_M[filtered])):
            tokens[i] = token
    return tokens


def _draw_filtered(scaled_MV: Tensor, draws: Sequence[Draw], u_M: Tensor) -> list[int]:
    """Draw among the best candidates. A first look at FIRST_LOOK of them is exact whenever they hold the top-p mass."""
    device, vocab = scaled_MV.device, scaled_MV.shape[1]
    top_k = torch.tensor([min(d.params.top_k, vocab) if d.params.top_k > 0 else vocab for d in draws], device=device)
    top_p = torch.tensor([d.params.top_p for d in draws], device=device)
    min_p = torch.tensor([d.params.min_p for d in draws], device=device)
    total_M = scaled_MV.logsumexp(-1)
    num = min(FIRST_LOOK, vocab)
    best_MK, ids_MK = scaled_MV.topk(num, -1)
    if num < vocab and bool(_needs_more(best_MK, total_M, top_k, top_p, min_p, vocab).any()):
        best_MK, ids_MK = torch.sort(scaled_MV, dim=-1, descending=True, stable=True)
    in_k_MK = torch.arange(best_MK.shape[1], device=device)[None] < top_k[:, None]
    # top-p and min-p act on what top-k left over, renormalised, as in transformers.
    probs_MK = torch.where(in_k_MK, (best_MK - total_M[:, None]).exp(), 0.0)
    share_M = torch.where(top_k < vocab, probs_MK.sum(-1), torch.ones_like(total_M))
    probs_MK = probs_MK / share_M[:, None]
    before_MK = probs_MK.cumsum(-1) - probs_MK
    keep_MK = in_k_MK & (before_MK < top_p[:, None]) & (probs_MK >= min_p[:, None] * probs_MK[:, :1])
    keep_MK[:, 0] = True
    probs_MK = torch.where(keep_MK, probs_MK, 0.0)
    places = _invert(probs_MK, u_M)
    return [int(ids_MK[i, place]) for i, place in enumerate(places)]


def _needs_more(
    best_MK: Tensor, total_M: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, vocab_size: int
) -> Tensor:
    """Whether a row's kept set may reach beyond the K candidates at hand."""
    num = best_MK.shape[1]
    probs_MK = (best_MK - total_M[:, None]).exp()
    holds_p = (top_p < 1) & (probs_MK.sum(-1) >= top_p)
    holds_min_p = (min_p > 0) & (probs_MK[:, -1] < min_p * probs_MK[:, 0])
    # A top-k beyond the candidates also needs the mass of those not seen.
    return ~((top_k <= num) | (top_k == vocab_size) & (holds_p | holds_min_p))


def _invert(probs_MK: Tensor, u_M: Tensor) -> list[int]:
    """Inverse of the cumulative distribution at u (need not be normalised); never a place of probability 0."""
    cumulative_MK = probs_MK.double().cumsum(-1)
    target_M = u_M.to(cumulative_MK.dtype) * cumulative_MK[:, -1]
    places_M = torch.searchsorted(cumulative_MK, target_M[:, None], right=True)[:, 0]
    last_M = (probs_MK > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(places_M, last_M).tolist()


def top_logprobs(logits_MV: Tensor, chosen: Sequence[int], wanted: Sequence[int]) -> list[TopLogprobs]:
    """Log-probability and rank of `chosen` in each row, and the `wanted` best alternatives."""
    logprobs_MV = logits_MV.log_softmax(-1)
    chosen_M = torch.tensor(chosen, device=logits_MV.device)
    own_M = logprobs_MV.gather(1, chosen_M[:, None])
    ranks = ((logprobs_MV > own_M).sum(-1) + 1).tolist()
    best, ids = logprobs_MV.topk(max(max(wanted), 1), -1)
    best_rows, id_rows, own = best.tolist(), ids.tolist(), own_M[:, 0].tolist()
    return [
        TopLogprobs(own[i], ranks[i], id_rows[i][: wanted[i]], best_rows[i][: wanted[i]]) for i in range(len(chosen))
    ]
