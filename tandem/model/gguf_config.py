"""GGUF metadata -> the config.json and generation_config.json that say the same, which `spec.py` then reads.

What llama.cpp knows by an architecture's name and not from the file is said here too. Not here: the container
(`tandem/gguf/container.py`), tensors (`gguf_weights.py`), the tokenizer (`tandem/gguf/vocabulary.py`).
"""

from __future__ import annotations

import math
from typing import Any

from tandem.errors import ModelError
from tandem.gguf.container import Gguf
from tandem.gguf.vocabulary import end_tokens, token_id
from tandem.model import fields
from tandem.model.gguf_weights import read_vector
from tandem.model.rope import ORIGINAL

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
MODEL_TYPES = {"gemma3": "gemma3_text"}
# Layers of the 27B models, which alone scale their queries by hidden_size / heads; the file does not say it.
_ODD_QUERY_SCALE = {"gemma2": 46, "gemma3": 62}
# Llama 3's way of dividing frequencies; the files hold only its results, rope_freqs.weight.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}

_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}
# Without these the answer would be a guess.
_NEEDED = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
           "attention.layer_norm_rms_epsilon")  # fmt: skip
# What changes the numbers and is not computed, with the value at which it does nothing.
_REFUSED = {
    "expert_count": 0,
    "use_parallel_residual": False,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.temperature_scale": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
}


