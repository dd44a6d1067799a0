"""GGUF files of tiny Hugging Face models, written with llama.cpp's own `gguf` package and its converter's conventions:
names, q and k rows reordered for llama, norms plus one for Gemma, rope factors as tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import load_file, save_file

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "smollm3": "smollm3", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3",
}  # fmt: skip
QUANTISABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# Of the types that the package can only read: where a block's float16 scales are.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,),
          "IQ4_XS": (0,)}  # fmt: skip


def random_blocks(kind: str, count: int, seed: int = 0, scale: float = 1e-3) -> np.ndarray:
    """uint8 [count, bytes of a block]: any codes, scales of at most `scale`."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]), dtype=np.uint8)
    for at in SCALES[kind]:
        scales = generator.uniform(-scale, scale, (count, 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return blocks


def encode(tensor: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """Rows as stored; of types that nothing here can write, random ones of the same size."""
    if kind == "F32":
        return tensor
    if kind == "F16":
        return tensor.astype(np.float16)
    if kind in SCALES:
        numbers = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]
        return random_blocks(kind, tensor.size // numbers, seed).reshape(len(tensor), -1)
    return quants.quantize(tensor, GGMLQuantizationType[kind])


def convert(
    source: Path, target: Path, kind: str = "F32", metadata: dict[str, Any] | None = None, drop: tuple[str, ...] = ()
) -> Path:
    """Write the model directory `source` as `target`/model.gguf with matrices of type `kind`, and beside it, in
    `target`/plain, a Hugging Face directory that holds the very same numbers. `metadata` is added or replaces."""
    config = json.loads((source / "config.json").read_text())
    arch = ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(
        {a: k for k, a in gguf.MODEL_ARCH_NAMES.items()}[arch], config["num_hidden_layers"]
    )
    plain = target / "plain"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, plain)
    tensors, same = load_file(source / "model.safetensors"), {}
    said = described(config, arch) | tokenizer_of(source) | (metadata or {})
    writer = GGUFWriter(target / "model.gguf", said.pop("general.architecture", (arch, None))[0])
    for key, (value, value_type) in said.items():
        if value is not None:
            item = gguf.GGUFValueType.get_type(value[0]) if value_type == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value, value_type, item)
    for seed, (name, tensor) in enumerate(sorted(tensors.items())):
        numbers, stored_as = tensor.numpy(), kind if tensor.ndim > 1 else "F32"
        rows = encode(numbers, stored_as, seed)
        same[name] = torch.from_numpy(quants.dequantize(rows, GGMLQuantizationType[stored_as]).reshape(numbers.shape))
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if arch in ("llama", "smollm3") and heads:
            half = len(rows) // config[heads] // 2
            rows = rows.reshape(config[heads], 2, half, -1).swapaxes(1, 2).reshape(rows.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            rows = rows + 1
        stem, _, suffix = name.rpartition(".")
        ours = f"{names.get_name(stem)}.{suffix}"
        if ours not in drop:
            writer.add_tensor(ours, np.ascontiguousarray(rows), raw_dtype=GGMLQuantizationType[stored_as])
    for name, factors in factors_of(config).items():
        writer.add_tensor(name, np.array(factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file({name: tensor.contiguous() for name, tensor in same.items()}, plain / "model.safetensors")
    return target / "model.gguf"


def number(value: Any) -> tuple[Any, gguf.GGUFValueType]:
    """A metadata value and the type that the converter gives it."""
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    return value, kinds.get(type(value)) or gguf.GGUFValueType.get_type(value)


def described(config: dict[str, Any], arch: str) -> dict[str, tuple[Any, gguf.GGUFValueType]]:
    """The hyperparameters."""
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    found = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(full["rope_theta"]),
        "rope.dimension_count": int(head_dim * (full.get("partial_rotary_factor") or 1)),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }
    if arch in ("gemma2", "gemma3"):
        found["attention.scale"] = float(config["query_pre_attn_scalar"] ** -0.5)
    if config.get("sliding_window") and arch in ("gemma2", "gemma3", "phi3", "llama"):
        found["attention.sliding_window"] = config["sliding_window"]
    if arch == "gemma3":
        found["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config["layer_types"]]
        found["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name):
            found[name] = float(config[name])
    if full["rope_type"] in ("linear", "yarn"):
        found |= {"rope.scaling.type": full["rope_type"], "rope.scaling.factor": float(full["factor"])}
    if full["rope_type"] == "yarn":
        found["rope.scaling.original_context_length"] = full["original_max_position_embeddings"]
    if full["rope_type"] == "longrope":
        original, longest = config["original_max_position_embeddings"], config["max_position_embeddings"]
        found["rope.scaling.original_context_length"] = original
        found["rope.scaling.attn_factor"] = float(np.sqrt(1 + np.log(longest / original) / np.log(original)))
    return {f"{arch}.{key}": number(value) for key, value in found.items()}


def factors_of(config: dict[str, Any]) -> dict[str, list[float]]:
    """Rope factors, which the converter writes as tensors."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        return {"rope_factors_long.weight": rope["long_factor"], "rope_factors_short.weight": rope["short_factor"]}
    if rope.get("rope_type") != "llama3":
        return {}
    dim = config["hidden_size"] // config["num_attention_heads"]
    low, high, original = (rope[n] for n in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    factors = []
    for index in range(0, dim, 2):
        length = 2 * np.pi * rope["rope_theta"] ** (index / dim)
        smooth = (original / length - low) / (high - low)
        blended = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1.0 if length < original / high else rope["factor"] if length > original / low else blended)
    return {"rope_freqs.weight": factors}


def tokenizer_of(source: Path) -> dict[str, tuple[Any, gguf.GGUFValueType]]:
    """The byte tokenizer of the tiny models, as the converter writes byte-level ones."""
    vocab = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [f"[PAD{i}]" for i in range(json.loads((source / "config.json").read_text())["vocab_size"])]
    for token, index in vocab.items():
        tokens[index] = token
    kinds = [3 if i < 3 else 5 if token.startswith("[PAD") else 1 for i, token in enumerate(tokens)]
    template = (source / "chat_template.jinja").read_text()
    found = {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": tokens,
        "ggml.token_type": kinds,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.padding_token_id": 0,
        "chat_template": template,
    }
    return {f"tokenizer.{key}": number(value) for key, value in found.items()}
