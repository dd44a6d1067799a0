"""Training's part of the plan: tables for what must be so, and random traffic for what must never be. No model, no
clock."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.memory.residency import Busy, Residency, Where
from tandem.scheduler import policy
from tandem.scheduler.budget import CostModel, Load
from tandem.scheduler.policy import Limits, RunningRow, Snapshot, WaitingRow
from tandem.scheduler.progress import Progress
from tandem.scheduler.training import (
    BackwardView,
    ForwardView,
    TrainCost,
    TrainLimits,
    TrainRow,
    TrainView,
    UpdateView,
    fill,
    first_guess,
    pairs_of,
)
from tandem.work import Example, OptimParams, Pass, Publish, Save, Update

LAYERS = 4
ROWS = (TrainRow(-1, 300, 1), TrainRow(-2, 200, 1))
UP = ForwardView(1, ROWS, 500, 0, None, 0, True, 0)
DOWN = BackwardView(2, ROWS, 500, 400, 0, True, LAYERS - 1, 500, False)
COST = CostModel()
# Rows beside the first one cost nothing up to 32.
ROOMY = CostModel(((1, 0.020), (32, 0.0201), (256, 0.14)), per_pair_s=0.0, per_context_s=0.0)
DECODE = Snapshot(running=(RunningRow(0, 20, 19), RunningRow(1, 30, 29)), free_blocks=1000, slack_s=0.2)


def limits(**changes):
    return Limits(train=TrainLimits(**changes))


def snapshot(base=DECODE, train=None, **changes):
    return base._replace(train=train or TrainView(LAYERS, UP, DOWN), **changes)


def slices_s(plan, cost):
    rows = {1: UP.rows, 2: DOWN.rows}
    total = 0.0
    for s in plan.slices:
        pairs = pairs_of(rows[s.batch], s.start, s.stop) if s.kind in ("forward", "backward") else 0
        total += cost.seconds(s.kind, s.stop - s.start, pairs, s.kind == "backward" and s.stop == 500)
    return total


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("view", [TrainView(LAYERS, UP, DOWN), TrainView(LAYERS, UP), TrainView(LAYERS, None, DOWN)])
def test_training_fills_the_slack_and_no_more(view):
    plan = policy.plan(snapshot(train=view), replace(limits(), cost=ROOMY))
    assert any(s.row < 0 for s in plan.segments) == (view.backward is None)
    assert bool(plan.slices) == (view.backward is not None)
    assert 0.1 < plan.predicted_s + plan.slices_s <= 0.2
    assert plan.slices_s == pytest.approx(slices_s(plan, TrainCost()))


@pytest.mark.parametrize(("share", "rides"), [(0.0, True), (0.5, True), (1.1, False)])
def test_nobody_rides_where_slices_get_on_faster(share, rides):
    cost = TrainCost()
    own_s = cost.seconds("forward", 500) * LAYERS / 500
    train = TrainLimits(cost=replace(cost, ride_s=share * own_s))
    flat = CostModel(((1, 0.020), (1024, 0.0201)), per_pair_s=0.0, per_context_s=0.0)
    plan = policy.plan(snapshot(train=TrainView(LAYERS, UP)), replace(limits(), cost=flat, train=train))
    assert any(s.row < 0 for s in plan.segments) == rides
    assert any(s.kind == "forward" for s in plan.slices) == (not rides)


def test_only_the_first_slice_of_a_step_is_cut_to_fit():
    """What a step leaves unused, the next one has more; smaller slices get less done."""
    one_s = TrainCost().seconds("backward", 500, pairs_of(ROWS, 0, 500))
    view = TrainView(LAYERS, None, DOWN._replace(lost=400, is_dense=True))
    for share, windows in ((0.6, 1), (1.1, 1), (1.9, 1), (2.2, 2)):
        some = snapshot(train=view, slack_s=0.021 + share * one_s)
        plan = policy.plan(some, replace(limits(step_s=10.0), cost=ROOMY))
        assert len(plan.slices) == windows
        assert all(s.stop - s.start == 500 for s in plan.slices) == (share >= 1.0)


@pytest.mark.parametrize("slack_s", [-1.0, 0.0, 0.021])
def test_no_slack_no_training(slack_s):
    plan = policy.plan(snapshot(slack_s=slack_s), limits())
    assert len(plan.segments) == 2 and not plan.slices


@pytest.mark.parametrize("changes", [
    {"running": (*DECODE.running, RunningRow(2, 400, 16))},
    {"waiting": (WaitingRow(5, 40),)},
    {"waiting": (WaitingRow(5, 1),)},
])  # fmt: skip
def test_a_prompt_goes_alone(changes):
    """Whoever waits for a first token waits for nothing else."""
    plan = policy.plan(snapshot(**changes), limits())
    assert not plan.slices and all(s.row >= 0 for s in plan.segments)


def test_who_waits_without_a_seat_does_not_stop_training():
    full = Limits(max_num_seqs=2, train=TrainLimits())
    plan = policy.plan(snapshot(waiting=(WaitingRow(5, 40),)), full)
    assert plan.slices and not plan.admit


def test_alone_training_takes_steps_of_bounded_length():
    plan = policy.plan(Snapshot(train=TrainView(LAYERS, UP, DOWN)), limits(step_s=0.1))
    assert plan.slices and not plan.segments and 0.05 < plan.slices_s <= 0.1


def test_alone_one_slice_runs_however_long_it_takes():
    slow = replace(TrainCost(), scale={"backward": 1000.0, "loss": 1000.0})
    plan = policy.plan(Snapshot(train=TrainView(LAYERS, UP, DOWN)), limits(step_s=0.1, cost=slow))
    assert len(plan.slices) == 1 and plan.slices[0].stop - plan.slices[0].start >= 64


def test_slices_never_keep_a_request_waiting_longer_than_a_step():
    plan = policy.plan(snapshot(slack_s=math.inf), limits(step_s=0.07))
    assert plan.slices and plan.slices_s <= 0.07


def test_a_slice_longer_than_a_step_runs_where_no_target_suffers():
    slow = replace(TrainCost(), scale={"backward": 100.0, "loss": 100.0})
    changes = {"train": TrainView(LAYERS, None, DOWN), "slack_s": 60.0}
    plan = policy.plan(snapshot(**changes), limits(cost=slow))
    assert len(plan.slices) == 1 and plan.slices_s > 0.15
    assert not policy.plan(snapshot(**changes | {"slack_s": 1.0}), limits(cost=slow)).slices


def test_deterministic_windows_are_fixed_and_never_ride():
    for slack_s in (0.12, 0.2, 5.0):
        plan = policy.plan(snapshot(slack_s=slack_s), limits(deterministic=True, step_s=10.0))
        assert all(s.row >= 0 for s in plan.segments)
        windows = {(s.kind, s.start, s.stop) for s in plan.slices}
        assert windows <= {
            ("loss", 0, 256), ("loss", 256, 400), ("backward", 244, 500), ("backward", 0, 244)
        }  # fmt: skip


def test_temporal_sharing_never_shares_a_forward_pass():
    view = TrainView(LAYERS, UP)
    plan = policy.plan(snapshot(train=view), limits(share_forward=False))
    assert {s.kind for s in plan.slices} == {"forward"} and all(s.row >= 0 for s in plan.segments)


def test_what_began_in_slices_goes_on_in_slices():
    view = TrainView(LAYERS, UP._replace(layer=2, cut=100))
    plan = policy.plan(snapshot(train=view), limits())
    assert plan.slices[0].layer == 2 and plan.slices[0].start == 100 and all(s.row >= 0 for s in plan.segments)


def test_requests_take_the_blocks_of_training():
    short = snapshot(waiting=(WaitingRow(5, 320),), free_blocks=25, train_blocks=10)
    plan = policy.plan(short, limits())
    assert plan.admit == (5,) and plan.evicts_training and not plan.slices
    assert not policy.plan(short._replace(free_blocks=31), limits()).evicts_training


def test_without_room_in_the_cache_the_forward_goes_in_slices():
    plan = policy.plan(snapshot(train=TrainView(LAYERS, UP), free_blocks=10), limits())
    assert {s.kind for s in plan.slices} == {"forward"} and all(s.row >= 0 for s in plan.segments)


def test_updates_come_first():
    view = TrainView(LAYERS, None, DOWN, (UpdateView(7, 20_000_000, 5),))
    plan = policy.plan(Snapshot(train=view), limits())
    assert [s.kind for s in plan.slices[:3]] == ["update"] * 3 and plan.slices[0].start == 5
    assert plan.slices[2].stop == 20_000_000


def test_pairs():
    assert pairs_of(ROWS, 0, 500) == 300 * 301 // 2 + 200 * 201 // 2
    assert pairs_of(ROWS, 299, 302) == 300 + 1 + 2


def test_costs_follow_measurements():
    cost = first_guess(COST, LAYERS, 2.0)
    for _ in range(200):
        cost = cost.corrected("backward", cost.seconds("backward", 256), 0.08, False)
    assert cost.seconds("backward", 256) == pytest.approx(0.08, rel=0.01)
    for _ in range(100):
        cost = cost.corrected("backward", cost.seconds("backward", 256, 0, True), 0.1, True)
    assert cost.unpack_s == pytest.approx(0.02, rel=0.05)


# ---------------------------------------------------------------- properties


@settings(max_examples=200, deadline=None)
@given(
    slack_s=st.floats(-0.1, 0.5),
    step_s=st.floats(0.01, 0.3),
    lost=st.integers(0, 400),
    layer=st.integers(0, LAYERS - 1),
    stop=st.integers(1, 500),
    done=st.integers(0, 499),
    scale=st.floats(0.05, 20.0),
    num_running=st.integers(0, 30),
)
def test_no_plan_exceeds_its_time(slack_s, step_s, lost, layer, stop, done, scale, num_running):
    cost = TrainCost(scale=dict.fromkeys(("forward", "backward", "loss"), scale))
    down = DOWN._replace(lost=400, layer=layer, stop=stop) if layer < LAYERS - 1 else DOWN._replace(lost=lost)
    view = TrainView(LAYERS, UP._replace(done=done), down)
    load = Load(tokens=num_running, context=100 * num_running, samples=num_running)
    slack_s = slack_s if num_running else math.inf
    found = fill(view, TrainLimits(step_s=step_s, cost=cost), COST, load, slack_s, 1000, 16)
    ridden = sum(s.length for s in found.segments)
    serving_s = COST.seconds(load)
    if num_running:
        more = load
        for s in found.segments:
            more = more.plus(s.start, s.length, 0)
        assert COST.seconds(more) + found.slices_s <= max(slack_s, serving_s) + 1e-9
        assert COST.seconds(more) - serving_s + found.slices_s <= step_s + 1e-9 or len(found.slices) == 1
    else:
        assert ridden == 0 and (found.slices_s <= step_s + 1e-9 or len(found.slices) == 1)
        assert found.slices
    assert ridden <= 500 - done


def example(length):
    return Example(list(range(length)), list(range(length)), [0.0] + [1.0] * (length - 1))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), mixes=st.booleans())
def test_everything_queued_is_done_once_and_in_order(seed, mixes):
    """Runs of several shares, passes of all sizes, requests that come and go: each operation ends exactly once, after
    those before it, and its tokens pass every layer exactly once, up and down."""
    rng = random.Random(seed)
    progress = Progress(LAYERS, batch_tokens=rng.choice([8, 64, 300]), mixes=mixes)
    queued, done = {}, []
    for number in range(rng.randint(1, 4)):
        run_id = f"run-{number}"
        progress.open(run_id, number + 1, 100, rng.randint(-1, 2), may_ride=rng.random() < 0.8)
        queued[run_id] = []
        for _ in range(rng.randint(1, 6)):
            op_id = number * 100 + len(queued[run_id])
            kind = rng.random()
            if kind < 0.7:
                lengths = [rng.randint(1, 90) for _ in range(rng.randint(1, 4))]
                op = Pass(run_id, [example(n) for n in lengths], learns=rng.random() < 0.8)
            else:
                op = Update(run_id, OptimParams(learning_rate=1.0)) if kind < 0.9 else Save(run_id, "x")
            progress.enqueue(op_id, op)
            queued[run_id].append(op_id)
    train = TrainLimits(step_s=rng.choice([0.004, 0.05]))
    batches, backward = [], {}
    worth = told = 0.0
    for _ in range(5000):
        for run, save in progress.due_files():
            done.append((run.run_id, save.op_id))
            progress.pop(run.run_id)
        progress.assemble()
        view = progress.view(0, {})
        if view is None:
            if not progress.due_files():
                break
            continue
        serving = rng.random() < 0.5
        running = (RunningRow(0, 20, 19),) if serving else ()
        snap = Snapshot(running=running, free_blocks=rng.choice([3, 500]), slack_s=rng.uniform(0, 0.2), train=view)
        plan = policy.plan(snap, Limits(train=train))
        for s in plan.slices:
            if s.kind == "backward":
                backward[s.batch] = backward.get(s.batch, 0) + s.stop - s.start
        ops, finished = progress.commit(plan)
        worth += sum(b.num_tokens for b in finished if b.learns)
        assert worth + progress.trained_tokens >= told - 1e-9, "training went backwards"
        told = worth + progress.trained_tokens
        done += [(q.op.run_id, q.op_id) for q in ops]
        batches += finished
    assert progress.view(0, {}) is None and not progress.has_work
    assert {run_id: [op for run, op in done if run == run_id] for run_id in queued} == queued
    for batch in batches:
        assert backward.get(batch.batch_id, 0) == (LAYERS * batch.num_tokens if batch.learns else 0)
        assert mixes or len({(r.run.run_id, r.queued.op_id) for r in batch.rows}) == 1


def test_shares_follow_priority():
    """Two runs with endless work: one step of priority is twice the tokens."""
    progress = Progress(LAYERS, batch_tokens=10, mixes=False)
    for name, priority in (("low", 0), ("high", 1)):
        progress.open(name, 1 + priority, 100, priority, True)
        for i in range(300):
            progress.enqueue(i, Pass(name, [example(10)]))
    served = {"low": 0, "high": 0}
    for _ in range(150):
        batch = progress.assemble()
        served[batch.rows[0].run.run_id] += 1
        while progress.view(0, {}) and progress.forward is batch or progress.backward is batch:
            progress.commit(policy.plan(Snapshot(train=progress.view(0, {})), Limits()))
    assert served["high"] == pytest.approx(2 * served["low"], abs=2)


def endless(progress, rng, run, op_id):
    """Work of this run's own kind for ever: passes of one to four examples, with an update now and then."""
    if rng.random() < 0.3:
        return progress.enqueue(op_id, Update(run, OptimParams(learning_rate=1.0)))
    longest = 10 * (1 + int(run) % 4)
    progress.enqueue(op_id, Pass(run, [example(rng.randint(1, longest)) for _ in range(rng.randint(1, 4))]))


