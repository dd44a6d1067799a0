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


def means(kind: str, reports: Sequence[PassReport]) -> dict[str, float | None]:
    """Loss and accuracy per trained token, over all `reports`. None is what no JSON number can say."""
    num_tokens = max(1, sum(report.num_tokens for report in reports))
    loss = sum(report.nll for report in reports) / num_tokens
    accuracy = sum(report.num_correct for report in reports) / num_tokens
    return {
        f"{kind}_loss": round(loss, 6) if math.isfinite(loss) else None,
        f"{kind}_mean_token_accuracy": round(accuracy, 6),
    }


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
