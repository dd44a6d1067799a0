"""What the operations of training may ask for: which losses and optimizers there are, what each needs. No torch.

Everything is checked before anything is changed. What the losses compute is in `losses.py`, updates in `optimizer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tandem.errors import ContextTooLong, InvalidRequest
from tandem.work import Example, OptimParams, Pass, Probe


class Need(NamedTuple):
    """What a loss takes: per-position inputs, and parameters with (default, least, most)."""

    fields: tuple[str, ...] = ()
    params: Mapping[str, tuple[float, float, float]] = {}


CLIP = {"clip_low_threshold": (0.8, 0.0, 1.0), "clip_high_threshold": (1.2, 1.0, 1e6)}
POLICY = ("logprobs", "advantages")
LOSSES: dict[str, Need] = {
    "cross_entropy": Need(),
    "importance_sampling": Need(POLICY),
    "ppo": Need(POLICY, CLIP),
    "cispo": Need(POLICY, CLIP),
    "gspo": Need(POLICY, CLIP),
    "dro": Need(POLICY, {"beta": (0.05, 0.0, 1e6)}),
    "dpo": Need((), {"beta": (0.1, 1e-6, 1e6), "label_smoothing": (0.0, 0.0, 0.5), "scale": (1.0, 0.0, 1e9)}),
}
KINDS = ("adamw", "adamw8bit", "sgd", "lion", "adafactor", "muon")


def resolved(op: Pass) -> dict[str, float]:
    """A checked pass's parameters, with the defaults of its loss."""
    return {name: default for name, (default, _, _) in LOSSES[op.loss].params.items()} | op.loss_params


def check_pass(op: Pass, vocab_size: int, max_model_len: int) -> None:
    """Raises InvalidRequest or ContextTooLong, naming the example."""
    need = LOSSES.get(op.loss)
    if need is None:
        raise InvalidRequest(f"there is no loss {op.loss!r}: use one of {', '.join(LOSSES)}", "loss")
    for name, value in op.loss_params.items():
        if name not in need.params:
            known = f"it takes {', '.join(need.params)}" if need.params else "it takes none"
            raise InvalidRequest(f"the loss {op.loss} has no parameter {name!r}: {known}", "loss_params")
        _, least, most = need.params[name]
        if not least <= value <= most:  # NaN fails every comparison
            raise InvalidRequest(f"{name} must be from {least:g} to {most:g}, not {value}", "loss_params")
    if op.frozen and op.learns:
        raise InvalidRequest("a frozen adapter cannot learn: ask for forward alone", "frozen")
    if not op.examples:
        raise InvalidRequest("there are no examples: send at least one", "examples")
    if len(op.examples) % op.group_size:
        raise InvalidRequest(
            f"{op.loss} takes pairs of examples, the preferred one first, but there are {len(op.examples)} examples",
            "examples",
        )
    for i, example in enumerate(op.examples):
        _check_example(op, need, i, example, vocab_size, max_model_len)


def _check_example(op: Pass, need: Need, i: int, example: Example, vocab_size: int, max_model_len: int) -> None:
    length = len(example.tokens)
    if not length or not length == len(example.targets) == len(example.weights):
        raise InvalidRequest(
            f"example {i} has {length} tokens, {len(example.targets)} targets and {len(example.weights)} weights: "
            "give equally many of each, at least one",
            "examples",
        )
    if length > max_model_len:
        raise ContextTooLong(f"example {i} has {length} tokens, the context is {max_model_len}", "examples")
    ids = (example.tokens, example.targets, *example.soft_targets)
    if not all(0 <= token < vocab_size for part in ids for token in part):
        raise InvalidRequest(f"example {i} has a token id outside the vocabulary of {vocab_size}", "examples")
    _check_finite(i, "weight", example.weights)
    if op.loss == "dpo" and example.logprobs:
        need = need._replace(fields=("logprobs",))
    for name in need.fields:
        values = getattr(example, name)
        if len(values) != length:
            raise InvalidRequest(
                f"example {i} has {length} tokens and {len(values)} {name}: {op.loss} needs one for each", "examples"
            )
        _check_finite(i, name.removesuffix("s"), values)
    if op.loss == "dpo" and bool(example.logprobs) != bool(op.examples[0].logprobs):
        raise InvalidRequest("give reference logprobs for all examples of a dpo pass, or for none", "examples")
    if example.soft_targets or example.soft_weights:
        _check_soft(op, i, example)


def _check_soft(op: Pass, i: int, example: Example) -> None:
    if op.loss != "cross_entropy":
        raise InvalidRequest(f"example {i} has soft targets: only cross_entropy takes them, not {op.loss}", "examples")
    length = len(example.tokens)
    if not length == len(example.soft_targets) == len(example.soft_weights):
        raise InvalidRequest(
            f"example {i} has {length} tokens, soft targets at {len(example.soft_targets)} positions and soft weights "
            f"at {len(example.soft_weights)}: give both at each",
            "examples",
        )
    for position, (targets, weights) in enumerate(zip(example.soft_targets, example.soft_weights, strict=True)):
        if len(targets) != len(weights):
            raise InvalidRequest(
                f"example {i}, position {position}: {len(targets)} soft targets, {len(weights)} soft weights",
                "examples",
            )
        _check_finite(i, "soft weight", weights)


def _check_finite(i: int, name: str, values: Iterable[float]) -> None:
    for position, value in enumerate(values):
        if not math.isfinite(value):
            article = "an" if name[0] in "aeiou" else "a"
            raise InvalidRequest(
                f"example {i} has {article} {name} that is not a finite number: {value} at position {position}",
                "examples",
            )


def check_probe(op: Probe, vocab_size: int, max_model_len: int) -> None:
    """Raises InvalidRequest or ContextTooLong."""
    check_pass(op.side(), vocab_size, max_model_len)
    if op.loss == "dpo" and not op.examples[0].logprobs:
        raise InvalidRequest("a probe with dpo needs reference logprobs in its examples", "examples")
    if not 0 < op.radius <= 1:
        raise InvalidRequest(f"radius must be above 0 and at most 1, not {op.radius}", "radius")
    if not 0 <= op.seed < 2**63:
        raise InvalidRequest("seed must be at least 0 and below 2^63", "seed")
    check_update(op.params)


def check_update(params: OptimParams) -> None:
    """Raises InvalidRequest. A learning rate that is no number is the optimizer's to refuse: it diverges."""
    if params.kind not in KINDS:
        raise InvalidRequest(f"there is no optimizer {params.kind!r}: use one of {', '.join(KINDS)}", "params")
    if not (0 <= params.beta1 < 1 and 0 <= params.beta2 < 1 and params.eps > 0):
        raise InvalidRequest("beta1 and beta2 must be at least 0 and below 1, eps above 0", "params")
    if params.momentum is not None and not 0 <= params.momentum < 1:
        raise InvalidRequest("momentum must be at least 0 and below 1", "params")
    if not params.weight_decay >= 0 or not params.max_grad_norm >= 0:
        raise InvalidRequest("weight_decay and max_grad_norm must be at least 0", "params")
