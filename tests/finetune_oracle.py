"""PEFT + autograd + torch.optim as the oracle of training, and the examples to train on.

`PeftRun` has the names of the engine's primitives, one sequence at a time and without padding, so that one list of
operations can be played on both. Gradients and weights go by (layer, target): lora_A as [R, I], lora_B as [R, O].
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tiny_adapters
import tiny_models
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy

from tandem.model.spec import load_spec, targets
from tandem.work import Example, LoraConfig, OptimParams, Pass, PassReport, TrainOp, Update, UpdateReport

Factors = dict[tuple[int, str], tuple[Tensor, Tensor]]
PARAMETER = re.compile(r"layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])\.default\.weight$")
DROPOUT = re.compile(r"layers\.(\d+)\.\w+\.(\w+)\.lora_dropout$")


class Mismatch(NamedTuple):
    """How far off a tensor is, relative to the norm of what it should be."""

    error: float
    layer: int
    target: str
    side: str


def worst(found: Factors, expected: Factors) -> Mismatch:
    """The tensor that is furthest off."""
    return max(mismatches(found, expected))


def assert_near(found: Factors, expected: Factors, tolerance: float) -> None:
    """No tensor is further off than this."""
    mismatch = worst(found, expected)
    assert mismatch.error < tolerance, f"{mismatch}, {tolerance} at most"


def mean(found: Factors, expected: Factors) -> float:
    """How far off the tensors are on average."""
    errors = [mismatch.error for mismatch in mismatches(found, expected)]
    return sum(errors) / len(errors)


def mismatches(found: Factors, expected: Factors) -> list[Mismatch]:
    """Compare tensor by tensor; both must name the same ones. What is not finite counts as infinitely off."""
    assert found.keys() == expected.keys(), f"found {sorted(found)}, expected {sorted(expected)}"
    all_found = []
    for (layer, target), pair in expected.items():
        for side, ours, theirs in zip("AB", found[layer, target], pair, strict=True):
            assert ours.shape == theirs.shape and ours.dtype == torch.float32, (layer, target, side)
            error = float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))
            all_found.append(Mismatch(error if error == error else float("inf"), layer, target, side))
    return all_found


def change(after: Factors, before: Factors) -> Factors:
    """after - before, tensor by tensor."""
    return {key: (after[key][0] - before[key][0], after[key][1] - before[key][1]) for key in before}


def is_same(one: Factors, other: Factors) -> bool:
    """Bit for bit."""
    assert one.keys() == other.keys()
    return all(torch.equal(a, b) for key in one for a, b in zip(one[key], other[key], strict=True))


def examples(seed: int, lengths: Iterable[int], scale: float = 1.0) -> list[Example]:
    """Random text of so many positions each. The first third of each has weight 0, as a prompt has, and so has one
    position in six after it; the others weigh between 0.2 and 1 times `scale`. Every example has a weight."""
    rng = random.Random(seed)
    found = []
    for length in lengths:
        text = [rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(length + 1)]
        weights = [
            0.0 if i < length // 3 or rng.random() < 1 / 6 else scale * rng.uniform(0.2, 1.0) for i in range(length)
        ]
        weights[-1] = weights[-1] or scale
        found.append(Example(text[:-1], text[1:], weights))
    return found


def gentle_models(folder: Path) -> Callable[[str], Path]:
    """As the fixture `tiny_model`, with weights drawn less wide: where attention saturates, the float32 gradients of
    PEFT itself are 1e-5 away from those in float64; here they are within 3e-6, and every feature still shows."""
    built: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in built:
            built[family] = tiny_models.build(family, folder / family, initializer_range=0.1)
        return built[family]

    return get


def copied(factors: Factors) -> Factors:
    """What an engine hands out are views that change with the run."""
    return {key: (a.clone(), b.clone()) for key, (a, b) in factors.items()}


def all_targets(model_dir: Path) -> tuple[str, ...]:
    """The names of every module that can carry a LoRA."""
    return tuple(targets(load_spec(model_dir)))


def random_adapter(model_dir: Path, directory: Path, lora: LoraConfig, seed: int = 0) -> Path:
    """A PEFT directory of this shape with B random too: with zeros, A's gradient would be zero."""
    names = all_targets(model_dir) if lora.target_modules == ("all-linear",) else lora.target_modules
    return tiny_adapters.build(
        model_dir, directory, seed, r=lora.rank, lora_alpha=lora.alpha, use_rslora=lora.use_rslora,
        lora_dropout=lora.dropout, target_modules=list(names),
    )  # fmt: skip


