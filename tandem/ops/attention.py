"""Attention over a paged cache of keys and values, for a flat batch of many sequences at once.

Here: where rows read and write (`Layout`), the fast path on torch's own operations, and the slow reference that
defines the meaning. Not here: who owns which block (`memory/`), how a batch is laid out (`engine/batch.py`).

Shape letters: T rows of the flat batch, B rows that are one token of a sequence, N blocks, L key positions read,
H query heads, K key/value heads, G query heads per key/value head, D head_dim, W written rows, E features of one head
in one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tandem.ops import kv_cache
from tandem.ops.kv_cache import QuantizedCache

SCRATCH_BYTES = 8 * 2**20  # keys and values gathered at once: not much more than a cache holds
PADDING = 2.0  # padding sequences to one length may at most double the work


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


def _attend_quantized(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cache: QuantizedCache,
    layout: Layout,
    options: dict[str, Any],
) -> Tensor:
    """`attention` over a quantised cache: the blocks in use become a plain cache, and what is new is read back."""
    num_rows = len(layout.single_context_B) + sum(chunk.length for chunk in layout.chunks)
    kv_cache.write(cache, k_TKD[:num_rows], v_TKD[:num_rows], layout.slots_T[:num_rows])
    tables = [layout.single_blocks_BN.flatten(), *(chunk.blocks_N for chunk in layout.chunks)]
    used_N = torch.cat([torch.zeros(1, dtype=torch.int64, device=q_THD.device), *tables]).unique()
    plain = kv_cache.read(cache, used_N, q_THD.dtype)
    plain[:, 0] = 0  # the scratch block: what is in it is masked, and must be finite
    blocks_T, places_T = layout.slots_T // cache.block_size, layout.slots_T % cache.block_size
    rows_T = torch.searchsorted(used_N, blocks_T)
    moved = replace(
        layout,
        slots_T=rows_T * cache.block_size + places_T,
        single_blocks_BN=torch.searchsorted(used_N, layout.single_blocks_BN),
        chunks=tuple(replace(c, blocks_N=torch.searchsorted(used_N, c.blocks_N)) for c in layout.chunks),
    )
    k_TKD, v_TKD = plain[:, rows_T, :, places_T].transpose(0, 1)
    return attention(q_THD, k_TKD, v_TKD, plain, moved, **options)


class Span(NamedTuple):
    """A sequence in training: query rows start:stop, key rows first_key:last_key, the queries being the last."""

    start: int
    stop: int
    first_key: int
    last_key: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def num_keys(self) -> int:
        return self.last_key - self.first_key


@dataclass(frozen=True, slots=True)
class SingleGroup:
    """Singles that read equally many blocks: their rows, the half blocks to gather, which positions count."""

    rows_B: Tensor | slice
    gather_N: Tensor
    mask_B11L: Tensor


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """What one chunk reads. Nothing to gather: its own rows are its whole context. No mask: plainly causal."""

    start: int
    stop: int
    gather_N: Tensor | None
    mask_TL: Tensor | None


@dataclass(frozen=True, slots=True)
class Reads:
    """The part of a layout's work that is the same in every layer with the same window: indices, masks, scratch.

    writes_W: rows of `_tokens(cache)[0]` to write, by batch row and kv head. scratch_NE receives what is gathered;
    one for all layers, because touching fresh memory costs more than the gathering.
    """

    writes_W: Tensor
    groups: tuple[SingleGroup, ...]
    chunks: tuple[ChunkRead, ...]
    num_rows: int
    scratch_NE: Tensor


def prepare_attention(
    layout: Layout, cache: Tensor | QuantizedCache, window: int | None = None, groups: int = 1
) -> Reads | None:
    """What every layer does whose window is `window` and whose cache has the shape and dtype of `cache`. `groups` is
    the number of query heads per key/value head; here it does not matter. None: nothing can be prepared."""
    if isinstance(cache, QuantizedCache):
        return None
    _, _, num_kv_heads, block_size, head_dim = cache.shape
    heads_K = torch.arange(num_kv_heads, device=cache.device)
    half_blocks_TK = (layout.slots_T // block_size)[:, None] * num_kv_heads + heads_K
    writes_TK = half_blocks_TK * block_size + (layout.slots_T % block_size)[:, None]
    singles = _group_singles(layout, cache, window)
    chunks = tuple(_read_chunk(chunk, cache, window) for chunk in layout.chunks)
    gathers = [group.gather_N for group in singles] + [chunk.gather_N for chunk in chunks if chunk.gather_N is not None]
    widest = max(map(len, gathers), default=0)
    return Reads(
        writes_W=writes_TK.flatten(),
        groups=singles,
        chunks=chunks,
        num_rows=len(layout.single_context_B) + sum(chunk.length for chunk in layout.chunks),
        scratch_NE=torch.empty(widest, block_size * head_dim, dtype=cache.dtype, device=cache.device),
    )


def attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cache: Tensor | QuantizedCache,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    reads: Reads | None = None,
) -> Tensor:
    """Write keys and values at `slots_T`, then let every row attend to its own sequence: [T, H, D].

    Causal; with `window` only the last `window` positions count; with `softcap` scores are softcap * tanh(s / softcap).
    cache: [2, num_blocks, K, block_size, D], finite everywhere (what is masked is multiplied by zero, not skipped); the
    positions of one head are neighbours, so that a gathered context needs no transposing. A quantised cache is written
    first: what a row sees is what the cache then holds, its own key and value included.
    `reads` is `prepare_attention(layout, cache, window)`, built here when absent.
    """
    if isinstance(cache, QuantizedCache):
        options = {"scale": scale, "window": window, "softcap": softcap}
        return _attend_quantized(q_THD, k_TKD, v_TKD, cache, layout, options)
    num_kv_heads, head_dim = cache.shape[2], cache.shape[4]
    if reads is None:
        reads = cast(Reads, prepare_attention(layout, cache, window))
    for half_WD, new_TKD in zip(_tokens(cache), (k_TKD, v_TKD)):
        half_WD.index_copy_(0, reads.writes_W, new_TKD.reshape(-1, head_dim))
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    if reads.num_rows < len(q_THD):
        out_THD[reads.num_rows :] = 0
    for group in reads.groups:
        rows_BHD = q_THD[group.rows_B]
        q_BKGD = rows_BHD.view(len(rows_BHD), num_kv_heads, -1, head_dim)
        k_BKLD, v_BKLD = _gather(cache, group.gather_N, len(rows_BHD), reads.scratch_NE)
        attended = _attend(q_BKGD, k_BKLD, v_BKLD, group.mask_B11L, False, scale, softcap)
        out_THD[group.rows_B] = attended.reshape(len(rows_BHD), -1, head_dim)
    for chunk in reads.chunks:
        rows = slice(chunk.start, chunk.stop)
        if chunk.gather_N is None:
            k_KLD, v_KLD = k_TKD[rows].transpose(0, 1), v_TKD[rows].transpose(0, 1)
        else:
            k_KLD, v_KLD = (x[0] for x in _gather(cache, chunk.gather_N, 1, reads.scratch_NE))
        q_KGTD = q_THD[rows].view(chunk.stop - chunk.start, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        # Stride 0: the heads of a group share keys and values, nothing is copied.
        k_KGLD = k_KLD[:, None].expand(-1, q_KGTD.shape[1], -1, -1)
        v_KGLD = v_KLD[:, None].expand(-1, q_KGTD.shape[1], -1, -1)
        attended = _attend(q_KGTD, k_KGLD, v_KGLD, chunk.mask_TL, chunk.mask_TL is None, scale, softcap)
        out_THD[rows] = attended.permute(2, 0, 1, 3).reshape(chunk.stop - chunk.start, -1, head_dim)
    return out_THD


def causal_attention(
    q_THD: Tensor,
    k_LKD: Tensor,
    v_LKD: Tensor,
    spans: Sequence[Span],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of sequences to their own keys, [T, H, D], without a cache: what training uses. Differentiable.

    Spans follow each other and cover all rows; the queries of one are the last of its keys. `window` and `softcap` as
    in `attention`.
    """
    parts = []
    for is_whole, group in groupby(spans, lambda span: span.num_keys == span.length):
        members = list(group)
        # Those with keys before their own queries go one at a time.
        for alike in [members] if is_whole else [[span] for span in members]:
            queries = slice(alike[0].start, alike[-1].stop)
            keys = slice(alike[0].first_key, alike[-1].last_key)
            q, k, v = q_THD[queries], k_LKD[keys], v_LKD[keys]
            if is_whole:
                lengths = [span.length for span in alike]
                parts.append(_attend_whole(q, k, v, lengths, scale, window, softcap))
            else:
                parts.append(_attend_equal(q[None], k[None], v[None], scale, window, softcap)[0])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_whole(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Whole sequences one after the other; padded to one length where that costs little."""
    longest, number = max(lengths), len(lengths)
    if number * longest**2 <= PADDING * sum(length**2 for length in lengths):
        if min(lengths) == longest:
            shape = (number, longest)
            q, k, v = (t.unflatten(0, shape) for t in (q_THD, k_TKD, v_TKD))
            return _attend_equal(q, k, v, scale, window, softcap).flatten(0, 1)
        # A short sequence's padding repeats its last row: it comes after all real ones, and is dropped.
        columns = torch.arange(longest, device=q_THD.device)
        ends = torch.tensor(lengths, device=q_THD.device).cumsum(0) - 1
        starts = ends + 1 - torch.tensor(lengths, device=q_THD.device)
        rows_BL = torch.minimum(starts[:, None] + columns, ends[:, None])
        real_N = (columns <= (ends - starts)[:, None]).flatten().nonzero()[:, 0]
        q, k, v = (t.index_select(0, rows_BL.flatten()).unflatten(0, rows_BL.shape) for t in (q_THD, k_TKD, v_TKD))
        return _attend_equal(q, k, v, scale, window, softcap).flatten(0, 1).index_select(0, real_N)
    cut = [t.split(list(lengths)) for t in (q_THD, k_TKD, v_TKD)]
    each = zip(*cut, strict=True)
    return torch.cat([_attend_equal(q[None], k[None], v[None], scale, window, softcap)[0] for q, k, v in each])


def _attend_equal(
    q_BTHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """The last T of L positions of B sequences, [B, T, H, D]."""
    batch, length, num_heads, head_dim = q_BTHD.shape
    num_keys, num_kv_heads = k_BLKD.shape[1:3]
    groups = num_heads // num_kv_heads
    q = q_BTHD.view(batch, length, num_kv_heads, groups, head_dim).permute(0, 2, 3, 1, 4).flatten(0, 1)
    k = k_BLKD.transpose(1, 2).flatten(0, 1)[:, None].expand(-1, groups, -1, -1)
    v = v_BLKD.transpose(1, 2).flatten(0, 1)[:, None].expand(-1, groups, -1, -1)
    is_plain = length == num_keys and (window is None or num_keys <= window)
    mask = None
    if not is_plain:
        keys_L = torch.arange(num_keys, device=q.device)
        queries_T = num_keys - length + torch.arange(length, device=q.device)
        allowed_TL = keys_L <= queries_T[:, None]
        if window is not None:
            allowed_TL &= keys_L > queries_T[:, None] - window
        mask = _additive(allowed_TL, q.dtype)
    attended = _attend(q, k, v, mask, is_plain, scale, softcap)
    heads_first = attended.view(batch, num_kv_heads, groups, length, head_dim)
    return heads_first.permute(0, 3, 1, 2, 4).flatten(2, 3)


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
    _, _, num_kv_heads, block_size, _ = cache.shape
    for row, slot in enumerate(layout.slots_T.tolist()):
        cache[0, slot // block_size, :, slot % block_size] = k_TKD[row]
        cache[1, slot // block_size, :, slot % block_size] = v_TKD[row]
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
            keys_LD = torch.stack([cache[0, b, kv_head, o] for b, o in slots]).float()
            values_LD = torch.stack([cache[1, b, kv_head, o] for b, o in slots]).float()
            scores_L = keys_LD @ q_THD[row, head].float() * scale
            if softcap is not None:
                scores_L = softcap * torch.tanh(scores_L / softcap)
            out_THD[row, head] = (torch.softmax(scores_L, 0) @ values_LD).to(q_THD.dtype)
    return out_THD


def _tokens(cache: Tensor) -> Tensor:
    """The cache as rows of one head's features at one position: [2, num_blocks * K * block_size, D]."""
    return cache.view(2, -1, cache.shape[-1])


def _gather(cache: Tensor, gather_N: Tensor, num_rows: int, scratch_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of whole blocks, each [B, K, L, D], in `scratch_NE`."""
    _, _, num_kv_heads, block_size, head_dim = cache.shape
    halves_NE = cache.view(-1, block_size * head_dim)
    gathered_NE = torch.index_select(halves_NE, 0, gather_N, out=scratch_NE[: len(gather_N)])
    k, v = gathered_NE.view(2, num_rows, num_kv_heads, -1, head_dim)
    return k, v


def _gather_indices(blocks_BN: Tensor, cache: Tensor) -> Tensor:
    """Rows of the cache, seen as [2 * num_blocks * K, block_size * D], in the order [2, B, K, N]."""
    _, num_blocks, num_kv_heads, _, _ = cache.shape
    heads_K1 = torch.arange(num_kv_heads, device=blocks_BN.device)[:, None]
    keys = (blocks_BN[:, None] * num_kv_heads + heads_K1).flatten()
    return torch.cat((keys, keys + num_blocks * num_kv_heads))


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


def _group_singles(layout: Layout, cache: Tensor, window: int | None) -> tuple[SingleGroup, ...]:
    """Singles by the number of blocks they read, rounded up in steps of about a quarter.

    The rounded number depends on the row's own context alone: one long row costs the short ones nothing, and a row
    is computed the same way whoever its batch mates are.
    """
    block_size, device = cache.shape[3], cache.device
    contexts = layout.single_context_B.tolist()
    members: dict[int, list[int]] = {}
    for row, context in enumerate(contexts):
        members.setdefault(_round_up(context, block_size, window), []).append(row)
    groups = []
    for num_blocks, alike in sorted(members.items()):
        at_once = max(1, SCRATCH_BYTES // (2 * num_blocks * cache[0, 0].nbytes))
        for rows in (alike[i : i + at_once] for i in range(0, len(alike), at_once)):
            neighbours = rows[-1] - rows[0] == len(rows) - 1
            rows_B = slice(rows[0], rows[-1] + 1) if neighbours else torch.tensor(rows, device=device)
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
            mask_B11L = _additive(allowed_BL, cache.dtype)[:, None, None]
            groups.append(SingleGroup(rows_B, _gather_indices(blocks_BN, cache), mask_B11L))
    return tuple(groups)


def _round_up(context: int, block_size: int, window: int | None) -> int:
    first = 0 if window is None else max(0, context - window) // block_size
    num_blocks = -(-context // block_size) - first
    step = max(1, 1 << (max(num_blocks - 1, 1).bit_length() - 3)) if num_blocks > 4 else 1
    return -(-num_blocks // step) * step


def _read_chunk(chunk: Chunk, cache: Tensor, window: int | None) -> ChunkRead:
    block_size, device = cache.shape[3], cache.device
    first_query = chunk.context - chunk.length
    whole = first_query == 0
    if whole and (window is None or chunk.context <= window):
        return ChunkRead(chunk.start, chunk.stop, None, None)
    first_block = 0 if window is None or whole else max(0, first_query - window + 1) // block_size
    gather_N = None if whole else _gather_indices(chunk.blocks_N[None, first_block:], cache)
    num_keys = chunk.context if whole else (len(chunk.blocks_N) - first_block) * block_size
    keys_L = first_block * block_size + torch.arange(num_keys, device=device)
    queries_T = first_query + torch.arange(chunk.length, device=device)
    allowed_TL = keys_L <= queries_T[:, None]
    if window is not None:
        allowed_TL &= keys_L > queries_T[:, None] - window
    return ChunkRead(chunk.start, chunk.stop, gather_N, _additive(allowed_TL, cache.dtype))


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))
