"""Laying out a plan: against a plain loop over its tokens, and with what the step before left."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.batch import Batch, Tables, build
from tandem.work import Segment, StepPlan

CPU = torch.device("cpu")
MIN_ROWS = 4


@dataclass
class Row:
    tokens: list[int]
    blocks: list[int]
    version: int


def check(batch: Batch, plan: StepPlan, rows: dict[int, Row], size: int, min_rows: int = MIN_ROWS) -> None:
    """Every token by itself, straight from the definition of a layout."""
    ids, positions, slots, samples, versions, fresh = [], [], [], [], [], []
    for s in plan.segments:
        row = rows[s.row]
        assert batch.starts[s.row] == len(ids)
        for position in range(s.start, s.stop):
            ids.append(row.tokens[position])
            positions.append(position)
            slots.append(row.blocks[position // size] * size + position % size)
            versions.append(row.version)
        if s.samples:
            samples.append(len(ids) - 1)
        if s.stop % size and s.stop // size * size >= s.start:
            fresh.append(row.blocks[s.stop // size])
    padding = [0] * max(0, min_rows - len(ids))
    assert batch.tokens_T.tolist() == ids + padding
    assert batch.layout.positions_T.tolist() == positions + padding
    assert batch.layout.slots_T.tolist() == slots + padding
    assert batch.sample_rows_M.tolist() == samples
    assert batch.sampling == tuple(s for s in plan.segments if s.samples)
    assert batch.fresh_blocks_N.tolist() == fresh
    assert [v for start, stop, v in batch.ranges for _ in range(start, stop)] == versions
    assert all(a[2] != b[2] for a, b in zip(batch.ranges, batch.ranges[1:]))
    singles = [s for s in plan.segments if s.length == 1]
    widest = max((-(-s.stop // size) for s in singles), default=0)
    tables = [(rows[s.row].blocks[: -(-s.stop // size)] + [0] * widest)[:widest] for s in singles]
    assert batch.layout.single_blocks_BN.tolist() == tables
    assert batch.layout.single_blocks_BN.is_contiguous()
    assert batch.layout.single_context_B.tolist() == [s.stop for s in singles]
    chunks = [s for s in plan.segments if s.length > 1]
    for chunk, s in zip(batch.layout.chunks, chunks, strict=True):
        assert (chunk.start, chunk.stop) == (batch.starts[s.row], batch.starts[s.row] + s.length)
        assert chunk.context == s.stop and chunk.blocks_N.tolist() == rows[s.row].blocks[: -(-s.stop // size)]


def grow(row: Row, length: int, size: int, fresh: list[int]) -> None:
    while len(row.blocks) * size < length:
        row.blocks.append(fresh.pop())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 16]), st.integers(1, 30))
def test_any_traffic_is_laid_out_as_defined(seed: int, size: int, num_steps: int) -> None:
    """Rows come, go, are preempted, wait a step, take other rows' blocks; one `Tables` sees it all."""
    rng = random.Random(seed)
    tables, rows, computed = Tables(), dict[int, Row](), dict[int, int]()
    fresh = list(range(4000, 0, -1))
    for _ in range(num_steps):
        for _ in range(rng.choice([0, 0, 1, 3])):
            row_id = len(computed)
            rows[row_id] = Row([rng.randrange(100) for _ in range(rng.randint(1, 40))], [], rng.choice([0, 0, 1, 2]))
            computed[row_id] = 0
        if rows and rng.random() < 0.2:
            gone = rng.choice(list(rows))
            fresh += rows[gone].blocks
            if rng.random() < 0.5:
                del rows[gone]
            else:  # preempted: the same row with other blocks
                rows[gone].blocks, computed[gone] = [], 0
        segments = []
        for row_id, row in rows.items():
            if rng.random() < 0.1:
                continue
            left = len(row.tokens) - computed[row_id]
            length = left if left == 1 else rng.randint(1, left)
            segments.append(Segment(row_id, computed[row_id], length, length == left))
        segments.sort(key=lambda s: s.length > 1)
        for s in segments:
            grow(rows[s.row], s.stop, size, fresh)
        plan = StepPlan(tuple(segments))
        check(build(plan, rows, size, CPU, MIN_ROWS, tables), plan, rows, size)
        check(build(plan, rows, size, CPU, 1), plan, rows, size, 1)
        for s in segments:
            computed[s.row] = s.stop
            if s.samples:
                rows[s.row].tokens.append(rng.randrange(100))


def test_a_step_does_not_change_the_layout_of_the_one_before() -> None:
    rows = {i: Row(list(range(9)), [3 * i + 1, 3 * i + 2, 3 * i + 3], 0) for i in range(3)}
    tables = Tables()
    plans = [StepPlan(tuple(Segment(i, start, 1, True) for i in range(3))) for start in range(9)]
    batches = [build(plan, rows, 3, CPU, MIN_ROWS, tables) for plan in plans]
    for plan, batch in zip(plans, batches, strict=True):
        check(batch, plan, rows, 3)


def test_single_tokens_come_first() -> None:
    rows = {0: Row([1, 2], [1], 0), 1: Row([3], [2], 0)}
    with pytest.raises(AssertionError, match="come first"):
        build(StepPlan((Segment(0, 0, 2, True), Segment(1, 0, 1, True))), rows, 4, CPU, MIN_ROWS)
