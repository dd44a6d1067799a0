"""The losses of trl's trainers, for the log-probabilities in tests/finetune/trl_losses.json: what our losses are tested
against. The inputs in that file are made up; what trl makes of them is computed anew, in float64.

trl needs an environment of its own; the file says which version its numbers are of:

    python -m venv trl-venv && trl-venv/bin/pip install torch trl==1.16.0
    trl-venv/bin/python tools/trl_losses.py            # exit code 1 where the file has other numbers
    trl-venv/bin/python tools/trl_losses.py --write    # replace them

`DPOTrainer._compute_loss` and `GRPOTrainer._compute_loss` are called as they are, on stand-ins for the trainer and for
the model, which has no parameters: its log-probabilities are the inputs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "finetune" / "trl_losses.json"
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x, unwrap_model=lambda model: model,
)  # fmt: skip


def dpo(case: dict[str, Any], logprobs: Tensor, reference: Tensor, mask: Tensor) -> dict[str, Any]:
    """Rows 0 and 1 were preferred to rows 2 and 3. trl's own model leaves out what is masked."""
    shown = torch.zeros(mask.shape)
    outputs = SimpleNamespace(log_probs=logprobs * mask, entropy=shown, mean_logits=shown, is_top1=shown.bool())
    metrics: dict[str, list[float]] = defaultdict(list)
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR, model=_Model(outputs), beta=case["beta"],
        label_smoothing=case["label_smoothing"], loss_types=[case["kind"]], loss_weights=[1.0],
        f_divergence_type="reverse_kl", ld_alpha=None, precompute_ref_logps=True, use_weighting=False,
        aux_loss_enabled=False, _metrics={"train": metrics}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    # The first token is predicted by nothing.
    whole = torch.nn.functional.pad(mask, (1, 0))
    chosen, rejected = (reference * mask).sum(dim=1).chunk(2)
    inputs = {
        "input_ids": whole, "attention_mask": torch.ones_like(whole), "completion_mask": whole,
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip
    loss = trl.DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    (slopes,) = torch.autograd.grad(loss, logprobs)
    return {
        "mean_loss": loss.item(), "slopes": slopes.tolist(), "chosen": metrics["rewards/chosen"][0],
        "rejected": metrics["rewards/rejected"][0], "accuracy": metrics["rewards/accuracies"][0],
    }  # fmt: skip


def policy(case: dict[str, Any], logprobs: Tensor, old: Tensor, mask: Tensor, advantages: Tensor) -> dict[str, Any]:
    """trl divides by the number of items; with one the loss is the sum."""
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR, model=_Model(None), loss_type=case["loss_type"],
        importance_sampling_level=case["level"], epsilon_low=case["low"], epsilon_high=case["high"], beta=0.0,
        args=SimpleNamespace(delta=None, steps_per_generation=1), top_entropy_quantile=1.0, use_vllm=False,
        off_policy_mask_threshold=None, current_gradient_accumulation_steps=1, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
    )  # fmt: skip
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": torch.ones_like(ids[:, :1]), "completion_ids": ids,
        "completion_mask": mask, "advantages": advantages, "old_per_token_logps": old,
        "num_items_in_batch": torch.tensor(1.0),
    }  # fmt: skip
    loss = trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    (slopes,) = torch.autograd.grad(loss, logprobs)
    return {"sum_loss": loss.item(), "slopes": slopes.tolist()}


class _Model(torch.nn.Module):
    """A model whose outputs are known."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, **_: Any) -> Any:
        return self.outputs


def computed(golden: dict[str, Any]) -> dict[str, Any]:
    """The file anew, with what this trl says."""
    old, advantages = (torch.tensor(golden[name], dtype=torch.float64) for name in ("reference", "advantages"))
    mask = torch.tensor(golden["mask"])
    cases = []
    for case in golden["cases"]:
        logprobs = torch.tensor(golden["logprobs"], dtype=torch.float64, requires_grad=True)
        if case["loss_type"] == "dpo":
            found = dpo(case, logprobs, old, mask)
        else:
            found = policy(case, logprobs, old, mask, advantages)
        cases.append({**case, **found})
    return {**golden, "trl": trl.__version__, "cases": cases}


def differences(golden: Any, found: Any, where: str = "") -> list[str]:
    """One line for each number that is not the same to 1e-12, or anything else that is not the same."""
    if isinstance(golden, dict) and isinstance(found, dict) and golden.keys() == found.keys():
        return [line for key in golden for line in differences(golden[key], found[key], f"{where}.{key}")]
    if isinstance(golden, list) and isinstance(found, list) and len(golden) == len(found):
        pairs = zip(golden, found, strict=True)
        return [line for i, pair in enumerate(pairs) for line in differences(*pair, f"{where}[{i}]")]
    if isinstance(golden, int | float) and isinstance(found, int | float):
        return [] if math.isclose(golden, found, rel_tol=1e-12, abs_tol=1e-15) else [f"{where}: {golden} -> {found}"]
    return [] if golden == found else [f"{where}: {golden} -> {found}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=GOLDEN)
    parser.add_argument("--write", action="store_true", help="replace the file's numbers")
    options = parser.parse_args()
    golden = json.loads(options.file.read_text())
    found = computed(golden)
    lines = differences(golden, found)
    print("\n".join(lines) or f"{len(found['cases'])} losses are those of trl {trl.__version__}")
    if options.write:
        options.file.write_text(json.dumps(found) + "\n")
        return 0
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
