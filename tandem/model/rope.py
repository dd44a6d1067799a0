"""Rotary positions as data: what config.json says of them -> `RopeSpec` -> frequencies.

Here: every kind of scaling we can run, and the refusal of the others. Not here: which layer uses which (`spec.py`), the
turning itself (`ops/pointwise.py`).

Shape letters: F rotated pairs of features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.errors import ModelError
from tandem.model import fields
from tandem.model.fields import Config

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
ORIGINAL = "original_max_position_embeddings"


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
    """`parameters` is what rope_scaling or rope_parameters holds, empty where the config has neither.

    Raises ModelError naming the field and its value.
    """
    kind = _kind(parameters)
    if architecture == "Phi3ForCausalLM" and kind in ("su", "yarn"):
        kind = "longrope"  # how the first Phi-3 checkpoints spelled it
    if kind not in ROPE_KINDS:
        raise ModelError(f"config.json: rope_type={kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    theta = _first(parameters, config, "rope_theta", 1e4, above=1.0)
    partial = _first(parameters, config, "partial_rotary_factor", 1.0, most=1.0)
    dim = int(head_dim * partial) if architecture == "Phi3ForCausalLM" or kind != "default" else head_dim
    if dim < 2 or dim % 2:
        raise ModelError(
            f"config.json: head_dim={head_dim} with partial_rotary_factor={partial} gives {dim} rotary features"
        )
    if kind == "default":
        return RopeSpec(kind, theta, dim)
    longest = fields.integer(config, "max_position_embeddings")
    original = fields.integer(config, ORIGINAL, None) or fields.integer(parameters, ORIGINAL, None) or longest
    factor = fields.number(parameters, "factor", None)
    if factor is None:
        if kind in ("linear", "llama3"):
            raise ModelError(f"config.json: rope_type={kind!r} needs a factor")
        factor = longest / original
    common = {"kind": kind, "theta": theta, "dim": dim, "factor": factor, "original_max_position": original}
    if kind == "linear":
        return RopeSpec(**common)
    if kind == "llama3":
        low, high = (fields.number(parameters, name) for name in ("low_freq_factor", "high_freq_factor"))
        if low >= high:
            raise ModelError(f"config.json: low_freq_factor={low:g} must be below high_freq_factor={high:g}")
        return RopeSpec(**common, low_freq_factor=low, high_freq_factor=high)
    scale = fields.number(parameters, "attention_factor", None)
    if kind == "yarn":
        return RopeSpec(
            **common,
            scale=_yarn_scale(parameters, factor) if scale is None else scale,
            beta_fast=fields.number(parameters, "beta_fast", None) or 32.0,
            beta_slow=fields.number(parameters, "beta_slow", None) or 1.0,
            truncate=fields.flag(parameters, "truncate", True),
        )
    if scale is None:
        if original < 2:
            fields.refuse(ORIGINAL, original, "at least 2")
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    name = "long_factor" if max_position > original else "short_factor"
    factors = parameters.get(name)
    listed = factors if isinstance(factors, list) else []
    if len(listed) != dim // 2 or not all(fields.is_number(f) and f > 0 for f in listed):
        fields.refuse(name, factors, f"a list of {dim // 2} positive numbers")
    return RopeSpec(**common, scale=scale, factors=tuple(map(float, listed)))


def scaled_reach(config: Config) -> int:
    """How far yarn stretches the trained context, where the config states both numbers (Qwen's leave the limit as is);
    0 otherwise."""
    parameters = fields.mapping(config, "rope_scaling") or fields.mapping(config, "rope_parameters")
    if _kind(parameters) != "yarn":
        return 0
    original, factor = fields.integer(parameters, ORIGINAL, None), fields.number(parameters, "factor", None)
    return int(min(original * factor, fields.LARGEST)) if original and factor else 0


def _kind(parameters: Config) -> str:
    return fields.text(parameters, "rope_type") or fields.text(parameters, "type") or "default"


def _first(parameters: Config, config: Config, name: str, default: float, **bounds: float) -> float:
    """A number that may stand in the rope's own object or beside it."""
    found = fields.number(parameters, name, None, **bounds)
    return fields.number(config, name, None, **bounds) or default if found is None else found


def _yarn_scale(parameters: Config, factor: float) -> float:
    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    names = ("mscale", "mscale_all_dim")
    if not all(parameters.get(name) for name in names):
        return grown(1.0)
    mscale, mscale_all = (fields.number(parameters, name) for name in names)
    return grown(mscale) / grown(mscale_all)


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
