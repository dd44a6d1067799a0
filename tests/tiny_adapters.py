"""Random PEFT adapters on the tiny models, saved by PEFT itself; the oracle is PEFT's own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model


def build(model_dir: Path, directory: Path, seed: int = 0, **config: Any) -> Path:
    """Save a LoRA adapter whose B is random too (a fresh one would be the identity)."""
    torch.manual_seed(seed)
    config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]} | config
    model = get_peft_model(tiny_models.oracle(model_dir), LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return directory


def generate(model_dir: Path, adapter: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of PEFT's model."""
    model = PeftModel.from_pretrained(tiny_models.oracle(model_dir), adapter).eval()
    ids_1L = torch.tensor([prompt])
    found = model.generate(
        input_ids=ids_1L, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return found[0, len(prompt) :].tolist()


def logprobs(model_dir: Path, adapter: Path, prompt: list[int]) -> torch.Tensor:
    """Log-probabilities [L, V] of PEFT's model."""
    model = PeftModel.from_pretrained(tiny_models.oracle(model_dir), adapter).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
