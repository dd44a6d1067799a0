"""What serving's forward passes computed for tokens that training may want: layer inputs and linears' outputs.

A tree of tokens for each run in training, as its adapter is now: what a token is computed to depends on those before it
and on the adapter, on nothing else. Which requests are worth keeping is the caller's business.

Shape letters: T tokens of one step, N tokens looked up, W features.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tandem.model.decoder import Record


@dataclass(slots=True, eq=False)
class Node:
    """A token after those above it; `place` is where its activations are, 0 for a root, -1 for what is gone."""

    parent: Node | None = None
    token: int = -1
    place: int = 0
    children: dict[int, Node] = field(default_factory=dict)

    @property
    def below(self) -> Iterator[Node]:
        """All nodes under this one, those above first."""
        left = list(self.children.values())
        while left:
            yield (node := left.pop())
            left += node.children.values()


class Computed(NamedTuple):
    """Tokens start:start + length of a row, computed in one step with adapter `version`, from place `at` of the flat
    batch on."""

    row: int
    version: int
    tokens: Sequence[int]
    start: int
    length: int
    at: int


class Kept:
    """Room for `capacity` tokens, `widths` says of what: (layer, name) -> features. What was used least recently goes
    first."""

    def __init__(
        self, widths: Mapping[tuple[int, str], int], capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self._widths = dict(widths)
        self._dtype = dtype
        self._device = device
        self._rows: dict[tuple[int, str], Tensor] = {}
        self._free: list[int] = []
        self._order: OrderedDict[Node, None] = OrderedDict()
        self._tips: dict[int, tuple[int, Node]] = {}  # rows of the last step -> their next position, the node before
        self._roots: dict[int, Node] = {}  # runs, as their adapters are now
        self._versions: dict[int, Node] = {}  # adapter versions that were made of them
        self._forgotten: deque[Node] = deque()

    @property
    def num_tokens(self) -> int:
        """Tokens that can still be found, and what is about to go."""
        return len(self._order)

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._rows.values())

    def publish(self, run: int, version: int) -> None:
        """What is computed with this adapter version is what the run, as it is now, would compute."""
        self._versions[version] = self._roots.setdefault(run, Node())

    def change(self, run: int) -> None:
        """A run's adapter is another one now, or gone: nothing that was kept is of use. Any thread may say so."""
        root = self._roots.pop(run, None)
        if root is not None:
            root.place = -1
            self._forgotten.append(root)

    def keeps(self, version: int) -> bool:
        """Whether anything computed with this adapter version is worth keeping."""
        return self.capacity > 0 and (root := self._versions.get(version)) is not None and root.place >= 0

    def drop(self) -> None:
        """Give back the memory. All runs are gone."""
        assert not self._roots
        self._clear()
        assert not self._order
        self._rows.clear()
        self._free.clear()
        self._tips.clear()

    # ------------------------------------------------------------ coming in

    def record(self, computed: Sequence[Computed]) -> Record | None:
        """What keeps these tokens' activations in the forward pass about to run; None where there is nothing new. A row
        whose earlier tokens are not here, or for which there is no room, is left out."""
        self._clear()
        computed = [c for c in computed if self.keeps(c.version)]
        if not computed:
            return None
        self._evict(sum(c.length for c in computed))
        rows, places, tips = [], [], {}
        for c in computed:
            node = self._before(c)
            for i in range(c.start, c.start + c.length):
                if node is None:
                    break
                child = node.children.get(c.tokens[i])
                if child is None and self._free:
                    child = self._add(node, c.tokens[i])
                    rows.append(c.at + i - c.start)
                    places.append(child.place)
                node = child
            if node is not None:
                tips[c.row] = c.start + c.length, node
        self._tips = tips
        if not rows:
            return None
        return partial(self._write, _slice(rows), _slice(places), self._ints(rows), self._ints(places))

    def _write(
        self, rows: slice | None, places: slice | None, rows_T: Tensor, places_T: Tensor, layer: int, name: str,
        tensor: Tensor,
    ) -> None:  # fmt: skip
        kept = self._rows.get((layer, name))
        if kept is None:
            return
        taken = tensor.index_select(0, rows_T) if rows is None else tensor[rows]
        if places is None:
            kept.index_copy_(0, places_T, taken)
        else:
            kept[places] = taken

    def _before(self, c: Computed) -> Node | None:
        """The node of the token before those computed now."""
        root = self._versions[c.version]
        position, tip = self._tips.get(c.row, (-1, root))
        if position == c.start and tip.place >= 0:
            return tip
        path = self._path(root, c.tokens[: c.start])
        if path is None:
            return None
        self._touch(path)
        return path[-1] if path else root

    def _path(self, root: Node, tokens: Sequence[int]) -> list[Node] | None:
        node, path = root, []
        for token in tokens:
            if (child := node.children.get(token)) is None:
                return None
            path.append(node := child)
        return path

    def _touch(self, path: Sequence[Node]) -> None:
        for node in path:
            self._order.move_to_end(node)

    def _add(self, parent: Node, token: int) -> Node:
        node = Node(parent, token, self._free.pop())
        parent.children[token] = node
        self._order[node] = None
        return node

    def _evict(self, num_tokens: int) -> None:
        """Make room for so many, as far as there is any. What goes takes all that comes after it along."""
        if not self._rows:
            with torch.inference_mode(False):
                self._rows = {
                    key: torch.empty(self.capacity, width, dtype=self._dtype, device=self._device)
                    for key, width in self._widths.items()
                }
            self._renew_free()
        while len(self._free) < num_tokens and self._order:
            self._remove(next(iter(self._order)))

    def _clear(self) -> None:
        """Free what nobody looks for any more."""
        if self._forgotten:
            self._versions = {version: root for version, root in self._versions.items() if root.place >= 0}
        while self._forgotten:
            root = self._forgotten.popleft()
            for node in root.below:
                self._release(node)
            root.children.clear()
            if not self._order:
                self._renew_free()

    def _renew_free(self) -> None:
        # Neighbouring tokens in neighbouring places: what is copied then is one piece.
        self._free = list(range(self.capacity - 1, -1, -1))

    def _remove(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.token]
        for gone in (node, *node.below):
            self._release(gone)

    def _release(self, node: Node) -> None:
        del self._order[node]
        self._free.append(node.place)
        node.place = -1

    # ------------------------------------------------------------ going out

    def find(self, run: int, tokens: Sequence[int]) -> list[int] | None:
        """Where each of these tokens' activations are, for `read`; None unless all are here. Good until the next
        `record`."""
        self._clear()
        root = self._roots.get(run)
        path = None if root is None else self._path(root, tokens)
        if path is None:
            return None
        self._touch(path)
        return [node.place for node in path]

    def read(self, layer: int, name: str, places_N: Tensor, out_NW: Tensor) -> None:
        """Copy what was kept of one tensor."""
        torch.index_select(self._rows[layer, name], 0, places_N, out=out_NW)

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _slice(values: Sequence[int]) -> slice | None:
    """The values as a slice, if each is one more than the one before."""
    is_run = values[-1] - values[0] == len(values) - 1 and all(b - a == 1 for a, b in pairwise(values))
    return slice(values[0], values[-1] + 1) if is_run else None


def all_of(records: Sequence[Record]) -> Record | None:
    """One that does what several do."""
    if len(records) < 2:
        return records[0] if records else None

    def record(layer: int, name: str, tensor: Tensor) -> None:
        for each in records:
            each(layer, name, tensor)

    return record
