"""The one file that allocates long-lived device tensors: the KV cache and the stacked pool of active adapters.

Who owns which block or rank row is decided elsewhere (`blocks`, `adapters`, integers only); here are only the bytes.

Shape letters: L layers, N blocks, S slots a block, K kv heads, D head_dim, C capacity in rank rows, I in, O out.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from tandem.ops import kv_cache

# A cache beyond this on a CPU is rarely of use and is memory the user has other plans for.
DEFAULT_CPU_KV_BYTES = 4 * 2**30
FREE_SHARE = 0.5


def block_bytes(
    num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, bits: int = 0
) -> int:
    """Bytes of one KV block over all layers, keys and values; `bits` of a quantised cache are 8 or 4."""
    if bits:
        return num_layers * num_kv_heads * kv_cache.head_bytes(bits, block_size, head_dim)
    return num_layers * 2 * block_size * num_kv_heads * head_dim * dtype.itemsize


def available_bytes(device: torch.device, gpu_memory_utilization: float) -> int:
    """Bytes that may still be allocated, control groups counted."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, free - int((1 - gpu_memory_utilization) * total))
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return max(0, free)


def default_kv_bytes(device: torch.device, gpu_memory_utilization: float) -> int:
    """How much the KV cache gets when nobody says: all of the GPU's share, or half of a CPU's free memory, capped."""
    free = available_bytes(device, gpu_memory_utilization)
    return free if device.type == "cuda" else min(int(free * FREE_SHARE), DEFAULT_CPU_KV_BYTES)


def allocate_kv(
    num_layers: int,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    bits: int = 0,
) -> Tensor:
    """The KV cache as one zeroed tensor [L, 2, N, K, S, D]; zeros, because masked slots are still multiplied by 0.
    A quantised one is uint8, [L, 1, N, K, bytes]."""
    shape: tuple[int, ...] = (num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim)
    if bits:
        shape = (num_layers, 1, num_blocks, num_kv_heads, kv_cache.head_bytes(bits, block_size, head_dim))
        dtype = torch.uint8
    if device.type == "cpu":
        return _huge_pages(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


def _huge_pages(num_bytes: int) -> Tensor:
    """Zeroed bytes in huge pages where the system grants them: blocks lie scattered, and a virtual machine takes
    longer to look up a small page than to read the block in it."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes)


def return_free_memory() -> None:
    """Give what the allocator holds and nobody uses back to the system, where the C library can (glibc)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class AdapterPool:
    """The factors of the adapters in use, stacked by rank row: per layer and target a_CI and b_CO.

    One matmul against the first rows of a_CI serves every adapter of a batch; a mask keeps them apart.
    Rows that nobody wrote are zero. `generation` changes when stacks move to other memory.
    """

    def __init__(
        self, num_layers: int, targets: Mapping[str, tuple[int, int]], dtype: torch.dtype, device: torch.device
    ) -> None:
        """`targets` maps a LoRA module name to (in_features, out_features)."""
        self.targets = dict(targets)
        self.dtype = dtype
        self.device = device
        self.capacity = 0
        self.generation = 0
        self._layers: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in range(num_layers)]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes + b.nbytes for layer in self._layers for a, b in layer.values())

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` rank rows; what is written stays."""
        if capacity <= self.capacity:
            return
        self.capacity = capacity
        self.generation += 1
        for layer in self._layers:
            for name, (a, b) in layer.items():
                layer[name] = (self._grown(a), self._grown(b))

    def _grown(self, old: Tensor) -> Tensor:
        new = self._empty(old.shape[1])
        new[: old.shape[0]] = old
        return new

    def _empty(self, width: int) -> Tensor:
        return torch.zeros(self.capacity, width, dtype=self.dtype, device=self.device)

    def write(self, low: int, high: int, factors: Sequence[Mapping[str, tuple[Tensor, Tensor]]]) -> None:
        """Put one adapter into rows low..high: per layer, by target, (a_RI, b_RO) with R <= high - low."""
        for layer, own in zip(self._layers, factors, strict=True):
            for name in own.keys() - layer.keys():
                in_features, out_features = self.targets[name]
                layer[name] = (self._empty(in_features), self._empty(out_features))
                self.generation += 1
            for name, stacks in layer.items():
                for stack in stacks:
                    stack[low:high] = 0
                for stack, factor in zip(stacks, own.get(name, ()), strict=False):
                    stack[low : low + factor.shape[0]] = factor

    def view(self, used_rows: int) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """The first `used_rows` rows of every stack."""
        return [{name: (a[:used_rows], b[:used_rows]) for name, (a, b) in layer.items()} for layer in self._layers]
