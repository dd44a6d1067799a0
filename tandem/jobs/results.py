"""What a job reports: losses from the engine's sums, the line of a step, the result table. Pure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tandem.jobs.queries import now
from tandem.jobs.records import RESULTS_PURPOSE, File, new_id
from tandem.work import PassReport

COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}


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


def step_message(metrics: Mapping[str, Any]) -> str:
    """Step 1/88: training loss=2.41, validation loss=2.52"""
    line = f"Step {metrics['step']}/{metrics['total_steps']}: training loss={_short(metrics['train_loss'])}"
    if "valid_loss" in metrics:
        line += f", validation loss={_short(metrics['valid_loss'])}"
    return line


def _short(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.2f}" if loss >= 0.1 else f"{loss:.4f}"


def checkpoint_metrics(metrics: Mapping[str, Any]) -> dict[str, float | int | None]:
    """The metrics of a checkpoint's step. Validation always covers the whole file, hence the full_ twins."""
    names = ("step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
    found = {name: metrics[name] for name in names if name in metrics}
    return found | {f"full_{name}": value for name, value in found.items() if name.startswith("valid_")}


def table(steps: Iterable[Mapping[str, Any]]) -> bytes:
    """The result file: CSV, a line per optimiser step, empty where nothing was measured."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([step.get(name) for name in COLUMNS.values()] for step in steps)
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
