"""Logits -> tokens and log-probabilities. Knows rows by their parameters and their history, nothing of blocks or text.

Shape letters: M sampled rows, V vocabulary, K candidates.
Random numbers depend on (seed, choice, position) only, so a request draws the same ones whatever its batch mates,
and a preempted row draws the same ones again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tandem.ops import sampling
from tandem.work import SamplingParams, TopLogprobs

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


@dataclass(frozen=True, slots=True)
class Head:
    """How tokens come from what the model's head makes of a row: the ops for it, and the way to float32 logits, where
    these are more than a wider format (`is_plain` False: soft-capped)."""

    argmax: Callable[[Tensor], Tensor] = sampling.argmax
    draw: Callable[[Tensor, Tensor, Tensor], Tensor] = sampling.draw
    draw_filtered: Callable[..., Tensor] = sampling.draw_filtered
    finish: Callable[[Tensor], Tensor] = Tensor.float
    is_plain: bool = True


_HEAD = Head()


def sample(
    raw_MV: Tensor, draws: Sequence[Draw], head: Head = _HEAD
) -> tuple[list[int], list[TopLogprobs | None]]:
    """Choose one token per row of logits (float32 ones may be changed in place), in this order: penalties, logit_bias,
    min_tokens, temperature, top-k, top-p, min-p. Log-probabilities are of the model's own logits, before all of these.

    Rows of which no logit is changed are read as the head left them: making float32 logits of a large vocabulary and
    going over them costs a good part of a decode step.
    """
    chosen = [0] * len(draws)
    reports: list[TopLogprobs | None] = [None] * len(draws)
    greedy: list[int] = []
    drawn: list[int] = []
    others: list[int] = []
    for i, draw in enumerate(draws):
        if not _is_simple(draw):
            others.append(i)
        elif draw.params.temperature < GREEDY_BELOW:
            greedy.append(i)
        else:
            (drawn if head.is_plain else others).append(i)
    if greedy:
        _place(chosen, greedy, head.argmax(_rows(raw_MV, greedy)).tolist())
    if drawn:
        _place(chosen, drawn, _draw_rows(_rows(raw_MV, drawn), [draws[i] for i in drawn], head))
    if others:
        tokens, found = _sample_adjusted(head.finish(_rows(raw_MV, others)), [draws[i] for i in others], head)
        _place(chosen, others, tokens)
        _place(reports, others, found)
    return chosen, reports


def _is_simple(draw: Draw) -> bool:
    """Nothing changes the row's logits, and nobody wants to know its log-probabilities."""
    p = draw.params
    return (
        p.logprobs is None
        and p.repetition_penalty == 1.0
        and not (p.presence_penalty or p.frequency_penalty or p.logit_bias)
        and draw.num_generated >= p.min_tokens
    )


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _rows(x_MV: Tensor, wanted: Sequence[int]) -> Tensor:
    return x_MV if len(wanted) == len(x_MV) else x_MV[wanted]


def _place(into: list[Any], places: Sequence[int], values: Sequence[Any]) -> None:
    for place, value in zip(places, values, strict=True):
        into[place] = value


def _temperatures(draws: Sequence[Draw], device: torch.device) -> tuple[Tensor, Tensor]:
    """Temperature and random number of each row."""
    return (
        torch.tensor([d.params.temperature for d in draws], device=device),
        torch.tensor(
            [uniform(d.seed, d.index, d.num_generated) for d in draws], device=device, dtype=torch.float64
        ),
    )


def _sample_adjusted(
    logits_MV: Tensor, draws: Sequence[Draw], head: Head
) -> tuple[list[int], list[TopLogprobs | None]]:
    """The general way, on float32 logits, which are changed in place."""
    wanted = [i for i, draw in enumerate(draws) if draw.params.logprobs is not None]
    raw_MV = logits_MV[wanted] if wanted else None
    for i, draw in enumerate(draws):
        _adjust(logits_MV[i], draw)
    chosen = head.argmax(logits_MV).tolist()
    random_rows = [i for i, draw in enumerate(draws) if draw.params.temperature >= GREEDY_BELOW]
    if random_rows:
        _place(chosen, random_rows, _draw_rows(logits_MV[random_rows], [draws[i] for i in random_rows], head))
    reports: list[TopLogprobs | None] = [None] * len(chosen)
    if raw_MV is not None:
        found = top_logprobs(raw_MV, [chosen[i] for i in wanted], [draws[i].params.logprobs or 0 for i in wanted])
        _place(reports, wanted, found)
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


def _draw_rows(logits_MV: Tensor, draws: Sequence[Draw], head: Head) -> list[int]:
    """Rows that are drawn: those with filters apart from those without."""
    tokens = [0] * len(draws)
    filtered = [i for i, d in enumerate(draws) if _is_filtered(d.params)]
    plain = [i for i, d in enumerate(draws) if not _is_filtered(d.params)]
    device, vocab = logits_MV.device, logits_MV.shape[1]
    if plain:
        picked = [draws[i] for i in plain]
        _place(tokens, plain, head.draw(_rows(logits_MV, plain), *_temperatures(picked, device)).tolist())
    if filtered:
        picked = [draws[i] for i in filtered]
        temperature_M, u_M = _temperatures(picked, device)
        limits = (
            torch.tensor([min(p.top_k, vocab) if p.top_k > 0 else vocab for p in (d.params for d in picked)]),
            torch.tensor([d.params.top_p for d in picked]),
            torch.tensor([d.params.min_p for d in picked]),
        )
        found_M = head.draw_filtered(_rows(logits_MV, filtered), temperature_M, *(x.to(device) for x in limits), u_M)
        _place(tokens, filtered, found_M.tolist())
    return tokens


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
