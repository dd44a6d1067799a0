"""PEFT's LoRA directory format <-> plain factors per layer and target. Says nothing of where adapters live or who uses
them; what the format can express and we do not compute is refused by the field's name.

Shape letters: R rank, I in features, O out features.
Format: adapter_config.json and adapter_model.safetensors, keys base_model.model.<module>.lora_{A,B}.weight (PEFT).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tandem.errors import ModelError
from tandem.model.spec import ModelSpec, targets

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(r"^(?:model\.)?layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.lora_([AB])(?:\.default)?\.weight$")

MLP_MODULES = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Fields that change the maths when they are set to anything but these values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "fan_in_fan_out": (False, None),
    "arrow_config": (None,),
    "corda_config": (None,),
    "eva_config": (None,),
    "megatron_config": (None,),
}
# Initialisations that subtract something from the base weights: the adapter alone is not the whole change.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")


@dataclass(frozen=True)
class AdapterWeights:
    """One adapter: per layer, by target name, (a_RI, b_RO) with the scaling already in b, and its largest rank."""

    rank: int
    layers: tuple[dict[str, tuple[Tensor, Tensor]], ...]
    base_model: str = ""

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes + b.nbytes for layer in self.layers for a, b in layer.values())


def module_name(layer: int, target: str) -> str:
    """A target's full name in transformers' models."""
    return f"model.layers.{layer}.{_block(target)}.{target}"


def read_adapter(
    path: str | Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    max_rank: int,
    scaled: bool = True,
) -> AdapterWeights:
    """Read a PEFT directory for the model `spec` describes. `scaled` False leaves the scaling out of b.

    Raises ModelError, naming file, field or tensor: no such directory, a field that changes the maths, a module that
    the model does not have, a shape that does not fit, a factor without its partner, a rank above `max_rank`.
    """
    path = Path(path)
    config = _read_config(path)
    known = targets(spec)
    factors = _read_factors(path / WEIGHTS_FILE, spec)
    _check_targets(config, factors, known, len(spec.layers), path)
    layers: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in spec.layers]
    largest = 0
    for (layer, name), pair in factors.items():
        a_RI, b_OR = _check_pair(pair, layer, name, known[name].in_features, known[name].out_features, path)
        rank = a_RI.shape[0]
        largest = max(largest, rank)
        scaling = _scaling(config, layer, name, rank) if scaled else 1.0
        b_RO = (b_OR.float().T * scaling).to(dtype).contiguous()
        if not (a_RI.to(dtype).isfinite().all() and b_RO.isfinite().all()):
            raise ModelError(f"{path}: layer {layer} {name} holds NaN or infinity once scaled by lora_alpha")
        layers[layer][name] = (a_RI.to(device, dtype), b_RO.to(device))
    if largest > max_rank:
        raise ModelError(f"adapter {path} has rank {largest}, more than --max-lora-rank {max_rank}")
    return AdapterWeights(largest, tuple(layers), str(config.get("base_model_name_or_path") or ""))


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    if not file.is_file():
        raise ModelError(f"{path} is not a PEFT adapter directory: {CONFIG_FILE} is missing")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from None
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ModelError(f"{file}: peft_type {kind!r} is not supported, only 'LORA'")
    for name, neutral in NEUTRAL.items():
        if name in config and config[name] not in neutral:
            raise ModelError(f"{file}: {name}={config[name]!r} changes the computation and is not supported")
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(BASE_CHANGING_INITS):
        raise ModelError(
            f"{file}: init_lora_weights={init!r} changes the base weights; convert it to a plain LoRA with PEFT first"
        )
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise ModelError(f"{file}: r={config.get('r')!r} must be a positive integer")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ModelError(f"{file}: alpha_pattern={patterns!r} must map module patterns to numbers")
    for name, value in [("lora_alpha", config.get("lora_alpha", 8)), *patterns.items()]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelError(f"{file}: {name}={value!r} must be a finite number")
        try:
            re.compile(name)
        except re.error as error:
            raise ModelError(f"{file}: alpha_pattern {name!r} is no regular expression: {error}") from None
    return config


def _read_factors(file: Path, spec: ModelSpec) -> dict[tuple[int, str], dict[str, Tensor]]:
    if not file.is_file():
        raise ModelError(f"{file} is missing (adapter weights must be safetensors, not pickle)")
    known = targets(spec)
    factors: dict[tuple[int, str], dict[str, Tensor]] = {}
    try:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                match = KEY.match(key.removeprefix(PREFIX))
                if not match:
                    raise ModelError(f"{file}: tensor {key} belongs to no module that can carry an adapter here")
                layer, block, name, side = int(match[1]), match[2], match[3], match[4]
                if name not in known or layer >= len(spec.layers) or block != _block(name):
                    raise ModelError(
                        f"{file}: {key.removeprefix(PREFIX)} does not exist in this model "
                        f"({len(spec.layers)} layers; modules {', '.join(known)}): an adapter of another base?"
                    )
                pair = factors.setdefault((layer, name), {})
                if side in pair:
                    raise ModelError(f"{file}: layer {layer} {name} has two lora_{side}")
                pair[side] = tensors.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from None
    if not factors:
        raise ModelError(f"{file} holds no LoRA factors")
    return factors


def _check_targets(config: dict[str, Any], factors: dict, known: dict, num_layers: int, path: Path) -> None:
    """Every module the config names must exist and have factors in every layer it transforms: a mismatch must never
    silently mean the base model. (A regular expression in target_modules names no modules to check.)"""
    wanted = config.get("target_modules")
    if not isinstance(wanted, list):
        return
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers if isinstance(layers, list) else range(num_layers)
    excluded = config.get("exclude_modules") or []
    for module in wanted:
        if not isinstance(module, str):
            raise ModelError(f"{path / CONFIG_FILE}: target_modules holds {module!r}, which is no module name")
        name = module.rpartition(".")[2]
        if name not in known:
            raise ModelError(f"{path / CONFIG_FILE}: target module {module!r} does not exist in this model")
        found = {layer for layer, other in factors if other == name}
        is_whole = name == module and not excluded
        missing = [layer for layer in layers if layer not in found] if is_whole else []
        if missing or not found:
            where = f" in layer {missing[0]}" if missing and found else ""
            raise ModelError(f"{path / CONFIG_FILE}: target module {module!r} has no weights{where}")


def _check_pair(
    pair: dict[str, Tensor], layer: int, name: str, in_features: int, out_features: int, path: Path
) -> tuple[Tensor, Tensor]:
    where = f"{path}: layer {layer} {name}"
    if pair.keys() != {"A", "B"}:
        raise ModelError(f"{where} has only lora_{'A' if 'A' in pair else 'B'}")
    a_RI, b_OR = pair["A"], pair["B"]
    if a_RI.dtype not in FLOATS or b_OR.dtype not in FLOATS:
        raise ModelError(f"{where} is {a_RI.dtype} and {b_OR.dtype}; float32, float16 and bfloat16 are supported")
    rank = a_RI.shape[0] if a_RI.ndim else 0
    if rank < 1 or a_RI.shape != (rank, in_features) or b_OR.shape != (out_features, rank):
        raise ModelError(
            f"{where} has shapes A {tuple(a_RI.shape)}, B {tuple(b_OR.shape)}; this model needs "
            f"({rank}, {in_features}) and ({out_features}, {rank}): an adapter of another base?"
        )
    return a_RI, b_OR


def _block(name: str) -> str:
    return "mlp" if name in MLP_MODULES else "self_attn"


def _scaling(config: dict[str, Any], layer: int, name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA; patterns match module names as in PEFT."""
    module = module_name(layer, name)
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
