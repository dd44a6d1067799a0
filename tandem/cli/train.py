"""`tandem train`: its options, and fine-tuning on a running server, over the OpenAI API.

Without --server the work is done in this process: `train_alone.py`. What axolotl's keys mean is in `axolotl.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem import config
from tandem.cli import adapters, axolotl, client, follow, jobs, options
from tandem.config import CacheConfig, EngineConfig, ModelConfig, TrainingConfig, option
from tandem.errors import ConfigError, TandemError
from tandem.jobs.recipe import ANSWER_TOKENS, GROUP_SIZE, METHODS, OPTIMIZER_RATES, POLICY_LOSSES
from tandem.jobs.records import TandemExtras

if TYPE_CHECKING:
    import httpx

DEFAULT = TandemExtras()
FORMATS = ("auto", "chat", "completion", "alpaca", "sharegpt", "text")
HYPERPARAMETERS = {"epochs": "n_epochs", "batch_size": "batch_size", "beta": "beta"}
# What is about requests only means nothing to a process that serves none.
SKIPPED = ("seed", "slo_tpot_ms", "slo_ttft_ms", "train_step_ms", "share_forward", "enable_prefix_caching",
           "train_resident_bytes", "max_resident_runs", "train_spill_dir")  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What is learnt from what."""

    data: str | None = option(None, "training file: JSONL of chats, prompts and completions, alpaca, sharegpt or text")
    method: str = option(
        "supervised", "what is learnt from a row: its answer, a preference, or a reward", choices=METHODS
    )
    grader: str | None = option(None, "JSON file of a grader, which gives answers their reward (reinforcement)")
    validation: str | None = option(None, "validation file, in the same format")
    format: str = option(
        "auto", "format of both files", choices=("auto", "chat", "completion", "alpaca", "sharegpt", "text")
    )
    output: str | None = option(None, "new directory for the adapter (default: tandem-SUFFIX or tandem-DATA)")
    init_from: str | None = option(None, "adapter to go on from: a PEFT directory, or with --server a name")
    suffix: str | None = option(None, "part of the new model's name: a-z, 0-9 and '-'")
    chat_template: str | None = option(None, "file with a Jinja chat template, or the template itself")


@dataclass(frozen=True)
class Recipe:
    """How it is learnt."""

    epochs: int | None = option(None, "times the whole file is learnt (default: by its size)", low=1)
    batch_size: int | None = option(None, "rows in one optimiser step (default: by the file's size)", low=1)
    optimizer: str | None = option(
        None, f"what makes a step of a gradient; mezo needs none (default: {DEFAULT.optimizer})",
        choices=tuple(OPTIMIZER_RATES),
    )  # fmt: skip
    learning_rate: float | None = option(
        None, "peak learning rate (default: by the model's size; sgd, adafactor and mezo have none)", low=0.0
    )
    schedule: str | None = option(
        None, f"learning rate over the run (default: {DEFAULT.schedule})", choices=("constant", "linear", "cosine")
    )
    warmup_steps: int | None = option(None, "optimiser steps until the peak (default: 0)", low=0)
    weight_decay: float | None = option(None, "of the optimizer (default: 0)", low=0.0)
    max_grad_norm: float | None = option(None, f"clip gradients (default: {DEFAULT.max_grad_norm}; 0: do not)", low=0.0)
    rank: int | None = option(None, f"rank of the LoRA adapter (default: {DEFAULT.rank})", low=1)
    alpha: float | None = option(None, "its scaling is alpha / rank (default: twice the rank)", low=0.0)
    target_modules: list[str] = option([], "modules that get one, q_proj say (default: all-linear)", metavar="NAME")
    use_rslora: bool = option(False, "scale by alpha / sqrt(rank)")
    dropout: float | None = option(None, "LoRA dropout (default: 0)", low=0.0, high=0.99)
    max_seq_len: int | None = option(None, "cut rows at this many tokens (default: the context)", low=2)
    checkpoint_every: int | None = option(None, "optimiser steps between checkpoints, beside each epoch's end", low=1)
    validate_every: int | None = option(None, "optimiser steps between validations, beside each checkpoint", low=1)
    beta: float | None = option(
        None, "how far dpo may go from where it began: less far with more (default: 0.1)", low=0.0
    )
    group_size: int | None = option(None, f"answers to a prompt (reinforcement; default: {GROUP_SIZE})", low=2)
    max_tokens: int | None = option(None, f"tokens of an answer (reinforcement; default: {ANSWER_TOKENS})", low=1)
    loss: str | None = option(None, "what learns from rewards (default: ppo)", choices=POLICY_LOSSES)
    priority: int | None = option(None, "each unit above others' doubles its share of the machine (default: 0)")


