"""Tinker's futures: what was asked for and is not there yet, or was not collected yet.

Results live in memory, for so long after they came and a little after they were collected. Nothing here knows what
they are results of.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Coroutine, Hashable
from dataclasses import dataclass, field
from typing import Any

from tandem.api.tinker_results import Failure, Result
from tandem.errors import Cancelled, Gone, NotFound, Overloaded, TandemError

log = logging.getLogger("tandem.tinker")

KEPT_S = 600.0
KEPT_AFTER_COLLECTION_S = 60.0
MAX_PER_TENANT = 16384
# Ids remembered after their results, to tell what is over from what never was.
NUM_REMEMBERED = 65536


@dataclass(eq=False)
class Future:
    """`key` names what was asked for, so that asking again finds the same future."""

    request_id: str
    tenant: str
    session_id: str
    key: Hashable
    kind: str
    task: asyncio.Task[Result]
    sequence_ids: list[str] = field(default_factory=list)
    done_s: float | None = None
    collected_s: float | None = None

    @property
    def result(self) -> Result | None:
        """None while there is none."""
        if not self.task.done():
            return None
        return Failure(Cancelled("the request was cancelled")) if self.task.cancelled() else self.task.result()


class Futures:
    """All futures of a server."""

    def __init__(self, kept_s: float = KEPT_S) -> None:
        self._kept_s = kept_s
        self._futures: dict[str, Future] = {}
        self._by_key: dict[Hashable, Future] = {}
        self._counts: dict[str, int] = {}
        self._over: dict[str, str] = {}  # id -> tenant

    def __len__(self) -> int:
        return len(self._futures)

    def find(self, key: Hashable) -> Future | None:
        """The future of what was asked for before."""
        return self._by_key.get(key)

    def check_room(self, tenant: str) -> None:
        """Raises Overloaded where a tenant has as many futures as it may."""
        if self._counts.get(tenant, 0) >= MAX_PER_TENANT:
            raise Overloaded(
                f"{MAX_PER_TENANT} requests are under way or uncollected: collect results before asking for more"
            )

    def add(
        self, tenant: str, session_id: str, key: Hashable, kind: str, work: Coroutine[Any, Any, Result]
    ) -> Future:
        """Begin to wait for `work`; what goes wrong with it becomes the future's result."""
        task = asyncio.create_task(_settled(work))
        future = Future(f"req_{secrets.token_hex(16)}", tenant, session_id, key, kind, task)

        def done(_: asyncio.Task[Result]) -> None:
            future.done_s = time.monotonic()
            work.close()  # it never began if the task was cancelled at once

        task.add_done_callback(done)
        self._futures[future.request_id] = self._by_key[key] = future
        self._counts[tenant] = self._counts.get(tenant, 0) + 1
        return future

    def get(self, tenant: str, request_id: str) -> Future:
        """Raises NotFound for an id that is not this tenant's, Gone for one whose result was dropped."""
        future = self._futures.get(request_id)
        if future is not None and future.tenant == tenant:
            return future
        if self._over.get(request_id) == tenant:
            raise Gone(f"the result of {request_id} was not collected in {self._kept_s:.0f} s and is gone: ask again")
        raise NotFound(f"there is no request {request_id[:80]!r}", "request_id")

    async def wait(self, future: Future, seconds: float) -> Result | None:
        """The result, or None where it takes longer."""
        await asyncio.wait((future.task,), timeout=seconds)
        if (result := future.result) is not None and future.collected_s is None:
            future.collected_s = time.monotonic()
        return result

    def sweep(self, now_s: float) -> None:
        """Drop what nobody collected in time, and what was collected a while ago."""
        for future in list(self._futures.values()):
            is_old = future.done_s is not None and now_s - future.done_s > self._kept_s
            is_spent = future.collected_s is not None and now_s - future.collected_s > KEPT_AFTER_COLLECTION_S
            if is_old or is_spent:
                self._drop(future)

    def cancel(self, future: Future) -> None:
        """Stop the work; the future fails."""
        future.task.cancel()

    def end_session(self, session_id: str) -> None:
        """Stop all that a session has under way; what it has not collected is gone."""
        for future in [f for f in self._futures.values() if f.session_id == session_id]:
            future.task.cancel()
            self._drop(future)

    def _drop(self, future: Future) -> None:
        del self._futures[future.request_id]
        if self._by_key.get(future.key) is future:
            del self._by_key[future.key]
        self._counts[future.tenant] -= 1
        if not self._counts[future.tenant]:
            del self._counts[future.tenant]
        self._over[future.request_id] = future.tenant
        while len(self._over) > NUM_REMEMBERED:
            del self._over[next(iter(self._over))]


async def _settled(work: Awaitable[Result]) -> Result:
    try:
        return await work
    except TandemError as error:
        return Failure(error)
    except Exception:
        log.exception("a request failed for a reason that is the server's own")
        return Failure(TandemError("the server failed to do this; its log says why"))