def drained(progress, served):
    """Run until a microbatch is done, the next one on its way behind it, adding up each run's tokens."""
    while True:
        progress.assemble()
        if (view := progress.view(0, {})) is None:
            return
        _, finished = progress.commit(policy.plan(Snapshot(train=view), Limits()))
        for batch in finished:
            for row in batch.rows:
                served[row.run.run_id] += row.length
        if finished:
            return


@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize("room", [8, 3, 1])
def test_eight_runs_with_endless_work_get_the_same(mixes, room):
    """However long each one's sequences are, and however few of the runs may be in memory at once."""
    rng, progress, residency = random.Random(0), Progress(LAYERS, batch_tokens=64, mixes=mixes), Residency(10**9, room)
    served, op_id, num_moves = dict.fromkeys(map(str, range(8)), 0), 0, 0
    for run in served:
        progress.open(run, int(run), 100, 0, True)
        residency.open(int(run), 1, int(run) < room)
        progress.runs[run].is_away = int(run) >= room
    for _ in range(4000):
        for run, queue in progress.runs.items():
            while len(queue.ops) < 3:
                op_id += 1
                endless(progress, rng, run, op_id)
        wanting = {q.version: q.service for q in progress.runs.values() if q.is_away}
        busy = [Busy(q.version, q.service, progress.may_leave(q)) for q in progress.runs.values() if not q.is_away]
        moves = residency.arrange(wanting, [], busy, lead=16)
        for queue in progress.runs.values():
            if queue.version in moves.leave:
                residency.move(queue.version, Where.HERE, Where.LEAVING)
                residency.move(queue.version, Where.LEAVING, Where.AWAY)
                queue.is_away, num_moves = True, num_moves + 1
            elif queue.version in moves.come:
                residency.move(queue.version, Where.AWAY, Where.COMING)
                residency.move(queue.version, Where.COMING, Where.HERE)
                queue.is_away = False
            queue.is_held = queue.version in moves.hold
        drained(progress, served)
    assert max(served.values()) < 1.2 * min(served.values()), served
    assert sum(served.values()) > 20_000 and (num_moves > 0) == (room < 8)


