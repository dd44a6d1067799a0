"""What the job store remembers, as plain structs, and along which lines a job's status may move.

No SQL, no disk, no HTTP: the store fills these, the API shows them. Times are whole seconds since 1970, sizes bytes.
"""

from __future__ import annotations

import secrets
import string
from typing import Any, Literal

import msgspec

Status = Literal["validating_files", "queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled"]
Auto = Literal["auto"]

# From each status to those it may become. A status that leads nowhere is final. `running` goes back to `queued` when
# the process that ran it is gone, or when the memory it needs is still held by other jobs.
TRANSITIONS: dict[Status, frozenset[Status]] = {
    "validating_files": frozenset({"queued", "paused", "failed", "cancelled"}),
    "queued": frozenset({"running", "paused", "failed", "cancelled"}),
    "running": frozenset({"queued", "pausing", "succeeded", "failed", "cancelled"}),
    "pausing": frozenset({"paused", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"validating_files", "queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
UNFINISHED: frozenset[Status] = frozenset(status for status, following in TRANSITIONS.items() if following)

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
RESULTS_PURPOSE = "fine-tune-results"

_ALPHABET = string.ascii_letters + string.digits


class File(msgspec.Struct, frozen=True, kw_only=True):
    """An uploaded file, or one that a job left behind. `purpose` is one of PURPOSES or RESULTS_PURPOSE."""

    file_id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    status: str = "processed"
    status_details: str | None = None
    expires_at: int | None = None


class TandemExtras(msgspec.Struct, frozen=True, kw_only=True):
    """What a job may say beyond OpenAI's API. None is resolved when the job is created or its files are checked.

    alpha: 2 x rank by default. learning_rate: before the multiplier. max_seq_len: tokens, the model's context by
    default. optimizer: a kind of `work.OptimParams`, or mezo. checkpoint_every and validate_every: optimiser steps
    (default: at each epoch's end). priority: higher starts first and gets twice the share per unit. The shape of an
    adapter that is continued cannot be changed.

    For reinforcement alone: `group_size` answers to a prompt at a time (8), of `max_tokens` tokens at most (256, or
    half of the longest sequence where that is less), learnt from with `loss` (ppo).
    """

    rank: int = 16
    alpha: float | None = None
    target_modules: tuple[str, ...] = ("all-linear",)
    use_rslora: bool = False
    dropout: float = 0.0
    learning_rate: float | None = None
    max_seq_len: int | None = None
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    priority: int = 0
    checkpoint_every: int | None = None
    validate_every: int | None = None
    format: str = "auto"
    optimizer: str = "adamw"
    group_size: int | None = None
    max_tokens: int | None = None
    loss: str | None = None


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a user asks of a new job. `model` is the base model or any adapter or alias, whose weights are the start."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = None
    metadata: dict[str, str] | None = None
    method: str = "supervised"
    n_epochs: int | Auto = "auto"
    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"
    beta: float | Auto = "auto"
    grader: dict[str, Any] | None = None
    compute_multiplier: float | Auto = "auto"
    eval_interval: int | Auto = "auto"
    eval_samples: int | Auto = "auto"
    tandem: TandemExtras = TandemExtras()


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A fine-tuning job. `hyperparameters` has n_epochs, batch_size and learning_rate_multiplier, with dpo also beta,
    with reinforcement compute_multiplier, eval_interval and eval_samples: "auto" until the files are checked, then
    numbers. `step` of `total_steps` optimiser steps are done, which is 0
    before that check. `base_model` is the model below all adapters, `parent` the adapter whose weights are the start.
    `error` has code, message and param.
    """

    job_id: str
    created_at: int
    status: Status
    model: str
    base_model: str
    parent: str | None = None
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int
    metadata: dict[str, str] | None = None
    method: str = "supervised"
    hyperparameters: dict[str, int | float | Auto]
    tandem: TandemExtras
    fine_tuned_model: str | None = None
    finished_at: int | None = None
    trained_tokens: int | None = None
    estimated_finish: int | None = None
    error: dict[str, str | None] | None = None
    result_files: list[str] = []
    step: int = 0
    total_steps: int = 0
    grader: dict[str, Any] | None = None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a job's log. `data` of type "metrics": step, total_steps, train_loss and so on."""

    event_id: str
    job_id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A published state of a job's adapter: `name` can be served, `path` is its PEFT directory."""

    checkpoint_id: str
    job_id: str
    created_at: int
    step: int
    name: str
    path: str
    metrics: dict[str, float | int | None]


class AdapterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter on disk. Its weights never change; `base_model` is the name of the model below all adapters."""

    name: str
    path: str
    base_model: str
    created_at: int
    rank: int
    job_id: str | None = None
    kind: Literal["final", "checkpoint", "imported"]


class Alias(msgspec.Struct, frozen=True, kw_only=True):
    """A name that stands for an adapter; `history` holds earlier targets, the newest last."""

    name: str
    target: str
    history: list[str] = []


class ResumePoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where an unfinished job goes on: after `step` optimiser steps, `cursor` rows into `epoch`."""

    job_id: str
    step: int
    epoch: int
    cursor: int
    trained_tokens: int
    path: str


def new_id(prefix: str) -> str:
    """A fresh id such as OpenAI's: `file-`, `ftjob-`, `ftevent-` or `ftckpt_` and 24 letters and digits."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(24))
