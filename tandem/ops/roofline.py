"""What this machine could do at best: read bandwidth and matmul rate, measured. Knows no model and no workload."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tandem import ops


def read_bandwidth(num_bytes: int, device: torch.device) -> float:
    """Bytes per second at which `num_bytes` (the size matters: caches) can be read with the threads torch uses."""
    count = max(num_bytes // 4, 2**18)
    buffer = torch.ones(count, device=device)
    vector = torch.ones(1024, device=device)
    matrix = buffer[: count // 1024 * 1024].view(-1, 1024)
    return buffer.nbytes / min(_best(buffer.sum, device), _best(lambda: matrix @ vector, device))


def matmul_rate(dtype: torch.dtype, device: torch.device, tokens: int = 512) -> float:
    """Floating-point operations per second of the linear layer this machine runs, at `tokens` rows."""
    kernels = ops.load(device.type, dtype)
    size_in, size_out = 2048, 8192
    weight = kernels.pack(torch.randn(size_out, size_in, device=device).to(dtype))
    x_TI = torch.randn(tokens, size_in, device=device).to(dtype)
    return 2 * tokens * size_in * size_out / _best(lambda: kernels.linear(x_TI, weight), device)


def _best(work: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """Seconds of the fastest of some rounds: what the machine can do, not what its neighbours let it."""
    seconds = []
    with torch.inference_mode():
        for _ in range(rounds):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return min(seconds)