def test_a_long_pass_makes_way_for_who_waits():
    """One microbatch of it is always behind another, so it is never at rest of itself."""
    progress, residency, served = Progress(LAYERS, batch_tokens=20, mixes=True), Residency(10**9, 1), {"a": 0, "b": 0}
    for version, run in enumerate(served):
        progress.open(run, version, 100, 0, True)
        residency.open(version, 1, run == "a")
        progress.runs[run].is_away = run == "b"
        progress.enqueue(version, Pass(run, [example(10)] * 60))
    for _ in range(8):
        progress.assemble()
        drained(progress, served)
        ahead, waits = progress.runs["a"], progress.runs["b"]
        busy = [Busy(ahead.version, ahead.service, progress.may_leave(ahead))]
        moves = residency.arrange({waits.version: waits.service}, [], busy, lead=16)
        ahead.is_held = ahead.version in moves.hold
        if moves.leave:
            break
    assert moves.leave and 16 <= served["a"] <= 80 and progress.forward is progress.backward is None
    ahead.is_held, ahead.is_away, waits.is_away = False, True, False
    progress.assemble()
    drained(progress, served)
    assert served["b"] == 20


def test_a_late_run_claims_nothing_of_the_past_and_is_not_kept_waiting():
    progress, served = Progress(LAYERS, batch_tokens=40, mixes=True), {"old": 0, "new": 0}
    rng = random.Random(1)
    for version, run in enumerate(served):
        progress.open(run, version, 100, 0, True)
    for op_id in range(600):
        progress.enqueue(op_id, Pass("old", [example(rng.randint(1, 20))]))
    for _ in range(50):
        drained(progress, served)
    before = served["old"]
    for op_id in range(600, 1000):
        progress.enqueue(op_id, Pass("new", [example(rng.randint(1, 20))]))
    for _ in range(50):
        drained(progress, served)
    assert served["new"] == pytest.approx(served["old"] - before, rel=0.2)


