"""Trains the model on the CPU: rows of packed documents, bfloat16 matrix products, float32 weights, Muon.

A row holds whole documents one after the other. In most rows a document sees only itself; in the open rows it sees all
before it, which look like earlier turns and teach the model to ignore what has nothing to do with the question, and to
look far back. The loss covers the assistant's words and
all plain text; questions are random mixtures of phrasings, which nothing can predict and nobody wants predicted.
"""

import ctypes
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tools.demo_model.corpus import BROAD, DRILLS, PLAIN, SKILLED, Document, Mixture, documents
from tools.demo_model.tokens import EOS, SPECIAL, Encoder
from tools.demo_model.world import World

# The id of the mark that ends plain text; a chat turn ends with another, see tokens.SPECIAL.
END_OF_TEXT = SPECIAL.index(EOS)
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1


@dataclass(frozen=True)
class Stage:
    """Rows of `length` tokens from one mixture, for a share of the tokens of the cycle."""

    length: int
    share: float
    mixture: Mixture


@dataclass(frozen=True)
class Recipe:
    """One cycle of the learning rate, from nothing to its peak and back to nothing."""

    tokens: int
    stages: tuple[Stage, ...]
    seed: int
    muon_lr: float = 3e-3
    adam_lr: float = 2e-3
    warmup: float = 0.02
    decay: float = 0.35
    tokens_per_step: int = 4096
    weight_decay: float = 0.05
    target_share: float = 0.45
    open_rows: float = 0.25
    log_every: int = 50
    save_every: int = 300


# Drills first, so that copying is there when the rest is learnt. Short rows are faster, so long ones come last.
FIRST = Recipe(12_000_000, (Stage(128, 0.10, DRILLS), Stage(256, 0.72, BROAD), Stage(512, 0.18, PLAIN)), seed=1)
SECOND = Recipe(
    8_000_000, (Stage(256, 0.75, SKILLED), Stage(512, 0.25, SKILLED)), seed=2, muon_lr=2e-3, adam_lr=1.5e-3, decay=0.6
)


def keep_freed_memory() -> None:
    """Makes glibc reuse large buffers; otherwise every step pays again for the page faults of its activations."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def build_model(vocab_size: int, ids: dict[str, int | None]) -> LlamaForCausalLM:
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
    )
    model = LlamaForCausalLM(config)
    # Compiled, this is faster on a CPU than the fused attention, whose backward pass is slow.
    model.set_attn_implementation("eager")
    out_scale = 1 / math.sqrt(2 * config.num_hidden_layers)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_(out_scale)
    return model


def packed_rows(stream: Iterator[Document], encoder: Encoder, length: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Rows of `length + 1` tokens: ids, loss mask, number of the document; what does not fit waits for the next row."""
    row: list[tuple[np.ndarray, ...]] = []
    room = length + 1
    while True:
        for ids, learn in encoder.encode_batch(list(islice(stream, 512))):
            if len(ids) > length + 1:
                continue
            if len(ids) > room:
                yield tuple(filled(parts, length + 1) for parts in zip(*row, strict=True))
                row, room = [], length + 1
            row.append((ids, learn, np.full(len(ids), len(row))))
            room -= len(ids)


def filled(parts: tuple[np.ndarray, ...], size: int) -> np.ndarray:
    joined = np.concatenate(parts)
    return np.pad(joined, (0, size - len(joined)))


def attention_bias(document_BT: Tensor, open_B: Tensor) -> Tensor:
    """(B, 1, T, T), 0 where a token may look and very negative where not: earlier tokens of its document, or, in an
    open row, of all documents."""
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    seen_BTT = (same_BTT | open_B[:, None, None]).tril()
    return torch.where(seen_BTT, 0.0, -1e4).to(torch.bfloat16)[:, None]


def batches(stream: Iterator[Document], encoder: Encoder, recipe: Recipe, length: int) -> Iterator[tuple[Tensor, ...]]:
    """(inputs, bias, positions, targets); positions index the flattened inputs, padded to a fixed number with -100."""
    num_rows = recipe.tokens_per_step // length
    capacity = int(recipe.tokens_per_step * recipe.target_share)
    rows = packed_rows(stream, encoder, length)
    open_B = torch.arange(num_rows) < num_rows * recipe.open_rows
    while True:
        ids, masks, numbers = (torch.from_numpy(np.stack(x)) for x in zip(*islice(rows, num_rows), strict=True))
        positions = masks[:, 1:].flatten().nonzero().squeeze(1)[:capacity]
        targets = ids[:, 1:].flatten()[positions]
        missing = capacity - len(positions)
        bias = attention_bias(numbers[:, :-1], open_B)
        yield ids[:, :-1].contiguous(), bias, F.pad(positions, (0, missing)), F.pad(targets, (0, missing), value=-100)


def schedule(progress: float, recipe: Recipe) -> float:
    """The factor on every learning rate: rises, stays at 1, then falls to zero; `progress` goes from 0 to 1."""
    rise = min(1.0, progress / recipe.warmup)
    fall = min(1.0, (1 - progress) / recipe.decay)
    return min(rise, fall)


def optimizers_for(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    inner = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    return [
        torch.optim.Muon(
            inner, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(outer, lr=recipe.adam_lr, betas=(0.9, 0.95), eps=1e-9, weight_decay=0.0, fused=True),
    ]


def loss_function(model: LlamaForCausalLM) -> Callable[..., Tensor]:
    """Compiled: (inputs, bias, positions, targets) to the mean loss over the targets."""

    def loss(inputs: Tensor, bias: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=inputs, attention_mask=bias, use_cache=False).last_hidden_state
            logits = F.linear(hidden.flatten(0, 1)[positions], model.lm_head.weight)
        return F.cross_entropy(logits.float(), targets, ignore_index=-100)

    return torch.compile(loss, dynamic=False)


def train(
    world: World, folder: Path, recipe: Recipe, save_to: Path | None = None
) -> tuple[LlamaForCausalLM, dict]:
    """Trains one cycle, from the weights in `folder` if there are any; returns the float32 model and what it took."""
    keep_freed_memory()
    torch.manual_seed(recipe.seed)
    encoder = Encoder(folder / "tokenizer.json")
    if (folder / "model.safetensors").exists():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    else:
        model = build_model(encoder.core.get_vocab_size(), encoder.special_ids)
    optimizers = optimizers_for(model, recipe)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    loss_of = loss_function(model)
    num_steps = recipe.tokens // recipe.tokens_per_step
    history, recent, step, began = [], [], 0, time.time()
    for number, stage in enumerate(recipe.stages):
        last = num_steps if stage is recipe.stages[-1] else step + round(stage.share * num_steps)
        source = documents(world, recipe.seed * 1000 + number, stage.mixture)
        stream = batches(source, encoder, recipe, stage.length)
        while step < last:
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * schedule(step / num_steps, recipe)
            loss = loss_of(*next(stream))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
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
    copy = LlamaForCausalLM(model.config).bfloat16()
    copy.load_state_dict(model.state_dict())
    copy.generation_config.update(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=[model.config.eos_token_id, END_OF_TEXT],
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
        max_new_tokens=128,
    )
    copy.save_pretrained(folder)
