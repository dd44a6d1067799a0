"""How far each training run has come: its queue of operations, the microbatches made of them, their cursors.

Integers only: no tensors, no clock. `view` says what could run next; what does run is the policy's decision, and
`commit` takes in what has run. Total order per run: an operation starts when all before it are done, except that passes
without an update between them follow each other closely.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tandem.scheduler.training import BackwardView, ForwardView, TrainRow, TrainView, UpdateView
from tandem.work import Example, FactorOp, FileOp, Nudge, Pass, Publish, Slice, StepPlan, TrainOp, Update

# The share of a run of priority p is this to the power of p.
PRIORITY_BASE = 2.0
PRIORITY_LIMIT = 16
# Examples that begin alike share what they have in common where it is at least so many tokens, and this part of a pass:
# a microbatch of such examples cannot ride.
LEAST_SHARED = 8
SHARED_PART = 0.2


@dataclass(slots=True, eq=False)
class Queued:
    """An operation on its way: examples not yet in a microbatch, examples not yet done."""

    op_id: int
    op: TrainOp | Nudge
    num_taken: int = 0
    num_left: int = 0
    parameters_done: int = 0
    shares: bool = False


@dataclass(slots=True, eq=False)
class RunQueue:
    """One run's operations in order. `service` is what it has got so far, in tokens over its share. `is_away`: its
    tensors are not in memory, so nothing of it can run. `is_held`: no further example of it begins."""

    run_id: str
    version: int
    num_parameters: int
    share: float
    may_ride: bool
    service: float = 0.0
    is_away: bool = False
    is_held: bool = False
    ops: deque[Queued] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One example in a microbatch; `row` is below 0. Its first tokens may be those of earlier rows: `past` says where
    in the microbatch these are, and `length` counts the others."""

    row: int
    run: RunQueue
    queued: Queued
    index: int
    length: int
    num_counted: int
    past: tuple[tuple[int, int], ...] = ()

    @property
    def num_shared(self) -> int:
        return sum(stop - start for start, stop in self.past)


@dataclass(slots=True, eq=False)
class Batch:
    """A microbatch and its cursors; see `ForwardView` and `BackwardView`."""

    batch_id: int
    rows: tuple[BatchRow, ...]
    learns: bool
    num_layers: int
    done: int = 0
    layer: int | None = None
    cut: int = 0
    lost: int = 0
    back_layer: int = 0
    stop: int = 0
    train_rows: tuple[TrainRow, ...] = ()
    num_tokens: int = 0
    num_counted: int = 0

    def __post_init__(self) -> None:
        self._arrange(self.rows)
        self.num_tokens = sum(r.length for r in self.rows)
        self.num_counted = sum(r.num_counted for r in self.rows)
        self.learns = self.learns and self.num_counted > 0
        self.back_layer, self.stop = self.num_layers - 1, self.num_tokens

    def _arrange(self, rows: Sequence[BatchRow]) -> None:
        self.rows = tuple(rows)
        self.train_rows = tuple(TrainRow(r.row, r.length, r.run.version, r.num_shared) for r in rows)

    @property
    def is_shared(self) -> bool:
        """Some rows' first tokens are those of others."""
        return any(r.past for r in self.rows)

    @property
    def num_read(self) -> int:
        """Tokens of its examples, whether they are shared or not."""
        return sum(r.length + r.num_shared for r in self.rows)

    def skip(self, known: Collection[int]) -> None:
        """These rows have been through all layers before. They come first; where rows share tokens it is all or
        none."""
        assert not self.done and self.layer is None and (not self.is_shared or len(known) in (0, len(self.rows)))
        first = [r for r in self.rows if r.row in known]
        self._arrange(first + [r for r in self.rows if r.row not in known])
        self.done = sum(r.length for r in first)

    @property
    def is_up(self) -> bool:
        """All tokens have passed all layers."""
        return self.done == self.num_tokens

    @property
    def is_finished(self) -> bool:
        return self.is_up and self.lost == self.num_counted and (not self.learns or self.back_layer < 0)

    @property
    def trained_tokens(self) -> float:
        """Tokens trained on so far: the way up counts as a third of the work, the way down as the rest."""
        if not self.learns:
            return 0.0
        layers, passed = self.num_layers, self.done
        up = passed * layers
        if self.layer is not None:
            up += self.layer * (self.num_tokens - passed) + self.cut - passed
        down = (layers - 1 - self.back_layer) * self.num_tokens + self.num_tokens - self.stop
        return (up + 2 * down) / (3 * layers) * self.num_read / self.num_tokens

    @property
    def may_ride(self) -> bool:
        """Its rows' adapters are those that serving knows, and each has all of its tokens."""
        return all(r.run.may_ride and not r.past and not _is_frozen(r.queued.op) for r in self.rows)


