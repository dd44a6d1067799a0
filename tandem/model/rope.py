"""Rotary positions as data: what config.json says of them -> `RopeSpec` -> frequencies.

Here: every kind of scaling we can run, and the refusal of the others. Not here: which layer uses which (`spec.py`), the
turning itself (`ops/pointwise.py`).

Shape letters: F rotated pairs of features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tandem.errors import ModelError

Config = Mapping[str, Any]
ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """One way of turning positions into angles. `dim` features of a head turn, the others pass through.

    `scale` multiplies cos and sin. `factors` are longrope's divisors, already the short or the long ones.
    """

    kind: str
    theta: float
    dim: int
    scale: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()


def rope_from_config(
    config: Config, parameters: Config, architecture: str, head_dim: int, max_position: int
) -> RopeSpec:
    kind = parameters.get("rope_type", parameters.get("type", "default")) or "default"
    if architecture == "Phi3ForCausalLM" and kind in ("su", "yarn"):
        kind = "longrope"  # how the first Phi-3 checkpoints spelled it
    if kind not in ROPE_KINDS:
        raise ModelError(f"config.json: rope_type={kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 1e4
    partial = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    dim = int(head_dim * partial) if architecture == "Phi3ForCausalLM" or kind != "default" else head_dim
    if dim < 2 or dim % 2:
        raise ModelError(
            f"config.json: head_dim={head_dim} with partial_rotary_factor={partial} gives {dim} rotary features"
        )
    if kind == "default":
        return RopeSpec(kind, float(theta), dim)
    longest = config["max_position_embeddings"]
    original = parameters.get("original_max_position_embeddings") or longest
    if config.get("original_max_position_embeddings"):
        original = config["original_max_position_embeddings"]
    factor = parameters.get("factor")
    if factor is None:
        if kind in ("linear", "llama3"):
            raise ModelError(f"config.json: rope_type={kind!r} needs a factor")
        factor = longest / original
    common = {
        "kind": kind,
        "theta": float(theta),
        "dim": dim,
        "factor": float(factor),
        "original_max_position": original,
    }
    if kind == "linear":
        return RopeSpec(**common)
    if kind == "llama3":
        return RopeSpec(
            **common,
            low_freq_factor=_number(parameters, "low_freq_factor", kind),
            high_freq_factor=_number(parameters, "high_freq_factor", kind),
        )
    scale = parameters.get("attention_factor")
    if kind == "yarn":
        return RopeSpec(
            **common,
            scale=_yarn_scale(parameters, factor) if scale is None else scale,
            beta_fast=parameters.get("beta_fast") or 32.0,
            beta_slow=parameters.get("beta_slow") or 1.0,
            truncate=parameters.get("truncate", True),
        )
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    name = "long_factor" if max_position > original else "short_factor"
    factors = parameters.get(name)
    if not isinstance(factors, list) or len(factors) != dim // 2:
        raise ModelError(f"config.json: {name} must list {dim // 2} numbers")
    return RopeSpec(**common, scale=scale, factors=tuple(float(f) for f in factors))


def scaled_reach(config: Config) -> int:
    """How far yarn stretches the trained context, where the config states both numbers (Qwen's leave the limit as is);
    0 otherwise."""
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = parameters.get("rope_type", parameters.get("type"))
    original, factor = parameters.get("original_max_position_embeddings"), parameters.get("factor")
    return int(original * factor) if kind == "yarn" and original and factor else 0


def _number(parameters: Config, name: str, kind: str) -> float:
    if not isinstance(parameters.get(name), (int, float)):
        raise ModelError(f"config.json: rope_type={kind!r} needs {name}")
    return float(parameters[name])


def _yarn_scale(parameters: Config, factor: float) -> float:
    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return grown(mscale) / grown(mscale_all) if mscale and mscale_all else grown(1.0)


def rope_frequencies(rope: RopeSpec) -> Tensor:
    """Radians per position of every rotated pair of features: float32 [F], F = dim / 2, in float32 throughout."""
    base_F = rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.factors, dtype=torch.float32) * base_F)
    plain_F = 1.0 / base_F
    if rope.kind == "linear":
        return plain_F / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain_F, rope)
    if rope.kind == "yarn":
        return _yarn(base_F, rope)
    return plain_F


def _llama3(plain_F: Tensor, rope: RopeSpec) -> Tensor:
    """Fast frequencies stay, slow ones are divided by the factor, those between are blended."""
    turns_F = rope.original_max_position * plain_F / (2 * math.pi)
    share_F = ((turns_F - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - share_F) * plain_F / rope.factor + share_F * plain_F


def _yarn(base_F: Tensor, rope: RopeSpec) -> Tensor:
    """Like llama3, but blended linearly in the feature's index between beta_fast and beta_slow turns."""

    def index_of(turns: float) -> float:
        return rope.dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp_F = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return ramp_F / (rope.factor * base_F) + (1 - ramp_F) / base_F
