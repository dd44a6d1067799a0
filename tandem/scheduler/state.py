"""The rows waiting and running: who is in the queue, how far each has come, and what a step's result means for it.

One row is one choice of one request. Integers and tokens only; who owns which block is `memory/blocks`' business, met
here through the three-method protocol `Blocks`. Decides when a row is finished, and nothing about what runs next.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from tandem.scheduler.policy import Limits, RunningRow, Snapshot, WaitingRow
from tandem.scheduler.training import TrainView
from tandem.work import Request, Segment, StepPlan, StepResult, TokenEvent, TopLogprobs


@dataclass(slots=True, eq=False)
class Row:
    """One choice of one request, from arrival to finish."""

    row_id: int
    request: Request
    index: int
    version: int  # adapter version, 0 is the base model
    tokens: list[int]  # prompt and generated
    num_prompt: int
    arrival: int
    parent: int | None  # row of choice 0, whose prompt blocks this one shares
    seed: int
    num_computed: int = 0
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache at first admission
    is_running: bool = False
    preempted: bool = False  # at least once
    reported: bool = False  # its first event is out
    prompt_logprobs: list[TopLogprobs] = field(default_factory=list)

    @property
    def order(self) -> tuple[int, int]:
        return (self.request.priority, self.arrival)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Known tokens not yet computed."""
        return len(self.tokens) - self.num_computed

    @property
    def queued_tokens(self) -> int:
        """Tokens to compute from the queue on: all known ones, or the last of the prompt for a fork."""
        return len(self.tokens) if self.parent is None or self.preempted else 1

    @property
    def wants_token(self) -> bool:
        return self.request.sampling.max_tokens > 0

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.index == 0 and self.request.sampling.prompt_logprobs is not None and not self.reported

    @property
    def uses_cache(self) -> bool:
        """False while prompt log-probabilities are wanted: they need every prompt token computed."""
        return not self.wants_prompt_logprobs


class Hit(Protocol):
    """A cached prefix: how many tokens, in which blocks, how many of those belong to nobody now."""

    @property
    def tokens(self) -> int: ...
    @property
    def blocks(self) -> Sequence[int]: ...
    @property
    def idle_blocks(self) -> int: ...


class Blocks(Protocol):
    """What a snapshot asks of the block pool; nothing here changes it."""

    @property
    def num_free(self) -> int: ...
    def match(self, version: int, tokens: Sequence[int]) -> Hit: ...
    def num_own(self, row_id: int) -> int: ...


