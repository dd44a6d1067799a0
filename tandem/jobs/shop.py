"""What the runs of one server share: the things they work with, what they are given, and how they fail."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.finetune import data
from tandem.jobs.adapters import Adapters
from tandem.jobs.grading import Grading
from tandem.jobs.records import Job
from tandem.jobs.store import Database
from tandem.tokenizer import Tokenizer
from tandem.work import LoraConfig

if TYPE_CHECKING:
    from tandem.engine.client import EngineClient


class Failure(Exception):
    """Ends a job: what its `error` says."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(code, message, param)
        self.code, self.message, self.param = code, message, param


@dataclass(frozen=True)
class Shop:
    """What every run works with. `resume_every_s`: seconds of training between two resume points."""

    db: Database
    engine: EngineClient
    adapters: Adapters
    root: Path
    organization: str
    resume_every_s: float
    tokenizer: Tokenizer
    grading: Grading


@dataclass(frozen=True)
class Loaded:
    """A job's files as rows."""

    train: data.Dataset
    valid: data.Dataset | None


def lora_config(job: Job) -> LoraConfig:
    extras = job.tandem
    assert extras.alpha is not None
    return LoraConfig(
        rank=extras.rank, alpha=extras.alpha, target_modules=extras.target_modules, use_rslora=extras.use_rslora,
        dropout=extras.dropout, seed=job.seed,
    )  # fmt: skip
