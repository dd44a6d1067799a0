"""The fine-tuning routes on the wire: request bodies as pydantic types, replies as plain dicts in OpenAI's shapes.

Here a field that is not known is refused, never dropped: a hyperparameter that silently does nothing costs a night of
training. Defaults are those of `jobs/records.py`; the generation routes' bodies are in `schemas.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tandem.errors import InvalidRequest
from tandem.finetune.formats import FORMATS
from tandem.jobs.records import AdapterRecord, Alias, Checkpoint, Event, File, Job, JobRequest, TandemExtras

INT32_MAX = 2**31 - 1
MAX_PAIRS = 16
Name = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """A body or a part of one: known fields only, right types only; null means the default."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _check(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, value in body.items():
            if name not in cls.model_fields:
                raise InvalidRequest(f"unknown field '{name[:64]}'{cls.hint(name)}", name[:64])
            if isinstance(value, str) and "\0" in value:
                raise InvalidRequest("has a NUL character", name)
        return {name: value for name, value in body.items() if value is not None}

    @classmethod
    def hint(cls, name: str) -> str:
        """What to do about the unknown field `name`."""
        near = difflib.get_close_matches(name, cls.model_fields, n=1)
        return f", did you mean '{near[0]}'?" if near else f": it takes {', '.join(cls.model_fields)}"


Epochs = Literal["auto"] | Annotated[int, Field(ge=1, le=10_000)]
BatchSize = Literal["auto"] | Annotated[int, Field(ge=1, le=65_536)]
Count = Literal["auto"] | Annotated[int, Field(ge=1, le=INT32_MAX)]
Multiplier = Literal["auto"] | Annotated[float, Field(gt=0, le=1e6)]


class Hyperparameters(Strict):
    n_epochs: Epochs = "auto"
    batch_size: BatchSize = "auto"
    learning_rate_multiplier: Multiplier = "auto"


class Supervised(Strict):
    hyperparameters: Hyperparameters = Hyperparameters()


class PreferenceHyperparameters(Hyperparameters):
    beta: Literal["auto"] | Annotated[float, Field(gt=0, le=2)] = "auto"


class Preference(Strict):
    hyperparameters: PreferenceHyperparameters = PreferenceHyperparameters()


def _no_effort(effort: Any) -> Any:
    if effort != "default":
        raise ValueError("models here have no reasoning effort to choose: leave it out, or send 'default'")
    return effort


class ReinforcementHyperparameters(Hyperparameters):
    compute_multiplier: Multiplier = "auto"
    eval_interval: Count = "auto"
    eval_samples: Count = "auto"
    reasoning_effort: Annotated[str, BeforeValidator(_no_effort)] = "default"


class Reinforcement(Strict):
    """What a grader may say is known in `finetune/graders.py`."""

    grader: dict[str, Any] | None = None
    hyperparameters: ReinforcementHyperparameters = ReinforcementHyperparameters()


class Method(Strict):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised = Supervised()
    dpo: Preference = Preference()
    reinforcement: Reinforcement = Reinforcement()

    @model_validator(mode="after")
    def _one(self) -> Method:
        for other in ("supervised", "dpo", "reinforcement"):
            if other != self.type and other in self.model_fields_set:
                raise InvalidRequest(f"method.type is {self.type}: remove method.{other}", other)
        return self

    @property
    def hyperparameters(self) -> Hyperparameters:
        chosen: Supervised | Preference | Reinforcement = getattr(self, self.type)
        return chosen.hyperparameters


def _as_list(targets: Any) -> Any:
    return [targets] if isinstance(targets, str) else targets


def _is_format(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f"must be one of {', '.join(FORMATS)}")
    return name


Target = Annotated[str, Field(min_length=1, max_length=64)]
Targets = Annotated[list[Target], Field(min_length=1, max_length=16, fail_fast=True), BeforeValidator(_as_list)]


