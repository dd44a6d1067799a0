"""The operations of one Tinker model, in the order of their numbers however they arrive. No engine, no clock.

A client numbers its operations from 1 on and may send several at once, the first of them last. What comes again is the
caller's to recognise; what comes early waits here, what waits for something that never comes is handed back.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from tandem.errors import InvalidRequest, Overloaded

T = TypeVar("T")
MAX_WAITING = 1024


class Order(Generic[T]):
    """`next_seq` is the number whose turn it is."""

    def __init__(self) -> None:
        self.next_seq = 1
        self._waiting: dict[int, tuple[float, T]] = {}
        self._spent: set[int] = set()  # numbers ahead that will not come any more

    def add(self, seq_id: int, op: T, now_s: float) -> list[T]:
        """Take an operation; returns those whose turn it is now. Raises InvalidRequest for a number that is over or
        taken, Overloaded where too many wait already."""
        if seq_id < self.next_seq or seq_id in self._spent or seq_id in self._waiting:
            raise InvalidRequest(
                f"seq_id {seq_id} was used before, and what came of it is no longer kept: the next one is "
                f"{self.next_seq}",
                "seq_id",
            )
        if seq_id > self.next_seq and len(self._waiting) >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} operations wait for seq_id {self.next_seq}: send that one", "seq_id")
        self._waiting[seq_id] = now_s, op
        return self._ready()

    def _ready(self) -> list[T]:
        ready = []
        while self.next_seq in self._waiting or self.next_seq in self._spent:
            if self.next_seq in self._waiting:
                ready.append(self._waiting.pop(self.next_seq)[1])
            self._spent.discard(self.next_seq)
            self.next_seq += 1
        return ready

    def overdue(self, before_s: float) -> list[T]:
        """Give up the operations that have waited since before then; their numbers are spent."""
        late = [seq_id for seq_id, (arrived_s, _) in self._waiting.items() if arrived_s < before_s]
        self._spent.update(late)
        return [self._waiting.pop(seq_id)[1] for seq_id in late]

    def drain(self) -> list[T]:
        """Give up everything that waits."""
        return self.overdue(float("inf"))
