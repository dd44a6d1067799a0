"""Rows from arrival to finish: tables for how a row ends, and a state machine that runs random traffic through state,
policy, block pool and adapter table with a cache whose every slot remembers what was written into it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tandem.errors import Conflict
from tandem.memory.adapters import AdapterTable
from tandem.memory.blocks import BlockPool
from tandem.scheduler.budget import CostModel
from tandem.scheduler.policy import Limits, plan
from tandem.scheduler.state import State
from tandem.work import Request, SamplingParams, StepPlan, StepResult, TopLogprobs

EOS = 1


def request(request_id: str = "a", prompt=(5, 6, 7), priority: int = 0, **sampling) -> Request:
    return Request(request_id=request_id, prompt=list(prompt), priority=priority, sampling=SamplingParams(**sampling))


def ranked(token_id: int) -> TopLogprobs:
    return TopLogprobs(-1.0, 1, [token_id], [-1.0])


class Bench:
    """State, policy and pool with a device that is a dictionary: what the engine does in a step, and no model."""

    def __init__(self, num_blocks=64, block_size=4, eos=(EOS,), max_model_len=10**6, prefix_caching=True, **limits):
        self.state = State(eos, max_model_len)
        self.pool = BlockPool(num_blocks, block_size, prefix_caching)
        self.limits = Limits(block_size=block_size, **limits)
        self.written: dict[tuple[int, int], object] = {}  # (block, slot) -> what that position was computed from
        self.plans: list[StepPlan] = []

    def step(self, sample=lambda row: 9):
        """One engine step; `sample(row)` is the next token. Returns (events, finished rows)."""
        state, pool, size = self.state, self.pool, self.pool.block_size
        made = plan(state.snapshot(pool, self.limits), self.limits)
        assert made.segments or not state.rows, "rows wait and nobody moves"
        self.plans.append(made)
        for source, target in pool.reserve(made, state.rows).copies:
            for slot in range(size):
                self.written[target, slot] = self.written.get((source, slot))
        pool.check()
        result = StepResult()
        planned = [(s, state.row(s.row)) for s in made.segments]
        for segment, row in planned:
            table = pool.table(row.row_id)
            for position in range(segment.stop):
                slot = (table[position // size], position % size)
                key = (row.version, tuple(row.tokens[: position + 1]))
                if position >= segment.start:
                    self.written[slot] = key
                assert self.written.get(slot) == key, "a row reads what was not written for it"
            if segment.samples:
                result.tokens[row.row_id] = sample(row)
            if row.request.sampling.prompt_logprobs is not None:
                result.prompt_logprobs[row.row_id] = [
                    ranked(t) for t in row.tokens[: row.num_prompt][segment.start + 1 : segment.stop + 1]
                ]
        events, finished = state.commit(made, result)
        for segment, row in planned:
            pool.commit(row.row_id, row.version, row.tokens, segment.stop)
        for row in finished:
            pool.release(row.row_id)
        pool.check()
        return events, finished

    def run(self, sample=lambda row: 9, steps=1000):
        """Steps until nothing is left; returns all events."""
        events = []
        for _ in range(steps):
            if not self.state.rows:
                assert self.pool.num_used == 0 and self.state.queued_tokens == 0
                return events
            events += self.step(sample)[0]
        raise AssertionError(f"{len(self.state.rows)} rows are not finished after {steps} steps")

    def cancel(self, request_id, index=None):
        rows = self.state.cancel(request_id, index)
        for row in rows:
            self.pool.release(row.row_id)
        return rows


@pytest.mark.parametrize(
    "sampling, text, expected",
    [
        ({"max_tokens": 3}, [9, 9, 9, 9], [(9, None, False), (9, None, False), (9, "length", False)]),
        ({"max_tokens": 3}, [9, EOS], [(9, None, False), (EOS, "stop", True)]),
        ({"max_tokens": 2}, [9, EOS], [(9, None, False), (EOS, "stop", True)]),  # both at once: stop
        ({"max_tokens": 2, "ignore_eos": True}, [EOS, EOS], [(EOS, None, False), (EOS, "length", False)]),
        ({"max_tokens": 9, "stop_token_ids": (8,)}, [9, 8], [(9, None, False), (8, "stop", True)]),
        (
            {"max_tokens": 9, "stop_token_ids": (8,), "ignore_eos": True},
            [EOS, 8],
            [(EOS, None, False), (8, "stop", True)],
        ),
        (
            {"max_tokens": 9, "min_tokens": 2},
            [EOS, EOS, EOS],
            [(EOS, None, False), (EOS, None, False), (EOS, "stop", True)],
        ),
        ({"max_tokens": 0}, [], [(None, "length", False)]),
        ({"max_tokens": 99}, [9] * 5, [(9, None, False)] * 4 + [(9, "length", False)]),  # max_model_len 8
    ],
)
def test_how_a_row_ends(sampling, text, expected):
    bench = Bench(max_model_len=8)
    (row,) = bench.state.add(request(**sampling), 0, 0)
    events = bench.run(lambda row: text[row.num_generated])
    assert [(e.token_id, e.finish_reason, e.stop_token) for e in events] == expected
    assert row.row_id not in bench.state.rows


def test_the_first_event_says_how_much_was_cached():
    bench = Bench(block_size=4)
    bench.state.add(request("a", range(10, 20), max_tokens=3), 0, 0)
    assert [e.cached_tokens for e in bench.run()] == [0, 0, 0]
    bench.state.add(request("b", range(10, 20), max_tokens=3), 0, 0)
    assert [e.cached_tokens for e in bench.run()] == [8, 0, 0]
    bench.state.add(request("c", range(10, 20), max_tokens=3), 7, 0)
    assert [e.cached_tokens for e in bench.run()] == [0, 0, 0], "another adapter version's blocks"
    assert (bench.pool.num_queried, bench.pool.num_hit) == (30, 8)


@pytest.mark.parametrize("max_tokens", [0, 2])
@pytest.mark.parametrize("n", [1, 2])
def test_prompt_logprobs_come_whole_with_the_first_event_also_after_a_cached_run(max_tokens, n):
    bench = Bench(block_size=4, max_num_batched_tokens=3, max_num_seqs=3)
    bench.state.add(request("a", range(10, 20), max_tokens=1), 0, 0)
    bench.run()
    bench.state.add(request("b", range(10, 20), max_tokens=max_tokens, prompt_logprobs=0, n=n), 0, 0)
    events = bench.run()
    assert len(events) == n * max(max_tokens, 1)
    for index in range(n):
        first, *later = [e for e in events if e.index == index]
        if index == 0:
            assert [p.token_ids for p in first.prompt_logprobs] == [[t] for t in range(11, 20)]
        else:
            assert first.prompt_logprobs is None
        assert first.cached_tokens == 0 and all(e.prompt_logprobs is None for e in later)
        assert [e.token_id for e in (first, *later)] == ([9, 9] if max_tokens else [None])


def test_logprobs_travel_with_their_token():
    state = State()
    state.add(request(max_tokens=1), 0, 0)
    pool = BlockPool(8, 4)
    made = plan(state.snapshot(pool, Limits(block_size=4)), Limits(block_size=4))
    ((event,), _) = state.commit(made, StepResult(tokens={0: 9}, logprobs={0: ranked(9)}))
    assert event.logprob == ranked(9)


def test_forks_share_full_blocks_and_copy_the_last():
    bench = Bench(block_size=4)
    rows = bench.state.add(request("a", range(10, 20), max_tokens=4, n=3), 0, seed=40)
    assert [(r.index, r.seed, r.parent) for r in rows] == [(0, 40, None), (1, 40, 0), (2, 40, 0)]
    assert bench.state.queued_tokens == 12
    bench.step(lambda row: 100 + row.index)
    assert bench.state.num_running == 1, "forks wait for the prompt"
    bench.step(lambda row: 100 + row.index)
    assert bench.state.num_running == 3
    tables = [bench.pool.table(r.row_id) for r in rows]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2] and len({t[2] for t in tables}) == 3
    assert bench.pool.num_used == 2 + 3
    assert [(s.row, s.start, s.length) for s in bench.plans[-1].segments] == [(0, 10, 1), (1, 9, 1), (2, 9, 1)]
    assert [(r.num_computed, r.cached_tokens) for r in rows] == [(11, 0), (10, 0), (10, 0)]
    events = bench.run(lambda row: 100 + row.index)
    assert {e.token_id for e in events if e.index == 2} == {102}


def test_a_preempted_fork_resumes_beside_its_parent():
    bench = Bench(block_size=2, num_blocks=15)
    bench.state.add(request("c", range(30, 33), max_tokens=13), 0, 0)
    parent, fork = bench.state.add(request("a", range(10, 13), max_tokens=13, n=2), 0, 0)
    while not fork.preempted:
        bench.step()
    assert fork.num_generated and parent.is_running and not fork.is_running
    bench.cancel("c")
    bench.step()
    assert parent.is_running and fork.is_running
    assert fork.cached_tokens == 0, "its own earlier blocks are no prefix of the prompt found in the cache"
    bench.run()


def test_forks_of_a_prompt_that_ends_at_a_block_border_copy_nothing():
    bench = Bench(block_size=4)
    bench.state.add(request("a", range(10, 19), max_tokens=4, n=2), 0, 0)
    bench.step()
    made = plan(bench.state.snapshot(bench.pool, bench.limits), bench.limits)
    assert made.admit == (1,) and bench.pool.reserve(made, bench.state.rows).copies == []


@pytest.mark.parametrize("after_steps", [0, 1])
def test_forks_go_alone_when_their_parent_is_gone(after_steps):
    bench = Bench(block_size=4, max_num_seqs=1)
    bench.state.add(request("a", range(10, 20), max_tokens=4, n=3), 0, 0)
    for _ in range(after_steps):
        bench.step()
    assert [r.index for r in bench.cancel("a", 0)] == [0]
    events = bench.run()
    assert {e.index for e in events} == {1, 2}
    assert [e.cached_tokens for e in events if e.index == 2][0] == 8


def test_cancel_frees_everything_at_once_and_may_be_repeated():
    bench = Bench(block_size=4)
    bench.state.add(request("a", range(10, 20), max_tokens=40, n=2), 0, 0)
    bench.state.add(request("b", range(10, 30), max_tokens=40), 0, 0)
    for _ in range(3):
        bench.step()
    assert len(bench.cancel("a")) == 2 and len(bench.cancel("b")) == 1
    assert bench.pool.num_used == 0 and not bench.state.rows and bench.state.queued_tokens == 0
    assert bench.cancel("a") == [] and bench.cancel("b", 0) == [] and bench.cancel("nobody") == []
    bench.state.add(request("a"), 0, 0)  # the id may be used again


def test_urgent_requests_overtake_and_the_rest_keep_their_order():
    bench = Bench(block_size=4, max_num_seqs=1)
    for request_id, priority in (("a", 0), ("b", 1), ("c", 0), ("d", -1)):
        bench.state.add(request(request_id, max_tokens=1, priority=priority), 0, 0)
    assert [r.request.request_id for r in bench.state.waiting] == ["d", "a", "c", "b"]
    assert bench.state.queued_tokens == 12
    assert [e.request_id for e in bench.run()] == ["d", "a", "c", "b"]


def test_a_preempted_row_resumes_with_the_same_text_and_reports_nothing_twice():
    def text(row):
        return 100 + sum(row.tokens) % 7

    alone = Bench(block_size=2)
    alone.state.add(request("b", range(20, 25), max_tokens=12, prompt_logprobs=0), 0, 0)
    expected = alone.run(text)
    tight = Bench(block_size=2, num_blocks=13)
    tight.state.add(request("a", range(10, 15), max_tokens=16), 0, 0)
    (row,) = tight.state.add(request("b", range(20, 25), max_tokens=12, prompt_logprobs=0), 0, 0)
    events = tight.run(text)
    assert any(p.preempt == (row.row_id,) for p in tight.plans) and row.preempted
    assert [e for e in events if e.request_id == "b"] == expected


def test_preempting_rows_that_share_blocks_counts_only_what_comes_free():
    bench = Bench(block_size=4, num_blocks=9)
    rows = bench.state.add(request("a", range(10, 23), max_tokens=6, n=5), 0, 0)
    bench.step()
    bench.step()
    bench.cancel("a", 0)  # four forks in step, on 3 shared blocks and one each; one block is free
    while not bench.plans[-1].preempt:
        before = bench.state.snapshot(bench.pool, bench.limits)
        bench.step()
    assert [(r.row, r.own_blocks) for r in before.running] == [(r.row_id, 1) for r in rows[1:]]
    assert bench.plans[-1].preempt == (rows[4].row_id, rows[3].row_id)
    bench.run()


def test_a_snapshot_looks_up_no_more_of_the_queue_than_a_step_could_take():
    state, limits = State(), Limits(max_num_seqs=4, max_num_batched_tokens=32, block_size=4)
    for i in range(500):
        state.add(request(str(i), range(10, 20)), 0, 0)
    assert len(state.snapshot(BlockPool(99, 4), limits).waiting) == 4
    state.cancel("0")
    state.add(request("long", range(100), priority=-1), 0, 0)
    assert [w.length for w in state.snapshot(BlockPool(99, 4), limits).waiting] == [100]


def test_base_rows_are_found_behind_any_number_of_adapter_rows():
    bench = Bench(block_size=4, max_num_seqs=4, max_loras=1)
    for i in range(50):
        bench.state.add(request(f"lora-{i}", max_tokens=4), 1 + i, 0)
    bench.state.add(request("base", max_tokens=4), 0, 0)
    bench.step()
    assert [r.request.request_id for r in bench.state.running] == ["lora-0", "base"]
    bench.run()


@pytest.mark.parametrize("blind", [False, True])
def test_rule_a_an_idle_hit_must_count_as_a_block_used(blind):
    """The rule is what keeps reserve from failing: without it the same snapshot promises more than there is."""
    bench = Bench(block_size=4, num_blocks=6)
    bench.state.add(request("a", range(10, 26), max_tokens=1), 0, 0)
    bench.run()
    bench.state.add(request("b", [7], max_tokens=7), 0, 0)
    bench.step()
    bench.state.add(request("c", range(10, 27), max_tokens=1), 0, 0)  # 5 blocks, 4 of them idle hits; 4 are free
    snapshot = bench.state.snapshot(bench.pool, bench.limits)
    if not blind:
        assert plan(snapshot, bench.limits).admit == ()
        bench.run()
        return
    waiting = tuple(w._replace(idle_hit_blocks=0) for w in snapshot.waiting)
    made = plan(snapshot._replace(waiting=waiting), bench.limits)
    with pytest.raises(AssertionError, match="no block left"):
        bench.pool.reserve(made, bench.state.rows)


class Traffic(RuleBasedStateMachine):
    """Random requests, cancels, adapter loads and unloads on a cache that is too small for them."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(4, 16),
        max_num_seqs=st.integers(2, 6),
        chunk=st.sampled_from([6, 10, 40]),
        max_loras=st.integers(1, 3),
        prefix_caching=st.sampled_from([True, True, True, False]),
        seconds_of_a_token=st.sampled_from([0.0, 1.0]),
        vocabulary=st.sampled_from([2, 30]),
    )
    def start(
        self, block_size, num_blocks, max_num_seqs, chunk, max_loras, prefix_caching, seconds_of_a_token, vocabulary
    ):
        self.bench = Bench(
            num_blocks,
            block_size,
            prefix_caching=prefix_caching,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(chunk, max_num_seqs),
            max_loras=max_loras,
            cost=CostModel(points=((1, 1.0), (2, 1.0 + seconds_of_a_token))),
        )
        self.capacity = (num_blocks - 1) * block_size
        self.adapters = AdapterTable(max_resident=4, num_rows=4)
        self.vocabulary = vocabulary
        self.num_requests = 0
        self.expected: dict[str, set[int]] = {}  # choices that have to finish

    @rule(
        share=st.floats(0, 0.8),
        own=st.lists(st.integers(2, 4), max_size=3),
        max_tokens=st.sampled_from([0, 1, 5, 20, 40]),
        n=st.sampled_from([1, 1, 2, 4]),
        scored=st.sampled_from([False, False, False, True]),
        priority=st.sampled_from([0, 0, 0, 1]),
        name=st.sampled_from([None, None, "x", "y", "z"]),
    )
    def submit(self, share, own, max_tokens, n, scored, priority, name):
        if name not in (None, *self.adapters.names()):
            return
        prompt = [*([2, 3, 4, 3, 2] * 12)[: int(share * self.capacity)], *own][: self.capacity] or [2]
        sampling = SamplingParams(
            max_tokens=min(max_tokens, self.capacity - len(prompt)), n=n, prompt_logprobs=0 if scored else None
        )
        request_id = str(self.num_requests)
        self.num_requests += 1
        version = self.adapters.resolve(name)
        self.adapters.pin(version)
        self.bench.state.add(
            Request(request_id=request_id, prompt=prompt, sampling=sampling, priority=priority), version, 0
        )
        self.expected[request_id] = set(range(n))

    @rule(name=st.sampled_from(["x", "y", "z"]), rank=st.integers(1, 5))
    def publish(self, name, rank):
        try:
            self.adapters.publish(name, rank, "path")
        except Conflict:
            assert self.adapters.num_resident == 4
        self.forget(self.adapters.take_freed())

    @rule(name=st.sampled_from(["x", "y", "z"]))
    def unload(self, name):
        if name in self.adapters.names():
            self.forget(self.adapters.retire(name))

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), whole=st.booleans())
    def cancel(self, data, whole):
        request_id = data.draw(st.sampled_from(sorted(self.expected)))
        index = None if whole else data.draw(st.sampled_from(sorted(self.expected[request_id])))
        rows = self.bench.cancel(request_id, index)
        assert {r.index for r in rows} == (self.expected[request_id] if whole else {index})
        for row in rows:
            self.ended(row)

    @rule(times=st.integers(1, 4))
    def steps(self, times):
        for _ in range(times):
            self.step()

    def step(self):
        # The text depends on the tokens alone, so equal prompts make equal blocks, and preemption may not change it.
        events, finished = self.bench.step(lambda row: 1 + hash(tuple(row.tokens)) % self.vocabulary)
        versions = {self.version_of.get(s.row, 0) for s in self.bench.plans[-1].segments} - {0}
        assert len(versions) <= self.bench.limits.max_loras
        self.adapters.reserve(versions)
        assert all(self.adapters.is_active(v) for v in versions)
        for row in finished:
            self.ended(row)
        assert {(e.request_id, e.index) for e in events if e.finish_reason} == {
            (r.request.request_id, r.index) for r in finished
        }

    @property
    def version_of(self):
        return {row_id: row.version for row_id, row in self.bench.state.rows.items()}

    def ended(self, row):
        request_id = row.request.request_id
        self.expected[request_id].remove(row.index)
        if not self.expected[request_id]:
            del self.expected[request_id]
            self.forget(self.adapters.unpin(row.version))

    def forget(self, versions):
        for version in versions:
            self.bench.pool.drop_version(version)

    @invariant()
    def accounts_agree(self):
        if not hasattr(self, "bench"):
            return
        self.bench.pool.check()
        self.adapters.check()
        state = self.bench.state
        assert len(state.rows) == state.num_running + state.num_waiting
        assert state.queued_tokens == sum(r.queued_tokens for r in state.waiting)
        if not state.num_running:
            assert self.bench.pool.num_used == 0

    def teardown(self):
        if not hasattr(self, "bench"):
            return
        work = sum(len(r.tokens) + r.request.sampling.max_tokens for r in self.bench.state.rows.values())
        for _ in range(10 + 4 * work):  # alone and token by token each row would take `work` steps in all
            if not self.bench.state.rows:
                break
            self.step()
        assert not self.bench.state.rows, "somebody starves"
        assert not self.expected and self.bench.pool.num_used == 0
        self.bench.pool.check()
        self.adapters.check()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