def test_who_is_away_or_held_begins_nothing():
    progress = Progress(LAYERS, batch_tokens=40, mixes=True)
    for version, run in enumerate(("away", "held", "here")):
        progress.open(run, version, 100, 0, True)
        progress.enqueue(version, Pass(run, [example(5)]))
    progress.runs["away"].is_away = progress.runs["held"].is_held = True
    assert [row.run.run_id for row in progress.assemble().rows] == ["here"]
    progress = Progress(LAYERS, batch_tokens=40, mixes=True)
    progress.open("away", 1, 100, 0, True)
    progress.runs["away"].is_away = True
    for op in (Update("away", OptimParams(learning_rate=1.0)), Save("away", "x"), Publish("away", "name")):
        progress.enqueue(1, op)
        assert not progress.has_work and progress.view(0, {}) is None and not progress.due_files()
        assert not progress.due_publications()
        assert [queued.op for queued in progress.drop("away")] == [op]


def test_closing_a_run_leaves_shared_microbatches_to_the_others():
    progress = Progress(LAYERS, batch_tokens=100, mixes=True)
    for version, name in enumerate(("a", "b"), 1):
        progress.open(name, version, 100, 0, True)
        progress.enqueue(version, Pass(name, [example(10)]))
    batch = progress.assemble()
    dropped, idle = progress.close("a")
    assert [q.op_id for q in dropped] == [1] and not idle and progress.uses(1)
    dropped, idle = progress.close("b")
    assert [q.op_id for q in dropped] == [2] and idle == [batch] and not progress.uses(1)
