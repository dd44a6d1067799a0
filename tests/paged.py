"""Runs a decoder over a paged cache for tests: sequences with scattered blocks, any mix of them in one forward."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem import ops
from tandem.model.decoder import Decoder, LoraBatch
from tandem.model.spec import ModelSpec, load_spec
from tandem.model.weights import load_weights
from tandem.ops.attention import Chunk, Layout

MIN_ROWS = 4
NUM_BLOCKS = 64
# (tokens already in the cache, new tokens) of each sequence, those of one new token first
MIXES = {
    "one single": [(0, 1)],
    "singles of all lengths": [(n, 1) for n in (0, 1, 3, 4, 5, 17, 40, 90)],
    "chunk alone": [(0, 9)],
    "chunk after context": [(13, 5)],
    "singles and chunks": [(30, 1), (2, 1), (0, 7), (21, 6), (8, 8)],
}


def load_decoder(
    path: Path, spec: ModelSpec | None = None, dtype: torch.dtype = torch.float32, max_model_len: int | None = None
) -> Decoder:
    """The decoder of a model directory on the CPU; `spec` replaces the one the directory describes."""
    spec = spec or load_spec(path, max_model_len)
    kernels = ops.load("cpu", dtype)
    return Decoder(spec, load_weights(path, spec, dtype=dtype, device="cpu", kernels=kernels), kernels)


def layout_of(parts: Sequence[tuple[int, int, Sequence[int]]], block_size: int) -> Layout:
    """Layout of (start position, number of tokens, block table) per sequence, those of one token first."""
    assert all(length > 1 for _, length, _ in parts[sum(length == 1 for _, length, _ in parts) :])
    positions, slots, chunks, at = [], [], [], 0
    for start, length, table in parts:
        span = range(start, start + length)
        positions += span
        slots += [table[p // block_size] * block_size + p % block_size for p in span]
        if length > 1:
            blocks_N = torch.tensor(table[: -(-(start + length) // block_size)])
            chunks.append(Chunk(at, at + length, start + length, blocks_N))
        at += length
    padding = [0] * (MIN_ROWS - at)
    singles = [(start + 1, table) for start, length, table in parts if length == 1]
    widest = max((-(-context // block_size) for context, _ in singles), default=0)
    rows = [[*table[:widest], *[0] * widest][:widest] for _, table in singles]
    return Layout(
        positions_T=torch.tensor(positions + padding),
        slots_T=torch.tensor(slots + padding),
        single_blocks_BN=torch.tensor(rows, dtype=torch.int64).view(len(singles), widest),
        single_context_B=torch.tensor([context for context, _ in singles], dtype=torch.int64),
        chunks=tuple(chunks),
    )


def attention_case(mix: str, block_size: int, heads: tuple[int, int], dtype: torch.dtype) -> tuple[Any, ...]:
    """Random queries, keys, values and cache for one of MIXES: q, k, v, cache, layout."""
    generator = torch.Generator().manual_seed(0)
    free = itertools.cycle(torch.randperm(NUM_BLOCKS - 1, generator=generator).add(1).tolist())
    parts = []
    for start, length in MIXES[mix]:
        parts.append((start, length, [next(free) for _ in range(-(-(start + length) // block_size))]))
    layout = layout_of(parts, block_size)
    rows, (num_heads, num_kv_heads), head_dim = len(layout.positions_T), heads, 8

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    cache = random(2, NUM_BLOCKS, num_kv_heads, block_size, head_dim)
    q, k, v = (
        random(rows, num_heads, head_dim),
        random(rows, num_kv_heads, head_dim),
        random(rows, num_kv_heads, head_dim),
    )
    return q, k, v, cache, layout


class Paged:
    """A decoder with a small cache whose blocks are handed out in random order. Sequences are known by name."""

    def __init__(self, decoder: Decoder, block_size: int = 4, num_blocks: int = 256) -> None:
        self.decoder = decoder
        self.block_size = block_size
        spec = decoder.spec
        shape = (2, num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        self.caches = [torch.zeros(shape, dtype=decoder.dtype) for _ in spec.layers]
        self.free = random.Random(0).sample(range(1, num_blocks), num_blocks - 1)
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    @torch.inference_mode()
    def step(self, new: Mapping[str, Sequence[int]], lora: LoraBatch | None = None) -> dict[str, Tensor]:
        """One forward with the given next tokens of each sequence; returns their logits, one row per token."""
        names = sorted(new, key=lambda name: len(new[name]) > 1)
        parts, tokens = [], []
        for name in names:
            table, start = self.tables.setdefault(name, []), self.lengths.get(name, 0)
            self.lengths[name] = start + len(new[name])
            while len(table) * self.block_size < self.lengths[name]:
                table.append(self.free.pop())
            parts.append((start, len(new[name]), table))
            tokens += new[name]
        layout = layout_of(parts, self.block_size)
        tokens_T = torch.tensor(tokens + [0] * (MIN_ROWS - len(tokens)))
        logits_TV = self.decoder.logits(self.decoder.forward(tokens_T, layout, self.caches, lora))
        return dict(zip(names, logits_TV[: len(tokens)].split([len(new[name]) for name in names]), strict=True))

    def feed(self, name: str, tokens: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Feed one sequence in pieces of the given sizes (the last size repeats); logits of all its tokens."""
        rows, at, turn = [], 0, 0
        while at < len(tokens):
            size = sizes[min(turn, len(sizes) - 1)]
            rows.append(self.step({name: tokens[at : at + size]})[name])
            at, turn = at + size, turn + 1
        return torch.cat(rows)