@dataclass(frozen=True)
class Remote:
    """Training on a running server, beside what it serves."""

    server: str | None = option(None, "the server's address (default: train in this process)")
    api_key: str | None = option(None, "its API key", env="OPENAI_API_KEY")
    detach: bool = option(False, "return as soon as the job is created")


OWN = (ModelConfig, CacheConfig, TrainingConfig)
CLASSES = (Task, Recipe, Remote, *OWN)


def parser(prog: str) -> options.Parser:
    """Task, recipe, server or engine, and a config file."""
    made = options.Parser(prog=prog, description="Fine-tune a LoRA adapter, in this process or on a running server.")
    made.add_argument("config", nargs="?", metavar="CONFIG.yaml",
                      help="file with these options or axolotl's, one `name: value` a line")  # fmt: skip
    options.add(made, Task, Recipe)
    made.add_argument("--seed", default=argparse.SUPPRESS, metavar="INT",
                      help="of the adapter's start, the order of rows and dropout (default: 0)")  # fmt: skip
    options.add(made, Remote, *OWN, skip=SKIPPED)
    return made


def run(namespace: argparse.Namespace) -> int:
    """Train to the end and say where the adapter is. 130 after Ctrl-C, which loses nothing."""
    entries: dict[str, Any] = {}
    if namespace.config:
        raw = config.read_yaml(namespace.config)
        entries = axolotl.translate(raw, config.options_of(*CLASSES), namespace.config, options.note)
    namespace.config_entries = entries
    task, recipe, remote, model, cache, training = options.resolve(namespace, *CLASSES)
    _check(task, remote, given=vars(namespace).keys() | entries.keys())
    if remote.server is None:
        from tandem.cli import train_alone

        return train_alone.run(EngineConfig(model=model, cache=cache, training=training), task, extras(task, recipe),
                               hyperparameters(task, recipe), grader(task))  # fmt: skip
    is_given = "model" in vars(namespace) or "model" in entries or model.model != ModelConfig.model
    return _on_server(task, recipe, remote, model.model if is_given else None, model.seed)


def hyperparameters(task: Task, recipe: Recipe) -> dict[str, int]:
    """What OpenAI's API calls hyperparameters, as far as it was given."""
    given = {name: getattr(recipe, field) for field, name in HYPERPARAMETERS.items()}
    if task.method == "reinforcement":
        given["eval_interval"] = recipe.validate_every
    return {name: value for name, value in given.items() if value is not None}


def grader(task: Task) -> dict[str, Any] | None:
    """What the grader's file holds. Raises ConfigError where it is no JSON object, UsageError for one too many."""
    if task.method != "reinforcement":
        if task.grader is not None:
            raise options.UsageError("--grader is for --method reinforcement: leave it out")
        return None
    if task.grader is None:
        raise options.UsageError("--method reinforcement needs --grader FILE: what an answer is worth")
    try:
        found = json.loads(Path(task.grader).expanduser().read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read --grader {task.grader}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f'--grader {task.grader} must hold a JSON object, {{"type": ...}}')
    return found


def extras(task: Task, recipe: Recipe) -> dict[str, Any]:
    """The fields of TandemExtras that were given; the defaults of the others are known in one place."""
    given = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)}
    unsaid = {*HYPERPARAMETERS, *(["validate_every"] if task.method == "reinforcement" else [])}
    given = {name: value for name, value in given.items() if name not in unsaid}
    given = {name: value for name, value in given.items() if value is not None and value is not False and value != []}
    return given | ({} if task.format == "auto" else {"format": task.format})


