"""Losses over final hidden states, in chunks of tokens: the logits of a whole sequence never exist.

Here: what a loss is and its gradient. Every loss is a function of log-probabilities, and each of those depends on one
hidden state only. So one pass of the head gives every token's log-probability and its gradient; once all tokens of a
microbatch are there, `Objective.finish` turns them into losses and scales each token's gradient by its loss's slope.
Losses of whole sequences (gspo, dpo) need no second pass either. Not here: the head that makes logits
(`model/decoder.py`), what a pass must look like (`inputs.py`).

Shape letters: N tokens of a microbatch, M that the head looks at, T those of one operation with a weight, S sequences,
E soft targets, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tandem.finetune.inputs import LOSSES, POLICY, resolved
from tandem.ops.pointwise import softcap
from tandem.work import Example, Pass, PassReport

# Logits at once, in numbers.
CHUNK_LOGITS = 2**23


class Terms(NamedTuple):
    """One operation's tokens that count, in float64. `sequence_T` numbers their examples from 0 on."""

    logprobs_T: Tensor
    weights_T: Tensor
    old_T: Tensor
    advantages_T: Tensor
    sequence_T: Tensor
    num_sequences: int

    def per_sequence(self, values_T: Tensor) -> Tensor:
        """Sums over the tokens of each sequence, [S]."""
        return values_T.new_zeros(self.num_sequences).index_add(0, self.sequence_T, values_T)


Params = Mapping[str, float]
# The loss, differentiable with respect to the log-probabilities, and sums worth knowing.
Formula = Callable[[Terms, Params], tuple[Tensor, dict[str, Tensor]]]


