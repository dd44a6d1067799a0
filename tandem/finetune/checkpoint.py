"""A training run on disk: a PEFT directory that anybody can load, and beside it what it takes to go on.

Written under a temporary name, fsynced, renamed: a directory with the final name is whole. Not here: when to save, how
the factors are read back for serving (`model/adapter.py`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tandem.errors import ModelError, TandemError
from tandem.finetune.inputs import KINDS
from tandem.finetune.run import Run

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
STATE_FILE = "trainer_state.safetensors"


def save(
    run: Run, path: str | Path, module_of: Callable[[int, str], str], base_model: str, with_state: bool = True
) -> None:
    """Write `run` to the new directory `path`. `module_of(layer, target)` is the module's full name in transformers.
    Without `with_state` the adapter alone, from which `restore` cannot go on.

    Raises TandemError where the disk is full or not writable; then nothing is left there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        (temporary / CONFIG_FILE).write_text(json.dumps(_peft_config(run, base_model), indent=2) + "\n")
        save_file(_peft_tensors(run, module_of), temporary / WEIGHTS_FILE, {"format": "pt"})
        if with_state:
            save_file(_state(run), temporary / STATE_FILE, {"optimizer": run.optimizer.kind})
        for file in temporary.iterdir():
            _fsync(file)
        _fsync(temporary)
        os.rename(temporary, path)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        raise TandemError(f"the adapter cannot be saved to {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def restore(run: Run, path: str | Path) -> None:
    """Go on from a directory written by `save` for a run of the same shape. Raises ModelError."""
    file = Path(path) / STATE_FILE
    try:
        with safe_open(file, "pt") as tensors:
            state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict
            kind = (tensors.metadata() or {}).get("optimizer", "adamw")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from None
    if kind not in ("", *KINDS):
        raise ModelError(f"{file} has the state of an optimizer that is not known here: {kind}")
    fresh = run.new_optimizer()
    if kind:
        fresh.begin(kind)
    wanted = {"weights": run.weights_P, "counters": torch.zeros(2), **fresh.state}
    if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in wanted.items()}:
        raise ModelError(f"{file} was written by a run of another shape: same rank and target modules needed")
    run.weights_P.copy_(state["weights"])
    for name, tensor in fresh.state.items():
        tensor.copy_(state[name])
    fresh.step, run.num_passes = state["counters"].tolist()
    run.optimizer = fresh


def _state(run: Run) -> dict[str, Tensor]:
    return {
        "weights": run.weights_P,
        "counters": torch.tensor([run.optimizer.step, run.num_passes]),
        **run.optimizer.state,
    }


def _peft_tensors(run: Run, module_of: Callable[[int, str], str]) -> dict[str, Tensor]:
    tensors = {}
    for index, layer in enumerate(run.weights):
        for target, (a_RI, b_RO) in layer.items():
            prefix = f"base_model.model.{module_of(index, target)}"
            tensors[f"{prefix}.lora_A.weight"] = a_RI.cpu().contiguous().clone()
            tensors[f"{prefix}.lora_B.weight"] = b_RO.T.cpu().contiguous().clone()
    return tensors


def _peft_config(run: Run, base_model: str) -> dict[str, object]:
    lora = run.lora
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": list(run.shapes),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
