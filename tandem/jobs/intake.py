"""From a request to a job: what it starts from, the shape of its adapter, how long its rows may be.

What needs the files' content, beyond a glance at the longest line, is found out later, in `queue.py`.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tandem.errors import InvalidRequest, NotFound
from tandem.jobs import queries
from tandem.jobs.adapters import Adapters, read_shape
from tandem.jobs.recipe import ANSWER_TOKENS, GROUP_SIZE
from tandem.jobs.records import AdapterRecord, Auto, File, Job, JobRequest, TandemExtras, new_id
from tandem.tokenizer import Tokenizer

TEXT_ROW_TOKENS = 1024  # rows that a plain text is cut into, unless the request says how long
LONG_LINE_BYTES = 1 << 22  # of the longest line, as much is looked at before the files are checked


def starting_point(model: str, adapters: Adapters, model_names: Sequence[str]) -> tuple[str, AdapterRecord | None]:
    """The base model's name, and the adapter to continue, if any. Raises NotFound, InvalidRequest."""
    if model in model_names:
        return model, None
    try:
        parent = adapters.get(model)
    except NotFound:
        raise NotFound(
            f"there is no model {model!r} to fine-tune: use {model_names[0]!r}, or an adapter of it", param="model"
        ) from None
    if not adapters.has_base(parent.base_model):
        raise InvalidRequest(
            f"{model} is an adapter of {parent.base_model}, but {model_names[0]} is served here", param="model"
        )
    return parent.base_model, parent


def shaped(extras: TandemExtras, parent: AdapterRecord | None, limit: int) -> TandemExtras:
    """The extras with the adapter's shape: a continued one keeps its own. Reads the parent's config.

    Raises InvalidRequest where something else was asked for, ModelError for a parent that cannot be continued.
    """
    if (extras.max_seq_len or 0) > limit:
        raise InvalidRequest(f"max_seq_len must be at most the model's {limit}", param="tandem.max_seq_len")
    if parent is None:
        return msgspec.structs.replace(extras, alpha=extras.alpha or 2.0 * extras.rank)
    shape, default = dataclasses.asdict(read_shape(Path(parent.path))), TandemExtras()
    for name, value in shape.items():
        asked = getattr(extras, name)
        asked = tuple(sorted(asked)) if isinstance(asked, tuple) else asked
        if asked != getattr(default, name) and asked != value:
            raise InvalidRequest(f"{parent.name} has {name} {value}: leave {name} out", param=f"tandem.{name}")
    return msgspec.structs.replace(extras, **shape)


def measured(
    extras: TandemExtras, uploads: Sequence[tuple[File, Path]], limit: int, tokenizer: Tokenizer
) -> tuple[TandemExtras, int]:
    """The extras with max_seq_len, and the tokens of the longest row to expect: what was asked for, or as many as the
    files' longest line has. Reads the files."""
    if extras.max_seq_len is not None:
        return extras, extras.max_seq_len
    longest = 2
    for file, path in uploads:
        if file.filename.lower().endswith(".txt"):
            limit = min(limit, TEXT_ROW_TOKENS)
            longest = max(longest, min(file.bytes, limit))
        else:
            longest = max(longest, _longest_line(path, tokenizer))
    return msgspec.structs.replace(extras, max_seq_len=limit), min(longest, limit)


def exploring(extras: TandemExtras, longest: int, limit: int) -> tuple[TandemExtras, int]:
    """The extras of a reinforcement job whose rows have up to `longest` tokens, and the longest sequence to expect: a
    prompt and its answer. Raises InvalidRequest where answers could fill a whole sequence."""
    room = extras.max_seq_len or limit
    max_tokens = extras.max_tokens or min(ANSWER_TOKENS, room // 2)
    if max_tokens >= room:
        raise InvalidRequest(f"max_tokens must be less than the {room} of prompt and answer", param="tandem.max_tokens")
    extras = msgspec.structs.replace(
        extras, max_tokens=max_tokens, group_size=extras.group_size or GROUP_SIZE, loss=extras.loss or "ppo"
    )
    return extras, min(longest + max_tokens, room)


def _longest_line(path: Path, tokenizer: Tokenizer) -> int:
    """Tokens of a file's longest line, as it stands there."""
    with open(path, "rb") as stream:
        longest = max(stream, key=len)
    return len(tokenizer.encode(longest[:LONG_LINE_BYTES].decode(errors="replace")))


def job(request: JobRequest, extras: TandemExtras, base_model: str, parent: AdapterRecord | None) -> Job:
    """The new job; its seed is drawn here, once, where the request has none."""
    return Job(
        job_id=new_id("ftjob-"), created_at=queries.now(), status="validating_files", model=request.model,
        base_model=base_model, parent=parent.name if parent else None, training_file=request.training_file,
        validation_file=request.validation_file, suffix=request.suffix,
        seed=request.seed if request.seed is not None else secrets.randbelow(2**31), metadata=request.metadata,
        method=request.method, tandem=extras, grader=request.grader,
        hyperparameters={
            "n_epochs": request.n_epochs,
            "batch_size": request.batch_size,
            "learning_rate_multiplier": request.learning_rate_multiplier,
            **({"beta": request.beta} if request.method == "dpo" else {}),
            **(_reinforcement(request) if request.method == "reinforcement" else {}),
        },
    )  # fmt: skip


def _reinforcement(request: JobRequest) -> dict[str, int | float | Auto]:
    return {name: getattr(request, name) for name in ("compute_multiplier", "eval_interval", "eval_samples")}
