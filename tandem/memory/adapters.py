"""Adapter versions: names, pins, and the rows each active one takes in the stacked LoRA pool. Integers only.

A name points to an immutable version and version ids are never used twice, so that nothing computed under one can be
mistaken for another. Bytes are the caller's: it frees those of the versions handed back here as gone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from typing import NamedTuple

from tandem.errors import Conflict, NotFound
from tandem.work import Adapter


class Load(NamedTuple):
    """An adapter version to copy into rows [lo, hi) of the stacked pool."""

    version: int
    lo: int
    hi: int


class AdapterTable:
    """At most `max_resident` versions at once; the stacked pool starts with `num_rows` rank rows and doubles on need.

    Version 0 is the base model: always there, with no rows and no pins.
    """

    def __init__(self, max_resident: int = 256, num_rows: int = 64) -> None:
        self.max_resident = max_resident
        self.num_rows = num_rows  # capacity of the stacked pool
        self._next_version = 1
        self._adapters: dict[int, Adapter] = {}  # resident: named, or retired but pinned
        self._versions: dict[str, int] = {}  # what a name means to new requests
        self._pins: dict[int, int] = {}
        self._freed: list[int] = []
        self._in_training: set[int] = set()  # versions without a name, whose factors change
        self._ranges: OrderedDict[int, tuple[int, int]] = OrderedDict()  # active, least recently used first

    @property
    def num_resident(self) -> int:
        return len(self._adapters)

    @property
    def used_rows(self) -> int:
        """One more than the highest row of the stacked pool that an active adapter has."""
        return max((hi for _, hi in self._ranges.values()), default=0)

    @property
    def num_pins(self) -> int:
        """Pins held by requests, over all versions."""
        return sum(pins for version, pins in self._pins.items() if version not in self._in_training)

    def names(self) -> list[str]:
        """Names that new requests may use, oldest first."""
        return list(self._versions)

    def adapter(self, version: int) -> Adapter:
        """A resident version, also a retired one that is still pinned. KeyError otherwise."""
        return self._adapters[version]

    def publish(self, name: str, rank: int, path: str, base_model: str = "") -> Adapter:
        """Give `name` a new version, for requests from now on. An older one lives until its last pin goes; if it has
        none, it is gone now: see `take_freed`. Raises Conflict when no more versions may be resident."""
        assert rank > 0
        old = self._versions.get(name, 0)
        leaves = bool(old) and not self._pins[old]
        if len(self._adapters) - len(self._in_training) - leaves >= self.max_resident:
            raise Conflict(
                f"{len(self._adapters)} adapters are loaded, which is the limit: "
                f"unload one first, or start with a larger --max-cpu-loras",
                param="lora_name",
            )
        adapter = Adapter(name=name, version=self._next_version, rank=rank, path=path, base_model=base_model)
        self._next_version += 1
        self._adapters[adapter.version] = adapter
        self._versions[name] = adapter.version
        self._pins[adapter.version] = 0
        if leaves:
            self._free(old)
        return adapter

    def begin_training(self, rank: int) -> int:
        """A version for an adapter whose factors change: it has no name and no request ever gets it."""
        adapter = Adapter(name="", version=self._next_version, rank=rank, path="")
        self._next_version += 1
        self._adapters[adapter.version] = adapter
        self._pins[adapter.version] = 1
        self._in_training.add(adapter.version)
        return adapter.version

    def end_training(self, version: int) -> list[int]:
        """The reverse of `begin_training`. Returns the versions gone by this: that one."""
        self._in_training.remove(version)
        self._free(version)
        return self.take_freed()

    def outdate(self, version: int) -> None:
        """The factors have changed: the next step that uses them copies them into the pool again."""
        self._ranges.pop(version, None)

    def retire(self, name: str) -> list[int]:
        """Take the name away at once. Returns the versions gone by this: none while it is pinned.

        Raises NotFound.
        """
        version = self.resolve(name)
        del self._versions[name]
        if not self._pins[version]:
            self._free(version)
        return self.take_freed()

    def resolve(self, name: str | None) -> int:
        """The version a new request gets; 0 for None. Raises NotFound."""
        if name is None:
            return 0
        try:
            return self._versions[name]
        except KeyError:
            raise NotFound(f"there is no adapter {name!r}: load it first, or see /v1/models", param="model") from None

    def pin(self, version: int) -> None:
        """Keep a version while a request uses it."""
        if version:
            self._pins[version] += 1

    def unpin(self, version: int) -> list[int]:
        """The reverse of `pin`. Returns the versions gone by this: retired ones whose last pin it was."""
        if version:
            assert self._pins[version] > 0
            self._pins[version] -= 1
            if not self._pins[version] and self._versions.get(self._adapters[version].name) != version:
                self._free(version)
        return self.take_freed()

    def take_freed(self) -> list[int]:
        """Versions gone since the last call: free their bytes and forget their cached prefixes."""
        freed, self._freed = self._freed, []
        return freed

    def reserve(self, versions: Iterable[int]) -> list[Load]:
        """Activate all adapters of a step; returns those to be copied into the stacked pool before it. Cannot fail;
        `num_rows` may have grown afterwards."""
        needed = dict.fromkeys(v for v in versions if v)
        new = [v for v in needed if v not in self._ranges]
        for version in needed:
            if version in self._ranges:
                self._ranges.move_to_end(version)
        return [Load(v, *self.activate(v, keep=needed)) for v in new]

    def activate(self, version: int, keep: Collection[int] | None = None) -> tuple[int, int]:
        """Rows [lo, hi) of an adapter in the stacked pool: the ones it has, or the first gap that fits. If none does,
        the least recently used of the others give theirs up, except those in `keep` (None: those pinned); if that is
        not enough, the pool doubles."""
        if version in self._ranges:
            self._ranges.move_to_end(version)
            return self._ranges[version]
        rank = self._adapters[version].rank
        idle = [v for v in self._ranges if (v not in keep if keep is not None else not self._pins[v])]
        while (lo := self._gap(rank)) is None:
            if idle:
                del self._ranges[idle.pop(0)]
            else:
                self.num_rows *= 2
        self._ranges[version] = (lo, lo + rank)
        return self._ranges[version]

    def rows(self, version: int) -> tuple[int, int]:
        """Rows [lo, hi) of an active adapter; (0, 0) for the base model."""
        return self._ranges[version] if version else (0, 0)

    def is_active(self, version: int) -> bool:
        return version in self._ranges

    def check(self) -> None:
        """Recount everything. Raises AssertionError if names, pins, residents and rows disagree."""
        assert self._pins.keys() == self._adapters.keys() and self._in_training <= self._adapters.keys()
        assert len(self._adapters) - len(self._in_training) <= self.max_resident
        assert all(self._adapters[v].name == name for name, v in self._versions.items())
        current = set(self._versions.values())
        assert all(pins >= 0 for pins in self._pins.values())
        assert all(v in current or self._pins[v] for v in self._adapters), "retired, unpinned and not gone"
        assert self._ranges.keys() <= self._adapters.keys()
        end = 0
        for version, (lo, hi) in sorted(self._ranges.items(), key=_range_of):
            assert end <= lo and hi <= self.num_rows and hi - lo == self._adapters[version].rank, "rows overlap"
            end = hi

    def _gap(self, rank: int) -> int | None:
        """Lowest row from which `rank` rows are free."""
        end = 0
        for lo, hi in sorted(self._ranges.values()):
            if lo - end >= rank:
                break
            end = hi
        return end if end + rank <= self.num_rows else None

    def _free(self, version: int) -> None:
        del self._adapters[version], self._pins[version]
        self._ranges.pop(version, None)
        self._freed.append(version)


def _range_of(item: tuple[int, tuple[int, int]]) -> tuple[int, int]:
    return item[1]
