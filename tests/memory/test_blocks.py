"""The block pool by hand and under a state machine; `check()` after every step is the oracle of the accounts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tandem.errors import ConfigError
from tandem.memory.blocks import BlockPool, Hit
from tandem.work import Segment, StepPlan


def row(tokens, version=0, num_computed=0, parent=None):
    tokens = list(tokens)
    return SimpleNamespace(
        tokens=tokens, version=version, num_prompt=len(tokens), num_computed=num_computed, parent=parent
    )


def start(pool, rows, *row_ids):
    """Admit rows in one step and compute all their tokens."""
    segments = []
    for row_id in row_ids:
        hit = pool.match(rows[row_id].version, rows[row_id].tokens).tokens
        segments.append(Segment(row_id, hit, len(rows[row_id].tokens) - hit, True))
    reservation = pool.reserve(StepPlan(tuple(segments), admit=row_ids), rows)
    for row_id in row_ids:
        r = rows[row_id]
        r.num_computed = len(r.tokens)
        pool.commit(row_id, r.version, r.tokens, r.num_computed)
    pool.check()
    return reservation


def finish(pool, *row_ids):
    for row_id in row_ids:
        pool.release(row_id)
    pool.check()


def test_scratch_block_is_owned_by_nobody():
    pool = BlockPool(4, 2)
    assert (pool.num_total, pool.num_free, pool.num_used) == (3, 3, 0)
    start(pool, {0: row(range(6))}, 0)
    assert sorted(pool.table(0)) == [1, 2, 3] and pool.num_used == 3


@pytest.mark.parametrize("num_blocks, block_size", [(1, 16), (0, 16), (8, 0)])
def test_a_pool_that_holds_nothing_is_refused(num_blocks, block_size):
    with pytest.raises(ConfigError, match="2 blocks or more"):
        BlockPool(num_blocks, block_size)


@pytest.mark.parametrize(
    "tokens, version, hit_tokens",
    [
        (range(12), 0, 8),  # one token at least stays to be computed
        (range(13), 0, 12),
        (range(50), 0, 12),  # the last block was not full
        (range(4), 0, 0),
        (range(5), 0, 4),
        ([0, 1, 2, 3, 9, 5, 6, 7, 8], 0, 4),
        ([4, 5, 6, 7, 8], 0, 0),  # the same block after another prefix
        (range(13), 1, 0),  # the same tokens under another adapter version
        ([], 0, 0),
    ],
)
@pytest.mark.parametrize("running", [True, False])
def test_match(tokens, version, hit_tokens, running):
    pool = BlockPool(10, 4)
    start(pool, {0: row(range(14))}, 0)
    table = list(pool.table(0))
    if not running:
        finish(pool, 0)
    num_hit = hit_tokens // 4
    expected = Hit(hit_tokens, tuple(table[:num_hit]), 0 if running else num_hit)
    assert pool.match(version, list(tokens)) == expected
    assert pool.match(version, list(tokens)) == expected, "a look-up changed something"


def test_without_prefix_caching_nothing_is_found_and_nothing_stays():
    pool = BlockPool(10, 4, prefix_caching=False)
    start(pool, {0: row(range(14))}, 0)
    assert pool.match(0, list(range(14))) == Hit()
    finish(pool, 0)
    assert pool.num_cached == 0 and pool.num_free == 9


def test_shared_blocks_are_counted_once_and_come_free_with_the_last_row():
    pool, rows = BlockPool(10, 4), {0: row(range(12)), 1: row(range(12))}
    start(pool, rows, 0)
    start(pool, rows, 1)
    assert pool.table(0)[:2] == pool.table(1)[:2]
    assert pool.num_used == 4 and (pool.num_own(0), pool.num_own(1)) == (1, 1)
    finish(pool, 0)
    assert pool.num_used == 3 and pool.num_own(1) == 3
    finish(pool, 1)
    assert pool.num_used == 0 and pool.num_cached == 3


def test_every_hit_is_pinned_before_a_new_block_is_taken():
    pool, rows = BlockPool(5, 4), {0: row(range(8)), 1: row(range(100, 105)), 2: row(range(8))}
    start(pool, rows, 0)
    finish(pool, 0)
    for block in pool.match(0, list(range(8))).blocks:
        assert pool.num_free == 4 and block
    # Row 1 is planned first and takes two blocks of the four; row 2's hit is the block that would be evicted next.
    first = pool.match(0, rows[2].tokens).blocks
    start(pool, rows, 1, 2)
    assert tuple(pool.table(2)[:1]) == first and pool.num_free == 0


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning():
    pool = BlockPool(9, 2)
    old, new = list(range(10, 18)), list(range(20, 28))
    rows = {0: row(old), 1: row(new), 2: row(old[:5]), 3: row([1, 2, 3, 4, 5])}
    start(pool, rows, 0)
    start(pool, rows, 1)
    finish(pool, 0, 1)
    start(pool, rows, 2)  # its first two blocks are used again; a new one evicts the end of the old
    finish(pool, 2)
    start(pool, rows, 3)
    finish(pool, 3)
    assert pool.match(0, [*old, 0]).tokens == 4
    assert pool.match(0, [*new, 0]).tokens == 6


def test_a_row_continues_under_an_equal_block_of_another_and_survives_its_eviction():
    pool, rows = BlockPool(8, 2), {0: row([1, 2]), 1: row([1, 2]), 2: row(range(50, 57))}
    pool.reserve(StepPlan((Segment(0, 0, 2, True), Segment(1, 0, 2, True)), admit=(0, 1)), rows)
    for row_id in (0, 1):
        pool.commit(row_id, 0, [1, 2], 2)
    assert pool.table(0) != pool.table(1)
    finish(pool, 0)
    pool.reserve(StepPlan((Segment(1, 2, 2, True),)), rows)
    pool.commit(1, 0, [1, 2, 3, 4], 4)  # its second block is indexed under row 0's first, which is idle
    pool.check()
    assert pool.match(0, [1, 2, 3, 4, 5]).idle_blocks == 1
    start(pool, rows, 2)  # takes 4 of the 5 free blocks
    rows[3] = row([60, 61])
    start(pool, rows, 3)  # and this the last, the idle one
    assert pool.match(0, [1, 2, 3, 4, 5]) == Hit()
    finish(pool, 3)
    pool.reserve(StepPlan((Segment(1, 4, 2, True),)), rows)
    pool.commit(1, 0, [1, 2, 3, 4, 5, 6], 6)  # all three are its own and can be found again
    pool.check()
    assert pool.match(0, [1, 2, 3, 4, 5, 6, 7]).blocks == tuple(pool.table(1))


@pytest.mark.parametrize("prompt, copied", [(9, False), (10, True), (11, True), (1, False), (2, True)])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_fork_shares_full_blocks_and_copies_the_partial_one(prompt, copied, prefix_caching):
    pool, rows = BlockPool(20, 4, prefix_caching), {0: row(range(prompt)), 1: row(range(prompt), parent=0)}
    start(pool, rows, 0)
    made = StepPlan((Segment(0, prompt, 1, True), Segment(1, prompt - 1, 1, True)), admit=(1,))
    copies = pool.reserve(made, rows).copies
    pool.check()
    full = (prompt - 1) // 4
    assert pool.table(1)[:full] == pool.table(0)[:full] and pool.table(1)[full] not in pool.table(0)
    assert copies == ([(pool.table(0)[full], pool.table(1)[full])] if copied else [])


def test_an_unloaded_version_is_forgotten_and_the_others_are_not():
    pool, rows = BlockPool(20, 4), {0: row(range(9), 1), 1: row(range(9), 2), 2: row(range(9), 1)}
    start(pool, rows, 0, 1)
    finish(pool, 0)
    start(pool, rows, 2)
    pool.drop_version(1)
    pool.check()
    assert pool.match(1, list(range(9))).tokens == 0 and pool.match(2, list(range(9))).tokens == 8
    assert pool.num_used == 6, "a running row keeps its blocks"
    finish(pool, 1, 2)
    pool.drop_version(2)
    pool.drop_version(2)
    pool.check()
    assert pool.num_cached == 0 and pool.num_free == 19


def test_preempted_rows_are_released_before_anybody_takes_blocks():
    pool, rows = BlockPool(5, 2), {0: row(range(4)), 1: row(range(50, 54))}
    start(pool, rows, 0, 1)
    pool.reserve(StepPlan((Segment(0, 4, 1, True),), preempt=(1,)), rows)
    pool.check()
    assert len(pool.table(0)) == 3 and pool.num_free == 1
    pool.release(1)  # a released row may be released again, as a cancelled waiting row is


@pytest.mark.parametrize(
    "made, message",
    [
        (StepPlan((Segment(0, 0, 9, True),), admit=(0,)), "no block left"),
        (StepPlan((Segment(0, 4, 4, True),), admit=(0,)), "was promised 4 cached tokens and found 0"),
        (StepPlan((Segment(0, 0, 4, True),), admit=(0,), preempt=(1,)), "admits and preempts"),
    ],
)
def test_a_plan_that_breaks_the_rules_is_caught(made, message):
    with pytest.raises(AssertionError, match=message):
        BlockPool(3, 4).reserve(made, {0: row(range(8))})


@pytest.mark.parametrize("break_it", ["refs", "free", "idle", "nodes", "leak"])
def test_check_finds_broken_accounts(break_it):
    pool, rows = BlockPool(12, 2), {0: row(range(6)), 1: row(range(20, 26))}
    start(pool, rows, 0, 1)
    finish(pool, 1)
    pool.check()
    if break_it == "refs":
        pool._refs[pool.table(0)[0]] += 1
    elif break_it == "free":
        pool._free.append(pool.table(0)[0])
    elif break_it == "idle":
        pool._idle.popitem()
    elif break_it == "nodes":
        pool._nodes[pool.table(0)[0]] = None
    else:
        pool._free.pop()
    with pytest.raises(AssertionError):
        pool.check()


class Pool(RuleBasedStateMachine):
    """Rows come, grow, fork and go in any order that the free blocks allow; a model of plain dictionaries says what a
    look-up may find at most: prefixes that were computed under the same version."""

    @initialize(
        num_blocks=st.integers(2, 20), block_size=st.integers(1, 4), prefix_caching=st.sampled_from([True, True, False])
    )
    def make(self, num_blocks, block_size, prefix_caching):
        self.pool = BlockPool(num_blocks, block_size, prefix_caching)
        self.rows: dict[int, SimpleNamespace] = {}
        self.computed: set[tuple[int, tuple[int, ...]]] = set()
        self.next_id = 0

    def compute(self, row_id, first, **moves):
        made = self.rows[row_id]
        length = len(made.tokens) - first
        copies = self.pool.reserve(StepPlan((Segment(row_id, first, length, True),), **moves), self.rows).copies
        made.num_computed = len(made.tokens)
        self.pool.commit(row_id, made.version, made.tokens, made.num_computed)
        for stop in range(self.pool.block_size, made.num_computed + 1, self.pool.block_size):
            self.computed.add((made.version, tuple(made.tokens[:stop])))
        return copies

    def blocks(self, tokens):
        return -(-tokens // self.pool.block_size)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), version=st.integers(0, 2))
    def admit(self, tokens, version):
        hit = self.pool.match(version, tokens)
        assert hit.tokens < len(tokens) and hit.tokens == len(hit.blocks) * self.pool.block_size
        assert hit.tokens == 0 or (version, tuple(tokens[: hit.tokens])) in self.computed
        if self.blocks(len(tokens)) - len(hit.blocks) + hit.idle_blocks > self.pool.num_free:
            return
        row_id = self.next_id
        self.next_id += 1
        self.rows[row_id] = row(tokens, version)
        self.compute(row_id, hit.tokens, admit=(row_id,))
        assert tuple(self.pool.table(row_id)[: len(hit.blocks)]) == hit.blocks

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data, token):
        row_id = data.draw(st.sampled_from(sorted(self.rows)))
        made = self.rows[row_id]
        if self.blocks(len(made.tokens) + 1) - self.blocks(len(made.tokens)) <= self.pool.num_free:
            made.tokens.append(token)
            self.compute(row_id, len(made.tokens) - 1)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from(sorted(self.rows)))
        if self.pool.num_free == 0:
            return
        made = self.rows[parent]
        row_id = self.next_id
        self.next_id += 1
        self.rows[row_id] = row(made.tokens[: made.num_prompt], made.version, parent=parent)
        copies = self.compute(row_id, made.num_prompt - 1, admit=(row_id,))
        assert len(copies) == ((made.num_prompt - 1) % self.pool.block_size > 0)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def release(self, data):
        row_id = data.draw(st.sampled_from(sorted(self.rows)))
        own, free = self.pool.num_own(row_id), self.pool.num_free
        self.pool.release(row_id)
        del self.rows[row_id]
        assert self.pool.num_free == free + own

    @rule(version=st.integers(0, 2))
    def drop(self, version):
        self.pool.drop_version(version)
        self.computed = {(v, tokens) for v, tokens in self.computed if v != version}

    @invariant()
    def accounts_agree(self):
        if hasattr(self, "pool"):
            self.pool.check()
            assert self.pool.num_used == len({b for r in self.rows for b in self.pool.table(r)})

    def teardown(self):
        for row_id in getattr(self, "rows", ()):
            self.pool.release(row_id)
        if hasattr(self, "pool"):
            self.pool.check()
            assert self.pool.num_used == 0


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
