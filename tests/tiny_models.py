"""Tiny random transformers models, one per feature set, saved as Hugging Face directories with a byte tokenizer.

Weights are drawn wide (initializer_range 0.3; norms and biases random too), so that a missing cap, window or norm
shows; the largest logits stay around 10 to 30. Vocabulary: 3 special tokens, then the 256 bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]
VOCAB_SIZE = 264
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% generation %}{{ m['content'] }}{% endgeneration %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
FACTORS = {
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [1.5 + 0.7 * i for i in range(6)],
}
GEMMA = {"head_dim": 32, "num_hidden_layers": 4, "query_pre_attn_scalar": 24, "sliding_window": 9}

# name -> (config class, model class, what differs from COMMON)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-bias": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama-llama3": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"rope_parameters": SCALED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "llama-linear": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama-yarn": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": SCALED | {"rope_type": "yarn"}}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 9}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        GEMMA | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"sliding_window": 9}),
    "phi3-longrope": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 32,
            "rope_parameters": FACTORS | {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        },
    ),
}


def build(family: str, directory: Path, **overrides: Any) -> Path:
    """Save the tiny model `family` (with config fields replaced by `overrides`) and its tokenizer in `directory`."""
    config_class, model_class, fields = FAMILIES[family]
    # transformers completes rope_parameters in place, so every model gets its own.
    fields = {name: _copied(value) for name, value in (COMMON | fields | overrides).items()}
    config = getattr(transformers, config_class)(**fields)
    torch.manual_seed(sorted(FAMILIES).index(family))
    model = getattr(transformers, model_class)(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def oracle(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers runs it, with the attention that honours every feature."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    return model.eval()


def tokenizer() -> Any:
    """One token per byte of the text, after the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS + alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, list) else value
