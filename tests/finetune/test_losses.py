"""Losses against plain autograd over whole logits, and against what trl computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from tandem.errors import ContextTooLong, InvalidRequest
from tandem.finetune import losses
from tandem.finetune.inputs import LOSSES, check_pass, resolved
from tandem.finetune.losses import FORMULAS, Head, Objective, Part, Terms, Totals
from tandem.ops import pointwise
from tandem.ops.cpu import library
from tandem.ops.cpu.pointwise import Pointwise
from tandem.work import Example, Pass, PassReport

VOCAB, HIDDEN = 37, 12
CLIP = {"clip_low_threshold": 0.7, "clip_high_threshold": 1.25}


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_head(seed: int = 0) -> Callable[[Tensor], Tensor]:
    weight_VD = torch.randn(VOCAB, HIDDEN, generator=rng(seed))
    return lambda x: torch.tanh(x).to(torch.float32) @ weight_VD.T


ISAS = ["torch", *library.available()[0]]


def cross_entropy_of(isa: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operation as torch does it, or compiled for an instruction set."""
    compiled = library.load(isa)
    return pointwise.cross_entropy_ if compiled is None else Pointwise(compiled).cross_entropy_


def make_example(seed: int, length: int, soft: bool = False) -> Example:
    """Every third position has weight 0; the others weigh between 0.5 and 1.5, one is negative."""
    g = rng(seed)
    ids = torch.randint(VOCAB, (2, length), generator=g).tolist()
    weights = [0.0 if i % 3 == 0 else x + 0.5 for i, x in enumerate(torch.rand(length, generator=g).tolist())]
    weights[-1] = -0.6
    counts = torch.randint(1, 5, (length,), generator=g).tolist()
    return Example(
        *ids, weights,
        logprobs=(-4 * torch.rand(length, generator=g)).tolist(),
        advantages=torch.randn(length, generator=g).tolist(),
        soft_targets=[torch.randperm(VOCAB, generator=g)[:n].tolist() for n in counts] if soft else [],
        soft_weights=[torch.randn(n, generator=g).tolist() for n in counts] if soft else [],
    )  # fmt: skip


def expected_loss(op: Pass, logits_by_example: Sequence[Tensor]) -> Tensor:
    """The formulas as their papers and Tinker's documentation write them, over whole sequences in a graph."""
    params, total = resolved(op), torch.zeros(())
    gains = []
    for example, logits in zip(op.examples, logits_by_example, strict=True):
        every = logits.log_softmax(-1)
        lp = every.gather(1, torch.tensor(example.targets)[:, None])[:, 0]
        w, old, a = (torch.tensor(v) for v in (example.weights, example.logprobs, example.advantages))
        if op.loss == "cross_entropy":
            if example.soft_targets:
                lp = torch.stack([
                    (every[i, ids] * torch.tensor(ws)).sum()
                    for i, (ids, ws) in enumerate(zip(example.soft_targets, example.soft_weights, strict=True))
                ])  # fmt: skip
            total = total - (lp * w).sum()
        elif op.loss == "dpo":
            gains.append((w * (lp - old)).sum())
        else:
            ratio = torch.exp(lp - old)
            if op.loss == "gspo":
                mean = (lp - old)[w != 0].mean().detach()
                ratio = torch.exp(mean + lp - lp.detach())
            if op.loss == "importance_sampling":
                value = ratio * a
            elif op.loss == "dro":
                value = lp * a - 0.5 * params["beta"] * (lp - old) ** 2
            else:
                clipped = ratio.clamp(params["clip_low_threshold"], params["clip_high_threshold"])
                value = clipped.detach() * lp * a if op.loss == "cispo" else torch.min(ratio * a, clipped * a)
            total = total - (w * value).sum()
    for chosen, rejected in zip(gains[0::2], gains[1::2], strict=True):
        margin = params["beta"] * (chosen - rejected)
        eps = params["label_smoothing"]
        each = -(1 - eps) * torch.sigmoid(margin).log() - eps * torch.sigmoid(-margin).log()
        total = total + params["scale"] * each
    return total


