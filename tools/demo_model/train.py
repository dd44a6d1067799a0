"""Trains the model on the CPU: rows of packed documents, bfloat16 matrix products, float32 weights and AdamW.

A row holds whole documents one after the other with no mask between them: earlier documents look like earlier turns,
which teaches the model to ignore what has nothing to do with the question. The loss covers the assistant's words and
all plain text; questions are random mixtures of phrasings, which nothing can predict and nobody wants predicted.
"""

import ctypes
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tools.demo_model.corpus import documents
from tools.demo_model.tokens import Encoder
from tools.demo_model.world import World

M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1


@dataclass(frozen=True)
class Recipe:
    """`stages` are (row length, share of the tokens): short rows are faster, the last ones teach longer distances."""

    tokens: int = 15_000_000
    tokens_per_step: int = 4096
    stages: tuple[tuple[int, float], ...] = ((256, 0.8), (512, 0.2))
    peak_lr: float = 2.5e-3
    warmup: float = 0.02
    decay: float = 0.35
    weight_decay: float = 0.05
    seed: int = 1
    target_share: float = 0.42
    log_every: int = 50
    save_every: int = 300


def keep_freed_memory() -> None:
    """Makes glibc reuse large buffers; otherwise every step pays again for the page faults of its activations."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def build_model(vocab_size: int, ids: dict[str, int]) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    out_scale = 1 / math.sqrt(2 * config.num_hidden_layers)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_(out_scale)
    return model


def packed_rows(world: World, encoder: Encoder, length: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of `length + 1` tokens with their masks; a document that does not fit waits for the next row."""
    stream = documents(world, seed)
    row, mask = [], []
    room = length + 1
    while True:
        for ids, learn in encoder.encode_batch(list(islice(stream, 512))):
            if len(ids) > length + 1:
                continue
            if len(ids) > room:
                yield filled(row, length + 1, 0), filled(mask, length + 1, False)
                row, mask, room = [], [], length + 1
            row.append(ids)
            mask.append(learn)
            room -= len(ids)


def filled(parts: list[np.ndarray], size: int, value: int | bool) -> np.ndarray:
    joined = np.concatenate(parts)
    return np.pad(joined, (0, size - len(joined)), constant_values=value)


def batches(world: World, encoder: Encoder, recipe: Recipe, length: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """(inputs, positions, targets); positions index the flattened inputs, padded with target -100 to a fixed number."""
    num_rows = recipe.tokens_per_step // length
    capacity = int(recipe.tokens_per_step * recipe.target_share)
    rows = packed_rows(world, encoder, length, seed)
    while True:
        ids, masks = (torch.from_numpy(np.stack(x)) for x in zip(*islice(rows, num_rows), strict=True))
        positions = masks[:, 1:].flatten().nonzero().squeeze(1)[:capacity]
        targets = ids[:, 1:].flatten()[positions]
        missing = capacity - len(positions)
        yield ids[:, :-1].contiguous(), F.pad(positions, (0, missing)), F.pad(targets, (0, missing), value=-100)


def learning_rate(progress: float, recipe: Recipe) -> float:
    """Warm up, stay, then fall to zero as a straight line; `progress` goes from 0 to 1."""
    rise = min(1.0, progress / recipe.warmup)
    fall = min(1.0, (1 - progress) / recipe.decay)
    return recipe.peak_lr * min(rise, fall)


def optimizer_for(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.95), eps=1e-9, fused=True)


def loss_function(model: LlamaForCausalLM):  # noqa: ANN201 - the compiled callable has no useful type
    def loss(inputs: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
            logits = F.linear(hidden.flatten(0, 1)[positions], model.lm_head.weight)
        return F.cross_entropy(logits.float(), targets, ignore_index=-100)

    return torch.compile(loss, dynamic=False)


def train(
    world: World, tokenizer_dir: Path, recipe: Recipe, save_to: Path | None = None
) -> tuple[LlamaForCausalLM, dict]:
    """Trains from random weights; returns the float32 model and what the run took."""
    keep_freed_memory()
    torch.manual_seed(recipe.seed)
    encoder = Encoder(tokenizer_dir / "tokenizer.json")
    special = {"bos": encoder.bos, "eos": encoder.im_end, "pad": 0}
    model = build_model(encoder.core.get_vocab_size(), special)
    optimizer = optimizer_for(model, recipe)
    loss_of = loss_function(model)
    num_steps = recipe.tokens // recipe.tokens_per_step
    history, recent, step, began = [], [], 0, time.time()
    for stage, (length, share) in enumerate(recipe.stages):
        last = num_steps if stage == len(recipe.stages) - 1 else step + round(share * num_steps)
        stream = batches(world, encoder, recipe, length, recipe.seed * 1000 + stage)
        while step < last:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step / num_steps, recipe)
            loss = loss_of(*next(stream))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent.append(loss.item())
            step += 1
            if step % recipe.log_every == 0:
                history.append(round(float(np.mean(recent)), 4))
                recent.clear()
                speed = step * recipe.tokens_per_step / (time.time() - began)
                line = {"step": step, "of": num_steps, "loss": history[-1], "tokens_per_s": round(speed)}
                print(json.dumps(line), flush=True)
            if save_to and step % recipe.save_every == 0:
                save(model, save_to)
    seconds = time.time() - began
    return model, {
        "tokens": num_steps * recipe.tokens_per_step,
        "steps": num_steps,
        "seconds": round(seconds, 1),
        "tokens_per_s": round(num_steps * recipe.tokens_per_step / seconds),
        "loss_every_50_steps": history,
    }


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes config.json, generation_config.json and the weights in bfloat16; the model itself stays float32."""
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config.update(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
        max_new_tokens=128,
    )
    copy.save_pretrained(folder)
