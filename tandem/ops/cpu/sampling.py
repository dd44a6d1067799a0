"""The compiled way from logits to tokens, with the contracts of `ops/sampling.py`: one or two passes over the logits as
the head leaves them, no copy in float32, and the same token whatever the number of rows and threads.

Shape letters: M rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.ops.cpu.library import Library


class Sampling:
    """The functions of `ops.sampling` on one library."""

    def __init__(self, library: Library) -> None:
        names = {torch.float32: "f32", torch.bfloat16: "bf16"}
        self._argmax = {dtype: library.bind(f"tandem_argmax_{name}", "pplll") for dtype, name in names.items()}
        self._draw = {dtype: library.bind(f"tandem_draw_{name}", "pppplll") for dtype, name in names.items()}

        self._draw_filtered = {
            dtype: library.bind(f"tandem_draw_filtered_{name}", "pppppp" + "plll") for dtype, name in names.items()
        }

    def argmax(self, logits_MV: Tensor) -> Tensor:
        logits_MV = _dense(logits_MV)
        rows, vocab = logits_MV.shape
        tokens_M = torch.empty(rows, dtype=torch.int64)
        self._argmax[logits_MV.dtype](logits_MV.data_ptr(), tokens_M.data_ptr(), rows, logits_MV.stride(0), vocab)
        return tokens_M

    def draw(self, logits_MV: Tensor, temperature_M: Tensor, u_M: Tensor) -> Tensor:
        logits_MV, temperature_M, u_M = _dense(logits_MV), temperature_M.contiguous(), u_M.contiguous()
        rows, vocab = logits_MV.shape
        _check(rows, (temperature_M, torch.float32), (u_M, torch.float64))
        tokens_M = torch.empty(rows, dtype=torch.int64)
        self._draw[logits_MV.dtype](
            logits_MV.data_ptr(), temperature_M.data_ptr(), u_M.data_ptr(), tokens_M.data_ptr(), rows,
            logits_MV.stride(0), vocab,
        )  # fmt: skip
        return tokens_M


    def draw_filtered(
        self, logits_MV: Tensor, temperature_M: Tensor, top_k_M: Tensor, top_p_M: Tensor, min_p_M: Tensor, u_M: Tensor
    ) -> Tensor:
        logits_MV = _dense(logits_MV)
        rows, vocab = logits_MV.shape
        given = [x.contiguous() for x in (temperature_M, top_p_M, min_p_M, u_M, top_k_M)]
        _check(rows, *zip(given, (*[torch.float32] * 3, torch.float64, torch.int64), strict=True))
        tokens_M = torch.empty(rows, dtype=torch.int64)
        self._draw_filtered[logits_MV.dtype](
            logits_MV.data_ptr(), *(x.data_ptr() for x in given), tokens_M.data_ptr(), rows, logits_MV.stride(0), vocab
        )
        return tokens_M


def _check(rows: int, *given: tuple[Tensor, torch.dtype]) -> None:
    for x, dtype in given:
        if x.dtype != dtype or len(x) != rows:
            raise ValueError(f"expected {rows} numbers of {dtype}, got {len(x)} of {x.dtype}")


def _dense(logits_MV: Tensor) -> Tensor:
    return logits_MV if logits_MV.stride(-1) == 1 else logits_MV.contiguous()
