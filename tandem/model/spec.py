"""Model families as data: config.json of Hugging Face -> `ModelSpec`, which says all that the decoder must know.

Every field that changes the computation is read or refused by name, before any weight is opened. Not here: tensors,
weights' names and shapes on disk (`weights.py`), and what the numbers do (`decoder.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tandem.errors import ModelError
from tandem.gguf.container import read_gguf
from tandem.hub import is_gguf
from tandem.model import fields
from tandem.model.fields import Config
from tandem.model.gguf_config import config_of
from tandem.model.rope import RopeSpec, rope_from_config, scaled_reach

# Deeper models do not exist; a config's typo must not become a list of a billion layers.
MOST_LAYERS = 4096
# Beyond any head, so that angles of it are always cheap to compute.
MOST_HEAD_DIM = 65536

ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """`window`: how many last positions a row sees (None: all). `rope` None: no position encoding in this layer."""

    window: int | None
    rope: RopeSpec | None


@dataclass(frozen=True)
class ModelSpec:
    """A decoder as data. `max_position` is the longest context the spec was made for, `dtype` the checkpoint's."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    layers: tuple[LayerSpec, ...]
    max_position: int
    norm_eps: float
    norm_plus_one: bool = False
    sandwich_norms: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused_checkpoint: bool = False
    attn_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float | None = None
    query_scale: float = 1.0
    tie_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Parameters of the checkpoint, a tied head counted once."""
        qkv = self.q_size + 2 * self.kv_size
        layer = self.hidden_size * (qkv + self.q_size + 3 * self.intermediate_size)
        layer += self.hidden_size * (4 if self.sandwich_norms else 2) + (2 * self.head_dim if self.qk_norm else 0)
        layer += qkv * self.qkv_bias + self.hidden_size * self.o_bias
        layer += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        heads = 1 if self.tie_embeddings else 2
        return len(self.layers) * layer + self.hidden_size * (1 + heads * self.vocab_size)


class Target(NamedTuple):
    """A module that can carry a LoRA: features `offset:offset + out_features` of one of the decoder's linears."""

    linear: Literal["qkv", "o", "gate_up", "down"]
    offset: int
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture's name says beyond its config's fields. `defaults` are those that configs may leave out."""

    windows: Callable[[Config, int], list[int | None]]
    flags: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False


def _no_windows(config: Config, num_layers: int) -> list[int | None]:
    return [None] * num_layers


def _same_window(config: Config, num_layers: int) -> list[int | None]:
    return [_window(config)] * num_layers


def _window(config: Config) -> int | None:
    return fields.integer(config, "sliding_window", None)


def _listed_kinds(config: Config) -> list[str] | None:
    return fields.items(config, "layer_types", str, "strings")


def _upper_windows(config: Config, num_layers: int) -> list[int | None]:
    """Qwen: the layers from max_window_layers on, if use_sliding_window says so."""
    window = _window(config) if fields.flag(config, "use_sliding_window") else None
    first = fields.integer(config, "max_window_layers", 28, low=0)
    kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    return _windows_by_kind(_listed_kinds(config) or kinds, window)


def _alternating_windows(config: Config, num_layers: int) -> list[int | None]:
    return _windows_by_kind(_layer_kinds(config, num_layers), _window(config))


def _smollm3_windows(config: Config, num_layers: int) -> list[int | None]:
    window = _window(config) if fields.flag(config, "use_sliding_window") else None
    if window is None:
        return [None] * num_layers
    kinds = ["full_attention" if turns else "sliding_attention" for turns in _rope_layers(config, num_layers)]
    return _windows_by_kind(_listed_kinds(config) or kinds, window)


def _windows_by_kind(kinds: list[str], window: int | None) -> list[int | None]:
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _layer_kinds(config: Config, num_layers: int) -> list[str]:
    """Gemma: named per layer, or every sliding_window_pattern-th layer sees everything."""
    if listed := _listed_kinds(config):
        return listed
    name = "sliding_window_pattern" if "sliding_window_pattern" in config else "_sliding_window_pattern"
    period = fields.integer(config, name, 2)
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers)]


def _rope_layers(config: Config, num_layers: int) -> list[bool]:
    """SmolLM3: which layers turn at all."""
    listed = fields.items(config, "no_rope_layers", int, "0 and 1")
    if listed is not None:
        return [bool(turns) for turns in listed]
    interval = fields.integer(config, "no_rope_layer_interval", 4)
    return [(i + 1) % interval != 0 for i in range(num_layers)]


_GEMMA_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
}
_GEMMA_FLAGS = {"norm_plus_one": True, "sandwich_norms": True}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_no_windows, reads_attention_bias=True, reads_mlp_bias=True),
    "MistralForCausalLM": Family(_same_window, defaults={"sliding_window": 4096}),
    "Qwen2ForCausalLM": Family(_upper_windows, {"qkv_bias": True}),
    "Qwen3ForCausalLM": Family(_upper_windows, {"qk_norm": True}, {"head_dim": 128}, reads_attention_bias=True),
    "Gemma2ForCausalLM": Family(
        _alternating_windows,
        _GEMMA_FLAGS,
        _GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        reads_attention_bias=True,
    ),
    "Gemma3ForCausalLM": Family(
        _alternating_windows,
        _GEMMA_FLAGS | {"qk_norm": True},
        _GEMMA_DEFAULTS | {"sliding_window_pattern": 6, "rope_local_base_freq": 1e4, "rope_theta": 1e6},
        reads_attention_bias=True,
    ),
    "Phi3ForCausalLM": Family(
        _same_window, {"fused_checkpoint": True}, {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}
    ),
    "SmolLM3ForCausalLM": Family(
        _smollm3_windows,
        defaults={"rope_theta": 2e6, "tie_word_embeddings": True},
        reads_attention_bias=True,
        reads_mlp_bias=True,
    ),
}


def load_spec(path: Path, max_model_len: int | None = None) -> ModelSpec:
    """The spec of a model directory, from its config.json and generation_config.json where there is one, or of a GGUF
    file. Raises ModelError."""
    path = Path(path)
    if is_gguf(path):
        try:
            return spec_from_config(*config_of(read_gguf(path)), max_model_len)
        except ModelError as error:
            raise ModelError(str(error).replace("config.json", f"{path}, as a config.json")) from None
    config = _read_json(path / "config.json")
    generation = path / "generation_config.json"
    return spec_from_config(config, _read_json(generation) if generation.is_file() else None, max_model_len)


def spec_from_config(
    config: Config, generation_config: Config | None = None, max_model_len: int | None = None
) -> ModelSpec:
    """Both spellings are read: rope_theta + rope_scaling, and rope_parameters (possibly one per layer type).

    longrope: the long factors are used iff the context (`max_model_len`, else the config's) is longer than
    original_max_position_embeddings; transformers switches at run time by the actual length.
    Raises ModelError naming the field, its value and what is supported.
    """
    architecture = next(iter(fields.items(config, "architectures", str, "names") or []), "")
    family = FAMILIES.get(architecture)
    if family is None:
        raise ModelError(
            f"config.json: architectures={config.get('architectures')!r} is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    for name in ("quantization_config", "compression_config"):
        if quantization := config.get(name):
            method = quantization.get("quant_method", "") if isinstance(quantization, dict) else ""
            raise ModelError(
                f"config.json: {name} is set{f' (quant_method {method})' if method else ''}, but only float32, "
                "bfloat16 and float16 weights are read; take the unquantised model, and --quantization int8 or int4"
            )
    config = family.defaults | dict(config)
    for name in ("use_bidirectional_attention", "add_cross_attention", "is_encoder_decoder"):
        if config.get(name):
            raise ModelError(f"config.json: {name}=true is not supported; only causal decoders are")
    num_layers = fields.integer(config, "num_hidden_layers", high=MOST_LAYERS)
    num_heads = fields.integer(config, "num_attention_heads")
    hidden_size = fields.integer(config, "hidden_size")
    head_dim = fields.integer(config, "head_dim", None, high=MOST_HEAD_DIM)
    if head_dim is None:
        if hidden_size % num_heads:
            raise ModelError(f"config.json: {hidden_size=} is no multiple of num_attention_heads={num_heads}")
        head_dim = hidden_size // num_heads
    num_kv_heads = fields.integer(config, "num_key_value_heads", None) or num_heads
    if num_heads % num_kv_heads:
        raise ModelError(f"config.json: num_attention_heads={num_heads} is no multiple of {num_kv_heads=}")
    vocab_size = fields.integer(config, "vocab_size")
    max_position = _context(config, max_model_len)
    windows = _check_windows(family.windows(config, num_layers), config, num_layers, max_position)
    ropes = _ropes(config, architecture, num_layers, head_dim, max_position)
    gemma, gemma2 = architecture.startswith("Gemma"), architecture == "Gemma2ForCausalLM"
    attention_bias = family.reads_attention_bias and fields.flag(config, "attention_bias")
    biases = {"qkv_bias": attention_bias, "o_bias": attention_bias}
    biases["mlp_bias"] = family.reads_mlp_bias and fields.flag(config, "mlp_bias")
    return ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer(config, "intermediate_size"),
        layers=tuple(LayerSpec(window, rope) for window, rope in zip(windows, ropes, strict=True)),
        max_position=max_position,
        norm_eps=fields.number(config, "rms_norm_eps", 1e-6),
        activation=_activation(config, "hidden_activation" if gemma else "hidden_act"),
        attn_softcap=fields.number(config, "attn_logit_softcapping", None) if gemma2 else None,
        final_softcap=fields.number(config, "final_logit_softcapping", None) if gemma else None,
        embedding_scale=hidden_size**0.5 if gemma else None,
        query_scale=(fields.number(config, "query_pre_attn_scalar") if gemma else head_dim) ** -0.5,
        tie_embeddings=fields.flag(config, "tie_word_embeddings"),
        eos_token_ids=_eos(config, generation_config or {}, vocab_size),
        dtype=_dtype(config),
        **(biases | family.flags),
    )


def targets(spec: ModelSpec) -> dict[str, Target]:
    """The modules that can carry a LoRA, by the names that PEFT uses."""
    q, kv, inner, hidden = spec.q_size, spec.kv_size, spec.intermediate_size, spec.hidden_size
    if spec.fused_checkpoint:
        first = {
            "qkv_proj": Target("qkv", 0, q + 2 * kv, hidden),
            "gate_up_proj": Target("gate_up", 0, 2 * inner, hidden),
        }
    else:
        first = {
            "q_proj": Target("qkv", 0, q, hidden),
            "k_proj": Target("qkv", q, kv, hidden),
            "v_proj": Target("qkv", q + kv, kv, hidden),
            "gate_proj": Target("gate_up", 0, inner, hidden),
            "up_proj": Target("gate_up", inner, inner, hidden),
        }
    return first | {"o_proj": Target("o", 0, hidden, q), "down_proj": Target("down", 0, hidden, inner)}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file} is missing: not a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold a JSON object")
    return content


def _activation(config: Config, name: str) -> Literal["silu", "gelu_tanh"]:
    value = config.get(name, "silu")
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ModelError(f"config.json: {name}={value!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def _dtype(config: Config) -> str:
    """The checkpoint's own number format, which the newer spelling names first."""
    name = fields.text(config, "dtype") or fields.text(config, "torch_dtype") or "float32"
    return name.removeprefix("torch.")


def _context(config: Config, max_model_len: int | None) -> int:
    longest = fields.integer(config, "max_position_embeddings")
    if max_model_len is None:
        return longest
    reach = max(longest, scaled_reach(config))
    if not 1 <= max_model_len <= reach:
        raise ModelError(
            f"max_model_len={max_model_len} must be between 1 and {reach} (max_position_embeddings={longest})"
        )
    return max_model_len


def _check_windows(windows: list[int | None], config: Config, num_layers: int, max_position: int) -> list[int | None]:
    """A window as long as the context is none."""
    kinds = _listed_kinds(config) or []
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ModelError(
            f"config.json: layer_types has {', '.join(map(repr, unknown))}; "
            "supported are full_attention, sliding_attention"
        )
    if len(windows) != num_layers:
        raise ModelError(f"config.json: layer_types names {len(windows)} layers, num_hidden_layers is {num_layers}")
    return [None if window is None or window >= max_position else window for window in windows]


def _ropes(
    config: Config, architecture: str, num_layers: int, head_dim: int, max_position: int
) -> list[RopeSpec | None]:
    parameters = fields.mapping(config, "rope_parameters")
    nested = any(kind in parameters for kind in ("full_attention", "sliding_attention"))
    if architecture.startswith("Gemma3"):
        kinds = _layer_kinds(config, num_layers)
        by_kind = parameters if nested else _gemma3_parameters(config, parameters)
        made = {
            kind: rope_from_config(config, fields.mapping(by_kind, kind), architecture, head_dim, max_position)
            for kind in set(kinds)
        }
        return [made[kind] for kind in kinds]
    if nested:
        raise ModelError(f"config.json: rope_parameters per layer type are not supported for {architecture}")
    scaling = fields.mapping(config, "rope_scaling") or parameters
    rope = rope_from_config(config, scaling, architecture, head_dim, max_position)
    if architecture == "SmolLM3ForCausalLM":
        turns = _rope_layers(config, num_layers)
        if len(turns) < num_layers:
            raise ModelError(
                f"config.json: no_rope_layers names {len(turns)} layers, num_hidden_layers is {num_layers}"
            )
        return [rope if turn else None for turn in turns[:num_layers]]
    return [rope] * num_layers


def _gemma3_parameters(config: Config, parameters: dict[str, Any]) -> dict[str, Any]:
    """The old spelling: rope_theta and rope_scaling for the full layers, rope_local_base_freq for the others."""
    full = {"rope_theta": config["rope_theta"]} | parameters | fields.mapping(config, "rope_scaling")
    return {"full_attention": full, "sliding_attention": {"rope_theta": config["rope_local_base_freq"]}}


def _eos(config: Config, generation_config: Config, vocab_size: int) -> tuple[int, ...]:
    """generation_config.json's end tokens, else config.json's; each a row of the vocabulary."""
    for file, source in (("generation_config.json", generation_config), ("config.json", config)):
        value = source.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids):
            raise ModelError(
                f"{file}: eos_token_id={value!r} must be a token id or a list of them, from 0 to {vocab_size - 1}"
            )
        return tuple(ids)
    return ()