def _check(task: Task, remote: Remote, given: set[str]) -> None:
    """Raise UsageError or ConfigError for what can be known to fail before anything slow happens."""
    if task.data is None:
        raise options.UsageError("--data FILE is missing: the rows to learn from")
    for flag, file in (("--data", task.data), ("--validation", task.validation)):
        if file is not None and not Path(file).expanduser().is_file():
            raise ConfigError(f"{flag} {file} is not a file")
    grader(task)
    if remote.server is None:
        if remote.detach:
            raise options.UsageError("--detach needs --server: without one the run ends with this process")
        if "api_key" in given:
            raise options.UsageError("--api-key needs --server: without one nobody asks for a key")
        return
    engine_only = set(options.names(*OWN)) - {"model", "seed"} | {"chat_template"}
    if wrong := sorted(given & engine_only):
        flags = ", ".join("--" + name.replace("_", "-") for name in wrong)
        raise options.UsageError(f"{flags}: with --server that is the server's to say; leave it out")
    if task.output and Path(task.output).expanduser().exists():
        raise ConfigError(f"--output {task.output} exists already: choose another directory, or remove it first")
    if task.init_from and Path(task.init_from).expanduser().is_dir():
        advice = f"tandem adapters load NAME {task.init_from} --server {remote.server}"
        raise ConfigError(f"--init-from takes an adapter's name with --server; import the directory with: {advice}")


def _on_server(task: Task, recipe: Recipe, remote: Remote, model: str | None, seed: int) -> int:
    assert task.data is not None and remote.server is not None
    with client.connect_to(remote.server, remote.api_key) as http:
        address = client.ServerAddress(url=str(http.base_url).rstrip("/"), model_name=task.init_from or model)
        body: dict[str, Any] = {
            "model": client.model_name(http, address),
            "training_file": _upload(http, task.data),
            "seed": seed,
            "method": {"type": task.method, task.method: _method(task, recipe)},
            "tandem": extras(task, recipe),
        }
        if task.validation:
            body["validation_file"] = _upload(http, task.validation)
        if task.suffix:
            body["suffix"] = task.suffix
        job_id = client.call(http, "POST", jobs.ROUTE, json=body)["id"]
        if remote.detach:
            print(job_id)
            options.note(_manage(job_id, remote.server))
            return 0
        try:
            asyncio.run(_follow(http, job_id))
        except (KeyboardInterrupt, TandemError):
            options.note(f"\nThe job goes on without this command. {_manage(job_id, remote.server)}")
            raise
        return _conclude(http, job_id, task.output)


def _method(task: Task, recipe: Recipe) -> dict[str, Any]:
    judge = grader(task)
    return {"hyperparameters": hyperparameters(task, recipe)} | ({} if judge is None else {"grader": judge})


def _upload(http: httpx.Client, file: str) -> str:
    path = Path(file).expanduser()
    try:
        with path.open("rb") as stream:
            content = {"file": (path.name, stream, "application/jsonl")}
            return client.call(http, "POST", "files", data={"purpose": "fine-tune"}, files=content)["id"]
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error}") from error


async def _follow(http: httpx.Client, job_id: str) -> None:
    with follow.display() as show:
        await follow.follow(jobs.source(http, job_id), show)


def _manage(job_id: str, server: str) -> str:
    at = "" if server == client.DEFAULT_SERVER else f" --server {server}"
    return f"Follow: tandem jobs logs -f {job_id}{at}; end it: tandem jobs cancel {job_id}{at}"


def _conclude(http: httpx.Client, job_id: str, output: str | None) -> int:
    job = client.call(http, "GET", jobs.route(job_id))
    if job["status"] != "succeeded":
        raise TandemError(ended_badly(job["status"], job.get("error")))
    name = job["fine_tuned_model"]
    print(f"Model    {name}, {job['trained_tokens'] or 0:,} tokens trained on")
    print(f"Try it   tandem chat --url {str(http.base_url).rstrip('/')} --model-name {name}")
    if output:
        adapters.download(http, name, Path(output).expanduser())
        print(f"Adapter  {output}, a PEFT directory")
    return 0


def ended_badly(status: str, error: dict[str, Any] | None) -> str:
    """Why a job that did not succeed did not."""
    return f"the job {'failed' if status == 'failed' else 'was cancelled'}" + (f": {error['message']}" if error else "")
