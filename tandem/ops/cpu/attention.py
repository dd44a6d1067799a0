"""Attention by the compiled kernels: the contracts of `ops/attention.py`, for a KV cache and for rows in training.

Here: plans of the work, and pointers for the kernels (`csrc/attention*.cpp`). What an argument means stands in
`ops/attention.py`. Every row's result is bitwise the same whatever its batch mates and the number of threads.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tandem.ops import attention as reference
from tandem.ops.attention import Layout, Reads, Span
from tandem.ops.cpu.library import Library
from tandem.ops.kv_cache import QuantizedCache

log = logging.getLogger("tandem.ops")
MAX_HEAD_DIM = 256
PLAN_WORDS = 1 << 16  # grows when a plan needs more


@dataclass(frozen=True, slots=True)
class Plan:
    """Who reads what, for every layer with the same window. `numbers` is the kernels' own; it holds addresses of the
    layout's tables, which `layout` keeps alive."""

    numbers: Tensor
    num_rows: int
    num_partials: int
    layout: Layout


class CpuAttention:
    """The attention kernels of one library, with the scratch memory that all layers and steps share."""

    def __init__(self, library: Library) -> None:
        self._plan = library.bind("tandem_attention_plan", "pllppllllplp")
        self._plan_rows = library.bind("tandem_attention_plan_rows", "plllplp")
        self._cache = library.bind("tandem_attention_cache", "plplplplllplpppplllffl")
        self._attend_rows = library.bind("tandem_attention_rows", "plplplppplllffl")
        self._backward = library.bind("tandem_attention_backward", "plplplppppppplllllffl")
        self._needed = torch.zeros(2, dtype=torch.int64)
        self._words = PLAN_WORDS
        self._partials = torch.empty(0)

    def prepare_attention(
        self, layout: Layout, cache: Tensor | QuantizedCache, window: int | None = None, groups: int = 1
    ) -> Plan | Reads | None:
        """As `ops.attention.prepare_attention`; rows whose tables share blocks are found here."""
        _, num_kv_heads, block_size, head_dim = _shape(cache)
        if head_dim > MAX_HEAD_DIM:
            _leave_to_torch(head_dim)
            return reference.prepare_attention(layout, cache, window, groups)
        tables_BN = layout.single_blocks_BN
        chunks = torch.tensor(
            [(c.start, c.stop, c.context, c.blocks_N.data_ptr()) for c in layout.chunks], dtype=torch.int64
        )
        numbers = torch.empty(self._words, dtype=torch.int64)
        self._plan(
            tables_BN.data_ptr(), tables_BN.shape[0], tables_BN.shape[1], layout.single_context_B.data_ptr(),
            chunks.data_ptr(), len(chunks), block_size, window or 0, groups,
            numbers.data_ptr(), len(numbers), self._needed.data_ptr(),
        )  # fmt: skip
        words, num_partials = self._needed.tolist()
        if words > self._words:
            self._words = 2 * words
            return self.prepare_attention(layout, cache, window, groups)
        room = num_partials * num_kv_heads * groups * (head_dim + 2)
        if room > self._partials.numel():
            self._partials = torch.empty(room + room // 4)
        num_rows = tables_BN.shape[0] + sum(chunk.length for chunk in layout.chunks)
        return Plan(numbers, num_rows, num_partials, layout)

    def attention(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        cache: Tensor | QuantizedCache,
        layout: Layout,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        reads: Plan | Reads | None = None,
    ) -> Tensor:
        """As `ops.attention.attention`; only what a row sees need be finite."""
        num_blocks, num_kv_heads, block_size, head_dim = _shape(cache)
        num_heads = q_THD.shape[1]
        if reads is None:
            reads = self.prepare_attention(layout, cache, window, num_heads // num_kv_heads)
        if not isinstance(reads, Plan):
            return reference.attention(
                q_THD, k_TKD, v_TKD, cache, layout, scale=scale, window=window, softcap=softcap, reads=reads
            )
        q_THD, k_TKD, v_TKD = _rows(q_THD), _rows(k_TKD), _rows(v_TKD)
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype)
        if reads.num_rows < len(q_THD):
            out_THD[reads.num_rows :] = 0
        memory, bits = (cache.bytes_NKB, cache.bits) if isinstance(cache, QuantizedCache) else (cache, 0)
        self._cache(
            q_THD.data_ptr(), q_THD.stride(0), k_TKD.data_ptr(), k_TKD.stride(0), v_TKD.data_ptr(), v_TKD.stride(0),
            memory.data_ptr(), num_blocks, block_size, bits, layout.slots_T.data_ptr(), reads.num_rows,
            reads.numbers.data_ptr(), self._partials.data_ptr(), out_THD.data_ptr(), None,
            num_heads, num_kv_heads, head_dim, scale, softcap or 0.0, q_THD.dtype == torch.bfloat16,
        )  # fmt: skip
        return out_THD

    def causal_attention(
        self,
        q_THD: Tensor,
        k_LKD: Tensor,
        v_LKD: Tensor,
        spans: Sequence[Span],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """As `ops.attention.causal_attention`; the backward computes the scores again."""
        if q_THD.shape[2] > MAX_HEAD_DIM:
            _leave_to_torch(q_THD.shape[2])
            return reference.causal_attention(
                q_THD, k_LKD, v_LKD, spans, scale=scale, window=window, softcap=softcap
            )
        options = _Options(torch.tensor(spans, dtype=torch.int64), scale, window or 0, softcap or 0.0)
        if torch.is_grad_enabled() and (q_THD.requires_grad or k_LKD.requires_grad or v_LKD.requires_grad):
            return _CausalAttention.apply(q_THD, k_LKD, v_LKD, self, options)
        return self.forward_rows(q_THD, k_LKD, v_LKD, options, None)

    def forward_rows(
        self, q_THD: Tensor, k_LKD: Tensor, v_LKD: Tensor, options: _Options, lse_TH: Tensor | None
    ) -> Tensor:
        """Attention of plain rows; the log-sum-exp of the scores goes to `lse_TH`."""
        q_THD, k_LKD, v_LKD = _rows(q_THD), _rows(k_LKD), _rows(v_LKD)
        num_heads, num_kv_heads, head_dim = q_THD.shape[1], k_LKD.shape[1], q_THD.shape[2]
        numbers = self._plan_of_rows(options, num_heads // num_kv_heads)
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype)
        self._attend_rows(
            q_THD.data_ptr(), q_THD.stride(0), k_LKD.data_ptr(), k_LKD.stride(0), v_LKD.data_ptr(), v_LKD.stride(0),
            numbers.data_ptr(), out_THD.data_ptr(), None if lse_TH is None else lse_TH.data_ptr(),
            num_heads, num_kv_heads, head_dim, options.scale, options.softcap, q_THD.dtype == torch.bfloat16,
        )  # fmt: skip
        return out_THD

    def _plan_of_rows(self, options: _Options, groups: int) -> Tensor:
        numbers = torch.empty(self._words, dtype=torch.int64)
        self._plan_rows(
            options.spans.data_ptr(), len(options.spans), options.window, groups,
            numbers.data_ptr(), len(numbers), self._needed.data_ptr(),
        )  # fmt: skip
        if (words := int(self._needed[0])) > self._words:
            self._words = 2 * words
            return self._plan_of_rows(options, groups)
        return numbers

    def backward_rows(
        self,
        q_THD: Tensor,
        k_LKD: Tensor,
        v_LKD: Tensor,
        out_THD: Tensor,
        lse_TH: Tensor,
        grad_THD: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values."""
        q_THD, k_LKD, v_LKD, grad_THD = _rows(q_THD), _rows(k_LKD), _rows(v_LKD), grad_THD.contiguous()
        num_heads, num_kv_heads, head_dim = q_THD.shape[1], k_LKD.shape[1], q_THD.shape[2]
        grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q_THD, k_LKD, v_LKD))
        self._backward(
            q_THD.data_ptr(), q_THD.stride(0), k_LKD.data_ptr(), k_LKD.stride(0), v_LKD.data_ptr(), v_LKD.stride(0),
            out_THD.data_ptr(), lse_TH.data_ptr(), grad_THD.data_ptr(), grad_q.data_ptr(), grad_k.data_ptr(),
            grad_v.data_ptr(), options.spans.data_ptr(), len(options.spans), num_heads, num_kv_heads, head_dim,
            options.window, options.scale, options.softcap, q_THD.dtype == torch.bfloat16,
        )  # fmt: skip
        return grad_q, grad_k, grad_v


@dataclass(frozen=True, slots=True)
class _Options:
    """Of one call: spans (int64, 4 columns), and what 0 means none of."""

    spans: Tensor
    scale: float
    window: int
    softcap: float


class _CausalAttention(torch.autograd.Function):
    """Keeps inputs, output and the log-sum-exp; no scores."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_LKD: Tensor, v_LKD: Tensor, kernels: CpuAttention, options: _Options
    ) -> Tensor:
        lse_TH = torch.empty(q_THD.shape[:2])
        out_THD = kernels.forward_rows(q_THD, k_LKD, v_LKD, options, lse_TH)
        ctx.save_for_backward(q_THD, k_LKD, v_LKD, out_THD, lse_TH)
        ctx.kernels, ctx.options = kernels, options
        return out_THD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.kernels.backward_rows(*ctx.saved_tensors, gradients[0], ctx.options), None, None


def _shape(cache: Tensor | QuantizedCache) -> tuple[int, int, int, int]:
    """Blocks, kv heads, slots of a block, head_dim."""
    if isinstance(cache, QuantizedCache):
        num_blocks, num_kv_heads, _ = cache.bytes_NKB.shape
        return num_blocks, num_kv_heads, cache.block_size, cache.head_dim
    _, num_blocks, num_kv_heads, block_size, head_dim = cache.shape
    return num_blocks, num_kv_heads, block_size, head_dim


def _rows(x_THD: Tensor) -> Tensor:
    """Heads beside each other, as the kernels want them."""
    return x_THD if x_THD.stride(2) == 1 and x_THD.stride(1) == x_THD.shape[2] else x_THD.contiguous()


@functools.cache
def _leave_to_torch(head_dim: int) -> None:
    log.warning("attention: head_dim %d is beyond the compiled kernels' %d, torch does it", head_dim, MAX_HEAD_DIM)
