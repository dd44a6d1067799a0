"""config.json -> ModelSpec: both spellings agree, what cannot be run is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.errors import ModelError
from tandem.model.rope import rope_frequencies
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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"architectures": 5}, "architectures=5"),
        ({"architectures": [["a"]]}, "architectures="),
        ({"head_dim": "16"}, "head_dim='16'"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads='2'"),
        ({"num_key_value_heads": -2}, "num_key_value_heads=-2"),
        ({"hidden_size": 65}, "hidden_size=65"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"attention_bias": "no"}, "attention_bias='no'"),
        ({"hidden_act": ["a"]}, "hidden_act="),
        ({"dtype": 16}, "dtype=16"),
        ({"rope_theta": "a"}, "rope_theta='a'"),
        ({"rope_theta": 0.5}, "rope_theta=0.5"),
        ({"rope_scaling": "x"}, "rope_scaling='x'"),
        ({"rope_parameters": [1]}, "rope_parameters="),
        ({"rope_scaling": {"type": ["yarn"]}}, "type="),
        ({"rope_scaling": YARN | {"factor": "4"}}, "factor='4'"),
        ({"rope_scaling": YARN | {"beta_fast": "x"}}, "beta_fast='x'"),
        ({"rope_scaling": YARN | {"mscale": "x", "mscale_all_dim": 1}}, "mscale='x'"),
        ({"rope_scaling": LLAMA3 | {"factor": 0}}, "factor=0"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor=4"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 1.5}}, "original_max_position_embeddings=1.5"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor=1"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor=2.0"),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": 5}, "layer_types=5"),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": [["a"]] * 4}, "layer_types="),
        ({"architectures": ["Qwen2ForCausalLM"], "max_window_layers": "a"}, "max_window_layers='a'"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": True}, "sliding_window=True"),
        ({"architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 0}, "sliding_window_pattern=0"),
        ({"architectures": ["Gemma3ForCausalLM"], "query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0"),
        ({"architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": 0.0}, "final_logit_softcapping=0.0"),
        ({"architectures": ["Gemma3ForCausalLM"], "rope_parameters": {"sliding_attention": 3}}, "sliding_attention=3"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": ["x"] * 4}, "no_rope_layers="),
        ({"eos_token_id": "7"}, "config.json: eos_token_id='7'"),
        ({"eos_token_id": 100}, "config.json: eos_token_id=100"),
        ({"eos_token_id": [7, -1]}, "config.json: eos_token_id="),
        ({"eos_token_id": True}, "config.json: eos_token_id=True"),
    ],
)
def test_wrong_types_and_senseless_values_are_named_with_their_value(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ModelError) as refusal:
        spec_from_config(LLAMA | changes)
    assert name in str(refusal.value)


def test_end_tokens_of_the_generation_config_are_checked_too_and_null_is_no_answer() -> None:
    assert spec_from_config(LLAMA, {"eos_token_id": None}).eos_token_ids == (7,)
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id=100 .* 0 to 99"):
        spec_from_config(LLAMA, {"eos_token_id": 100})


ROPES: list[dict[str, Any]] = [
    {},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": YARN | {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}},
    {"rope_parameters": YARN | {"rope_theta": 1e4}},
]
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([10**12, -(10**12), 10**400]),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(-1, 9), st.text(max_size=2), st.none()), max_size=5),
    st.dictionaries(st.sampled_from(["type", "factor", "full_attention"]), st.integers(-1, 3), max_size=2),
)


@settings(max_examples=400, deadline=None)
@given(family=st.sampled_from(list(FAMILIES)), rope=st.sampled_from(ROPES), junk=JUNK, choice=st.data())
def test_one_field_of_junk_gives_a_model_error_or_a_spec(
    family: str, rope: dict[str, Any], junk: Any, choice: st.DataObject
) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 16, "sliding_window_pattern": 2}
    config = GEMMA3 | windows | rope | {"architectures": [family], "num_hidden_layers": 4, "head_dim": 16}
    unset = ["rope_theta", "layer_types", "attention_bias", "no_rope_layers", "no_rope_layer_interval", "dtype",
             "max_window_layers", "query_pre_attn_scalar", "final_logit_softcapping", "rope_local_base_freq",
             "partial_rotary_factor", "original_max_position_embeddings", "tie_word_embeddings"]  # fmt: skip
    name = choice.draw(st.sampled_from([*config, *unset]))
    inside = next(iter(rope), None)
    if name == inside and choice.draw(st.booleans()):
        config = config | {name: config[name] | {choice.draw(st.sampled_from(list(config[name]))): junk}}
    else:
        config = config | {name: junk}
    try:
        spec = spec_from_config(config)
    except ModelError as error:
        assert "config.json" in str(error)
        return
    assert spec.num_parameters > 0
    for layer in set(spec.layers):
        assert layer.rope is None or rope_frequencies(layer.rope).shape == (layer.rope.dim // 2,)