class _Mask(torch.nn.Module):
    def __init__(self, mask_of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mask_of = mask_of

    def forward(self, x_1LI: Tensor) -> Tensor:
        return x_1LI * self.mask_of(x_1LI[0])


class PeftRun:
    """A training run by PEFT. `dtype` float64 shows how far float32 itself is from the truth."""

    def __init__(self, model_dir: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> None:
        model = tiny_models.oracle(model_dir, dtype)
        # Evaluation mode: dropout is off, everything else is the same.
        self.model: Any = PeftModel.from_pretrained(model, adapter, is_trainable=True).to(dtype).eval()
        self._named = {
            (int(match[1]), match[2], match[3]): parameter
            for name, parameter in self.model.named_parameters()
            if (match := PARAMETER.search(name))
        }
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        assert len(trainable) == len(self._named) > 0
        self._step = 0
        self._num_learnt = 0
        self._adamw = torch.optim.AdamW(trainable)

    def forward_backward(self, batch: Sequence[Example]) -> PassReport:
        """Gradients of sum(weight * -log p) are added up."""
        return self._pass(batch, learns=True)

    def forward(self, batch: Sequence[Example]) -> PassReport:
        with torch.no_grad():
            return self._pass(batch, learns=False)

    def drop(self, mask_of: Callable[[int, int, str, Tensor], Tensor]) -> None:
        """Put `mask_of(example, layer, target, x_LI)` before every lora_A; `example` counts those that have learnt."""
        for name, module in self.model.named_modules():
            if match := DROPOUT.search(name):
                layer, target = int(match[1]), match[2]
                module["default"] = _Mask(lambda x, at=(layer, target): mask_of(self._num_learnt, *at, x))

    def _pass(self, batch: Sequence[Example], learns: bool) -> PassReport:
        loss = nll = 0.0
        num_tokens = num_correct = 0
        for example in batch:
            targets_L, weights_L = torch.tensor(example.targets), torch.tensor(example.weights)
            logits_LV = self.model(input_ids=torch.tensor([example.tokens])).logits[0]
            nll_L = cross_entropy(logits_LV, targets_L, reduction="none")
            weighted = (nll_L * weights_L).sum()
            if learns:
                weighted.backward()
                self._num_learnt += 1
            counts_L = weights_L != 0
            loss, nll = loss + weighted.item(), nll + nll_L[counts_L].sum().item()
            num_tokens += int(counts_L.sum())
            num_correct += int((logits_LV.argmax(-1) == targets_L)[counts_L].sum())
        return PassReport(loss=loss, nll=nll, num_tokens=num_tokens, num_correct=num_correct)

    def optim_step(self, params: OptimParams) -> UpdateReport:
        group = self._adamw.param_groups[0]
        group["lr"], group["betas"] = params.learning_rate, (params.beta1, params.beta2)
        group["eps"], group["weight_decay"] = params.eps, params.weight_decay
        norm = torch.nn.utils.clip_grad_norm_(self._named.values(), params.max_grad_norm or float("inf"))
        self._adamw.step()
        self._adamw.zero_grad()
        self._step += 1
        return UpdateReport(step=self._step, grad_norm=float(norm))

    def gradients(self) -> Factors:
        return self._factors(lambda p: torch.zeros_like(p) if p.grad is None else p.grad)

    def weights(self) -> Factors:
        return self._factors(lambda p: p.detach())

    def _factors(self, of: Any) -> Factors:
        keys = sorted({key[:2] for key in self._named})
        return {
            key: (of(self._named[*key, "A"]).float().clone(), of(self._named[*key, "B"]).float().T.contiguous())
            for key in keys
        }

    def parameter(self, layer: int, target: str, side: str) -> torch.nn.Parameter:
        """lora_A [R, I] or lora_B [O, R] itself."""
        return self._named[layer, target, side]


def play(run: Any, run_id: str | None, ops: Iterable[TrainOp]) -> list[PassReport | UpdateReport]:
    """Do operations one by one on a PeftRun (`run_id` None) or in a run of an engine; returns what each said."""
    prefix = () if run_id is None else (run_id,)
    reports = []
    for op in ops:
        match op:
            case Pass(learns=True):
                reports.append(run.forward_backward(*prefix, op.examples))
            case Pass():
                reports.append(run.forward(*prefix, op.examples))
            case Update():
                reports.append(run.optim_step(*prefix, op.params))
            case _:
                raise AssertionError(f"{op} is not for a PeftRun")
    return reports
