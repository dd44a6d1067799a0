"""A job's numbers: what `auto` means, which rows make which optimiser step, the learning rate of each, the names.

Pure functions of the request and of the row count: a resumed job computes the same steps as an uninterrupted one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import msgspec

from tandem.errors import InvalidRequest
from tandem.finetune import data, formats, graders
from tandem.jobs.records import Auto, Job, JobRequest, TandemExtras

T = TypeVar("T", int, float)

MIN_EPOCHS, MAX_AUTO_EPOCHS, ENOUGH_STEPS = 3, 25, 100
MIN_BATCH, MAX_AUTO_BATCH, ROWS_PER_BATCH = 4, 32, 50
MAX_EPOCHS, MAX_BATCH, MAX_MULTIPLIER = 1000, 4096, 1e6
SUFFIX = re.compile(r"[a-z0-9-]{1,64}")
BETA, MAX_BETA = 0.1, 2.0
# The default learning rate by that of supervised training: preferences and rewards need smaller steps.
METHOD_RATES = {"supervised": 1.0, "dpo": 0.25, "reinforcement": 0.5}
METHODS = tuple(METHOD_RATES)
# Of reinforcement: answers to a prompt, the longest of them by default, what may be learnt with.
GROUP_SIZE, MAX_GROUP, ANSWER_TOKENS = 8, 1024, 256
POLICY_LOSSES = ("ppo", "importance_sampling", "cispo", "gspo", "dro")
EVALUATIONS = 10
# The same by optimizer. There is none for those whose rates mean something else for every model.
OPTIMIZER_RATES: dict[str, float | None] = {
    "adamw": 1.0, "adamw8bit": 1.0, "muon": 1.0, "lion": 0.1, "sgd": None, "adafactor": None, "mezo": None,
}  # fmt: skip
# Request fields of the extras that must lie in a range, ends included; None passes.
RANGES: dict[str, tuple[float, float]] = {
    "rank": (1, 65536), "alpha": (1e-6, 1e6), "dropout": (0.0, 0.99), "learning_rate": (1e-12, 1e3),
    "max_seq_len": (2, 2**31), "warmup_steps": (0, 2**31), "weight_decay": (0.0, 1e3), "max_grad_norm": (0.0, 1e9),
    "priority": (-1000, 1000), "checkpoint_every": (1, 2**31), "validate_every": (1, 2**31),
    "group_size": (2, MAX_GROUP), "max_tokens": (1, 2**31),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """The optimiser steps of a job, numbered from 0. The last step of an epoch takes the rows that are left."""

    num_rows: int
    n_epochs: int
    batch_size: int
    peak: float
    schedule: str
    warmup_steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.batch_size)

    @property
    def total_steps(self) -> int:
        return self.n_epochs * self.steps_per_epoch

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, rows of it already used) before `step`."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return epoch, batch * self.batch_size

    def batch(self, step: int) -> list[int]:
        """The row numbers of `step`."""
        epoch, cursor = self.place(step)
        return self._order(epoch)[cursor : cursor + self.batch_size]

    def learning_rate(self, step: int) -> float:
        """Rises over the warm-up steps, then stays (constant) or falls towards 0 at the end (linear, cosine)."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak * (1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)

    def is_epoch_end(self, step: int) -> bool:
        return (step + 1) % self.steps_per_epoch == 0

    def is_ready(self, step: int) -> bool:
        """Whether the order of its epoch, and of the one before, is at hand. Past the end there is none to make."""
        last = self.place(min(step, self.total_steps - 1))[0]
        return all(epoch in self._orders for epoch in range(max(0, last - 1), last + 1))

    def make_ready(self, step: int) -> None:
        """Draw the orders that `batch` needs around `step`: for a million rows that takes half a second."""
        last = self.place(min(step, self.total_steps - 1))[0]
        wanted = range(max(0, last - 1), last + 1)
        for epoch in [epoch for epoch in self._orders if epoch not in wanted]:
            del self._orders[epoch]
        for epoch in wanted:
            self._order(epoch)

    @cached_property
    def _orders(self) -> dict[int, list[int]]:
        return {}

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            self._orders[epoch] = data.order(self.num_rows, epoch, self.seed)
        return self._orders[epoch]