def config_of(gguf: Gguf) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of config.json and of generation_config.json.

    Raises ModelError naming the architecture or the key that is not supported.
    """
    arch = gguf.architecture
    if arch not in ARCHITECTURES:
        raise ModelError(
            f"{gguf.path}: general.architecture={arch!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    prefix = f"{arch}."
    values = {key.removeprefix(prefix): _uniform(v) for key, v in gguf.metadata.items() if key.startswith(prefix)}
    _check(gguf, values)
    config: dict[str, Any] = {"architectures": [ARCHITECTURES[arch]], "model_type": MODEL_TYPES.get(arch, arch)}
    config |= {field: values[key] for key, field in _FIELDS.items() if key in values}
    config["vocab_size"] = gguf.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
    config["mlp_bias"] = "blk.0.ffn_down.bias" in gguf.tensors
    config["dtype"] = _dtype(gguf)
    config |= _windows(gguf, values) | _query_scale(arch, values)
    config |= _rope(gguf, values, _head_dim(gguf, values))
    # Said even where there is none: transformers' defaults may lie outside a small vocabulary.
    config |= {f"{name}_token_id": token_id(gguf, f"{key}_token_id") for name, key in _SPECIAL.items()}
    ends = end_tokens(gguf)
    return config, {"eos_token_id": ends} if ends else {}


def _check(gguf: Gguf, values: dict[str, Any]) -> None:
    missing = [f"{gguf.architecture}.{key}" for key in _NEEDED if key not in values]
    if missing:
        raise ModelError(f"{gguf.path} does not say {', '.join(missing)}")
    if "token_embd.weight" not in gguf.tensors:
        raise ModelError(f"{gguf.path}: tensor token_embd.weight is missing")
    for key, harmless in _REFUSED.items():
        if values.get(key, harmless) != harmless:
            raise ModelError(f"{gguf.path}: {gguf.architecture}.{key}={values[key]!r} is not supported")


def _uniform(value: Any) -> Any:
    """One value where a list says the same of every layer."""
    if isinstance(value, list) and value and not isinstance(value[0], bool) and value == [value[0]] * len(value):
        return value[0]
    return value


def _head_dim(gguf: Gguf, values: dict[str, Any]) -> int:
    head_dim = fields.integer(values, "attention.key_length", None)
    if head_dim is None:
        return fields.integer(values, "embedding_length") // fields.integer(values, "attention.head_count")
    if values.get("attention.value_length", head_dim) != head_dim:
        raise ModelError(
            f"{gguf.path}: {gguf.architecture}.attention.value_length={values['attention.value_length']!r} is not "
            f"supported beside attention.key_length={head_dim}"
        )
    return head_dim


def _dtype(gguf: Gguf) -> str:
    """That of the matrices where it is a plain one; quantised ones are run in bfloat16."""
    kinds = {info.type for info in gguf.tensors.values() if len(info.shape) > 1}
    return {frozenset({"F32"}): "float32", frozenset({"F16"}): "float16"}.get(frozenset(kinds), "bfloat16")


def _windows(gguf: Gguf, values: dict[str, Any]) -> dict[str, Any]:
    arch, window = gguf.architecture, fields.integer(values, "attention.sliding_window", None, low=0)
    if arch == "gemma3" and window is None:
        raise ModelError(f"{gguf.path} does not say {arch}.attention.sliding_window")
    if not window:  # 0: none
        return {"sliding_window": None} if arch == "phi3" else {}
    if arch == "llama":
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    if arch == "phi3":
        return {"sliding_window": window}
    if arch not in ("gemma2", "gemma3"):
        if window >= fields.integer(values, "context_length"):
            return {}
        raise ModelError(f"{gguf.path}: {arch}.attention.sliding_window={window!r} is not supported: in which layers?")
    pattern = values.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern]
        return {"sliding_window": window, "layer_types": kinds}
    return {"sliding_window": window} | ({} if pattern is None else {"sliding_window_pattern": pattern})


def _query_scale(arch: str, values: dict[str, Any]) -> dict[str, Any]:
    """Gemma divides scores by the root of a number that only newer files name."""
    if arch not in _ODD_QUERY_SCALE:
        if "attention.scale" in values:
            raise ModelError(f"{arch}.attention.scale={values['attention.scale']!r} is not supported")
        return {}
    if scale := fields.number(values, "attention.scale", None, above=1e-4, most=10.0):
        return {"query_pre_attn_scalar": round(scale**-2)}  # a whole number, as transformers wants it
    if values["block_count"] == _ODD_QUERY_SCALE[arch]:
        hidden, heads = (fields.integer(values, name) for name in ("embedding_length", "attention.head_count"))
        return {"query_pre_attn_scalar": hidden // heads}
    return {"query_pre_attn_scalar": values.get("attention.key_length", 256)}


def _rope(gguf: Gguf, values: dict[str, Any], head_dim: int) -> dict[str, Any]:
    arch, found = gguf.architecture, {}
    turned = fields.integer(values, "rope.dimension_count", head_dim)
    if turned != head_dim:
        if arch != "phi3":
            raise ModelError(f"{gguf.path}: {arch}.rope.dimension_count={turned!r} is not supported, only {head_dim}")
        found["partial_rotary_factor"] = turned / head_dim
    if arch == "gemma3" and "rope.freq_base_swa" in values:
        found["rope_local_base_freq"] = values["rope.freq_base_swa"]
    scaling = _factors(gguf, values) or _scaling(gguf, values)
    if scaling.get("rope_type") == "longrope":  # Phi-3's place for it
        found[ORIGINAL] = scaling.pop(ORIGINAL, values["context_length"])
    return found | ({"rope_scaling": scaling} if scaling else {})


def _scaling(gguf: Gguf, values: dict[str, Any]) -> dict[str, Any]:
    """Linear and YaRN, which are said by numbers."""
    kind, factor = values.get("rope.scaling.type"), values.get("rope.scaling.factor")
    if kind is None and "rope.scale_linear" in values:  # the first files' spelling
        kind, factor = "linear", values["rope.scale_linear"]
    if kind in (None, "none", "longrope") or factor in (0, 1):
        return {}
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{gguf.path}: {gguf.architecture}.rope.scaling.type={kind!r} is not supported")
    if values.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise ModelError(f"{gguf.path}: {gguf.architecture}.rope.scaling.attn_factor is not supported with {kind}")
    names = {
        "rope.scaling.original_context_length": ORIGINAL,
        "rope.scaling.yarn_beta_fast": "beta_fast",
        "rope.scaling.yarn_beta_slow": "beta_slow",
    }
    more = {field: values[key] for key, field in names.items() if key in values and kind == "yarn"}
    return {"rope_type": kind, "factor": factor, **more}


def _factors(gguf: Gguf, values: dict[str, Any]) -> dict[str, Any]:
    """Scalings that are said by a divisor for every frequency: longrope's two lists, and Llama 3's results."""
    names = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
    if all(name in gguf.tensors for name in names.values()):
        found: dict[str, Any] = {field: read_vector(gguf, name) for field, name in names.items()}
        found |= {"rope_type": "longrope"}
        if original := values.get("rope.scaling.original_context_length"):
            found[ORIGINAL] = original
        if scale := values.get("rope.scaling.attn_factor"):
            found["attention_factor"] = scale
        return found
    if "rope_freqs.weight" not in gguf.tensors:
        return {}
    factors = read_vector(gguf, "rope_freqs.weight")
    if set(factors) == {1.0}:
        return {}
    if not all(factor > 0 for factor in factors):
        raise ModelError(f"{gguf.path}: rope_freqs.weight must hold positive numbers")
    theta = fields.number(values, "rope.freq_base", 1e4)
    if _is_llama3(factors, theta):
        return {"rope_type": "llama3", "factor": max(factors), **_LLAMA3}
    return {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}


def _is_llama3(factors: list[float], theta: float) -> bool:
    """Whether Llama 3's rule, with its usual numbers, gives these divisors."""
    low, high, original = _LLAMA3.values()
    for index, factor in enumerate(factors):
        turns = original * theta ** (-index / len(factors)) / (2 * math.pi)
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        if not math.isclose(factor, 1 / ((1 - share) / max(factors) + share), rel_tol=1e-4):
            return False
    return True
