"""StepPlan -> the index tensors of one forward: token ids, positions, cache slots, block tables. Pure, but for the
block tables of the last step (`Tables`), which are most of this one's.

Shape letters: T flat tokens (padded), B rows of one query token, N blocks, M sampled rows, R rank rows of the adapters.
The flat batch holds the plan's segments in order, rows of one token first, then padding up to the least number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_, lt
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

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


class RowLike(Protocol):
    """A row's known ids, its blocks and its adapter."""

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def blocks(self) -> Sequence[int]: ...

    @property
    def version(self) -> int: ...


class Tables:
    """The block tables of the rows of one token, as one array. A row that runs has the same list of blocks from step to
    step, and that list only grows: what was copied of it before is right, and only what is new need be copied."""

    def __init__(self) -> None:
        self._lists: list[Sequence[int]] = []
        self._used: list[int] = []
        self._blocks_BN = np.zeros((0, 0), np.int64)

    def update(self, lists: list[Sequence[int]], used: list[int]) -> np.ndarray:
        """[B, N]: the first `used` blocks of each list, then zeros; N is the largest of `used`. Nobody may change it;
        it stays as it is."""
        is_same = len(lists) == len(self._lists) and all(map(is_, lists, self._lists))
        if is_same and used == self._used:
            return self._blocks_BN
        num_rows, widest = len(lists), max(used, default=0)
        before, kept = self._used, self._blocks_BN
        if not is_same or any(map(lt, used, before)):
            before, kept = [0] * num_rows, np.zeros((num_rows, 0), np.int64)
        if widest > kept.shape[1]:
            self._blocks_BN = np.zeros((num_rows, widest), np.int64)
            self._blocks_BN[:, : kept.shape[1]] = kept
        else:
            self._blocks_BN = kept.copy()
        for i, (low, high) in enumerate(zip(before, used)):
            if high > low:
                self._blocks_BN[i, low:high] = lists[i][low:high]
        self._lists, self._used = lists, used
        return self._blocks_BN


def build(
    plan: StepPlan,
    rows: Mapping[int, RowLike],
    block_size: int,
    device: torch.device,
    min_rows: int,
    tables: Tables | None = None,
) -> Batch:
    """Lay out `plan`, whose rows are `rows`, with at least `min_rows` tokens. `tables` is what the step before was laid
    out with.

    Everything but block tables goes into one list first. After a forward pass no code is in the processor's caches:
    the number of different operations counts, not how fast each would be in a loop.
    """
    segments = plan.segments
    inputs = [rows[s.row] for s in segments]
    num_singles = len([s for s in segments if s.length == 1])
    positions = [s.start for s in segments[:num_singles]]
    blocks_BN = (tables or Tables()).update(
        [row.blocks for row in inputs[:num_singles]], [p // block_size + 1 for p in positions]
    )
    ids = [row.tokens[p] for row, p in zip(inputs, positions)]
    slots = [row.blocks[p // block_size] * block_size + p % block_size for row, p in zip(inputs, positions)]
    contexts = [p + 1 for p in positions]
    # A block of one token is full at once.
    fresh = [slot // block_size for slot in slots if slot % block_size == 0] if block_size > 1 else []
    ends = list(range(1, num_singles + 1))
    chunks: list[Chunk] = []
    for segment, row in zip(segments[num_singles:], inputs[num_singles:]):
        assert segment.length != 1, "segments of one token come first"
        start, stop, blocks = segment.start, segment.stop, row.blocks
        ids += row.tokens[start:stop]
        positions += range(start, stop)
        read = blocks[: -(-stop // block_size)]
        for i in range(start // block_size, len(read)):
            shift = (read[i] - i) * block_size
            slots += range(max(start, i * block_size) + shift, min(stop, (i + 1) * block_size) + shift)
        read_N = torch.tensor(read, dtype=torch.int64, device=device)
        chunks.append(Chunk(len(ids) - segment.length, len(ids), stop, read_N))
        begun = stop // block_size
        if stop % block_size and begun * block_size >= start:
            fresh.append(blocks[begun])
        ends.append(len(ids))
    sample_rows = [end - 1 for s, end in zip(segments, ends) if s.samples]
    none = [0] * (min_rows - len(ids))
    flat = [*ids, *none, *positions, *none, *slots, *none, *contexts, *sample_rows, *fresh]
    sizes = (*[len(ids) + len(none)] * 3, num_singles, len(sample_rows), len(fresh))
    ids_T, positions_T, slots_T, context_B, sample_rows_M, fresh_N = torch.tensor(
        flat, dtype=torch.int64, device=device
    ).split(sizes)
    return Batch(
        tokens_T=ids_T,
        layout=Layout(positions_T, slots_T, torch.from_numpy(blocks_BN).to(device), context_B, tuple(chunks)),
        sampling=tuple([s for s in segments if s.samples]),
        sample_rows_M=sample_rows_M,
        ranges=_ranges([row.version for row in inputs], ends),
        starts=dict(zip([s.row for s in segments], [0, *ends])),
        fresh_blocks_N=fresh_N,
    )


def _ranges(versions: list[int], ends: list[int]) -> tuple[tuple[int, int, int], ...]:
    """(start, stop, version) of neighbours with one version."""
    found: list[tuple[int, int, int]] = []
    start = 0
    for i, (version, end) in enumerate(zip(versions, ends), 1):
        if i == len(ends) or versions[i] != version:
            found.append((start, end, version))
            start = end
    return tuple(found)
