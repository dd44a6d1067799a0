"""What the next step does: `plan(snapshot, limits) -> StepPlan`, a pure function of integers.

No clock, no random, no torch, no memory of earlier steps: the same snapshot gives the same plan. The rows themselves
live in `state`; the blocks that a plan promises are taken by `memory/blocks.reserve`, which cannot fail.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tandem.errors import ConfigError
from tandem.scheduler.budget import CostModel, Load
from tandem.scheduler.training import Training, TrainLimits, TrainView, fill
from tandem.work import Segment, StepPlan


class RunningRow(NamedTuple):
    """A row that owns blocks: ceil(computed / block_size) of them.

    `own_blocks` are those that come free if it is preempted (nobody shares them). They are counted only when there
    are fewer free blocks than running rows, since nobody is preempted otherwise.
    """

    row: int
    length: int  # known tokens, prompt and generated
    computed: int
    version: int = 0
    wants_token: bool = True
    own_blocks: int = 0
    scores: bool = False  # the log-probabilities of its prompt are wanted: every token costs a row of the head


class WaitingRow(NamedTuple):
    """A row in the queue and the prefix it would start from, cached or forked from its parent.

    Of its `hit_blocks`, `idle_hit_blocks` belong to nobody now: pinning them makes that many fewer free.
    """

    row: int
    length: int
    hit_tokens: int = 0
    hit_blocks: int = 0
    idle_hit_blocks: int = 0
    version: int = 0
    wants_token: bool = True
    scores: bool = False


class Snapshot(NamedTuple):
    """All that the policy sees. Both tuples are in order of (priority, arrival), most urgent first.

    `free_blocks` are owned by no row, whether empty or holding an evictable prefix; the `train_blocks` of training,
    which it gives up at any time, are among them. `slack_s`: how long this step may take at most, so that no running
    row's mean time per output token exceeds its target.
    """

    running: tuple[RunningRow, ...] = ()
    waiting: tuple[WaitingRow, ...] = ()
    free_blocks: int = 0
    slack_s: float = float("inf")
    train: TrainView | None = None
    train_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may not exceed. Raises ConfigError where a full house could not decode in one step."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 16
    max_loras: int = 32
    cost: CostModel = field(default_factory=CostModel)
    max_stall_ratio: float = 3.0
    train: TrainLimits = field(default_factory=TrainLimits)

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"--max-num-seqs must be at least 1, not {self.max_num_seqs}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least --max-num-seqs "
                f"({self.max_num_seqs}), so that every running sequence can decode in one step"
            )


def plan(snapshot: Snapshot, limits: Limits) -> StepPlan:
    """The next step: running decodes, then prompts begun, then admissions in queue order.

    While a decode is in the plan, the whole step is predicted to take at most `max_stall_ratio` times as long as its
    decodes alone; chunks shrink to fit, to nothing if need be. Training comes last, and only into steps without a
    prompt: those are what somebody waits for.
    """
    draft = _Draft(limits, snapshot.free_blocks)
    kept = _decode(draft, snapshot.running)
    has_room = _prefill(draft, kept)
    if has_room and not draft.preempt:
        _admit(draft, kept, snapshot.waiting)
    evicts = draft.free_blocks < snapshot.train_blocks
    if snapshot.train is None or evicts or not has_room or draft.long or draft.admit or draft.preempt:
        return draft.finished(Training(), evicts)
    free = draft.free_blocks - snapshot.train_blocks
    training = fill(
        snapshot.train, limits.train, limits.cost, draft.load, snapshot.slack_s, free, limits.block_size
    )  # fmt: skip
    return draft.finished(training, False)


class _Draft:
    """A plan in the making, with what is left of the budgets: tokens, seconds, blocks."""

    def __init__(self, limits: Limits, free_blocks: int) -> None:
        self.limits = limits
        self.free_blocks = free_blocks
        self.load = Load()
        self.max_s = float("inf")
        self.short: list[Segment] = []  # one token each
        self.long: list[Segment] = []
        self.admit: list[int] = []
        self.preempt: list[int] = []

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_size)

    def append(self, row: int, start: int, length: int, samples: bool, scores: bool) -> None:
        (self.short if length == 1 else self.long).append(Segment(row, start, length, samples))
        self.load = self.load.plus(start, length, samples + scores * length)

    def largest_chunk(self, start: int, remaining: int, wants_token: bool, scores: bool) -> int:
        """Most tokens from `start` that the token and time budgets allow; 0 if none. Blocks are not looked at."""
        most = min(remaining, self.limits.max_num_batched_tokens - self.load.tokens)
        fits, too_long = 0, most + 1
        probe = most  # the whole of it mostly fits; otherwise halve the interval
        while fits + 1 < too_long:
            samples = (wants_token and probe == remaining) + scores * probe
            load = self.load.plus(start, probe, samples)
            if self.limits.cost.seconds(load) <= self.max_s:
                fits = probe
            else:
                too_long = probe
            probe = (fits + too_long) // 2
        return fits

    def finished(self, training: Training, evicts_training: bool) -> StepPlan:
        for segment in training.segments:
            self.append(segment.row, segment.start, segment.length, False, False)
        return StepPlan(
            segments=(*self.short, *self.long),
            admit=tuple(self.admit),
            preempt=tuple(self.preempt),
            predicted_s=self.limits.cost.seconds(self.load),
            slices=training.slices,
            slices_s=training.slices_s,
            evicts_training=evicts_training,
        )


def _decode(draft: _Draft, running: tuple[RunningRow, ...]) -> list[RunningRow]:
    """One token for each row that knows all but its last; returns the rows that keep their blocks.

    A row that finds no block takes those of the least urgent one, be it itself. If every running row is in the middle
    of its prompt, the most urgent one finds its next block this way too: the others wait for it.
    """
    kept = list(running)
    block_size = draft.limits.block_size
    tokens = context = samples = done = 0
    while done < len(kept):  # preemption shortens `kept` from its end
        row = kept[done]
        if row.length - row.computed == 1:
            if row.computed % block_size == 0 and not _find_block(draft, kept, done):
                break
            draft.short.append(Segment(row.row, row.computed, 1, row.wants_token))
            tokens += 1
            context += row.length
            samples += row.wants_token
        done += 1
    draft.load = Load(tokens, context, 0, samples)
    if tokens:
        draft.max_s = draft.limits.max_stall_ratio * draft.limits.cost.seconds(draft.load)
    elif kept and draft.free_blocks == 0 and kept[0].computed % block_size == 0:
        _find_block(draft, kept, 0)
        draft.free_blocks += 1  # found for a prefill, which takes it in `_prefill`
    return kept


def _find_block(draft: _Draft, kept: list[RunningRow], needy: int) -> bool:
    """Take one block for kept[needy], preempting from the end. False if that row itself had to go."""
    while draft.free_blocks == 0 and len(kept) > 1:
        victim = kept.pop()
        draft.preempt.append(victim.row)
        draft.free_blocks += victim.own_blocks
        if needy == len(kept):
            return False
    # A row left alone finds a block whatever the count says: blocks shared by two victims are in nobody's own_blocks.
    draft.free_blocks = max(draft.free_blocks - 1, 0)
    return True


def _prefill(draft: _Draft, running: list[RunningRow]) -> bool:
    """Chunks for rows whose prompt is not all computed, most urgent first. False when a budget ran out."""
    block_size = draft.limits.block_size
    for row in running:
        remaining = row.length - row.computed
        if remaining <= 1:
            continue
        held = draft.blocks(row.computed)
        roof = (held + draft.free_blocks) * block_size - row.computed
        reaches_end = row.wants_token and roof >= remaining
        length = draft.largest_chunk(row.computed, min(remaining, roof), reaches_end, row.scores)
        if length:
            draft.append(row.row, row.computed, length, row.wants_token and length == remaining, row.scores)
            draft.free_blocks -= draft.blocks(row.computed + length) - held
        if length < remaining:
            return False
    return True


def _admit(draft: _Draft, running: list[RunningRow], waiting: tuple[WaitingRow, ...]) -> None:
    """Take rows from the queue in order, until one does not fit whole or a limit is reached.

    A row is admitted when there are blocks for all its known tokens, its idle hits counted as blocks used. Rows whose
    adapter finds no place are passed by base-model rows only: rows of other adapters wait behind them, or the
    adapters running now could keep theirs for ever.
    """
    limits = draft.limits
    versions = {row.version for row in running if row.version}
    num_running = len(running)
    passing_adapters = False
    for row in waiting:
        if num_running >= limits.max_num_seqs:
            return
        if row.version and (passing_adapters or (row.version not in versions and len(versions) >= limits.max_loras)):
            passing_adapters = True
            continue
        blocks = draft.blocks(row.length) - row.hit_blocks + row.idle_hit_blocks
        if blocks > draft.free_blocks:
            return
        remaining = row.length - row.hit_tokens
        length = draft.largest_chunk(row.hit_tokens, remaining, row.wants_token, row.scores)
        if length == 0:
            return
        draft.append(row.row, row.hit_tokens, length, row.wants_token and length == remaining, row.scores)
        draft.admit.append(row.row)
        num_running += 1
        if row.version:
            versions.add(row.version)
        draft.free_blocks -= blocks
        if length < remaining:
            return