def run_objective(
    ops: Sequence[Pass],
    slice_length: int,
    learns: bool = True,
    dtype: torch.dtype = torch.float32,
    isa: str = "torch",
    cap: float | None = None,
) -> tuple[list[PassReport], Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """All examples of some operations as one microbatch. Returns reports, hidden states, their gradient, the head."""
    parts, at = [], 0
    for op_id, op in enumerate(ops):
        for index, example in enumerate(op.examples):
            parts.append(Part(op_id, op, index, at, at + len(example.tokens)))
            at += len(example.tokens)
    hidden_ND = torch.randn(at, HIDDEN, generator=rng(5)).to(dtype)
    objective, head = Objective(parts, torch.device("cpu")), make_head()
    head_of_losses = Head(head, cross_entropy_of(isa), cap, VOCAB)
    grad_ND = torch.zeros_like(hidden_ND) if learns else None
    totals = {op_id: Totals() for op_id in range(len(ops))}
    num = len(objective.rows_M)
    for start in range(0, num, slice_length):
        stop = min(start + slice_length, num)
        rows = objective.rows_M[start:stop]
        grad_MD = torch.full((stop - start, HIDDEN), float("nan")).to(dtype) if learns else None
        objective.score(start, stop, hidden_ND[rows], head_of_losses, grad_MD)
        if grad_ND is not None and grad_MD is not None:
            grad_ND[rows] = grad_MD
    objective.finish(totals, {}, grad_ND)
    return [t.report(0.0) for t in totals.values()], hidden_ND, grad_ND if learns else torch.zeros(0), head


def check_against_autograd(
    ops: Sequence[Pass], slice_length: int, isa: str = "torch", cap: float | None = None
) -> list[PassReport]:
    for op in ops:
        check_pass(op, VOCAB, 1000)
    reports, hidden_ND, grad_ND, head = run_objective(ops, slice_length, isa=isa, cap=cap)
    x = hidden_ND.clone().requires_grad_()
    logits = head(x)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    at, total = 0, torch.zeros(())
    for op, report in zip(ops, reports, strict=True):
        each = []
        for example in op.examples:
            each.append(logits[at : at + len(example.tokens)])
            at += len(example.tokens)
        loss = expected_loss(op, each)
        assert report.loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
        if op.wants_logprobs:
            for example, found, part in zip(op.examples, report.logprobs, each, strict=True):
                every = part.detach().log_softmax(-1)
                wanted = example.soft_targets or [[t] for t in example.targets]
                flat = [float(every[i, t]) for i, ids in enumerate(wanted) for t in ids]
                assert found == pytest.approx(flat, abs=1e-5)
        else:
            assert report.logprobs == []
        total = total + loss
    (expected_ND,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(grad_ND, expected_ND, rtol=2e-5, atol=2e-6)
    return reports


def make_op(loss: str, seed: int = 0, **more: Any) -> Pass:
    params = {name: value for name, value in CLIP.items() if name in LOSSES[loss].params}
    if loss == "dpo":
        params = {"beta": 0.3, "label_smoothing": 0.1, "scale": 0.25}
    return Pass("r", [make_example(seed + i, 7 + 2 * i) for i in range(4)], True, loss, params, **more)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("slice_length", "cap"), [(3, None), (16, 3.0), (1000, None)])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_autograds(
    loss: str, slice_length: int, cap: float | None, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 5 * VOCAB)
    (report,) = check_against_autograd([make_op(loss)], slice_length, isa, cap)
    counted = sum(w != 0 for e in make_op(loss).examples for w in e.weights)
    assert report.num_tokens == counted


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("wants_logprobs", [False, True])
def test_operations_with_different_losses_share_a_microbatch(wants_logprobs: bool, cap: float | None) -> None:
    ops = [make_op(loss, 10 * i, wants_logprobs=wants_logprobs) for i, loss in enumerate(LOSSES)]
    ops.append(Pass("r", [make_example(50 + i, 6, soft=i % 2 == 0) for i in range(3)], wants_logprobs=wants_logprobs))
    reports = check_against_autograd(ops, 20, cap=cap)
    ppo = reports[list(LOSSES).index("ppo")].metrics
    assert 0 < ppo["num_clipped"] < reports[2].num_tokens
    assert reports[list(LOSSES).index("dpo")].metrics["num_pairs"] == 2


def test_forward_alone_finds_the_same_losses() -> None:
    ops = [make_op(loss, wants_logprobs=True) for loss in LOSSES]
    learnt, *_ = run_objective(ops, 16)
    seen, *_ = run_objective(ops, 16, learns=False)
    assert seen == learnt


def test_tokens_without_weight_count_for_nothing() -> None:
    """Whatever their old log-probability is, which would overflow a ratio."""
    op = make_op("importance_sampling")
    wild = [
        Example(e.tokens, e.targets, e.weights, [x if w else -1e4 for x, w in zip(e.logprobs, e.weights, strict=True)],
                e.advantages)
        for e in op.examples
    ]  # fmt: skip
    (expected,), _, expected_ND, _ = run_objective([op], 16)
    for wants_logprobs in (False, True):
        (found,), _, found_ND, _ = run_objective([Pass("r", wild, True, op.loss, {}, wants_logprobs)], 16)
        assert found.loss == expected.loss
        torch.testing.assert_close(found_ND, expected_ND)


@pytest.mark.parametrize("isa", ISAS)
def test_a_token_has_the_same_bits_however_the_slices_are_cut(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head()
    monkeypatch.setitem(globals(), "make_head", lambda: lambda x: torch.cat([head(row) for row in x.split(1)]))
    ops = [make_op(loss, 10 * i, wants_logprobs=True) for i, loss in enumerate(LOSSES)]
    expected, _, expected_ND, _ = run_objective(ops, 1000, isa=isa)
    for slice_length in (1, 7, 20):
        found, _, found_ND, _ = run_objective(ops, slice_length, isa=isa)
        assert [report.logprobs for report in found] == [report.logprobs for report in expected]
        assert torch.equal(found_ND, expected_ND)


@pytest.mark.parametrize("isa", ISAS)
def test_gradients_in_bfloat16_are_near(isa: str) -> None:
    for loss in LOSSES:
        _, hidden_ND, found_ND, _ = run_objective([make_op(loss)], 16, dtype=torch.bfloat16, isa=isa)
        assert found_ND.dtype == torch.bfloat16
        x = hidden_ND.float().requires_grad_()
        op, at, each = make_op(loss), 0, []
        logits = make_head()(x)
        for example in op.examples:
            each.append(logits[at : at + len(example.tokens)])
            at += len(example.tokens)
        (expected_ND,) = torch.autograd.grad(expected_loss(op, each), x)
        error = (found_ND.float() - expected_ND).norm() / expected_ND.norm()
        assert error < 0.01, (loss, float(error))


# ---------------------------------------------------------------- trl

GOLDEN = json.loads((Path(__file__).parent / "trl_losses.json").read_text())


def numbers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['loss_type']}-{c.get('level', c.get('beta'))}")
def test_losses_are_trls(case: dict[str, Any]) -> None:
    """Numbers of trl 1.16.0: `_compute_loss` of its DPOTrainer and GRPOTrainer, fed with these log-probabilities.
    Rows 0 and 1 were preferred to rows 2 and 3. dapo with one item is the plain sum of PPO's losses."""
    mask = torch.tensor(GOLDEN["mask"]).bool()
    logprobs, old = (numbers(GOLDEN[name]) for name in ("logprobs", "reference"))
    advantages = numbers(GOLDEN["advantages"])[:, None].expand(4, 6)
    slopes = numbers(case["slopes"])
    order = [0, 2, 1, 3] if case["loss_type"] == "dpo" else [0, 1, 2, 3]
    mask, logprobs, old, advantages, slopes = (t[order] for t in (mask, logprobs, old, advantages, slopes))
    lp = logprobs[mask].requires_grad_()
    sequence = torch.arange(4).repeat_interleave(mask.sum(1))
    terms = Terms(lp, torch.ones_like(lp), old[mask], advantages[mask], sequence, 4)
    if case["loss_type"] == "dpo":
        params = {"beta": case["beta"], "label_smoothing": case["label_smoothing"], "scale": 0.5}
        name, expected = "dpo", case["mean_loss"]
    else:
        high = case["high"] if case["loss_type"] == "cispo" else 1 + case["high"]
        low = 0.0 if case["loss_type"] == "cispo" else 1 - case["low"]
        params = {"clip_low_threshold": low, "clip_high_threshold": high}
        name = {("dapo", "token"): "ppo", ("dapo", "sequence"): "gspo"}.get(
            (case["loss_type"], case["level"]), "cispo"
        )
        expected = case["sum_loss"]
    loss, metrics = FORMULAS[name](terms, params)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    (found,) = torch.autograd.grad(loss, lp)
    torch.testing.assert_close(found, slopes[mask], rtol=1e-9, atol=1e-12)
    if name == "dpo":
        assert metrics["chosen_reward"].item() / 2 == pytest.approx(case["chosen"], rel=1e-9)
        assert metrics["rejected_reward"].item() / 2 == pytest.approx(case["rejected"], rel=1e-9)
        assert metrics["num_preferred"].item() / 2 == case["accuracy"]



# ---------------------------------------------------------------- bad input


GOOD = make_example(1, 5)
SOFT = make_example(2, 5, soft=True)
NAN = float("nan")


def changed(example: Example, **fields: Any) -> Example:
    return msgspec.structs.replace(example, **fields)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (Pass("r", [GOOD], loss="stable_reinforce"), "there is no loss 'stable_reinforce': use one of cross_entropy"),
        (Pass("r", []), "there are no examples"),
        (Pass("r", [GOOD], loss="ppo", loss_params={"beta": 1.0}), "ppo has no parameter 'beta': it takes clip_low"),
        (Pass("r", [GOOD], loss_params={"beta": 1.0}), "it takes none"),
        (Pass("r", [GOOD], loss="ppo", loss_params={"clip_high_threshold": NAN}), "clip_high_threshold must be from 1"),
        (Pass("r", [GOOD] * 3, loss="dpo"), "pairs of examples, the preferred one first, but there are 3"),
        (Pass("r", [GOOD, changed(GOOD, logprobs=[])], loss="dpo"), "for all examples of a dpo pass, or for none"),
        (Pass("r", [changed(GOOD, logprobs=[])], loss="ppo"), "example 0 has 5 tokens and 0 logprobs: ppo needs one"),
        (Pass("r", [GOOD, changed(GOOD, advantages=[1.0] * 6)], loss="dro"), "example 1 has 5 tokens and 6 advantages"),
        (Pass("r", [changed(GOOD, advantages=[0, 0, NAN, 0, 0])], loss="cispo"), "an advantage that is not a finite "),
        (Pass("r", [changed(GOOD, logprobs=[0, 0, 0, 0, -float("inf")])], loss="gspo"), "a logprob .* position 4"),
        (Pass("r", [changed(GOOD, weights=[1, 1, 1, 1, NAN])]), "a weight that is not a finite number"),
        (Pass("r", [changed(GOOD, weights=[1.0])]), "5 tokens, 5 targets and 1 weights"),
        (Pass("r", [changed(GOOD, targets=[0, 0, 0, 0, VOCAB])]), "outside the vocabulary"),
        (Pass("r", [SOFT], loss="ppo"), "only cross_entropy takes them, not ppo"),
        (Pass("r", [changed(SOFT, soft_targets=SOFT.soft_targets[1:])]), "soft targets at 4 positions"),
        (Pass("r", [changed(SOFT, soft_weights=[[], *SOFT.soft_weights[1:]])]), "position 0: . soft targets, 0 soft"),
        (Pass("r", [changed(SOFT, soft_weights=[[NAN] * len(w) for w in SOFT.soft_weights])]), "a soft weight"),
        (Pass("r", [changed(SOFT, soft_targets=[[-1] * len(t) for t in SOFT.soft_targets])]), "outside the vocab"),
    ],
)
def test_what_does_not_fit_is_refused(op: Pass, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_pass(op, VOCAB, 100)
    with pytest.raises(ContextTooLong):
        check_pass(Pass("r", [GOOD]), VOCAB, 4)
