"""The KV block pool: which row owns which block, and which blocks hold a prefix that others may share.

Integers only; the bytes are in `arena`. A block is free (on the free list), idle (unreferenced, but its prefix is in
the index and may be hit again) or used (in the table of one or more rows). Block 0 is scratch: nobody owns it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tandem.errors import ConfigError
from tandem.work import StepPlan


class Hit(NamedTuple):
    """A cached prefix: its tokens (a multiple of the block size), its blocks, and how many of those are idle."""

    tokens: int = 0
    blocks: tuple[int, ...] = ()
    idle_blocks: int = 0


class Reservation(NamedTuple):
    """What the device must do before the step: copy whole blocks (source, destination)."""

    copies: list[tuple[int, int]]


class RowLike(Protocol):
    """What the pool reads of a row."""

    version: int
    tokens: list[int]
    num_prompt: int
    num_computed: int
    parent: int | None


@dataclass(slots=True, eq=False)
class _Node:
    """One full block of one prefix. Roots stand for adapter versions and have block 0."""

    block: int
    parent: _Node | None = None
    key: tuple[int, ...] = ()
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    in_index: bool = True


@dataclass(slots=True, eq=False)
class _Table:
    """The blocks of one row in order of position, and how far its tokens are in the index."""

    blocks: list[int]
    node: _Node | None = None  # node of the last indexed block (the root if none)
    num_indexed: int = 0


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, the scratch block included."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ConfigError(
                f"a KV cache of {num_blocks} blocks of {block_size} tokens holds nothing: it needs 2 blocks or more"
            )
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.num_total = num_blocks - 1
        self.num_queried = 0  # tokens looked up for admitted rows, a counter
        self.num_hit = 0  # of these, tokens found
        self._refs = [0] * num_blocks
        self._nodes: list[_Node | None] = [None] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))  # a stack: the block given back last is the warmest
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._tables: dict[int, _Table] = {}
        self._roots: dict[int, _Node] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no row owns, empty or evictable."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_total - self.num_free

    @property
    def num_cached(self) -> int:
        """Idle blocks: evictable, but a hit while they last."""
        return len(self._idle)

    def match(self, version: int, tokens: Sequence[int]) -> Hit:
        """The longest cached prefix of `tokens` under an adapter version, leaving at least one token to compute.
        Changes nothing."""
        node = self._roots.get(version)
        if node is None:
            return Hit()
        size = self.block_size
        blocks = []
        for start in range(0, len(tokens) - size, size):
            node = node.children.get(tuple(tokens[start : start + size]))
            if node is None:
                break
            blocks.append(node.block)
        refs = self._refs
        return Hit(len(blocks) * size, tuple(blocks), sum(refs[b] == 0 for b in blocks))

    def num_own(self, row_id: int) -> int:
        """Blocks that come free when this row is released: those in no other table."""
        refs = self._refs
        return sum(refs[b] == 1 for b in self._tables[row_id].blocks)

    def num_held(self, row_id: int) -> int:
        """Blocks of a row; 0 for one without a table."""
        table = self._tables.get(row_id)
        return len(table.blocks) if table is not None else 0

    def table(self, row_id: int) -> list[int]:
        """Blocks of a row in order of position. The list is the pool's own: it grows with the row; do not change it."""
        return self._tables[row_id].blocks

    def reserve(self, plan: StepPlan, rows: Mapping[int, RowLike]) -> Reservation:
        """Give every segment of the plan its blocks; `rows` holds at least the planned rows and the parents of forks.

        Cannot fail for a plan made from a snapshot of this pool: preempted rows are released first, every promised
        hit is pinned before any new block is taken, and no plan both preempts and admits. An admitted row whose
        segment starts at s > 0 takes its first s tokens from its running parent (full blocks shared, a partial one
        copied: the copies returned must be made before the step) or from the prefix index. Rows are not changed:
        `num_computed` of an admitted row is its segment's start, which `State.commit` knows from the plan.
        """
        assert not (plan.admit and plan.preempt), "a plan that admits and preempts"
        for row_id in plan.preempt:
            self.release(row_id)
        copies: list[tuple[int, int]] = []
        tables, size = self._tables, self.block_size
        if plan.admit:
            starts = {s.row: s.start for s in plan.segments}
            sources = [(row_id, self._pin(row_id, rows, starts[row_id])) for row_id in plan.admit]
            for row_id, source in sources:
                if source is not None:
                    copies.append((source, self._take()))
                    tables[row_id].blocks.append(copies[-1][1])
        for segment in plan.segments:
            blocks = tables[segment.row].blocks
            while len(blocks) * size < segment.start + segment.length:
                blocks.append(self._take())
        return Reservation(copies)

    def hold(self, row_id: int, num_tokens: int) -> None:
        """Give a training row all its blocks at once. Needs as many free ones; nobody else ever shares them."""
        table = self._tables.setdefault(row_id, _Table([]))
        while len(table.blocks) * self.block_size < num_tokens:
            table.blocks.append(self._take())

    def commit(self, row_id: int, version: int, tokens: Sequence[int], num_computed: int) -> None:
        """Make the row's full blocks of computed tokens findable. `tokens` are all the row's tokens so far.

        Where an equal block is in the index already, the row keeps its own, which stays private.
        """
        table, size = self._tables[row_id], self.block_size
        num_full = num_computed // size
        if num_full <= table.num_indexed or not self.prefix_caching:
            return
        node = table.node
        if node is None or not node.in_index:  # new, or what it continued was evicted: index it all again
            node, table.num_indexed = self._roots.setdefault(version, _Node(0)), 0
        for i in range(table.num_indexed, num_full):
            key = tuple(tokens[i * size : (i + 1) * size])
            child = node.children.get(key)
            if child is None:
                block = table.blocks[i]
                assert self._nodes[block] is None
                child = node.children[key] = self._nodes[block] = _Node(block, node, key)
            node = child
        table.node, table.num_indexed = node, num_full

    def release(self, row_id: int) -> None:
        """Give up a row's blocks: those in the index become idle, its last ones to be evicted first. A row without
        blocks (still waiting, or released before) is none of our business."""
        table = self._tables.pop(row_id, None)
        if table is None:
            return
        for block in reversed(table.blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._unreferenced(block)

    def drop_version(self, version: int) -> None:
        """Forget every cached prefix of an adapter version. Rows that still run keep their blocks, unshared."""
        root = self._roots.pop(version, None)
        if root is not None:
            self._forget(root)

    def check(self) -> None:
        """Recount everything. Raises AssertionError if a block is lost, owned twice or wrongly indexed."""
        counted = Counter(b for t in self._tables.values() for b in t.blocks)
        assert all(len(set(t.blocks)) == len(t.blocks) for t in self._tables.values()), "block twice in one table"
        assert counted[0] == 0 and self._refs[0] == 0, "scratch block owned"
        for block in range(1, self.num_total + 1):
            assert self._refs[block] == counted[block], f"block {block}: {self._refs[block]} refs"
        used = set(counted)
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "block twice on the free list"
        assert not (free & idle or free & used or idle & used), "block in two states"
        assert free | idle | used == set(range(1, self.num_total + 1)), "block in no state"
        found: list[int] = []
        pending = list(self._roots.values())
        while pending:
            node = pending.pop()
            assert node.in_index
            for key, child in node.children.items():
                assert child.parent is node and child.key == key and len(key) == self.block_size
                assert self._nodes[child.block] is child, "index and block disagree"
                found.append(child.block)
                pending.append(child)
        assert len(found) == len(set(found)), "block twice in the index"
        indexed = {block for block, node in enumerate(self._nodes) if node is not None}
        assert set(found) == indexed, "block with a node outside the index"
        assert idle == indexed - used, "idle block without a prefix, or prefix neither used nor idle"

    def _pin(self, row_id: int, rows: Mapping[int, RowLike], start: int) -> int | None:
        """Open the row's table with the blocks of its first `start` tokens; returns the block to copy, if any."""
        row = rows[row_id]
        assert row_id not in self._tables
        size, source = self.block_size, None
        parent = row.parent
        is_fork = parent in self._tables and start == row.num_prompt - 1
        if parent is not None and is_fork and rows[parent].num_computed >= start:
            blocks = self._tables[parent].blocks
            shared = blocks[: start // size]
            source = blocks[start // size] if start % size else None
        else:
            hit = self.match(row.version, row.tokens) if start else Hit()
            assert hit.tokens == start, f"row {row_id} was promised {start} cached tokens and found {hit.tokens}"
            shared = list(hit.blocks)
            self.num_queried += len(row.tokens)
            self.num_hit += start
        for block in shared:
            if self._refs[block] == 0:
                del self._idle[block]
            self._refs[block] += 1
        self._tables[row_id] = _Table(shared)
        return source

    def _take(self) -> int:
        """An empty block, referenced once."""
        if not self._free:
            assert self._idle, "no block left: the plan promised more than there is"
            block = next(iter(self._idle))
            node = self._nodes[block]
            assert node is not None and node.parent is not None
            del node.parent.children[node.key]
            self._forget(node)
        block = self._free.pop()
        self._refs[block] = 1
        return block

    def _forget(self, node: _Node) -> None:
        """Take a node and all below it out of the index. Below an idle one there can be used ones: a row keeps its own
        block where an equal one is indexed, and indexes its later blocks under that."""
        pending = [node]
        while pending:
            node = pending.pop()
            node.in_index = False
            pending += node.children.values()
            node.children = {}
            if node.block:
                self._nodes[node.block] = None
                if self._refs[node.block] == 0:
                    del self._idle[node.block]
                    self._free.append(node.block)

    def _unreferenced(self, block: int) -> None:
        if self._nodes[block] is None:
            self._free.append(block)
        else:
            self._idle[block] = None