class Progress:
    """All runs. At most one microbatch is on its way up and one on its way down.

    `batch_tokens`: tokens of a microbatch at most (a longer example goes alone). `mixes`: examples of several runs may
    share a microbatch. `shares`: those that begin alike may share tokens.
    """

    def __init__(self, num_layers: int, batch_tokens: int, mixes: bool, shares: bool = False) -> None:
        self.num_layers = num_layers
        self.batch_tokens = batch_tokens
        self.mixes = mixes
        self.shares = shares
        self.forward: Batch | None = None
        self.backward: Batch | None = None
        self._runs: dict[str, RunQueue] = {}
        self._next_row = -1
        self._next_batch = 1

    @property
    def runs(self) -> Mapping[str, RunQueue]:
        return self._runs

    @property
    def has_work(self) -> bool:
        """Something could run now: a file that is being written or read is not such."""
        return (
            self.forward is not None
            or self.backward is not None
            or any(run.ops and not isinstance(run.ops[0].op, FileOp) for run in self._present())
        )

    def _present(self) -> Iterator[RunQueue]:
        return (run for run in self._runs.values() if not run.is_away)

    def open(self, run_id: str, version: int, num_parameters: int, priority: int, may_ride: bool) -> None:
        """A new run; it starts with as much service as the one that has had least."""
        assert run_id not in self._runs
        share = PRIORITY_BASE ** max(-PRIORITY_LIMIT, min(priority, PRIORITY_LIMIT))
        service = min((run.service for run in self._runs.values()), default=0.0)
        self._runs[run_id] = RunQueue(run_id, version, num_parameters, share, may_ride, service)

    def close(self, run_id: str) -> tuple[list[Queued], list[Batch]]:
        """Forget a run. Returns its operations not done and the microbatches that nobody waits for any more; those that
        other runs share go on to their end."""
        run = self._runs.pop(run_id)
        idle = [b for b in (self.forward, self.backward) if b and not any(self._is_open(r.run) for r in b.rows)]
        self.forward = None if self.forward in idle else self.forward
        self.backward = None if self.backward in idle else self.backward
        return list(run.ops), idle

    def _is_open(self, run: RunQueue) -> bool:
        return self._runs.get(run.run_id) is run

    def uses(self, version: int) -> bool:
        """Whether a microbatch on its way holds rows of this run, open or closed."""
        return any(r.run.version == version for b in (self.forward, self.backward) if b for r in b.rows)

    def enqueue(self, op_id: int, op: TrainOp | Nudge) -> None:
        """Add an operation to its run's queue. The run is open, a pass has examples."""
        num_left = len(op.examples) if isinstance(op, Pass) else 0
        run = self._runs[op.run_id]
        # Without dropout, a token is computed to the same whatever comes after it.
        shares = self.shares and run.may_ride and isinstance(op, Pass) and _is_worth_sharing(op)
        if not run.ops:  # what it did not ask for earlier it cannot claim now
            run.service = max(run.service, min((r.service for r in self._runs.values() if r.ops), default=0.0))
        run.ops.append(Queued(op_id, op, num_left=num_left, shares=shares))

    # ------------------------------------------------------------ what could run

    def assemble(self) -> Batch | None:
        """Start the next microbatch if none is on its way up and an example may begin; returns it."""
        if self.forward is not None:
            return None
        rows: list[BatchRow] = []
        learns, frozen, num_tokens = True, False, 0
        for run in sorted((r for r in self._present() if not r.is_held), key=lambda r: r.service):
            prefixes = Prefixes()
            while (queued := _next_pass(run)) is not None:
                op = queued.op
                assert isinstance(op, Pass)
                differs = (op.learns, op.frozen) != (learns, frozen)
                if rows and (differs or (not self.mixes and rows[-1].queued is not queued)):
                    break
                first = queued.num_taken
                group = range(first, first + op.group_size)
                found, length = self._rows_of(run, queued, group, num_tokens, prefixes)
                if rows and num_tokens + length > self.batch_tokens:
                    return self._start(rows, learns)
                rows += found
                self._next_row -= len(group)
                learns, frozen, num_tokens = op.learns, op.frozen, num_tokens + length
                queued.num_taken += len(group)
                run.service += length / run.share
            if rows and not self.mixes:
                break
        return self._start(rows, learns) if rows else None

    def _rows_of(
        self, run: RunQueue, queued: Queued, group: range, start: int, prefixes: Prefixes
    ) -> tuple[list[BatchRow], int]:
        """The rows of some examples if the first is to begin at token `start` of a microbatch, and their tokens."""
        op, rows, at = queued.op, [], start
        assert isinstance(op, Pass)
        for i, index in enumerate(group):
            example = op.examples[index]
            past = prefixes.place(example, at) if queued.shares else ()
            length = len(example.tokens) - sum(high - low for low, high in past)
            rows.append(BatchRow(self._next_row - i, run, queued, index, length, op.num_counted(index), past))
            at += length
        return rows, at - start

    def _start(self, rows: Sequence[BatchRow], learns: bool) -> Batch:
        self.forward = Batch(self._next_batch, tuple(rows), learns, self.num_layers)
        self._next_batch += 1
        return self.forward

    def view(self, held_blocks: int, dense: Mapping[int, bool]) -> TrainView | None:
        """What the policy may choose from; None when there is nothing. `held_blocks`: KV blocks of the microbatch on
        its way up. `dense[layer]`: that layer's weights need no unpacking."""
        forward = backward = None
        if (up := self.forward) is not None and not up.is_up:
            forward = ForwardView(
                up.batch_id, up.train_rows, up.num_tokens, up.done, up.layer, up.cut, up.may_ride, held_blocks
            )
        if (down := self.backward) is not None:
            backward = BackwardView(
                down.batch_id, down.train_rows, down.num_tokens, down.num_counted, down.lost, down.learns,
                down.back_layer, down.stop, dense.get(down.back_layer, False),
            )  # fmt: skip
        updates = tuple(
            UpdateView(run.version, run.num_parameters, run.ops[0].parameters_done, _kind(op))
            for run in self._present()
            if run.ops and isinstance(op := run.ops[0].op, FactorOp)
        )
        if forward is None and backward is None and not updates:
            return None
        return TrainView(self.num_layers, forward, backward, updates)

    @property
    def trained_tokens(self) -> float:
        """Tokens' worth of training done in the microbatches on their way."""
        return sum(batch.trained_tokens for batch in (self.forward, self.backward) if batch is not None)

    def due_files(self) -> list[tuple[RunQueue, Queued]]:
        """Runs whose next operation is a save or a load."""
        return [(run, run.ops[0]) for run in self._present() if run.ops and isinstance(run.ops[0].op, FileOp)]

    def due_publications(self) -> list[tuple[RunQueue, Publish]]:
        """Runs to be published as they are now; pop each before asking again."""
        heads = [(run, run.ops[0].op) for run in self._present() if run.ops]
        return [(run, op) for run, op in heads if isinstance(op, Publish)]

    def may_leave(self, run: RunQueue) -> bool:
        """Whether nothing of a run is under way, and what comes next is more than an update, which is over in a moment
        and leaves less to be carried. Between the parts of a probe is for the caller to see."""
        if self.uses(run.version):
            return False
        if not run.ops:
            return True
        first = run.ops[0]
        return isinstance(first.op, Pass) or (isinstance(first.op, Nudge) and not first.parameters_done)

    # ------------------------------------------------------------ what has run

    def commit(self, plan: StepPlan) -> tuple[list[Queued], list[Batch]]:
        """Move the cursors over a plan that has run. Returns the operations done by it, and the microbatches."""
        finished_ops: list[Queued] = []
        ridden = sum(s.length for s in plan.segments if s.row < 0)
        if ridden:
            assert self.forward is not None
            self.forward.done += ridden
        for piece in plan.slices:
            self._move(piece, finished_ops)
        finished = []
        if self.backward is not None and self.backward.is_finished:
            finished.append(self.backward)
            for row in self.backward.rows:
                row.queued.num_left -= 1
                if row.queued.num_left == 0 and self._is_open(row.run):
                    finished_ops.append(self.pop(row.run.run_id))
            self.backward = None
        self.turn()
        return finished_ops, finished

    def turn(self) -> bool:
        """Send the microbatch that is up on its way down, if there is one and no other is; whether there was."""
        if self.backward is not None or self.forward is None or not self.forward.is_up:
            return False
        self.forward, self.backward = None, self.forward
        return True

    def _move(self, piece: Slice, finished_ops: list[Queued]) -> None:
        match piece.kind:
            case "forward":
                up = self.forward
                assert up is not None and up.batch_id == piece.batch
                up.layer, up.cut = piece.layer, piece.stop
                if up.cut == up.num_tokens:
                    up.layer, up.cut = piece.layer + 1, up.done
                if up.layer == self.num_layers:
                    up.layer, up.done = None, up.num_tokens
            case "loss" | "backward":
                down = self.backward
                assert down is not None and down.batch_id == piece.batch
                if piece.kind == "loss":
                    down.lost = piece.stop
                else:
                    down.stop = piece.start
                    if down.stop == 0:
                        down.back_layer, down.stop = down.back_layer - 1, down.num_tokens
            case _:
                run = next(r for r in self._runs.values() if r.version == piece.batch)
                run.ops[0].parameters_done = piece.stop
                if piece.stop == run.num_parameters:
                    finished_ops.append(self.pop(run.run_id))

    def pop(self, run_id: str) -> Queued:
        """A run's first operation, which is done (or has failed)."""
        return self._runs[run_id].ops.popleft()

    def drop(self, run_id: str) -> list[Queued]:
        """Give up all that a run has queued, none of which is in a microbatch."""
        run = self._runs[run_id]
        assert not self.uses(run.version)
        dropped = list(run.ops)
        run.ops.clear()
        return dropped

    def abandon(self, run_ids: Collection[str]) -> tuple[list[Queued], list[Batch]]:
        """Give up every microbatch on its way, and all that these runs and those in the microbatches have queued, which
        could only go wrong now. Returns both."""
        batches = [b for b in (self.forward, self.backward) if b is not None]
        self.forward = self.backward = None
        dropped: list[Queued] = []
        for run in self._runs.values():
            if run.run_id in run_ids or any(row.run is run for batch in batches for row in batch.rows):
                dropped += run.ops
                run.ops.clear()
        return dropped, batches

    def evict(self) -> Batch:
        """The microbatch on its way up has lost its blocks: it goes on in slices, which rebuild keys and values."""
        assert self.forward is not None and self.forward.layer is None
        self.forward.layer, self.forward.cut = 0, self.forward.done
        return self.forward


