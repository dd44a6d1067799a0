"""Who is in memory: the visible rules by hand, and a state machine whose moves end when they like."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tandem.memory.residency import Busy, Moves, Residency, Where

HERE, LEAVING, AWAY, COMING = Where.HERE, Where.LEAVING, Where.AWAY, Where.COMING


def places(max_bytes=100, max_runs=None, here=(), away=()):
    found = Residency(max_bytes, max_runs)
    for version, num_bytes in here:
        found.open(version, num_bytes, True)
    for version, num_bytes in away:
        found.open(version, num_bytes, False)
    return found


def test_the_least_recently_used_leaves_first():
    found = places(here=[(1, 50), (2, 50)], away=[(3, 40)])
    found.touch(1)
    assert list(found) == [2, 3, 1]
    assert found.arrange({3: 0.0}, [v for v in found if v != 3], [], 10) == Moves(leave=(2,))


def test_who_waits_comes_when_the_other_has_left_and_not_before():
    found = places(here=[(1, 60)], away=[(2, 60)])
    assert found.arrange({2: 0.0}, [1], [], 10) == Moves(leave=(1,))
    found.move(1, HERE, LEAVING)
    assert found.arrange({2: 0.0}, [], [], 10) == Moves()
    found.move(1, LEAVING, AWAY)
    assert found.arrange({2: 0.0}, [], [], 10) == Moves(come=(2,))


def test_a_busy_run_stays_until_it_is_far_enough_ahead():
    found = places(here=[(1, 60)], away=[(2, 60)])
    assert found.arrange({2: 5.0}, [], [Busy(1, 14.0, True)], 10) == Moves()
    assert found.arrange({2: 5.0}, [], [Busy(1, 15.0, True)], 10) == Moves(leave=(1,))
    assert found.arrange({2: 5.0}, [], [Busy(1, 15.0, False)], 10) == Moves(hold=(1,))


def test_nobody_passes_the_first_by_however_small():
    found = places(here=[(1, 60), (2, 20)], away=[(3, 90), (4, 10)])
    assert found.arrange({3: 0.0, 4: 1.0}, [], [Busy(1, 5.0, True), Busy(2, 5.0, True)], 10) == Moves()
    assert found.arrange({3: 1.0, 4: 0.0}, [], [Busy(1, 5.0, True), Busy(2, 5.0, True)], 10) == Moves(come=(4,))


def test_a_run_that_is_too_large_is_there_alone():
    found = places(here=[(1, 30)], away=[(2, 300)])
    assert not found.fits(300)
    assert found.arrange({2: 0.0}, [1], [], 10).leave == (1,)
    found.move(1, HERE, LEAVING)
    found.move(1, LEAVING, AWAY)
    assert found.arrange({2: 0.0}, [], [], 10).come == (2,)
    found.move(2, AWAY, COMING)
    found.move(2, COMING, HERE)
    assert not found.is_over and not found.fits(1)
    assert found.arrange({1: 0.0}, [2], [], 10) == Moves(leave=(2,))


def test_a_number_of_runs_is_a_bound_too():
    found = places(max_runs=2, here=[(1, 1), (2, 1)])
    assert not found.fits(1)
    found.open(3, 1, True)
    assert found.is_over and found.excess([1, 2, 3], []) == (1,)
    assert found.excess([], [Busy(1, 3.0, False), Busy(2, 2.0, True), Busy(3, 1.0, True)]) == (2,)


@pytest.mark.parametrize(
    ("before", "after"),
    [(HERE, AWAY), (HERE, COMING), (AWAY, HERE), (AWAY, LEAVING), (LEAVING, COMING), (COMING, LEAVING), (HERE, HERE)],
)
def test_there_are_no_shortcuts(before, after):
    found = places(here=[(1, 1)])
    for step in {HERE: (), LEAVING: (LEAVING,), AWAY: (LEAVING, AWAY), COMING: (LEAVING, AWAY, COMING)}[before]:
        found.move(1, found.where(1), step)
    with pytest.raises(AssertionError):
        found.move(1, before, after)


class Comings(RuleBasedStateMachine):
    """Runs get work and finish it; moves succeed or fail at any time. A model of its own counts bytes."""

    @initialize(max_bytes=st.integers(10, 60), max_runs=st.sampled_from([None, 1, 3]))
    def start(self, max_bytes, max_runs):
        self.found, self.max_bytes, self.max_runs = Residency(max_bytes, max_runs), max_bytes, max_runs
        self.sizes, self.service, self.busy, self.under_way = {}, {}, set(), set()

    def versions(self, *where):
        return [v for v in self.sizes if self.found.where(v) in where]

    @rule(num_bytes=st.integers(1, 30))
    def open(self, num_bytes):
        version = len(self.sizes) + 1 + max(self.sizes, default=0)
        self.found.open(version, num_bytes, self.found.fits(num_bytes))
        self.sizes[version], self.service[version] = num_bytes, min(self.service.values(), default=0.0)

    @precondition(lambda self: any(self.found.where(v) in (HERE, AWAY) for v in self.sizes))
    @rule(data=st.data())
    def close(self, data):
        version = data.draw(st.sampled_from(self.versions(HERE, AWAY)))
        self.found.close(version)
        del self.sizes[version], self.service[version]
        self.busy.discard(version)
        self.under_way.discard(version)

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def ask(self, data):
        version = data.draw(st.sampled_from(sorted(self.sizes)))
        self.busy.add(version)
        self.found.touch(version)

    @precondition(lambda self: any(self.found.where(v) is HERE for v in self.busy))
    @rule(data=st.data(), tokens=st.integers(0, 20))
    def work(self, data, tokens):
        version = data.draw(st.sampled_from([v for v in sorted(self.busy) if self.found.where(v) is HERE]))
        self.service[version] += tokens
        change = data.draw(st.sampled_from(["begin", "rest", "finish"]))
        (self.under_way.add if change == "begin" else self.under_way.discard)(version)
        if change == "finish":
            self.busy.remove(version)

    def arranged(self):
        wanting = {v: self.service[v] for v in self.versions(AWAY) if v in self.busy}
        idle = [v for v in self.found if self.found.where(v) is HERE and v not in self.busy]
        busy = [Busy(v, self.service[v], v not in self.under_way) for v in self.versions(HERE) if v in self.busy]
        moves = self.found.arrange(wanting, idle, busy, lead=5.0)
        assert set(moves.come) <= wanting.keys()
        assert set(moves.leave) <= set(idle) | {b.version for b in busy if b.is_at_rest}
        assert set(moves.hold) <= self.under_way
        taken = [v for v in idle if v in moves.leave]
        assert taken == idle[: len(taken)], "somebody used later had to go first"
        least = min(wanting.values(), default=0.0)
        assert all(self.service[v] >= least + 5 for v in [*moves.leave, *moves.hold] if v in self.busy)
        if wanting and not moves.come and not self.versions(LEAVING, COMING):
            first = min(wanting, key=wanting.__getitem__)
            others = [b for b in busy if b.service < wanting[first] + 5]
            assert moves.leave or moves.hold or others, "nobody moves and nothing keeps them"
        return moves

    @rule()
    def arrange(self):
        moves = self.arranged()
        for version in moves.come:
            self.found.move(version, AWAY, COMING)
        for version in moves.leave:
            self.found.move(version, HERE, LEAVING)

    @precondition(lambda self: self.versions(LEAVING, COMING))
    @rule(data=st.data(), works=st.booleans())
    def settle(self, data, works):
        version = data.draw(st.sampled_from(self.versions(LEAVING, COMING)))
        if self.found.where(version) is LEAVING:
            self.found.move(version, LEAVING, AWAY if works else HERE)
        else:
            self.found.move(version, COMING, HERE if works else AWAY)

    @invariant()
    def bounded(self):
        if not hasattr(self, "sizes"):
            return
        inside = [self.sizes[v] for v in self.versions(HERE, LEAVING, COMING)]
        assert self.found.used_bytes == sum(inside)
        assert len(inside) <= 1 or (sum(inside) <= self.max_bytes and len(inside) <= (self.max_runs or 10**9))
        assert not self.found.is_over

    def teardown(self):
        """Once nothing fails and all work ends, everybody gets its turn."""
        if not hasattr(self, "sizes"):
            return
        for _ in range(6 * len(self.sizes) + 6):
            for version in self.versions(LEAVING):
                self.found.move(version, LEAVING, AWAY)
            for version in self.versions(COMING):
                self.found.move(version, COMING, HERE)
            self.busy -= set(self.versions(HERE))
            self.under_way.clear()
            self.arrange()
        assert not self.busy


TestComings = Comings.TestCase
TestComings.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
