"""How many of Tinker's samples are in the engine at once: sessions take turns, the rest wait here.

A loop may ask for thousands of samples at a time. The engine gets as many as it can run, so that everybody else's
requests wait for one seat at most and not behind the whole batch.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

MAX_WAITING = 4096


class Seats:
    """`num_free` of `num_seats` may be taken; who waits is served in turn with other sessions."""

    def __init__(self, num_seats: int) -> None:
        self.num_seats = num_seats
        self.num_free = num_seats
        self._queues: OrderedDict[str, deque[tuple[int, asyncio.Future[None]]]] = OrderedDict()

    async def take(self, session_id: str, num: int) -> None:
        """Wait for `num` seats, which are the caller's to `give` back. At most `num_seats`."""
        assert 0 < num <= self.num_seats
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(session_id, deque()).append((num, turn))
        self._grant()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(num)
            raise

    def give(self, num: int = 1) -> None:
        self.num_free += num
        assert self.num_free <= self.num_seats
        self._grant()

    def _grant(self) -> None:
        while self._queues:
            session_id, queue = next(iter(self._queues.items()))
            while queue and queue[0][1].done():  # given up
                queue.popleft()
            if not queue:
                del self._queues[session_id]
                continue
            num, turn = queue[0]
            if num > self.num_free:
                return
            queue.popleft()
            self.num_free -= num
            turn.set_result(None)
            self._queues.move_to_end(session_id)
            if not queue:
                del self._queues[session_id]