class Prefixes:
    """The first tokens, without a weight in the loss, of a run's examples in a microbatch, and where they are."""

    def __init__(self) -> None:
        self._tree: dict[int, tuple[int, dict]] = {}  # token -> its place, and the tokens after it

    def place(self, example: Example, start: int) -> tuple[tuple[int, int], ...]:
        """Where an example's first tokens are already; the others go to the places from `start` on."""
        tokens, most = example.tokens, _num_unweighted(example)
        tree, places, at = self._tree, [], 0
        while at < most and (known := tree.get(tokens[at])) is not None:
            places.append(known[0])
            tree, at = known[1], at + 1
        if at < LEAST_SHARED:
            tree, places, at = self._tree, [], 0
        for place, token in enumerate(tokens[at:most], start):
            tree = tree.setdefault(token, (place, {}))[1]
        return tuple(_spans(places))


def _num_unweighted(example: Example) -> int:
    """How many of its first tokens other examples may share: those that no loss looks at, and not the last one."""
    last = len(example.tokens) - 1
    return next((i for i, weight in enumerate(example.weights[:last]) if weight), last)


def _is_worth_sharing(op: Pass) -> bool:
    if len({tuple(example.tokens[:LEAST_SHARED]) for example in op.examples}) == len(op.examples):
        return False
    prefixes, at = Prefixes(), 0
    for example in op.examples:
        shared = sum(stop - start for start, stop in prefixes.place(example, at))
        at += len(example.tokens) - shared
    return at <= (1 - SHARED_PART) * sum(len(example.tokens) for example in op.examples)


def _spans(places: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring places together, as (start, stop)."""
    found: list[tuple[int, int]] = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1] = found[-1][0], place + 1
        else:
            found.append((place, place + 1))
    return found


def _is_frozen(op: TrainOp | Nudge) -> bool:
    return isinstance(op, Pass) and op.frozen


def _kind(op: FactorOp) -> str:
    return op.params.kind if isinstance(op, Update) else "mezo"


def _next_pass(run: RunQueue) -> Queued | None:
    """The pass with the next example that may begin, if the operations before it allow."""
    for queued in run.ops:
        if not isinstance(queued.op, Pass):
            return None
        if queued.num_taken < len(queued.op.examples):
            return queued
    return None
