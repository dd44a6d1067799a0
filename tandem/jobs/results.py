"""What a job reports: losses from the engine's sums, the line of a step, the result table. Pure."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tandem.jobs.queries import now
from tandem.jobs.records import RESULTS_PURPOSE, File, new_id
from tandem.jobs.rollouts import Group
from tandem.work import PassReport

COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}
REWARD_COLUMNS = {
    name: name
    for name in (
        "step", "train_mean_reward", "valid_mean_reward", "train_loss", "train_reward_std", "train_mean_tokens",
        "train_kl",
    )
}  # fmt: skip


def means(kind: str, reports: Sequence[PassReport], is_mean: bool = False) -> dict[str, float | None]:
    """Loss and accuracy per trained token, over all `reports`; for preferences the loss and the rewards per pair.
    `is_mean`: each report's own loss is a mean already. None is what no JSON number can say."""
    num_tokens = max(1, sum(report.num_tokens for report in reports))
    accuracy = sum(report.num_correct for report in reports) / num_tokens
    found = {f"{kind}_mean_token_accuracy": accuracy}
    num_pairs = sum(report.metrics.get("num_pairs", 0.0) for report in reports)
    if num_pairs:
        loss = sum(r.loss * (r.metrics["num_pairs"] if is_mean else 1.0) for r in reports) / num_pairs
        chosen, rejected, preferred = (
            sum(report.metrics[name] for report in reports) / num_pairs
            for name in ("chosen_reward", "rejected_reward", "num_preferred")
        )
        found |= {f"{kind}_reward_accuracy": preferred, f"{kind}_reward_margin": chosen - rejected}
    else:
        loss = sum(report.nll for report in reports) / num_tokens
    found = {f"{kind}_loss": loss, **found}
    return {name: round(value, 6) if math.isfinite(value) else None for name, value in found.items()}


def rewards(kind: str, groups: Sequence[Group]) -> dict[str, float]:
    """What answers were worth. `faults`: the share of which a grader could not read, or whose judge's reply it could
    not; only where there are any."""
    found = [reward for group in groups for reward in group.rewards]
    answers = [answer for group in groups for answer in group.answers]
    faults = [bool(grade.faults) for group in groups for grade in group.grades]
    means = {
        f"{kind}_mean_reward": statistics.fmean(found),
        f"{kind}_reward_std": statistics.pstdev(found),
        f"{kind}_mean_tokens": statistics.fmean(len(answer.tokens) for answer in answers),
        f"{kind}_cut_off": statistics.fmean(answer.is_cut for answer in answers),
        **({f"{kind}_grader_faults": statistics.fmean(faults)} if any(faults) else {}),
    }
    return {name: round(value, 6) for name, value in means.items()}


def policy(reports: Sequence[PassReport], weight: float) -> dict[str, float | None]:
    """Per token that was learnt: the loss, where each token had this `weight`, and how far what learnt is from what
    sampled, which is nothing but rounding. Where nothing was learnt the loss is None."""
    num_tokens = sum(report.num_tokens for report in reports)
    if not num_tokens:
        return {"train_loss": None}
    found = {
        "train_loss": sum(report.loss for report in reports) / (weight * num_tokens),
        "train_kl": sum(report.metrics.get("kl_from_sampler", 0.0) for report in reports) / num_tokens,
    }
    return {name: round(value, 6) if math.isfinite(value) else None for name, value in found.items()}


def step_message(metrics: Mapping[str, Any]) -> str:
    """Step 1/88: training loss=2.41, validation loss=2.52"""
    where = f"Step {metrics['step']}/{metrics['total_steps']}"
    if "train_mean_reward" in metrics:
        return f"{where}: {_reward_message(metrics)}"
    line = f"{where}: training loss={_short(metrics['train_loss'])}"
    if "valid_loss" in metrics:
        line += f", validation loss={_short(metrics['valid_loss'])}"
    return line


def _reward_message(metrics: Mapping[str, Any]) -> str:
    line = f"mean reward={metrics['train_mean_reward']:.3f}"
    if "valid_mean_reward" in metrics:
        line += f", validation mean reward={metrics['valid_mean_reward']:.3f}"
    if metrics["train_loss"] is None:
        line += "; nothing to learn: the answers to each prompt were all worth the same"
    return line


def _short(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.2f}" if loss >= 0.1 else f"{loss:.4f}"


def checkpoint_metrics(metrics: Mapping[str, Any]) -> dict[str, float | int | None]:
    """The metrics of a checkpoint's step. Validation always covers the whole file, hence the full_ twins."""
    names = (
        "step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy",
        "train_mean_reward", "valid_mean_reward",
    )  # fmt: skip
    found = {name: metrics[name] for name in names if name in metrics}
    return found | {f"full_{name}": value for name, value in found.items() if name.startswith("valid_")}


def table(steps: Iterable[Mapping[str, Any]]) -> bytes:
    """The result file: CSV, a line per optimiser step, empty where nothing was measured."""
    lines = list(steps)
    columns = REWARD_COLUMNS if lines and "train_mean_reward" in lines[0] else COLUMNS
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([step.get(name) for name in columns.values()] for step in lines)
    return stream.getvalue().encode()


def file(content: bytes) -> File:
    """The record of a result file."""
    return File(
        file_id=new_id("file-"),
        filename="step_metrics.csv",
        purpose=RESULTS_PURPOSE,
        bytes=len(content),
        created_at=now(),
    )