def cross_entropy(t: Terms, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    """-weight * log p. With soft targets, log p stands for sum_k soft_weight_k * log p_k."""
    return -(t.weights_T * t.logprobs_T).sum(), {}


def importance_sampling(t: Terms, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    """-r * A with r = p / p_old: REINFORCE, corrected for the policy that sampled."""
    ratio_T = (t.logprobs_T - t.old_T).exp()
    return -(t.weights_T * ratio_T * t.advantages_T).sum(), _policy_metrics(t, ratio_T)


def ppo(t: Terms, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(r * A, clip(r) * A) (Schulman et al. 2017, arXiv 1707.06347)."""
    ratio_T = (t.logprobs_T - t.old_T).exp()
    clipped_T = _clip(ratio_T, params)
    gain_T = torch.minimum(ratio_T * t.advantages_T, clipped_T * t.advantages_T)
    return -(t.weights_T * gain_T).sum(), _policy_metrics(t, ratio_T, clipped_T)


def cispo(t: Terms, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    """-sg(clip(r)) * log p * A: clips the weight and keeps every token's gradient (MiniMax 2025, arXiv 2506.13585)."""
    ratio_T = (t.logprobs_T.detach() - t.old_T).exp()
    clipped_T = _clip(ratio_T, params)
    return -(t.weights_T * clipped_T * t.logprobs_T * t.advantages_T).sum(), _policy_metrics(t, ratio_T, clipped_T)


def dro(t: Terms, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    """-(log p * A - beta / 2 * (log p - log p_old)^2) (Richemond et al. 2024, arXiv 2405.19107)."""
    apart_T = t.logprobs_T - t.old_T
    gain_T = t.logprobs_T * t.advantages_T - 0.5 * params["beta"] * apart_T**2
    return -(t.weights_T * gain_T).sum(), _policy_metrics(t, apart_T.exp())


def gspo(t: Terms, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    """ppo with one ratio for a sequence, the geometric mean of its tokens' (Zheng et al. 2025, arXiv 2507.18071, the
    token-level form: every token takes its sequence's ratio and the gradient of its own log-probability)."""
    apart_T = t.logprobs_T.detach() - t.old_T
    mean_S = t.per_sequence(apart_T) / t.per_sequence(torch.ones_like(apart_T)).clamp(min=1)
    ratio_T = (mean_S[t.sequence_T] + t.logprobs_T - t.logprobs_T.detach()).exp()
    clipped_T = _clip(ratio_T, params)
    gain_T = torch.minimum(ratio_T * t.advantages_T, clipped_T * t.advantages_T)
    return -(t.weights_T * gain_T).sum(), _policy_metrics(t, ratio_T, clipped_T)


def dpo(t: Terms, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    """-log sigmoid(beta * (what the preferred answer gained over the reference - what the other gained)), smoothed
    where labels are noisy (Rafailov et al. 2023, arXiv 2305.18290; Mitchell 2023). The old log-probabilities are the
    reference's; `scale` multiplies the loss of every pair."""
    beta, smoothing = params["beta"], params["label_smoothing"]
    reward_S = beta * t.per_sequence(t.weights_T * (t.logprobs_T - t.old_T))
    chosen_P, rejected_P = reward_S[0::2], reward_S[1::2]
    margin_P = chosen_P - rejected_P
    loss_P = -(1 - smoothing) * logsigmoid(margin_P) - smoothing * logsigmoid(-margin_P)
    return params["scale"] * loss_P.sum(), {
        "num_pairs": torch.tensor(float(len(margin_P))),
        "num_preferred": (margin_P > 0).float().sum(),
        "chosen_reward": chosen_P.sum(),
        "rejected_reward": rejected_P.sum(),
    }


FORMULAS: dict[str, Formula] = {
    "cross_entropy": cross_entropy, "importance_sampling": importance_sampling, "ppo": ppo, "cispo": cispo,
    "dro": dro, "gspo": gspo, "dpo": dpo,
}  # fmt: skip


def _clip(ratio_T: Tensor, params: Params) -> Tensor:
    return ratio_T.clamp(params["clip_low_threshold"], params["clip_high_threshold"])


def _policy_metrics(t: Terms, ratio_T: Tensor, clipped_T: Tensor | None = None) -> dict[str, Tensor]:
    found = {"ratio": ratio_T.sum(), "kl_from_sampler": (t.old_T - t.logprobs_T).sum()}
    if clipped_T is not None:
        found["num_clipped"] = (ratio_T != clipped_T).float().sum()
    return found


# ---------------------------------------------------------------- a microbatch


class Part(NamedTuple):
    """Rows start:stop of a microbatch: example `number` of an operation."""

    op_id: int
    op: Pass
    number: int
    start: int
    stop: int

    @property
    def example(self) -> Example:
        return self.op.examples[self.number]


@dataclass(slots=True)
class Totals:
    """What the microbatches of one operation add up to."""

    loss: float = 0.0
    nll: float = 0.0
    num_tokens: int = 0
    num_correct: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)

    def report(self, seconds: float) -> PassReport:
        return PassReport(
            loss=self.loss, nll=self.nll, num_tokens=self.num_tokens, num_correct=self.num_correct, seconds=seconds,
            logprobs=[self.logprobs[i] for i in sorted(self.logprobs)], metrics=self.metrics,
        )  # fmt: skip


class Head(NamedTuple):
    """The way from hidden states to log-probabilities.

    `raw_logits`: [M, D] -> [M, V], differentiable; its backward does not look at what it returned. Logits are these
    after the soft cap, if there is one. `cross_entropy_`: the operation of `ops.Kernels`.
    """

    raw_logits: Callable[[Tensor], Tensor]
    cross_entropy_: Callable[..., tuple[Tensor, Tensor]]
    softcap: float | None
    vocab_size: int


class Objective:
    """The losses of a microbatch: `score` its M tokens in slices, then `finish`.

    The first `num_graded` of the M count in a loss; only the log-probabilities of the others are of interest.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device) -> None:
        self._parts = list(parts)
        self._device = device
        graded, others = [], []
        for part in parts:
            for i, weight in enumerate(part.example.weights):
                if weight:
                    graded.append(part.start + i)
                elif part.op.wants_logprobs:
                    others.append(part.start + i)
        assert len(graded) + len(others) == sum(part.op.num_counted(part.number) for part in parts)
        self.num_graded = len(graded)
        self.rows_M = self._ints(graded + others)
        targets_N = self._ints([token for part in parts for token in part.example.targets])
        self._weights_N = self._floats([weight for part in parts for weight in part.example.weights])
        self._targets_M = targets_N[self.rows_M]
        self._soft = (
            _SoftTargets(parts, graded + others, device) if any(p.example.soft_targets for p in parts) else None
        )
        self._logprobs_M = torch.zeros(len(self.rows_M), device=device)
        self._is_best_M = torch.zeros(len(self.rows_M), dtype=torch.bool, device=device)

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _floats(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)

    def score(self, start: int, stop: int, x_MD: Tensor, head: Head, grad_MD: Tensor | None) -> None:
        """Log-probabilities of tokens start:stop, whose hidden states are `x_MD`; their gradients with respect to these
        go into `grad_MD` (None: not wanted)."""
        rows = max(1, CHUNK_LOGITS // head.vocab_size)
        at = start
        while at < stop:
            is_graded = grad_MD is not None and at < self.num_graded
            end = min(at + rows, stop, self.num_graded if at < self.num_graded else stop)
            part = slice(at - start, end - start)
            with torch.set_grad_enabled(is_graded):
                x = x_MD[part].detach().requires_grad_(is_graded)
                raw_MV = head.raw_logits(x)
            score = self._score if self._soft is None else self._soft_score
            grad_MV = score(at, end, raw_MV, head, is_graded)
            if grad_MD is not None:
                grad_MD[part] = 0.0 if grad_MV is None else torch.autograd.grad(raw_MV, x, grad_MV)[0]
            at = end

    def _score(self, start: int, stop: int, raw_MV: Tensor, head: Head, is_graded: bool) -> Tensor | None:
        """Keeps the log-probabilities of tokens start:stop; their gradient with respect to the raw logits is written
        over these."""
        targets_M, raw_MV = self._targets_M[start:stop], raw_MV.detach()
        weights_M = raw_MV.new_full((stop - start,), -1.0, dtype=torch.float32) if is_graded else None
        nll_M, self._is_best_M[start:stop] = head.cross_entropy_(raw_MV, targets_M, weights_M, head.softcap)
        self._logprobs_M[start:stop] = -nll_M
        return raw_MV if is_graded else None

    def _soft_score(self, start: int, stop: int, raw_MV: Tensor, head: Head, is_graded: bool) -> Tensor | None:
        """The same where some tokens have soft targets, by autograd."""
        assert self._soft is not None
        with torch.set_grad_enabled(is_graded):
            leaf_MV = raw_MV.detach().requires_grad_(is_graded)
            logits_MV = leaf_MV.float() if head.softcap is None else softcap(leaf_MV.float(), head.softcap)
            logprobs_M = self._soft.mixed(logits_MV, start, stop)
        self._logprobs_M[start:stop] = logprobs_M.detach()
        self._is_best_M[start:stop] = raw_MV.detach().argmax(-1) == self._targets_M[start:stop]
        return torch.autograd.grad(logprobs_M.sum(), leaf_MV)[0] if is_graded else None

    def finish(
        self, totals: Mapping[int, Totals], references: Mapping[int, Mapping[int, Sequence[float]]],
        grad_ND: Tensor | None,
    ) -> None:  # fmt: skip
        """All tokens are scored: add up the losses, and multiply each token's gradient by its loss's slope.

        `references`: for dpo operations without log-probabilities of their own, those of the reference, by example.
        Operations without totals are not wanted any more; their gradients become zero.
        """
        num_rows = len(self._weights_N)
        logprobs_N, slopes_N = self._weights_N.new_zeros(num_rows), self._weights_N.new_zeros(num_rows)
        is_best_N = torch.zeros(num_rows, dtype=torch.bool, device=self._device)
        logprobs_N[self.rows_M], is_best_N[self.rows_M] = self._logprobs_M, self._is_best_M
        for parts in _by_operation(self._parts):
            first = parts[0]
            if (found := totals.get(first.op_id)) is None:
                continue
            span = slice(first.start, parts[-1].stop)
            terms, at_T = self._terms(parts, logprobs_N, references.get(first.op_id))
            if len(at_T):
                self._add(first.op, terms, slopes_N[span], at_T, found)
                found.nll -= float(terms.logprobs_T.sum())
                found.num_tokens += len(at_T)
                found.num_correct += int(is_best_N[span][at_T].sum())
            if first.op.wants_logprobs or first.op.frozen:
                for part in parts:
                    found.logprobs[part.number] = logprobs_N[part.start : part.stop].tolist()
        if self._soft is not None:
            self._soft.report(totals)
        if grad_ND is not None:
            graded_M = self.rows_M[: self.num_graded]
            grad_ND[graded_M] *= slopes_N[graded_M, None].to(grad_ND.dtype)

    def _terms(
        self, parts: Sequence[Part], logprobs_N: Tensor, reference: Mapping[int, Sequence[float]] | None
    ) -> tuple[Terms, Tensor]:
        """An operation's tokens that count, and where they are among its rows."""
        span, need = slice(parts[0].start, parts[-1].stop), LOSSES[parts[0].op.loss]
        weights = self._weights_N[span]
        at_T = weights.nonzero()[:, 0]
        none = weights.new_zeros(0)
        old = advantages = none
        if need.fields == POLICY:
            old = self._floats([value for part in parts for value in part.example.logprobs])[at_T]
            advantages = self._floats([value for part in parts for value in part.example.advantages])[at_T]
        elif parts[0].op.group_size > 1:
            known = [reference[part.number] if reference else part.example.logprobs for part in parts]
            old = self._floats([value for values in known for value in values])[at_T]
        lengths = self._ints([part.stop - part.start for part in parts])
        sequence = torch.arange(len(parts), device=self._device).repeat_interleave(lengths)
        logprobs, weights, old, advantages = (
            t.double() for t in (logprobs_N[span][at_T], weights[at_T], old, advantages)
        )  # fmt: skip
        return Terms(logprobs, weights, old, advantages, sequence[at_T], len(parts)), at_T

    def _add(self, op: Pass, terms: Terms, slopes: Tensor, at_T: Tensor, found: Totals) -> None:
        with torch.enable_grad():
            logprobs_T = terms.logprobs_T.clone().requires_grad_()
            loss, metrics = FORMULAS[op.loss](terms._replace(logprobs_T=logprobs_T), resolved(op))
        slopes[at_T] = torch.autograd.grad(loss, logprobs_T)[0].to(slopes.dtype)
        found.loss += float(loss.detach())
        for name, value in metrics.items():
            found.metrics[name] = found.metrics.get(name, 0.0) + float(value.detach())


def _by_operation(parts: Sequence[Part]) -> list[list[Part]]:
    """Neighbours of one operation together."""
    groups: list[list[Part]] = []
    for part in parts:
        if groups and groups[-1][0].op_id == part.op_id:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


class _SoftTargets:
    """Several weighted targets a position: E of them, those of one of the M tokens after the other's.

    A token without soft targets has its target, with weight 1.
    """

    def __init__(self, parts: Sequence[Part], rows: Sequence[int], device: torch.device) -> None:
        at_row = {part.start + i: (part, i) for part in parts for i in range(part.stop - part.start)}
        self._places: list[tuple[Part, int]] = [at_row[row] for row in rows]
        targets: list[int] = []
        weights: list[float] = []
        self._starts = [0]
        for part, i in self._places:
            example = part.example
            soft = bool(example.soft_targets)
            targets += example.soft_targets[i] if soft else [example.targets[i]]
            weights += example.soft_weights[i] if soft else [1.0]
            self._starts.append(len(targets))
        starts_M = torch.tensor(self._starts, device=device)
        self._token_E = torch.arange(len(rows), device=device).repeat_interleave(starts_M.diff())
        self._targets_E = torch.tensor(targets, dtype=torch.int64, device=device)
        self._weights_E = torch.tensor(weights, dtype=torch.float32, device=device)
        self._logprobs_E = torch.zeros(len(targets), device=device)

    def mixed(self, logits_MV: Tensor, start: int, stop: int) -> Tensor:
        """sum_k weight_k * log p_k of tokens start:stop, differentiable; the log-probabilities are kept."""
        part = slice(self._starts[start], self._starts[stop])
        rows_E = self._token_E[part] - start
        logprobs_E = logits_MV[rows_E, self._targets_E[part]] - logits_MV.logsumexp(-1)[rows_E]
        self._logprobs_E[part] = logprobs_E.detach()
        return logits_MV.new_zeros(stop - start).index_add(0, rows_E, self._weights_E[part] * logprobs_E)

    def report(self, totals: Mapping[int, Totals]) -> None:
        """The log-probabilities of every soft target, where they were asked for."""
        logprobs = self._logprobs_E.tolist()
        by_example: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for m, (part, i) in enumerate(self._places):
            if part.example.soft_targets and part.op.wants_logprobs and part.op_id in totals:
                by_example.setdefault((part.op_id, part.number), []).append((i, m))
        for (op_id, number), places in by_example.items():
            totals[op_id].logprobs[number] = [
                value for _, m in sorted(places) for value in logprobs[self._starts[m] : self._starts[m + 1]]
            ]