class State:
    """All rows not finished yet. `eos_token_ids` end a row unless it ignores them; `max_model_len` tokens end any."""

    def __init__(self, eos_token_ids: Collection[int] = (), max_model_len: int = 2**31) -> None:
        self._eos = frozenset(eos_token_ids)
        self._max_model_len = max_model_len
        self._rows: dict[int, Row] = {}
        self._by_request: dict[str, list[Row]] = {}
        self._waiting: list[Row] = []  # both in order of (priority, arrival)
        self._running: list[Row] = []
        self._next_id = 0
        self.queued_tokens = 0  # tokens that the waiting rows will have to compute, if the cache holds nothing for them

    @property
    def rows(self) -> Mapping[int, Row]:
        """Every row, waiting or running, by id."""
        return MappingProxyType(self._rows)

    @property
    def waiting(self) -> Sequence[Row]:
        return self._waiting

    @property
    def running(self) -> Sequence[Row]:
        return self._running

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def row(self, row_id: int) -> Row:
        return self._rows[row_id]

    def has_request(self, request_id: str) -> bool:
        """Whether any choice of a request is still waiting or running."""
        return request_id in self._by_request

    def add(self, request: Request, version: int, seed: int) -> list[Row]:
        """Queue the `n` rows of a request, index 0 first. All have the same seed: the draws differ by index.

        Rows 1.. fork from row 0 once its prompt is computed; the prompt's log-probabilities are row 0's to report.
        """
        assert request.prompt and request.request_id not in self._by_request
        rows: list[Row] = []
        for index in range(request.sampling.n):
            row = Row(
                row_id=self._next_id,
                request=request,
                index=index,
                version=version,
                tokens=list(request.prompt),
                num_prompt=len(request.prompt),
                arrival=self._next_id,
                parent=rows[0].row_id if rows else None,
                seed=seed,
            )
            self._next_id += 1
            self._rows[row.row_id] = row
            self._enqueue(row)
            rows.append(row)
        self._by_request[request.request_id] = list(rows)
        return rows

    def cancel(self, request_id: str, index: int | None = None) -> list[Row]:
        """Forget a request, or one choice of it. Returns the rows removed, whose blocks the caller releases; unknown
        or finished ones give an empty list."""
        rows = [r for r in self._by_request.get(request_id, ()) if index is None or r.index == index]
        for row in rows:
            self._remove(row)
        return rows

    def snapshot(
        self,
        pool: Blocks,
        limits: Limits,
        slack_s: float = float("inf"),
        train: TrainView | None = None,
        train_blocks: int = 0,
    ) -> Snapshot:
        """What the policy sees of the rows. Of the queue only as much as one step could admit: looking up prefixes for
        a thousand waiting rows would take longer than the step."""
        free_blocks = pool.num_free + train_blocks
        is_short = free_blocks < len(self._running)
        running = tuple(
            RunningRow(
                r.row_id,
                len(r.tokens),
                r.num_computed,
                r.version,
                r.wants_token,
                pool.num_own(r.row_id) if is_short else 0,
                r.wants_prompt_logprobs,
            )
            for r in self._running
        )
        return Snapshot(running, tuple(self._candidates(pool, limits)), free_blocks, slack_s, train, train_blocks)

    def commit(self, plan: StepPlan, result: StepResult) -> tuple[list[TokenEvent], list[Row]]:
        """Apply a step that was run: moves between queue and running, progress, new tokens.

        Returns the events for the user, one per row that got a token or finished, and the finished rows, which are
        forgotten here and whose blocks the caller releases. Must be given plans in the order they were made, with no
        `cancel` of a planned row in between.
        """
        for row_id in plan.preempt:
            row = self._rows[row_id]
            row.num_computed, row.preempted = 0, True
            if not row.reported:
                row.prompt_logprobs.clear()
            _take_out(self._running, row)
            row.is_running = False
            self._enqueue(row)
        starts = {s.row: s.start for s in plan.segments} if plan.admit else {}
        for row_id in plan.admit:
            row = self._rows[row_id]
            self._dequeue(row)
            insort(self._running, row, key=_order)
            row.is_running = True
            if not row.preempted:
                parent = self._fork_parent(row)
                row.cached_tokens = parent.cached_tokens if parent else starts[row_id]
        events: list[TokenEvent] = []
        finished: list[Row] = []
        for segment in plan.requests:
            row = self._rows[segment.row]
            event = self._advance(row, segment, result)
            if event is not None:
                events.append(event)
                if event.finish_reason is not None:
                    finished.append(row)
        for row in finished:
            self._remove(row)
        return events, finished

    def _advance(self, row: Row, segment: Segment, result: StepResult) -> TokenEvent | None:
        row.num_computed = segment.stop
        if row.wants_prompt_logprobs:
            row.prompt_logprobs += result.prompt_logprobs.get(row.row_id, ())
        token_id = None
        finish_reason, stop_token = None, False
        if segment.samples:
            token_id = result.tokens[row.row_id]
            finish_reason, stop_token = self._append(row, token_id)
        elif row.wants_token or row.num_computed < row.num_prompt:
            return None
        else:
            finish_reason = "length"
        is_first, prompt_logprobs = not row.reported, None
        if row.wants_prompt_logprobs:
            prompt_logprobs = row.prompt_logprobs
            assert len(prompt_logprobs) == row.num_prompt - 1
        row.reported = True
        return TokenEvent(
            request_id=row.request.request_id,
            index=row.index,
            token_id=token_id,
            logprob=result.logprobs.get(row.row_id),
            finish_reason=finish_reason,
            stop_token=stop_token,
            cached_tokens=row.cached_tokens if is_first else 0,
            prompt_logprobs=prompt_logprobs,
        )

    def _append(self, row: Row, token_id: int) -> tuple[str | None, bool]:
        """Add a sampled token; returns the finish reason, if that ends the row, and whether the token did it."""
        sampling = row.request.sampling
        may_stop = row.num_generated >= sampling.min_tokens
        row.tokens.append(token_id)
        if may_stop and (token_id in sampling.stop_token_ids or (token_id in self._eos and not sampling.ignore_eos)):
            return "stop", True
        if row.num_generated >= sampling.max_tokens or len(row.tokens) >= self._max_model_len:
            return "length", False
        return None, False

    def _candidates(self, pool: Blocks, limits: Limits) -> list[WaitingRow]:
        """The head of the queue, each with the prefix it would start from; forks that wait for a parent left out."""
        seats = limits.max_num_seqs - len(self._running)
        tokens = limits.max_num_batched_tokens
        candidates: list[WaitingRow] = []
        versions = {r.version for r in self._running if r.version}
        for row in self._waiting:
            if seats <= 0 or tokens <= 0:
                break
            if row.version:
                versions.add(row.version)
                if len(versions) > limits.max_loras:
                    continue  # the policy lets only base-model rows pass from here
            waiting = self._candidate(row, pool, limits.block_size)
            if waiting is not None:
                candidates.append(waiting)
                seats -= 1
                tokens -= waiting.length - waiting.hit_tokens
        return candidates

    def _candidate(self, row: Row, pool: Blocks, block_size: int) -> WaitingRow | None:
        tokens, num_blocks, idle_blocks = 0, 0, 0
        parent = self._fork_parent(row)
        if parent is not None:
            if not parent.is_running or parent.num_computed < row.num_prompt - 1:
                return None
            tokens = row.num_prompt - 1
            num_blocks = tokens // block_size
        elif row.uses_cache:
            hit = pool.match(row.version, row.tokens)
            tokens, num_blocks, idle_blocks = hit.tokens, len(hit.blocks), hit.idle_blocks
        return WaitingRow(
            row.row_id,
            len(row.tokens),
            tokens,
            num_blocks,
            idle_blocks,
            row.version,
            row.wants_token,
            row.wants_prompt_logprobs,
        )

    def _fork_parent(self, row: Row) -> Row | None:
        """The row whose blocks hold, or are going to hold, this one's prompt but for the last token, which a fork
        computes itself. None for a row that goes alone: no fork, parent gone, or resuming with text of its own."""
        return self._rows.get(row.parent) if row.parent is not None and not row.num_generated else None

    def _enqueue(self, row: Row) -> None:
        insort(self._waiting, row, key=_order)
        self.queued_tokens += row.queued_tokens

    def _dequeue(self, row: Row) -> None:
        _take_out(self._waiting, row)
        self.queued_tokens -= row.queued_tokens

    def _remove(self, row: Row) -> None:
        if row.is_running:
            _take_out(self._running, row)
            row.is_running = False
        else:
            self._dequeue(row)
        del self._rows[row.row_id]
        siblings = self._by_request[row.request.request_id]
        siblings.remove(row)
        if not siblings:
            del self._by_request[row.request.request_id]


def _order(row: Row) -> tuple[int, int]:
    return (row.request.priority, row.arrival)


def _take_out(rows: list[Row], row: Row) -> None:
    """Remove `row` from a list in order of (priority, arrival)."""
    place = bisect_left(rows, _order(row), key=_order)
    assert rows[place] is row
    del rows[place]
