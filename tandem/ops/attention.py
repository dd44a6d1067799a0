"""Attention over a paged cache of keys and values, for a flat batch of many sequences at once.

Here: where rows read and write (`Layout`), the fast path on torch's own operations, and the slow reference that
defines the meaning. Not here: who owns which block (`memory/`), how a batch is laid out (`engine/batch.py`).

Shape letters: T rows of the flat batch, B rows that are one token of a sequence, N blocks, L key positions read,
H query heads, K key/value heads, G query heads per key/value head, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence with more than one query token in this batch: rows `start:stop`.

    `context` is the number of its tokens in the cache once these rows are written, so that the first row's position
    is `context - (stop - start)`. `blocks_N` are its ceil(context / block_size) block ids (int64).
    """

    start: int
    stop: int
    context: int
    blocks_N: Tensor

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each row of the flat batch reads and writes the cache; all tensors are int64 on the model's device.

    Rows 0..B-1 are sequences with one query token each, chunks follow, the rest is padding: padding rows write into
    block 0, a scratch block that no sequence owns, and their output is zero.
    slots_T: block * block_size + offset, where the row's key and value go.
    single_blocks_BN: block tables, padded with block 0. single_context_B: tokens in cache, the row's own included.
    """

    positions_T: Tensor
    slots_T: Tensor
    single_blocks_BN: Tensor
    single_context_B: Tensor
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class SingleGroup:
    """Singles that read equally many blocks: their rows, the blocks to gather, which positions count."""

    rows_B: Tensor | slice
    blocks_BN: Tensor
    mask_B11L: Tensor


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """What one chunk reads. No blocks: its own rows are its whole context. No mask: plainly causal."""

    start: int
    stop: int
    blocks_N: Tensor | None
    mask_TL: Tensor | None


@dataclass(frozen=True, slots=True)
class Reads:
    """The part of a layout's work that is the same in every layer with the same window: indices and masks."""

    groups: tuple[SingleGroup, ...]
    chunks: tuple[ChunkRead, ...]
    num_rows: int


def prepare_attention(layout: Layout, block_size: int, dtype: torch.dtype, window: int | None = None) -> Reads:
    """Gather indices and additive masks of `dtype`, to be used by every layer whose window is `window`."""
    groups = _group_singles(layout, block_size, dtype, window)
    chunks = tuple(_read_chunk(chunk, block_size, dtype, window) for chunk in layout.chunks)
    return Reads(groups, chunks, len(layout.single_context_B) + sum(chunk.length for chunk in layout.chunks))


def attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cache: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    reads: Reads | None = None,
) -> Tensor:
    """Write keys and values at `slots_T`, then let every row attend to its own sequence: [T, H, D].

    Causal; with `window` only the last `window` positions count; with `softcap` scores are softcap * tanh(s / softcap).
    cache: [2, num_blocks, block_size, K, D], finite everywhere (what is masked is multiplied by zero, not skipped).
    `reads` is `prepare_attention(layout, block_size, q.dtype, window)`, built here when absent.
    """
    _, num_blocks, block_size, num_kv_heads, head_dim = cache.shape
    slots = cache.view(2, num_blocks * block_size, num_kv_heads, head_dim)
    slots[0].index_copy_(0, layout.slots_T, k_TKD)
    slots[1].index_copy_(0, layout.slots_T, v_TKD)
    if reads is None:
        reads = prepare_attention(layout, block_size, q_THD.dtype, window)
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    if reads.num_rows < len(q_THD):
        out_THD[reads.num_rows :] = 0
    for group in reads.groups:
        rows_BHD = q_THD[group.rows_B]
        q_BKGD = rows_BHD.view(len(rows_BHD), num_kv_heads, -1, head_dim)
        k_BKLD, v_BKLD = _gather(cache, group.blocks_BN)
        attended = _attend(q_BKGD, k_BKLD, v_BKLD, group.mask_B11L, False, scale, softcap)
        out_THD[group.rows_B] = attended.reshape(len(rows_BHD), -1, head_dim)
    for chunk in reads.chunks:
        rows = slice(chunk.start, chunk.stop)
        if chunk.blocks_N is None:
            k_KLD, v_KLD = k_TKD[rows].transpose(0, 1), v_TKD[rows].transpose(0, 1)
        else:
            k_KLD, v_KLD = (x[0] for x in _gather(cache, chunk.blocks_N[None]))
        q_KGTD = q_THD[rows].view(chunk.stop - chunk.start, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        k_KGLD = k_KLD[:, None].expand(
            -1, q_KGTD.shape[1], -1, -1
        )  # stride 0: the group shares keys, nothing is copied
        v_KGLD = v_KLD[:, None].expand(-1, q_KGTD.shape[1], -1, -1)
        attended = _attend(q_KGTD, k_KGLD, v_KGLD, chunk.mask_TL, chunk.mask_TL is None, scale, softcap)
        out_THD[rows] = attended.permute(2, 0, 1, 3).reshape(chunk.stop - chunk.start, -1, head_dim)
    return out_THD


def attention_reference(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cache: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """What `attention` means, one row and one head at a time, in float32."""
    _, _, block_size, num_kv_heads, _ = cache.shape
    for row, slot in enumerate(layout.slots_T.tolist()):
        cache[0, slot // block_size, slot % block_size] = k_TKD[row]
        cache[1, slot // block_size, slot % block_size] = v_TKD[row]
    out_THD = torch.zeros_like(q_THD)
    num_singles = len(layout.single_context_B)
    for row in range(len(q_THD)):
        if row < num_singles:
            context, blocks_N = int(layout.single_context_B[row]), layout.single_blocks_BN[row]
        else:
            chunk = next((c for c in layout.chunks if c.start <= row < c.stop), None)
            if chunk is None:
                continue
            context, blocks_N = chunk.context - (chunk.stop - 1 - row), chunk.blocks_N
        first = 0 if window is None else max(0, context - window)
        slots = [(int(blocks_N[p // block_size]), p % block_size) for p in range(first, context)]
        for head in range(q_THD.shape[1]):
            kv_head = head // (q_THD.shape[1] // num_kv_heads)
            keys_LD = torch.stack([cache[0, b, o, kv_head] for b, o in slots]).float()
            values_LD = torch.stack([cache[1, b, o, kv_head] for b, o in slots]).float()
            scores_L = keys_LD @ q_THD[row, head].float() * scale
            if softcap is not None:
                scores_L = softcap * torch.tanh(scores_L / softcap)
            out_THD[row, head] = (torch.softmax(scores_L, 0) @ values_LD).to(q_THD.dtype)
    return out_THD


def _gather(cache: Tensor, blocks_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of whole blocks, each as a [B, K, L, D] view of one gathered copy."""
    num_kv_heads, head_dim = cache.shape[3:]
    rows, flat_blocks = len(blocks_BN), blocks_BN.reshape(-1)
    k, v = (half.index_select(0, flat_blocks).view(rows, -1, num_kv_heads, head_dim) for half in cache)
    return k.transpose(1, 2), v.transpose(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, softcap: float | None
) -> Tensor:
    if softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
    scores = softcap * torch.tanh(torch.matmul(q, k.transpose(-1, -2)).float() * (scale / softcap))
    if mask is not None:
        scores = scores + mask
    elif is_causal:
        length = q.shape[-2]
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return torch.matmul(torch.softmax(scores, -1).to(v.dtype), v)


def _group_singles(layout: Layout, block_size: int, dtype: torch.dtype, window: int | None) -> tuple[SingleGroup, ...]:
    """Singles by the number of blocks they read, rounded up in steps of about a quarter.

    The rounded number depends on the row's own context alone: one long row costs the short ones nothing, and a row
    is computed the same way whoever its batch mates are.
    """
    contexts = layout.single_context_B.tolist()
    device = layout.single_context_B.device
    members: dict[int, list[int]] = {}
    for row, context in enumerate(contexts):
        members.setdefault(_round_up(context, block_size, window), []).append(row)
    groups = []
    for num_blocks, rows in sorted(members.items()):
        whole = len(rows) == len(contexts)
        rows_B = slice(0, len(rows)) if whole else torch.tensor(rows, device=device)
        context_B = layout.single_context_B[rows_B]
        first_B = torch.zeros_like(context_B) if window is None else (context_B - window).clamp(min=0) // block_size
        columns_BN = first_B[:, None] + torch.arange(num_blocks, device=device)
        inside_BN = columns_BN * block_size < context_B[:, None]
        table_BN = layout.single_blocks_BN[rows_B]
        blocks_BN = table_BN.gather(1, columns_BN.clamp(max=table_BN.shape[1] - 1)) * inside_BN
        positions_BL = (first_B * block_size)[:, None] + torch.arange(num_blocks * block_size, device=device)
        allowed_BL = positions_BL < context_B[:, None]
        if window is not None:
            allowed_BL &= positions_BL >= (context_B - window)[:, None]
        groups.append(SingleGroup(rows_B, blocks_BN, _additive(allowed_BL, dtype)[:, None, None]))
    return tuple(groups)


def _round_up(context: int, block_size: int, window: int | None) -> int:
    first = 0 if window is None else max(0, context - window) // block_size
    num_blocks = -(-context // block_size) - first
    step = max(1, 1 << (max(num_blocks - 1, 1).bit_length() - 3)) if num_blocks > 4 else 1
    return -(-num_blocks // step) * step


def _read_chunk(chunk: Chunk, block_size: int, dtype: torch.dtype, window: int | None) -> ChunkRead:
    first_query = chunk.context - chunk.length
    whole = first_query == 0
    if whole and (window is None or chunk.context <= window):
        return ChunkRead(chunk.start, chunk.stop, None, None)
    device = chunk.blocks_N.device
    first_block = 0 if window is None or whole else max(0, first_query - window + 1) // block_size
    blocks_N = None if whole else chunk.blocks_N[first_block:]
    num_keys = chunk.context if blocks_N is None else len(blocks_N) * block_size
    keys_L = first_block * block_size + torch.arange(num_keys, device=device)
    queries_T = first_query + torch.arange(chunk.length, device=device)
    allowed_TL = keys_L <= queries_T[:, None]
    if window is not None:
        allowed_TL &= keys_L > queries_T[:, None] - window
    return ChunkRead(chunk.start, chunk.stop, blocks_N, _additive(allowed_TL, dtype))


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))
