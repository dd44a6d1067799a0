"""Adapter versions and pool rows: the visible rules by hand, and a state machine with `check()` after each step."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tandem.errors import Conflict, NotFound
from tandem.memory.adapters import AdapterTable, Load


def test_a_name_means_its_newest_version_and_versions_are_never_reused():
    table = AdapterTable()
    first = table.publish("a", 8, "/one", "base")
    assert (first.name, first.version, first.rank, first.path, first.base_model) == ("a", 1, 8, "/one", "base")
    assert table.retire("a") == [1]
    second = table.publish("a", 8, "/two")
    assert second.version == 2 and table.resolve("a") == 2 and table.names() == ["a"]
    assert table.resolve(None) == 0


def test_a_running_request_keeps_its_version_through_a_reload():
    table = AdapterTable()
    old = table.publish("a", 8, "/one").version
    table.pin(old)
    table.pin(old)
    new = table.publish("a", 16, "/two").version
    assert table.take_freed() == [] and table.adapter(old).path == "/one" and table.resolve("a") == new
    assert table.unpin(old) == []
    assert table.unpin(old) == [old]
    assert table.num_resident == 1
    with pytest.raises(KeyError):
        table.adapter(old)


def test_a_reload_that_nobody_pins_frees_the_old_one_at_once():
    table = AdapterTable(max_resident=1)
    table.publish("a", 8, "/one")
    assert table.publish("a", 8, "/two").version == 2
    assert table.take_freed() == [1] and table.take_freed() == []


def test_unloading_takes_the_name_at_once_and_the_bytes_with_the_last_pin():
    table = AdapterTable()
    version = table.publish("a", 8, "/one").version
    table.pin(version)
    assert table.retire("a") == [] and table.names() == [] and table.num_resident == 1
    with pytest.raises(NotFound, match="there is no adapter 'a': load it first"):
        table.resolve("a")
    with pytest.raises(NotFound):
        table.retire("a")
    assert table.unpin(version) == [version] and table.num_resident == 0


def test_an_unpinned_current_version_stays():
    table = AdapterTable()
    version = table.publish("a", 8, "/one").version
    table.pin(version)
    assert table.unpin(version) == [] and table.resolve("a") == version


def test_a_full_table_says_what_to_do_and_changes_nothing():
    table = AdapterTable(max_resident=2)
    table.publish("a", 8, "/a")
    table.pin(table.publish("b", 8, "/b").version)
    for name in ("c", "b"):  # b is pinned: its new version would be a third
        with pytest.raises(Conflict, match="2 adapters are loaded.*unload one.*--max-cpu-loras"):
            table.publish(name, 8, "/c")
    table.check()
    assert table.names() == ["a", "b"] and table.resolve("b") == 2 and table.take_freed() == []
    assert table.publish("a", 8, "/a2").version == 3


def test_the_base_model_has_no_pins_and_no_rows():
    table = AdapterTable()
    table.pin(0)
    assert table.unpin(0) == [] and table.reserve([0, 0]) == [] and table.rows(0) == (0, 0) and table.used_rows == 0
    table.check()


def test_rows_are_the_first_gap_that_fits():
    table = AdapterTable(num_rows=32)
    a, b, c, d = (table.publish(name, rank, "/").version for name, rank in (("a", 8), ("b", 4), ("c", 4), ("d", 8)))
    assert table.reserve([a, b, c]) == [Load(a, 0, 8), Load(b, 8, 12), Load(c, 12, 16)]
    assert table.reserve([a, b, c]) == [], "all are there already"
    table.retire("b")
    e = table.publish("e", 3, "/").version
    assert table.reserve([d, e]) == [Load(d, 16, 24), Load(e, 8, 11)]
    assert table.used_rows == 24 and table.num_rows == 32
    table.retire("d")
    assert table.used_rows == 16 and not table.is_active(d)


def test_least_recently_used_adapters_make_room_before_the_pool_grows():
    table = AdapterTable(num_rows=16)
    a, b, c = (table.publish(name, 8, "/").version for name in "abc")
    table.reserve([a, b])
    table.reserve([a])
    assert table.reserve([c]) == [Load(c, 8, 16)] and table.num_rows == 16
    assert table.is_active(a) and not table.is_active(b)
    assert table.reserve([a, b, c]) == [Load(b, 16, 24)] and table.num_rows == 32, "one step needs all three"


def test_activate_alone_spares_pinned_adapters():
    table = AdapterTable(num_rows=8)
    a, b, c = (table.publish(name, 8, "/").version for name in "abc")
    table.pin(a)
    assert table.activate(a) == (0, 8) == table.activate(a)
    assert table.activate(b) == (8, 16) and table.num_rows == 16
    assert table.activate(c) == (8, 16) and table.num_rows == 16


def test_a_rank_larger_than_the_pool_doubles_it_until_it_fits():
    table = AdapterTable(num_rows=4)
    assert table.activate(table.publish("a", 64, "/").version) == (0, 64)
    assert table.num_rows == 64


class Adapters(RuleBasedStateMachine):
    """Loads, unloads, requests and steps in any order, beside a model of what each name means."""

    names = st.sampled_from("abcd")

    @initialize(max_resident=st.integers(1, 6), num_rows=st.integers(1, 8))
    def make(self, max_resident, num_rows):
        self.table = AdapterTable(max_resident, num_rows)
        self.current: dict[str, int] = {}
        self.pinned: list[int] = []
        self.resident: set[int] = set()
        self.newest = 0

    def gone(self, versions):
        for version in versions:
            assert version not in self.current.values() and version not in self.pinned
            self.resident.remove(version)  # KeyError if freed twice

    @rule(name=names, rank=st.integers(1, 9))
    def publish(self, name, rank):
        leaves = name in self.current and self.current[name] not in self.pinned
        if len(self.resident) - leaves >= self.table.max_resident:
            with pytest.raises(Conflict):
                self.table.publish(name, rank, "/")
            return
        version = self.table.publish(name, rank, "/").version
        assert version > self.newest
        self.newest = self.current[name] = version
        self.resident.add(version)
        self.gone(self.table.take_freed())

    @rule(name=names)
    def retire(self, name):
        if name not in self.current:
            with pytest.raises(NotFound):
                self.table.retire(name)
            return
        del self.current[name]
        self.gone(self.table.retire(name))

    @rule(name=names)
    def request(self, name):
        if name in self.current:
            version = self.table.resolve(name)
            assert version == self.current[name]
            self.table.pin(version)
            self.pinned.append(version)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def finish(self, data):
        version = data.draw(st.sampled_from(self.pinned))
        self.pinned.remove(version)
        self.gone(self.table.unpin(version))

    @rule(data=st.data())
    def step(self, data):
        running = data.draw(st.lists(st.sampled_from([0, *self.pinned]), max_size=4))
        before = {v: self.table.rows(v) for v in running if v and self.table.is_active(v)}
        loads = self.table.reserve(running)
        assert {load.version for load in loads} == set(running) - before.keys() - {0}
        for version in running:
            lo, hi = self.table.rows(version)
            assert before.get(version, (lo, hi)) == (lo, hi), "a loaded adapter moved"
            assert hi - lo == (self.table.adapter(version).rank if version else 0)

    @invariant()
    def accounts_agree(self):
        if hasattr(self, "table"):
            self.table.check()
            assert self.table.num_resident == len(self.resident)
            assert set(self.table.names()) == set(self.current)
            for version in self.pinned:
                assert self.table.adapter(version).version == version


TestAdapters = Adapters.TestCase
TestAdapters.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
