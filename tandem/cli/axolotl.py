"""A training config in axolotl's words -> `tandem train` options; keys that are already Tandem's pass through.

A key is translated, known to change nothing here, or an error: nothing is dropped in silence. Pure: a dict goes in, a
dict comes out.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tandem.errors import ConfigError
from tandem.jobs.recipe import OPTIMIZER_RATES

RENAMED = {
    "base_model": "model",
    "revision_of_model": "revision",
    "chat_template_jinja": "chat_template",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules",
    "lora_model_dir": "init_from",
    "peft_use_rslora": "use_rslora",
    "num_epochs": "epochs",
    "sequence_len": "max_seq_len",
    "output_dir": "output",
    "save_steps": "checkpoint_every",
    "eval_steps": "validate_every",
}
DATASET_FORMATS = {
    "chat_template": "chat",
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
    "completion": "text",
}
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
}
# Its names for what Tandem has, and Tandem's own.
OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_8bit": "adamw8bit", "adamw_bnb_8bit": "adamw8bit",
    "lion_pytorch": "lion", **{name: name for name in OPTIMIZER_RATES},
}  # fmt: skip
# What changes nothing with these values (None: with any), and why; another value is an error.
WITHOUT_EFFECT: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "adapter": (("lora",), "Tandem trains LoRA adapters on weights as they are"),
    "load_in_8bit": ((False,), "weights are trained on as they are"),
    "load_in_4bit": ((False,), "weights are trained on as they are"),
    "train_on_inputs": ((False,), "only answers are learnt; give a turn weight 0 to leave it out"),
    "val_set_size": ((0, 0.0), "split the file yourself and give validation: FILE"),
    "strict": ((False,), "unknown keys are always an error"),
    "fp16": ((False, "auto"), "choose dtype: float32 or bfloat16"),
    "special_tokens": (({},), "the model's own tokenizer is used as it is"),
    "tokens": (([],), "the model's own tokenizer is used as it is"),
    "chat_template": (("tokenizer_default",), "give a template's file, or itself, as chat_template_jinja"),
    "save_strategy": (("epoch", "steps"), "checkpoints come at each epoch's end, and every checkpoint_every steps"),
    "eval_strategy": (("epoch", "steps"), "validation comes at each epoch's end, and every validate_every steps"),
    "model_type": (None, "config.json says it"),
    "tokenizer_type": (None, "the tokenizer's files say it"),
    "dataset_prepared_path": (None, "nothing is prepared in advance"),
    "sample_packing": (None, "sequences always go through the layers together, never seeing each other"),
    "eval_sample_packing": (None, "sequences always go through the layers together, never seeing each other"),
    "pad_to_sequence_len": (None, "nothing is padded"),
    "group_by_length": (None, "nothing is padded"),
    "flash_attention": (None, "kernels are chosen at start and printed"),
    "sdp_attention": (None, "kernels are chosen at start and printed"),
    "xformers_attention": (None, "kernels are chosen at start and printed"),
    "tf32": (None, "kernels are chosen at start and printed"),
    "gradient_checkpointing": (None, "what is kept for the backward pass follows the memory there is"),
    "gradient_checkpointing_kwargs": (None, "what is kept for the backward pass follows the memory there is"),
    "logging_steps": (None, "every step is reported"),
    "save_total_limit": (None, "all checkpoints are kept"),
    "save_safetensors": (None, "adapters are always safetensors"),
    "resume_from_checkpoint": ((None, False), "the same command goes on by itself where it was interrupted"),
    "auto_resume_from_checkpoints": (None, "the same command goes on by itself where it was interrupted"),
    "wandb_project": ((None, ""), "nothing is sent anywhere"),
    "wandb_entity": (None, "nothing is sent anywhere"),
    "wandb_watch": (None, "nothing is sent anywhere"),
    "wandb_name": (None, "nothing is sent anywhere"),
    "wandb_log_model": (None, "nothing is sent anywhere"),
}
TRANSLATED = (
    "datasets", "test_datasets", "micro_batch_size", "gradient_accumulation_steps", "lora_target_linear",
    "lr_scheduler", "optimizer", "bf16",
)  # fmt: skip


def translate(
    entries: Mapping[str, Any], known: Iterable[str], path: str, note: Callable[[str], None]
) -> dict[str, Any]:
    """The entries of the file `path` by the names in `known`; `note` gets a line for each that has no effect.

    Raises ConfigError for a key that nobody knows, a value that cannot be honoured, and two keys for one option.
    """
    known, found = list(known), _translated(entries, path)
    sources = dict.fromkeys(found, "datasets and the like")
    for key, value in entries.items():
        name = str(key).replace("-", "_")
        if name in TRANSLATED or value is None:
            _check_known(key, name, known, path)
            continue
        allowed, reason = WITHOUT_EFFECT.get(name, (None, ""))
        # A chat template's file is Tandem's own spelling of a key that axolotl has for a template's name.
        if name in WITHOUT_EFFECT and (name not in known or value in (allowed or ())):
            if allowed is not None and value not in allowed:
                raise ConfigError(f"{path}: {key}: {value!r} is not supported: {reason}")
            note(f"{path}: {key} is accepted and has no effect: {reason}")
            continue
        _check_known(key, name, known, path)
        target = RENAMED.get(name, name)
        if target in found:
            raise ConfigError(f"{path}: {key} and {sources[target]} both say {target}: keep one")
        found[target], sources[target] = value, str(key)
    return found


def _check_known(key: Any, name: str, known: list[str], path: str) -> None:
    every = [*known, *RENAMED, *TRANSLATED, *WITHOUT_EFFECT]
    if name not in every:
        near = difflib.get_close_matches(name, every, n=1)
        raise ConfigError(f"{path}: unknown option '{key}'" + (f", did you mean '{near[0]}'?" if near else ""))


def _translated(entries: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What takes more than another name."""
    found: dict[str, Any] = {}
    for key, target in (("datasets", "data"), ("test_datasets", "validation")):
        if entries.get(key) is not None:
            file, form = _dataset(entries[key], f"{path}: {key}")
            found[target] = file
            if form is not None and found.setdefault("format", form) != form:
                raise ConfigError(f"{path}: {key} has another type than datasets: both files need the same")
    sizes = [entries.get(key) for key in ("micro_batch_size", "gradient_accumulation_steps")]
    if any(size is not None for size in sizes):
        found["batch_size"] = _product([1 if size is None else size for size in sizes], path)
    if entries.get("lora_target_linear"):
        found["target_modules"] = ["all-linear"]
    if (schedule := entries.get("lr_scheduler")) is not None:
        found["schedule"] = _one_of(schedule, SCHEDULES, f"{path}: lr_scheduler")
    if (optimizer := entries.get("optimizer")) is not None:
        found["optimizer"] = _one_of(optimizer, OPTIMIZERS, f"{path}: optimizer")
    if entries.get("bf16") is True:
        found["dtype"] = "bfloat16"
    return found


def _dataset(value: Any, source: str) -> tuple[Any, str | None]:
    """The file and the format of a list of one data set."""
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict) or "path" not in value[0]:
        raise ConfigError(f"{source} must be a list of one entry with a path: put all rows into one file")
    entry = value[0]
    for key in entry:
        if key not in ("path", "type", "ds_type", "split"):
            raise ConfigError(f"{source}: '{key}' is not supported, only path and type: write the rows in a known form")
    if entry.get("ds_type", "json") != "json" or entry.get("split", "train") != "train":
        raise ConfigError(f"{source}: only JSON files as a whole are supported")
    form = entry.get("type")
    return entry["path"], None if form is None else _one_of(form, DATASET_FORMATS, f"{source}: type")


def _product(sizes: list[Any], path: str) -> int:
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ConfigError(f"{path}: micro_batch_size and gradient_accumulation_steps must be whole numbers, at least 1")
    return sizes[0] * sizes[1]


def _one_of(value: Any, choices: Mapping[str, Any], source: str) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{source} must be one of {', '.join(choices)}, not {value!r}")
    return choices[value]
