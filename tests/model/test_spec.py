"""config.json -> ModelSpec: both spellings agree, what cannot be run is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import ModelError
from tandem.model.spec import FAMILIES, RopeSpec, load_spec, spec_from_config, targets

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "eos_token_id": 7,
    "torch_dtype": "float16",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
GEMMA3 = LLAMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 12,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 512,
}


def test_the_plain_fields() -> None:
    spec = spec_from_config(LLAMA)
    assert (spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (64, 4, 2, 16)
    assert (spec.norm_eps, spec.query_scale, spec.dtype) == (1e-5, 0.25, "float16")
    assert spec.eos_token_ids == (7,)
    assert [layer.rope for layer in spec.layers] == [RopeSpec("default", 1e4, 16)] * 4


def test_generation_config_overrides_the_end_tokens() -> None:
    assert spec_from_config(LLAMA, {"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert spec_from_config(LLAMA, {}).eos_token_ids == (7,)
    assert spec_from_config({**LLAMA, "eos_token_id": None}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        ),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
        (
            {
                "rope_theta": 1e6,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
            },
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 1024,
                    "rope_theta": 1e6,
                }
            },
        ),
    ],
)
def test_old_and_new_spelling_of_rope_agree(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert spec_from_config(LLAMA | old) == spec_from_config(LLAMA | new)
    assert spec_from_config(LLAMA | old) != spec_from_config(LLAMA)


def test_gemma3_old_and_new_spelling_agree() -> None:
    old = GEMMA3 | {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
    }
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 2
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    spec = spec_from_config(old)
    assert spec == spec_from_config(GEMMA3 | {"layer_types": kinds, "rope_parameters": parameters})
    assert [layer.window for layer in spec.layers] == ([512] * 5 + [None]) * 2
    assert spec.layers[0].rope == RopeSpec("default", 1e4, 32)
    assert spec.layers[5].rope is not None and spec.layers[5].rope.factor == 8.0
    assert spec.tie_embeddings and spec.embedding_scale == 8.0 and spec.query_scale == 1 / 16


@pytest.mark.parametrize("alias", ["longrope", "su"])
def test_phi3_longrope_picks_factors_by_the_context(alias: str) -> None:
    config = LLAMA | {
        "architectures": ["Phi3ForCausalLM"],
        "original_max_position_embeddings": 1024,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"type": alias, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    }
    long, short = spec_from_config(config), spec_from_config(config, max_model_len=1024)
    assert long.layers[0].rope is not None and short.layers[0].rope is not None
    assert (long.layers[0].rope.factors, short.layers[0].rope.factors) == ((2.0,) * 4, (1.0,) * 4)
    assert long.layers[0].rope.dim == 8
    assert long.layers[0].rope.scale == short.layers[0].rope.scale == pytest.approx((1 + 2 / 10) ** 0.5)


def test_windows() -> None:
    qwen = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 100, "max_window_layers": 3}
    assert {layer.window for layer in spec_from_config(qwen).layers} == {None}
    on = spec_from_config(qwen | {"use_sliding_window": True})
    assert [layer.window for layer in on.layers] == [None, None, None, 100]
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 100}
    assert {layer.window for layer in spec_from_config(mistral).layers} == {100}
    assert {layer.window for layer in spec_from_config(mistral, max_model_len=100).layers} == {None}
    assert {layer.window for layer in spec_from_config(mistral | {"sliding_window": None}).layers} == {None}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, ["MixtralForCausalLM", "LlamaForCausalLM"]),
        ({"architectures": None}, ["architectures"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        ({"hidden_act": "relu"}, ["hidden_act", "relu", "silu"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_type", "dynamic", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, ["low_freq_factor"]),
        ({"hidden_size": "many"}, ["hidden_size", "many"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "3"]),
        ({"vocab_size": None}, ["vocab_size"]),
        ({"head_dim": 15}, ["head_dim", "15"]),
        ({"is_encoder_decoder": True}, ["is_encoder_decoder"]),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": -1}, ["sliding_window", "-1"]),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["linear_attention"] * 4},
            ["layer_types", "linear_attention"],
        ),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"] * 3}, ["layer_types", "3", "4"]),
        (
            {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
            ["use_bidirectional_attention"],
        ),
        ({"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu"}, ["hidden_activation", "gelu"]),
        (
            {"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "longrope", "long_factor": [1.0]}},
            ["factor", "8"],
        ),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(changes: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ModelError) as refusal:
        spec_from_config(LLAMA | changes)
    for name in names:
        assert name in str(refusal.value)


@pytest.mark.parametrize("length", [0, 4097])
def test_context_longer_than_the_model_is_refused(length: int) -> None:
    assert spec_from_config(LLAMA, max_model_len=4096).max_position == 4096
    with pytest.raises(ModelError, match="max_position_embeddings=4096"):
        spec_from_config(LLAMA, max_model_len=length)


def test_yarn_reaches_as_far_as_it_stretches() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert spec_from_config(LLAMA | {"rope_scaling": yarn}).max_position == 4096
    assert spec_from_config(LLAMA | {"rope_scaling": yarn}, max_model_len=16384).max_position == 16384
    with pytest.raises(ModelError, match="16384"):
        spec_from_config(LLAMA | {"rope_scaling": yarn}, max_model_len=16385)


def test_load_spec_reads_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="JSON object"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert load_spec(tmp_path).eos_token_ids == (1, 2)


def test_targets_tile_the_fused_linears() -> None:
    spec = spec_from_config(LLAMA)
    found = targets(spec)
    assert list(found) == ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj"]
    assert found["v_proj"] == ("qkv", 96, 32, 64)
    assert found["up_proj"] == ("gate_up", 128, 128, 64)
    phi3 = targets(spec_from_config(LLAMA | {"architectures": ["Phi3ForCausalLM"]}))
    assert list(phi3) == ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]
    assert phi3["qkv_proj"] == ("qkv", 0, 128, 64)


def test_num_parameters_counts_what_transformers_counts(tiny_model: Callable[[str], Path]) -> None:
    import tiny_models

    for family in ("llama-tied", "llama-bias", "qwen3", "gemma3", "phi3"):
        expected = sum(p.numel() for p in tiny_models.oracle(tiny_model(family)).parameters())
        assert load_spec(tiny_model(family)).num_parameters == expected, family


def test_supported_families_are_those_we_promise() -> None:
    promised = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi3", "SmolLM3"]
    assert list(FAMILIES) == [f"{name}ForCausalLM" for name in promised]
