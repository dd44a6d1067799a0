"""StepPlan -> the index tensors of one forward: token ids, positions, cache slots, block tables. Pure.

Shape letters: T flat tokens (padded), B rows of one query token, N blocks, M sampled rows, R rank rows of the adapters.
The flat batch holds the plan's segments in order, rows of one token first, then padding up to MIN_ROWS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tandem.model.decoder import MIN_ROWS
from tandem.ops.attention import Chunk, Layout
from tandem.work import Segment, StepPlan


@dataclass(frozen=True, slots=True)
class Batch:
    """What `worker` needs for one forward.

    tokens_T: input ids. layout: where keys and values go and come from. sample_rows_M: flat rows whose logits are
    wanted, one per segment of `sampling`. ranges: (start, stop, adapter version) of flat rows. starts: each row's first
    flat row. fresh_blocks_N: blocks begun but not filled by this step.
    """

    tokens_T: Tensor
    layout: Layout
    sampling: tuple[Segment, ...]
    sample_rows_M: Tensor
    ranges: tuple[tuple[int, int, int], ...]
    starts: dict[int, int]
    fresh_blocks_N: Tensor


def build(
    plan: StepPlan,
    tokens: Mapping[int, Sequence[int]],
    tables: Mapping[int, Sequence[int]],
    versions: Mapping[int, int],
    block_size: int,
    device: torch.device,
) -> Batch:
    """Lay out `plan`: `tokens[row]` are the row's known ids, `tables[row]` its blocks, `versions[row]` its adapter."""
    num_tokens = plan.num_tokens
    padded = max(num_tokens, MIN_ROWS)
    ids, positions, slots = (np.zeros(padded, np.int64) for _ in range(3))
    chunks: list[Chunk] = []
    singles: list[Segment] = []
    sample_rows: list[int] = []
    sampling: list[Segment] = []
    ranges: list[tuple[int, int, int]] = []
    starts: dict[int, int] = {}
    fresh: list[int] = []
    at = 0
    for segment in plan.segments:
        row, end = segment.row, at + segment.length
        table = tables[row]
        if segment.length == 1:
            assert not chunks, "segments of one token come first"
            ids[at] = tokens[row][segment.start]
            positions[at] = segment.start
            slots[at] = table[segment.start // block_size] * block_size + segment.start % block_size
            singles.append(segment)
        else:
            span = np.arange(segment.start, segment.stop)
            ids[at:end] = tokens[row][segment.start : segment.stop]
            positions[at:end] = span
            slots[at:end] = np.asarray(table)[span // block_size] * block_size + span % block_size
            blocks = table[: -(-segment.stop // block_size)]
            chunks.append(Chunk(at, end, segment.stop, torch.tensor(blocks, dtype=torch.int64, device=device)))
        if segment.samples:
            sampling.append(segment)
            sample_rows.append(end - 1)
        if ranges and ranges[-1][2] == versions[row]:
            ranges[-1] = (ranges[-1][0], end, versions[row])
        else:
            ranges.append((at, end, versions[row]))
        begun = segment.stop // block_size
        if segment.stop % block_size and begun * block_size >= segment.start:
            fresh.append(table[begun])
        starts[row] = at
        at = end
    blocks_BN, context_B = _single_tables(singles, tables, block_size)
    layout = Layout(
        positions_T=_tensor(positions, device),
        slots_T=_tensor(slots, device),
        single_blocks_BN=_tensor(blocks_BN, device),
        single_context_B=_tensor(context_B, device),
        chunks=tuple(chunks),
    )
    return Batch(
        tokens_T=_tensor(ids, device),
        layout=layout,
        sampling=tuple(sampling),
        sample_rows_M=torch.tensor(sample_rows, dtype=torch.int64, device=device),
        ranges=tuple(ranges),
        starts=starts,
        fresh_blocks_N=torch.tensor(fresh, dtype=torch.int64, device=device),
    )


def _single_tables(
    singles: Sequence[Segment], tables: Mapping[int, Sequence[int]], block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    context_B = np.array([s.stop for s in singles], np.int64)
    widest = -(-int(context_B.max(initial=0)) // block_size)
    blocks_BN = np.zeros((len(singles), widest), np.int64)
    for i, segment in enumerate(singles):
        used = -(-segment.stop // block_size)
        blocks_BN[i, :used] = tables[segment.row][:used]
    return blocks_BN, context_B


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