class Tandem(Strict):
    """What OpenAI's body has no place for; the SDK sends it with extra_body={"tandem": {...}}."""

    rank: Annotated[int, Field(ge=1, le=4096)] | None = None
    alpha: Annotated[float, Field(gt=0, le=1e6)] | None = None
    target_modules: Targets | None = None
    use_rslora: bool | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1e6)] | None = None
    max_seq_len: Annotated[int, Field(ge=2, le=INT32_MAX)] | None = None
    schedule: Literal["constant", "linear", "cosine"] | None = None
    warmup_steps: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] | None = None
    max_grad_norm: Annotated[float, Field(ge=0, le=1e6)] | None = None
    priority: Annotated[int, Field(ge=-8, le=8)] | None = None
    checkpoint_every: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    validate_every: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    format: Annotated[str, AfterValidator(_is_format)] | None = None
    optimizer: Literal["adamw", "adamw8bit", "sgd", "lion", "adafactor", "muon", "mezo"] | None = None
    group_size: Annotated[int, Field(ge=2, le=1024)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    loss: Literal["ppo", "importance_sampling", "cispo", "gspo", "dro"] | None = None

    def to_record(self) -> TandemExtras:
        given = {name: getattr(self, name) for name in self.model_fields_set}
        if "target_modules" in given:
            given["target_modules"] = tuple(given["target_modules"])
        return TandemExtras(**given)


def _is_metadata(pairs: Any) -> Any:
    if not isinstance(pairs, dict):
        raise ValueError("must be an object of strings")
    if len(pairs) > MAX_PAIRS:
        raise ValueError(f"has more than {MAX_PAIRS} keys")
    for key, value in pairs.items():
        if not 1 <= len(key) <= 64 or "\0" in key:
            raise ValueError("keys have 1 to 64 characters")
        if not isinstance(value, str) or len(value) > 512 or "\0" in value:
            raise ValueError(f"the value of '{key}' must be a string of at most 512 characters")
    return pairs


def _no_integrations(given: Any) -> Any:
    if given != []:
        raise ValueError("integrations are not supported yet: read the metrics from the job's events")
    return given


class JobBody(Strict):
    """POST /v1/fine_tuning/jobs."""

    model: Name
    training_file: Name
    validation_file: Name | None = None
    suffix: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")] | None = None
    seed: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(_is_metadata)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: Annotated[list[Any], BeforeValidator(_no_integrations)] = []
    tandem: Tandem = Tandem()

    @classmethod
    def hint(cls, name: str) -> str:
        if name in Tandem.model_fields:
            return f': put it into "tandem" (extra_body={{"tandem": {{"{name}": ...}}}} with the SDK)'
        if name in Hyperparameters.model_fields:
            return ": put it into method.supervised.hyperparameters"
        if name == "beta":
            return ": put it into method.dpo.hyperparameters"
        if name == "grader" or name in ReinforcementHyperparameters.model_fields:
            within = "method.reinforcement" + ("" if name == "grader" else ".hyperparameters")
            return f": put it into {within}"
        return super().hint(name)

    @model_validator(mode="after")
    def _once(self) -> JobBody:
        inner = self.method.hyperparameters if self.method else None
        if self.hyperparameters and inner and inner.model_fields_set and inner != self.hyperparameters:
            assert self.method is not None
            where = f"method.{self.method.type}.hyperparameters"
            raise InvalidRequest(f"differs from {where}: send one of them", "hyperparameters")
        return self

    def to_record(self) -> JobRequest:
        inner = self.method.hyperparameters if self.method else Hyperparameters()
        chosen = inner if inner.model_fields_set or not self.hyperparameters else self.hyperparameters
        return JobRequest(
            model=self.model,
            training_file=self.training_file,
            validation_file=self.validation_file,
            suffix=self.suffix,
            seed=self.seed,
            metadata=self.metadata,
            n_epochs=chosen.n_epochs,
            batch_size=chosen.batch_size,
            learning_rate_multiplier=chosen.learning_rate_multiplier,
            method=self.method.type if self.method else "supervised",
            beta=inner.beta if isinstance(inner, PreferenceHyperparameters) else "auto",
            tandem=self.tandem.to_record(),
            **(_exploring(self.method.reinforcement) if self.method else {}),
        )


def _exploring(method: Reinforcement) -> dict[str, Any]:
    names = ("compute_multiplier", "eval_interval", "eval_samples")
    return {"grader": method.grader, **{name: getattr(method.hyperparameters, name) for name in names}}


class GraderBody(Strict):
    """POST /v1/fine_tuning/alpha/graders/validate."""

    grader: dict[str, Any]


class GraderRunBody(GraderBody):
    """POST /v1/fine_tuning/alpha/graders/run."""

    model_sample: str
    item: dict[str, Any] = {}


AdapterName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
ServerPath = Annotated[str, Field(min_length=1, max_length=4096)]


class AdapterPath(Strict):
    """POST /v1/adapters and /v1/adapters/export."""

    name: AdapterName
    path: ServerPath


class Promotion(Strict):
    alias: AdapterName
    target: AdapterName


class Rollback(Strict):
    alias: AdapterName


# ---------------------------------------------------------------- replies


def page(objects: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """OpenAI's list: the next page starts `after` the last id."""
    first, last = (objects[0]["id"], objects[-1]["id"]) if objects else (None, None)
    return {"object": "list", "data": objects, "has_more": has_more, "first_id": first, "last_id": last}


def file_object(file: File) -> dict[str, Any]:
    return {
        "id": file.file_id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
        "status_details": file.status_details,
    }


def job_object(job: Job, organization: str) -> dict[str, Any]:
    """`tandem` holds what OpenAI's object has no place for: the extras as resolved, and how far the job is."""
    return {
        "id": job.job_id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "error": job.error,
        "estimated_finish": job.estimated_finish,
        "fine_tuned_model": job.fine_tuned_model,
        "finished_at": job.finished_at,
        "hyperparameters": job.hyperparameters,
        "integrations": [],
        "metadata": job.metadata,
        "method": {"type": job.method, job.method: _method(job)},
        "model": job.model,
        "organization_id": organization,
        "result_files": job.result_files,
        "seed": job.seed,
        "status": job.status,
        "trained_tokens": job.trained_tokens,
        "training_file": job.training_file,
        "user_provided_suffix": job.suffix,
        "validation_file": job.validation_file,
        "tandem": {
            **msgspec.to_builtins(job.tandem),
            "base_model": job.base_model,
            "step": job.step,
            "total_steps": job.total_steps,
        },
    }


def _method(job: Job) -> dict[str, Any]:
    grader = {} if job.grader is None else {"grader": job.grader}
    return {**grader, "hyperparameters": job.hyperparameters}


def event_object(event: Event) -> dict[str, Any]:
    return {
        "id": event.event_id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def checkpoint_object(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "id": checkpoint.checkpoint_id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint.name,
        "fine_tuning_job_id": checkpoint.job_id,
        "metrics": checkpoint.metrics,
        "step_number": checkpoint.step,
    }


def adapter_object(record: AdapterRecord, is_resident: bool, aliases: Sequence[str]) -> dict[str, Any]:
    return {
        "id": record.name,
        "object": "adapter",
        "name": record.name,
        "path": record.path,
        "base_model": record.base_model,
        "created_at": record.created_at,
        "rank": record.rank,
        "job_id": record.job_id,
        "kind": record.kind,
        "resident": is_resident,
        "aliases": list(aliases),
    }


def alias_object(alias: Alias) -> dict[str, Any]:
    return {"object": "adapter.alias", "name": alias.name, "target": alias.target, "history": list(alias.history)}
