"""Which training runs' state is in memory and which is on disk: who leaves, who comes. Integers only.

A run is here, leaving, away or coming; all but those away take memory. Not here: bytes, files and threads
(`engine/residents.py`), what runs have to do (`scheduler/progress.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Where(Enum):
    HERE, LEAVING, AWAY, COMING = range(4)


class Busy(NamedTuple):
    """A run here that has something to do. `service`: what it has had so far, as `RunQueue` counts. `is_at_rest`: none
    of it is under way, so the run could leave."""

    version: int
    service: float
    is_at_rest: bool


class Moves(NamedTuple):
    """What is to happen now: these runs come, those leave, and these begin nothing more, so that they can leave."""

    come: tuple[int, ...] = ()
    leave: tuple[int, ...] = ()
    hold: tuple[int, ...] = ()


@dataclass(slots=True)
class _Seat:
    num_bytes: int
    where: Where


class Residency:
    """At most `max_bytes` and `max_runs` of state in memory; a run that is larger than that is there alone."""

    def __init__(self, max_bytes: int, max_runs: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.max_runs = max_runs or 2**63
        self._seats: OrderedDict[int, _Seat] = OrderedDict()  # least recently used first

    @property
    def used_bytes(self) -> int:
        """Bytes of state in memory, what is leaving or coming included."""
        return sum(seat.num_bytes for seat in self._seats.values() if seat.where is not Where.AWAY)

    def count(self, *where: Where) -> int:
        """How many runs are at one of these."""
        return sum(seat.where in where for seat in self._seats.values())

    def where(self, version: int) -> Where:
        return self._seats[version].where

    def __iter__(self) -> Iterator[int]:
        """All runs, least recently used first."""
        return iter(self._seats)

    def num_bytes(self, version: int) -> int:
        return self._seats[version].num_bytes

    def fits(self, num_bytes: int) -> bool:
        """Whether a run of this size may be in memory beside all that is."""
        return self._fits(self.used_bytes, len(self._seats) - self.count(Where.AWAY), num_bytes)

    def _fits(self, used_bytes: int, num_runs: int, num_bytes: int) -> bool:
        return not num_runs or (used_bytes + num_bytes <= self.max_bytes and num_runs < self.max_runs)

    @property
    def is_over(self) -> bool:
        """More than one run is here and they take more than they may, even once those that are leaving have gone."""
        staying = [s.num_bytes for s in self._seats.values() if s.where in (Where.HERE, Where.COMING)]
        return len(staying) > 1 and (sum(staying) > self.max_bytes or len(staying) > self.max_runs)

    # ------------------------------------------------------------ one run

    def open(self, version: int, num_bytes: int, is_here: bool) -> None:
        """A new run, the most recently used."""
        assert version not in self._seats
        self._seats[version] = _Seat(num_bytes, Where.HERE if is_here else Where.AWAY)

    def close(self, version: int) -> None:
        """Forget a run. The memory of one that moves is free when the move is done: close it then."""
        assert self._seats.pop(version).where in (Where.HERE, Where.AWAY)

    def touch(self, version: int) -> None:
        """The run is being used."""
        self._seats.move_to_end(version)

    def move(self, version: int, before: Where, after: Where) -> None:
        """Each step is the caller's: here, leaving, away, coming, here; or back where it came from."""
        seat = self._seats[version]
        assert seat.where is before and after is not before and (before, after) not in _IMPOSSIBLE, (seat, after)
        seat.where = after

    # ------------------------------------------------------------ all of them

    def arrange(self, wanting: Mapping[int, float], idle: Sequence[int], busy: Sequence[Busy], lead: float) -> Moves:
        """Make room for the runs that are `wanting`, those away with something to do, by their service.

        Whoever has had least comes first and nobody passes it by, however small. For it leave, of those here, the idle
        ones in this order, and then busy ones that are `lead` ahead of it, the farthest first.
        """
        come: list[int] = []
        leave: list[int] = []
        hold: list[int] = []
        victims, ahead = list(idle), sorted(busy, key=lambda b: -b.service)
        used, runs = self.used_bytes, len(self._seats) - self.count(Where.AWAY)
        # What those that are leaving take: room that comes by itself.
        late = [s.num_bytes for s in self._seats.values() if s.where is Where.LEAVING]
        late_bytes, late_runs = sum(late), len(late)
        waits = False
        for version in sorted(wanting, key=lambda v: wanting[v]):
            needed = self._seats[version].num_bytes
            if not waits and self._fits(used, runs, needed):
                come.append(version)
                used, runs = used + needed, runs + 1
                continue
            waits = True
            while not self._fits(used - late_bytes, runs - late_runs, needed):
                if victims:
                    leaver = victims.pop(0)
                    leave.append(leaver)
                elif ahead and ahead[0].service - wanting[version] >= lead:
                    first = ahead.pop(0)
                    leaver = first.version
                    (leave if first.is_at_rest else hold).append(leaver)
                else:
                    return Moves(tuple(come), tuple(leave), tuple(hold))
                late_bytes, late_runs = late_bytes + self._seats[leaver].num_bytes, late_runs + 1
            used, runs = used + needed, runs + 1
        return Moves(tuple(come), tuple(leave), tuple(hold))

    def excess(self, idle: Sequence[int], busy: Sequence[Busy]) -> tuple[int, ...]:
        """Runs that leave where there are more than may be, idle ones first."""
        order = [*idle, *(b.version for b in sorted(busy, key=lambda b: -b.service) if b.is_at_rest)]
        staying = {v: s.num_bytes for v, s in self._seats.items() if s.where in (Where.HERE, Where.COMING)}
        leave = []
        for version in order:
            if len(staying) <= 1 or (sum(staying.values()) <= self.max_bytes and len(staying) <= self.max_runs):
                break
            del staying[version]
            leave.append(version)
        return tuple(leave)


_IMPOSSIBLE = {(Where.HERE, Where.AWAY), (Where.HERE, Where.COMING), (Where.LEAVING, Where.COMING),
               (Where.AWAY, Where.HERE), (Where.AWAY, Where.LEAVING), (Where.COMING, Where.LEAVING)}  # fmt: skip