def recipe(job: Job, num_rows: int) -> Recipe:
    """The steps of a job whose hyperparameters are numbers."""
    numbers, extras = job.hyperparameters, job.tandem
    assert extras.learning_rate is not None and "auto" not in numbers.values()
    return Recipe(
        num_rows, int(numbers["n_epochs"]), int(numbers["batch_size"]),
        extras.learning_rate * float(numbers["learning_rate_multiplier"]),
        extras.schedule, extras.warmup_steps, job.seed,
    )  # fmt: skip


def resolve(job: Job, num_rows: int, hidden_size: int) -> Job:
    """The job with every "auto" replaced by a number.

    batch_size: a fiftieth of the rows, at least 4, at most 32; never more than there are rows, even where asked for.
    n_epochs: 3, or where that gives fewer than 100 optimiser steps, as many epochs as give 100, but 25 at most.
    learning_rate_multiplier: 1. The learning rate it multiplies is `default_rate`. beta (dpo): 0.1. For reinforcement
    compute_multiplier: 1, eval_interval: a tenth of the steps, eval_samples: 1.
    """
    asked = job.hyperparameters
    batch_size = _number(asked["batch_size"], min(max(num_rows // ROWS_PER_BATCH, MIN_BATCH), MAX_AUTO_BATCH))
    batch_size = min(batch_size, num_rows)
    steps_per_epoch = math.ceil(num_rows / batch_size)
    n_epochs = _number(
        asked["n_epochs"], min(max(math.ceil(ENOUGH_STEPS / steps_per_epoch), MIN_EPOCHS), MAX_AUTO_EPOCHS)
    )
    numbers: dict[str, int | float | Auto] = {
        "n_epochs": n_epochs,
        "batch_size": batch_size,
        "learning_rate_multiplier": _number(asked["learning_rate_multiplier"], 1.0),
    }
    if job.method == "dpo":
        numbers["beta"] = _number(asked.get("beta", "auto"), BETA)
    if job.method == "reinforcement":
        numbers["compute_multiplier"] = _number(asked["compute_multiplier"], 1.0)
        numbers["eval_interval"] = _number(asked["eval_interval"], max(1, n_epochs * steps_per_epoch // EVALUATIONS))
        numbers["eval_samples"] = _number(asked["eval_samples"], 1)
    rate = job.tandem.learning_rate or default_rate(job, hidden_size)
    return msgspec.structs.replace(
        job,
        hyperparameters=numbers,
        tandem=msgspec.structs.replace(job.tandem, learning_rate=rate),
        total_steps=n_epochs * steps_per_epoch,
    )


def default_rate(job: Job, hidden_size: int) -> float:
    """2e-4 x sqrt(2048 / hidden_size), less for preferences, rewards and lion."""
    by_optimizer = OPTIMIZER_RATES[job.tandem.optimizer]
    assert by_optimizer is not None  # `check` has seen to that
    return 2e-4 * math.sqrt(2048 / hidden_size) * by_optimizer * METHOD_RATES[job.method]


def num_answers(job: Job) -> int:
    """Answers to a prompt at a time."""
    assert job.tandem.group_size is not None
    return answers(job.tandem.group_size, job.hyperparameters["compute_multiplier"])


def answers(group_size: int, multiplier: float | Auto) -> int:
    return max(2, round(group_size * (1.0 if multiplier == "auto" else float(multiplier))))


def _number(asked: int | float | Auto, chosen: T) -> T:
    return chosen if asked == "auto" else type(chosen)(asked)


def check(request: JobRequest) -> None:
    """Raise InvalidRequest, naming the field, for what no file and no machine could make right."""
    if request.method not in METHODS:
        raise InvalidRequest(f"method {request.method!r} is unknown: use {' or '.join(METHODS)}", param="method.type")
    if request.method != "supervised" and request.tandem.format != "auto":
        raise InvalidRequest("format is for supervised training: other files have one", param="tandem.format")
    if request.method != "supervised" and request.tandem.optimizer == "mezo":
        raise InvalidRequest("mezo is for supervised training: choose another optimizer", param="tandem.optimizer")
    _check_reinforcement(request)
    if request.method != "dpo" and request.beta != "auto":
        raise InvalidRequest("beta is for dpo: leave it out", param="beta")
    _check_range("beta", request.beta, 1e-6, MAX_BETA)
    if request.suffix is not None and not SUFFIX.fullmatch(request.suffix):
        raise InvalidRequest("suffix must be 1 to 64 of a-z, 0-9 and '-'", param="suffix")
    if request.seed is not None and not 0 <= request.seed < 2**31:
        raise InvalidRequest("seed must be from 0 to 2147483647", param="seed")
    _check_range("n_epochs", request.n_epochs, 1, MAX_EPOCHS)
    _check_range("batch_size", request.batch_size, 1, MAX_BATCH)
    _check_range("learning_rate_multiplier", request.learning_rate_multiplier, 1e-9, MAX_MULTIPLIER)
    _check_metadata(request.metadata or {})
    _check_extras(request.tandem)


def _check_reinforcement(request: JobRequest) -> None:
    extras = request.tandem
    if request.method != "reinforcement":
        for name in ("group_size", "max_tokens", "loss"):
            if getattr(extras, name) is not None:
                raise InvalidRequest(f"{name} is for reinforcement: leave it out", param=f"tandem.{name}")
        for name in ("grader", "compute_multiplier", "eval_interval", "eval_samples"):
            if getattr(request, name) not in (None, "auto"):
                raise InvalidRequest(f"{name} is for reinforcement: leave it out", param=name)
        return
    if request.grader is None:
        raise InvalidRequest("give a grader: it says what an answer is worth", param=graders.PARAM)
    graders.parse(request.grader)
    if extras.loss not in (None, *POLICY_LOSSES):
        raise InvalidRequest(f"loss must be one of {', '.join(POLICY_LOSSES)}", param="tandem.loss")
    if extras.validate_every is not None:
        raise InvalidRequest("validate_every is eval_interval here, a hyperparameter", param="tandem.validate_every")
    _check_range("compute_multiplier", request.compute_multiplier, 1 / 64, 128)
    _check_range("eval_interval", request.eval_interval, 1, 2**31)
    _check_range("eval_samples", request.eval_samples, 1, 64)
    if (count := answers(extras.group_size or GROUP_SIZE, request.compute_multiplier)) > MAX_GROUP:
        raise InvalidRequest(
            f"group_size x compute_multiplier gives {count} answers to a prompt: at most {MAX_GROUP}",
            param="tandem.group_size",
        )


def _check_extras(extras: TandemExtras) -> None:
    for name, (low, high) in RANGES.items():
        _check_range(f"tandem.{name}", getattr(extras, name), low, high)
    if extras.optimizer not in OPTIMIZER_RATES:
        raise InvalidRequest(f"optimizer must be one of {', '.join(OPTIMIZER_RATES)}", param="tandem.optimizer")
    if OPTIMIZER_RATES[extras.optimizer] is None and extras.learning_rate is None:
        raise InvalidRequest(
            f"the optimizer {extras.optimizer} has no learning rate that suits most models: give one",
            param="tandem.learning_rate",
        )
    if extras.schedule not in ("constant", "linear", "cosine"):
        raise InvalidRequest("schedule must be constant, linear or cosine", param="tandem.schedule")
    if extras.format not in formats.FORMATS:
        raise InvalidRequest(f"format must be one of {', '.join(formats.FORMATS)}", param="tandem.format")
    if not extras.target_modules:
        raise InvalidRequest("target_modules must name a module, or be all-linear", param="tandem.target_modules")


def _check_range(name: str, value: float | Auto | None, low: float, high: float) -> None:
    if value is None or value == "auto":
        return
    if isinstance(value, str) or not low <= value <= high:  # NaN fails every comparison
        raise InvalidRequest(f"{name} must be from {low:g} to {high:g}, not {value}", param=name)


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > 16:
        raise InvalidRequest(f"metadata has {len(metadata)} entries: at most 16", param="metadata")
    for key, value in metadata.items():
        if not 1 <= len(key) <= 64 or len(value) > 512:
            raise InvalidRequest("metadata: keys have 1 to 64 characters, values 512 at most", param="metadata")
        check_text(key, "metadata")
        check_text(value, "metadata")


def check_text(text: str, param: str) -> None:
    """Raise InvalidRequest for what is no text to a database: NUL, lone surrogates."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidRequest(f"{param} must be valid Unicode without NUL", param=param)


def plain(name: str) -> str:
    """A served model's name as part of another name: its last component, with what separates parts replaced."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.rstrip("/").rpartition("/")[2]).strip("-") or "model"


def model_name(base: str, organization: str, suffix: str | None, job_id: str) -> str:
    """`ft:base:organization:suffix:id8`, the name of a job's finished adapter; ids make it unique."""
    return f"ft:{plain(base)}:{plain(organization)}:{suffix or ''}:{job_id.removeprefix('ftjob-')[:8]}"


def checkpoint_name(name: str, step: int) -> str:
    """The name of the state after `step` optimiser steps."""
    return f"{name}:ckpt-step-{step}"
