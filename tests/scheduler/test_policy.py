"""The policy against tables of what it must do, and against random snapshots and cost models for what it never may."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.errors import ConfigError
from tandem.scheduler.budget import CostModel
from tandem.scheduler.policy import Limits, RunningRow, Snapshot, WaitingRow, plan
from tandem.work import Segment

FLAT = CostModel(points=((1, 1.0), (2, 1.0)), per_context_s=0, per_pair_s=0, per_sample_s=0)  # tokens cost nothing
LINEAR = CostModel(points=((1, 1.0), (2, 2.0)), per_context_s=0, per_pair_s=0, per_sample_s=0)  # a second a token


def limits(**changes) -> Limits:
    return Limits(**{"max_num_seqs": 8, "max_num_batched_tokens": 32, "block_size": 4, "cost": FLAT, **changes})


def decode(row: int, length: int = 6, **fields) -> RunningRow:
    return RunningRow(row, length, length - 1, **fields)


def lengths(plan_) -> dict[int, int]:
    return {s.row: s.length for s in plan_.segments}


def test_nothing_to_do_is_an_empty_plan():
    assert plan(Snapshot(free_blocks=5), limits()).segments == ()


def test_one_step_holds_decodes_then_chunks_then_admissions():
    running = (RunningRow(0, 10, 4), decode(1), decode(2))
    waiting = (WaitingRow(3, 9), WaitingRow(4, 5, hit_tokens=4, hit_blocks=1, idle_hit_blocks=1))
    made = plan(Snapshot(running, waiting, 20), limits())
    assert made.segments == (
        Segment(1, 5, 1, True),
        Segment(2, 5, 1, True),
        Segment(4, 4, 1, True),  # one token, so it stands with the short ones
        Segment(0, 4, 6, True),
        Segment(3, 0, 9, True),
    )
    assert made.admit == (3, 4) and made.preempt == ()
    assert made.predicted_s == FLAT.predict(made.segments)


@pytest.mark.parametrize(
    "row, expected",
    [
        (RunningRow(0, 6, 5), Segment(0, 5, 1, True)),  # decode
        (RunningRow(0, 6, 5, wants_token=False), Segment(0, 5, 1, False)),  # last token of a scored prompt
        (RunningRow(0, 6, 2), Segment(0, 2, 4, True)),  # last chunk
        (RunningRow(0, 6, 2, wants_token=False), Segment(0, 2, 4, False)),
        (RunningRow(0, 80, 2), Segment(0, 2, 32, False)),  # chunk in the middle
    ],
)
def test_a_segment_samples_only_at_the_end_of_a_row_that_wants_a_token(row, expected):
    assert plan(Snapshot((row,), (), 40), limits()).segments == (expected,)


def test_prompt_tokens_that_are_scored_cost_a_row_of_the_head_each():
    cost = CostModel(points=((1, 1.0), (2, 1.0)), per_context_s=0, per_pair_s=0, per_sample_s=1.0)
    for scores, chunk in ((False, 30), (True, 4)):  # 2 s of decode: 6 s in all, 4 s of scores
        running = (decode(0), RunningRow(1, 32, 2, scores=scores, wants_token=False))
        assert lengths(plan(Snapshot(running, (), 40), limits(cost=cost))) == {0: 1, 1: chunk}


def test_without_decodes_only_the_token_limit_holds():
    made = plan(Snapshot((), (WaitingRow(0, 20), WaitingRow(1, 20), WaitingRow(2, 20)), 40), limits(cost=LINEAR))
    assert lengths(made) == {0: 20, 1: 12} and made.admit == (0, 1)


@pytest.mark.parametrize(
    "num_decodes, prompt, ratio, chunk",
    [
        (1, 100, 3.0, 2),  # 1 s of decodes: 3 s in all, so 2 s of prompt
        (4, 100, 3.0, 8),
        (8, 100, 3.0, 16),
        (8, 10, 3.0, 10),  # the prompt is shorter than what is left
        (4, 100, 1.0, 0),  # no room: the prompt waits
        (4, 100, 1.2, 0),  # nor for a single token
        (4, 100, 1.25, 1),
        (8, 1000, 90.0, 24),  # max_num_batched_tokens is first
    ],
)
@pytest.mark.parametrize("begun", [True, False], ids=["running prompt", "waiting prompt"])
def test_a_step_with_decodes_takes_at_most_the_stall_ratio(num_decodes, prompt, ratio, chunk, begun):
    running = tuple(decode(i) for i in range(num_decodes))
    waiting = ()
    if begun:
        running += (RunningRow(99, prompt + 4, 4),)
    else:
        waiting = (WaitingRow(99, prompt + 4, 4, 1, 1),)
    made = plan(Snapshot(running, waiting, 1000), limits(cost=LINEAR, max_stall_ratio=ratio, max_num_seqs=9))
    assert lengths(made).get(99, 0) == chunk
    assert made.admit == ((99,) if chunk and not begun else ())
    assert made.predicted_s <= ratio * num_decodes


def test_a_row_that_gets_no_more_tokens_keeps_the_others_behind_it():
    running = (decode(0), RunningRow(1, 100, 4), RunningRow(2, 6, 4))
    made = plan(Snapshot(running, (WaitingRow(3, 2),), 1000), limits(cost=LINEAR))
    assert lengths(made) == {0: 1, 1: 2} and made.admit == ()


def test_a_prompt_too_dear_for_a_step_with_decodes_is_not_overtaken():
    """Or short requests could keep decodes running, and the prompt waiting, for ever."""
    dear = CostModel(points=((1, 1.0),), per_context_s=0.01, per_pair_s=0.01, per_sample_s=0)
    running = (decode(0), RunningRow(1, 900, 400))
    made = plan(Snapshot(running, (WaitingRow(2, 3),), 1000), limits(cost=dear))
    assert lengths(made) == {0: 1} and made.admit == ()
    assert lengths(plan(Snapshot(running[1:], (WaitingRow(2, 3),), 1000), limits(cost=dear))) == {1: 32}


def test_admission_stops_at_max_num_seqs():
    made = plan(Snapshot((decode(0),), tuple(WaitingRow(i, 2) for i in (1, 2, 3)), 50), limits(max_num_seqs=3))
    assert made.admit == (1, 2)


@pytest.mark.parametrize(
    "waiting, free, admitted",
    [
        (WaitingRow(1, 16), 4, True),
        (WaitingRow(1, 17), 4, False),
        (WaitingRow(1, 17, 8, 2, 0), 3, True),  # hits that others use cost nothing
        (WaitingRow(1, 17, 8, 2, 2), 4, False),  # idle ones count as used
        (WaitingRow(1, 17, 8, 2, 2), 5, True),
        (WaitingRow(1, 60), 14, False),  # also what later chunks will need
        (WaitingRow(1, 60), 15, True),
    ],
)
def test_admission_needs_blocks_for_the_whole_row(waiting, free, admitted):
    assert plan(Snapshot((decode(0),), (waiting,), free), limits()).admit == ((1,) if admitted else ())


def test_a_row_too_large_for_now_is_not_passed_by_smaller_ones():
    assert plan(Snapshot((decode(0),), (WaitingRow(1, 20), WaitingRow(2, 3)), 2), limits()).admit == ()


def test_blocks_promised_to_one_admission_are_gone_for_the_next():
    made = plan(Snapshot((), (WaitingRow(1, 8), WaitingRow(2, 8), WaitingRow(3, 4)), 4), limits())
    assert made.admit == (1, 2)


@pytest.mark.parametrize(
    "running, waiting, admitted",
    [
        ((1, 2), (3, 0, 0), (11, 12)),  # a third adapter waits, base rows pass
        ((1, 2), (2, 1, 0), (10, 11, 12)),  # adapters that run already
        ((1, 2), (3, 2, 0), (12,)),  # but none of them passes a waiting one
        ((1,), (2, 3, 2, 0), (10, 13)),
        ((0, 0), (1, 0, 2, 3), (10, 11, 12)),
    ],
)
def test_rows_of_more_adapters_than_max_loras_wait(running, waiting, admitted):
    made = plan(
        Snapshot(
            tuple(decode(i, version=v) for i, v in enumerate(running)),
            tuple(WaitingRow(10 + i, 2, version=v) for i, v in enumerate(waiting)),
            50,
        ),
        limits(max_loras=2),
    )
    assert made.admit == admitted


AT_BORDER = 9  # its last token, at position 8, begins a block of 4


@pytest.mark.parametrize(
    "free, own, preempted, decoded",
    [
        (3, (2, 2, 2), (), (0, 1, 2)),
        (2, (2, 2, 2), (2,), (0, 1)),  # the last arrived is the needy one
        (1, (2, 2, 2), (2,), (0, 1)),
        (0, (2, 2, 2), (2,), (0, 1)),
        (0, (2, 2, 1), (2, 1), (0,)),  # one block for row 0; then row 1 is itself the last
        (0, (2, 2, 0), (2, 1), (0,)),  # shares all its blocks: it is not enough
        (0, (0, 0, 0), (2, 1), (0,)),  # the last one left finds room whatever the count
    ],
)
def test_a_decode_without_a_block_takes_those_of_the_last_arrived(free, own, preempted, decoded):
    running = tuple(decode(i, AT_BORDER, own_blocks=n) for i, n in enumerate(own))
    made = plan(Snapshot(running, (WaitingRow(9, 1),), free), limits())
    assert made.preempt == preempted and tuple(lengths(made)) == decoded
    assert made.admit == () or free == 3


def test_a_prompt_is_preempted_for_an_older_decode_and_shrinks_for_a_younger_one():
    older = plan(Snapshot((decode(0, AT_BORDER), RunningRow(1, 30, 8, own_blocks=2)), (), 0), limits())
    assert older.preempt == (1,) and lengths(older) == {0: 1}
    younger = plan(Snapshot((RunningRow(0, 30, 8, own_blocks=2), decode(1, AT_BORDER, own_blocks=3)), (), 1), limits())
    assert younger.preempt == () and lengths(younger) == {1: 1}  # the decode has the block, the prompt waits a step


def test_a_chunk_stops_where_the_blocks_do():
    made = plan(Snapshot((RunningRow(0, 30, 5),), (WaitingRow(1, 2),), 2), limits())
    assert made.segments == (Segment(0, 5, 11, False),) and made.admit == ()


def test_prompts_that_hold_all_blocks_between_them_do_not_wait_for_each_other():
    running = tuple(RunningRow(i, 30, 8, own_blocks=2) for i in range(3))
    made = plan(Snapshot(running, (), 0), limits())
    assert made.preempt == (2,) and lengths(made) == {0: 8}
    made = plan(Snapshot((running[0], RunningRow(1, 30, 6, own_blocks=2)), (), 0), limits())
    assert made.preempt == (1,) and lengths(made) == {0: 8}, "also where another could fill its last block"
    shared = tuple(r._replace(own_blocks=0) for r in running)
    assert lengths(plan(Snapshot(shared, (), 0), limits())) == {0: 4}, "the last one left gets a block uncounted"


def test_limits_that_cannot_decode_a_full_house_are_refused():
    with pytest.raises(ConfigError, match="--max-num-batched-tokens .16. must be at least --max-num-seqs"):
        Limits(max_num_seqs=32, max_num_batched_tokens=16)


@st.composite
def cost_models(draw) -> CostModel:
    tokens = draw(st.lists(st.integers(1, 300), min_size=1, max_size=6, unique=True).map(sorted))
    rises = draw(st.lists(st.floats(0, 1), min_size=len(tokens), max_size=len(tokens)))
    seconds = [0.01 + sum(rises[: i + 1]) for i in range(len(rises))]
    slope = st.floats(0, 0.01)
    return CostModel(tuple(zip(tokens, seconds)), draw(slope), draw(slope), draw(slope), draw(st.floats(0.1, 10)))


@st.composite
def situations(draw) -> tuple[Snapshot, Limits]:
    size = draw(st.integers(1, 8))
    max_num_seqs = draw(st.integers(1, 12))
    limit = Limits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.integers(max_num_seqs, 200)),
        block_size=size,
        max_loras=draw(st.integers(1, 3)),
        cost=draw(cost_models()),
        max_stall_ratio=draw(st.floats(1, 5)),
    )
    running = []
    versions = draw(st.lists(st.integers(0, 4), max_size=limit.max_loras, min_size=1))
    for row in range(draw(st.integers(0, max_num_seqs))):
        computed = draw(st.integers(1, 60))
        remaining = draw(st.sampled_from([1, 1, 1, 2, 50]))
        own = draw(st.integers(0, -(-computed // size)))
        running.append(RunningRow(row, computed + remaining, computed, draw(st.sampled_from(versions)), own_blocks=own))
    waiting = []
    for row in range(100, 100 + draw(st.integers(0, 6))):
        length = draw(st.integers(1, 80))
        hit = draw(st.integers(0, (length - 1) // size))
        idle = draw(st.integers(0, hit))
        waiting.append(WaitingRow(row, length, hit * size, hit, idle, draw(st.integers(0, 5)), draw(st.booleans())))
    return Snapshot(tuple(running), tuple(waiting), draw(st.integers(0, 60))), limit


@settings(max_examples=500, deadline=None)
@given(situations())
def test_no_plan_breaks_a_limit(situation):
    snapshot, limit = situation
    made = plan(snapshot, limit)
    assert made == plan(snapshot, limit)
    running = {r.row: r for r in snapshot.running}
    waiting = {r.row: r for r in snapshot.waiting}
    preempted, planned = set(made.preempt), [s.row for s in made.segments]
    assert not (made.admit and made.preempt)
    assert len(planned) == len(set(planned)) and not preempted & set(planned)
    assert set(planned) <= (running.keys() - preempted) | set(made.admit)
    assert set(made.admit) <= set(planned) and made.num_tokens <= limit.max_num_batched_tokens
    assert len(running) - len(preempted) + len(made.admit) <= limit.max_num_seqs
    versions = {r.version for r in running.values()} | {waiting[r].version for r in made.admit}
    assert len(versions - {0}) <= limit.max_loras
    assert list(made.admit) == [r for r in waiting if r in made.admit], "out of order"
    kept = list(running)[: len(running) - len(preempted)]
    assert preempted == running.keys() - set(kept), "not the last arrived"
    assert not preempted or snapshot.free_blocks < len(running)
    if running:
        assert kept and planned, "a step in which nobody moves"

    size, blocks = limit.block_size, snapshot.free_blocks + sum(running[r].own_blocks for r in preempted)
    for segment in made.segments:
        row = running.get(segment.row)
        start, held = (row.computed, -(-row.computed // size)) if row else (0, 0)
        if row is None:
            start, held = waiting[segment.row].hit_tokens, waiting[segment.row].hit_blocks
            blocks -= waiting[segment.row].idle_hit_blocks
        known = (row or waiting[segment.row]).length
        wants = (row or waiting[segment.row]).wants_token
        assert segment.start == start and segment.length > 0 and segment.stop <= known
        assert segment.samples == (wants and segment.stop == known)
        blocks -= -(-segment.stop // size) - held
    assert blocks >= 0 or len(kept) == 1

    decodes = [s for s in made.segments if s.row in running and running[s.row].length - running[s.row].computed == 1]
    assert {s.row for s in decodes} == {r for r in kept if running[r].length - running[r].computed == 1}
    assert made.predicted_s == pytest.approx(limit.cost.predict(made.segments))
    if decodes:
        assert made.predicted_s <= limit.max_stall_ratio * limit.cost.predict(decodes) * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(situations())
def test_a_chunk_cut_short_is_as_long_as_the_budget_allows(situation):
    snapshot, limit = situation
    snapshot = snapshot._replace(free_blocks=1000)
    made = plan(snapshot, limit)
    running = {r.row: r for r in snapshot.running}
    decodes = [s for s in made.segments if s.row in running and running[s.row].length - running[s.row].computed == 1]
    for cut in [s for s in made.segments if s.row in running and s.length > 1 and s.stop < running[s.row].length]:
        longer = Segment(cut.row, cut.start, cut.length + 1, cut.stop + 1 == running[cut.row].length)
        seconds = limit.cost.predict([s for s in made.segments if s != cut] + [longer])
        is_full = made.num_tokens == limit.max_num_batched_tokens
        assert is_full or (decodes and seconds > limit.max_stall_ratio * limit.cost.predict(decodes) * (1 - 1e-9))
