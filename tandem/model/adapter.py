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
KEY = re.compile(r"^(?:model\.)?layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])(?:\.default)?\.weight$")

MLP_MODULES = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
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


def read_adapter(
    path: str | Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device, max_rank: int
) -> AdapterWeights:
    """Read a PEFT directory for the model `spec` describes.

    Raises ModelError, naming file, field or tensor: no such directory, a field that changes the maths, a module that
    the model does not have, a shape that does not fit, a factor without its partner, a rank above `max_rank`.
    """
    path = Path(path)
    config = _read_config(path)
    known = targets(spec)
    factors = _read_factors(path / WEIGHTS_FILE, spec)
    _check_targets(config, factors, known, path)
    layers: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in spec.layers]
    largest = 0
    for (layer, name), pair in factors.items():
        a_RI, b_OR = _check_pair(pair, layer, name, known[name].in_features, known[name].out_features, path)
        rank = a_RI.shape[0]
        largest = max(largest, rank)
        b_RO = (b_OR.float().T * _scaling(config, layer, name, rank)).to(dtype).contiguous()
        layers[layer][name] = (a_RI.to(device, dtype), b_RO.to(device))
    if largest > max_rank:
        raise ModelError(f"adapter {path} has rank {largest}, more than --max-lora-rank {max_rank}")
    return AdapterWeights(largest, tuple(layers), str(config.get("base_model_name_or_path") or ""))


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    if not file.is_file():
        raise ModelError(f"{path} is not a PEFT adapter directory: {CONFIG_FILE} is missing")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from None
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
                layer, name, side = int(match[1]), match[2], match[3]
                if name not in known or layer >= len(spec.layers):
                    raise ModelError(
                        f"{file}: {key.removeprefix(PREFIX)} does not exist in this model "
                        f"({len(spec.layers)} layers; modules {', '.join(known)}): an adapter of another base?"
                    )
                factors.setdefault((layer, name), {})[side] = tensors.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from None
    if not factors:
        raise ModelError(f"{file} holds no LoRA factors")
    return factors


def _check_targets(config: dict[str, Any], factors: dict, known: dict, path: Path) -> None:
    """Every module the config names must exist and have factors: a mismatch must never mean the base model."""
    wanted = config.get("target_modules")
    found = {name for _, name in factors}
    if isinstance(wanted, list):
        missing = [module for module in wanted if module.rpartition(".")[2] not in found]
        if missing:
            reason = "has no weights" if missing[0].rpartition(".")[2] in known else "does not exist in this model"
            raise ModelError(f"{path / CONFIG_FILE}: target module {missing[0]!r} {reason}")


def _check_pair(
    pair: dict[str, Tensor], layer: int, name: str, in_features: int, out_features: int, path: Path
) -> tuple[Tensor, Tensor]:
    where = f"{path}: layer {layer} {name}"
    if pair.keys() != {"A", "B"}:
        raise ModelError(f"{where} has only lora_{'A' if 'A' in pair else 'B'}")
    a_RI, b_OR = pair["A"], pair["B"]
    rank = a_RI.shape[0]
    if a_RI.shape != (rank, in_features) or b_OR.shape != (out_features, rank):
        raise ModelError(
            f"{where} has shapes A {tuple(a_RI.shape)}, B {tuple(b_OR.shape)}; this model needs "
            f"({rank}, {in_features}) and ({out_features}, {rank}): an adapter of another base?"
        )
    if not (a_RI.isfinite().all() and b_OR.isfinite().all()):
        raise ModelError(f"{where} holds NaN or infinity")
    return a_RI, b_OR


def _scaling(config: dict[str, Any], layer: int, name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA; patterns match module names as in PEFT."""
    block = "mlp" if name in MLP_MODULES else "self_attn"
    module = f"model.layers.{layer}.{block}.{name}"
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
