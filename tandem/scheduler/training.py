"""What training does in a step: windows that ride in serving's forward pass, slices after it. Pure numbers.

Inference first: training gets what the tightest latency target leaves of a step, nothing while a prompt is being
computed, and everything (in steps of bounded length) when there is nothing to serve. Which microbatch comes next is
`progress`' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tandem.scheduler.budget import CostModel, Load
from tandem.work import Segment, Slice

# Slices shorter than this waste more time on reading weights than they save in waiting.
LEAST_WINDOW = 64
LARGEST_WINDOW = 512
# Window lengths are multiples of this: matrix products are prepared anew for each shape.
WINDOW_STEP = 32
FIXED_WINDOW = 256
# Parameters of an update's piece; less where each takes more than reading and writing it.
UPDATE_STEP = {"adamw": 2**23, "sgd": 2**23, "lion": 2**23}
SLOW_UPDATE_STEP = 2**20


class TrainRow(NamedTuple):
    """One example of a microbatch; row ids of training are below 0. `past`: tokens before the `length` that it has in
    common with earlier rows, whose business these are."""

    row: int
    length: int
    version: int
    past: int = 0


class ForwardView(NamedTuple):
    """The microbatch on its way up. `done` tokens have passed all layers. The others go layer by layer from the moment
    `layer` is not None: those before `cut` have passed that layer too."""

    batch: int
    rows: tuple[TrainRow, ...]
    num_tokens: int
    done: int
    layer: int | None
    cut: int
    may_ride: bool
    held_blocks: int


class BackwardView(NamedTuple):
    """The microbatch on its way down: first the loss of its `num_counted` tokens, `lost` of which are done, then,
    unless it only wants the loss, the layers; tokens from `stop` on are through `layer`. `is_dense`: the layer's
    weights need no unpacking."""

    batch: int
    rows: tuple[TrainRow, ...]
    num_tokens: int
    num_counted: int
    lost: int
    learns: bool
    layer: int
    stop: int
    is_dense: bool


class UpdateView(NamedTuple):
    """An optimiser step that is due: parameters from `done` on are still to be updated."""

    version: int
    num_parameters: int
    done: int
    kind: str = "adamw"


class TrainView(NamedTuple):
    """All that the policy sees of training. `num_layers` is the model's."""

    num_layers: int
    forward: ForwardView | None = None
    backward: BackwardView | None = None
    updates: tuple[UpdateView, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainCost:
    """Predicted seconds of a slice, corrected after each one: per kind a fixed part, one per token, one per query x key
    pair, and a scale. `unpack_s` is what the first backward slice of a layer takes more, `ride_s` what a token
    that rides takes beyond what a request's would."""

    fixed_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("forward", "backward", "loss"), 2e-3))
    token_s: dict[str, float] = field(
        default_factory=lambda: {"forward": 1.5e-4, "backward": 4e-4, "loss": 5e-4, "update": 3e-9}
    )
    pair_s: dict[str, float] = field(default_factory=dict)
    scale: dict[str, float] = field(default_factory=dict)
    unpack_s: float = 0.02
    ride_s: float = 0.0

    def seconds(self, kind: str, tokens: int, pairs: int = 0, unpacks: bool = False) -> float:
        """Seconds of one slice of so many tokens (parameters, for an update)."""
        whole = self.fixed_s.get(kind, 0.0) + self.token_s[kind] * tokens + self.pair_s.get(kind, 0.0) * pairs
        return self.scale.get(kind, 1.0) * whole + (self.unpack_s if unpacks else 0.0)

    def corrected(self, kind: str, predicted_s: float, measured_s: float, unpacked: bool) -> TrainCost:
        """The model after one more slice, which unpacked its layer or not."""
        if predicted_s <= 0 or measured_s <= 0:
            return self
        if unpacked:
            rest_s = max(measured_s - (predicted_s - self.unpack_s), 0.0)
            return replace(self, unpack_s=self.unpack_s + 0.2 * (min(rest_s, 4 * self.unpack_s) - self.unpack_s))
        ratio = min(max(measured_s / predicted_s, 0.5), 2.0)
        scale = min(max(self.scale.get(kind, 1.0) * ratio**0.2, 1 / 64), 64.0)
        return replace(self, scale=self.scale | {kind: scale})

    def corrected_ride(self, rest_s: float, tokens: int, step_s: float) -> TrainCost:
        """The model after a step of `step_s` with so many riding tokens that took `rest_s` more than it should: a tenth
        of the way there. A single measurement says little: what it is compared with is a prediction too."""
        each_s = max(-0.25 * step_s, min(rest_s, 0.25 * step_s)) / tokens
        return replace(self, ride_s=max(0.0, self.ride_s + 0.1 * (each_s - self.ride_s)))


def first_guess(cost: CostModel, num_layers: int, head_share: float) -> TrainCost:
    """Slices' costs from what serving's steps took in the calibration. `head_share`: the head's parameters by a
    layer's."""
    bulk = 256
    least_s, bulk_s = cost.seconds(Load(tokens=4)), cost.seconds(Load(tokens=bulk))
    token_s = max(bulk_s - least_s, 0.3 * bulk_s) / bulk / num_layers
    fixed_s = 0.5 * least_s / num_layers
    pair_s = cost.scale * cost.per_pair_s / num_layers
    return TrainCost(
        fixed_s={"forward": fixed_s, "backward": 2 * fixed_s, "loss": fixed_s * head_share},
        token_s={"forward": token_s, "backward": 2.5 * token_s, "loss": 4 * token_s * head_share, "update": 3e-9},
        pair_s={"forward": pair_s, "backward": 3.5 * pair_s},
        unpack_s=4 * fixed_s,
    )


@dataclass(frozen=True, slots=True)
class TrainLimits:
    """What training may take. `step_s`: the longest that slices keep an arriving request waiting. `window`: tokens of a
    slice at most. `deterministic`: fixed windows, and never a forward pass together with serving."""

    step_s: float = 0.15
    window: int | None = None
    share_forward: bool = True
    deterministic: bool = False
    cost: TrainCost = field(default_factory=TrainCost)

    @property
    def may_ride(self) -> bool:
        return self.share_forward and not self.deterministic


def pairs_of(rows: Sequence[TrainRow], start: int, stop: int) -> int:
    """Query x key pairs of tokens start:stop of a microbatch."""
    pairs = at = 0
    for row in rows:
        low, high = max(start - at, 0), min(stop - at, row.length)
        if low < high:
            pairs += (high * (high + 1) - low * (low + 1)) // 2 + row.past * (high - low)
        at += row.length
        if at >= stop:
            break
    return pairs


class Training(NamedTuple):
    """What a step does for training."""

    segments: tuple[Segment, ...] = ()
    slices: tuple[Slice, ...] = ()
    slices_s: float = 0.0


def fill(
    view: TrainView,
    limits: TrainLimits,
    cost: CostModel,
    load: Load,
    slack_s: float,
    free_blocks: int,
    block_size: int,
) -> Training:
    """Training beside a forward pass with this `load` (empty: nothing to serve), within `slack_s` of the whole step.

    The last microbatch goes first, so that activations are given back early. Where none is on its way down, tokens
    ride: the few that could ride beside slices would cost more each than the many for which a step of their own has
    room. One slice may take longer than a step of training should, if it must and the slack allows: where the smallest
    there is takes that long, training would never get on otherwise.
    """
    is_alone = load.tokens == 0
    serving_s = cost.seconds(load)
    most_s = slack_s - serving_s
    room_s = min(most_s, limits.step_s)
    segments: tuple[Segment, ...] = ()
    forward = view.forward
    rides = not is_alone and view.backward is None
    if forward is not None and rides and _may_ride(forward, limits, free_blocks, block_size):
        tokens = _ride(forward, view.num_layers, load, cost, limits, room_s)
        segments = _segments(forward.rows, forward.done, forward.done + tokens)
        ridden_s = _added_s(forward, load, cost, limits, tokens)
        room_s, most_s = room_s - ridden_s, most_s - ridden_s
        if tokens:
            forward = None  # what did not ride now rides in the next step
    draft = _Slices(limits, view.num_layers, room_s, float("inf") if is_alone and slack_s > 0 else most_s)
    for update in view.updates:
        draft.update(update)
    if view.backward is not None:
        draft.backward(view.backward)
    elif forward is not None:
        draft.forward(forward)
    return Training(segments, tuple(draft.slices), draft.slices_s)


def _may_ride(forward: ForwardView, limits: TrainLimits, free_blocks: int, block_size: int) -> bool:
    """Whether the microbatch's keys and values fit the cache and its forward pass has not begun in slices."""
    needed = sum(-(-row.length // block_size) for row in forward.rows) - forward.held_blocks
    return limits.may_ride and forward.may_ride and forward.layer is None and needed <= free_blocks


def _added_s(forward: ForwardView, load: Load, cost: CostModel, limits: TrainLimits, tokens: int) -> float:
    """What `tokens` more in the forward pass take."""
    pairs = pairs_of(forward.rows, forward.done, forward.done + tokens)
    more = Load(load.tokens + tokens, load.context, load.pairs + pairs, load.samples)
    return limits.cost.ride_s * tokens + cost.seconds(more) - cost.seconds(load)


def _ride(
    forward: ForwardView, num_layers: int, load: Load, cost: CostModel, limits: TrainLimits, room_s: float
) -> int:
    """How many tokens ride: as many as fit, unless slices would get on faster; then none."""
    window = min(forward.num_tokens, limits.window or LARGEST_WINDOW)
    most = min(forward.num_tokens - forward.done, window)
    own_s = limits.cost.seconds("forward", window) * num_layers / window
    fits, too_many = 0, most + 1
    while fits + 1 < too_many:
        tokens = (fits + too_many) // 2
        if _added_s(forward, load, cost, limits, tokens) <= room_s:
            fits = tokens
        else:
            too_many = tokens
    return fits if fits * own_s > room_s or fits == most else 0


def _segments(rows: Sequence[TrainRow], start: int, stop: int) -> tuple[Segment, ...]:
    """Tokens start:stop of a microbatch as segments of its rows."""
    found, at = [], 0
    for row in rows:
        low, high = max(start - at, 0), min(stop - at, row.length)
        if low < high:
            found.append(Segment(row.row, low, high - low, False))
        at += row.length
    return tuple(found)


class _Slices:
    """Slices in the making, until the time is used up."""

    def __init__(self, limits: TrainLimits, num_layers: int, room_s: float, first_s: float) -> None:
        """`room_s` for all slices together, `first_s` if there is only one."""
        self.limits = limits
        self.num_layers = num_layers
        self.room_s = room_s
        self.first_s = first_s
        self.slices: list[Slice] = []
        self.slices_s = 0.0

    def update(self, view: UpdateView) -> None:
        done = view.done
        while done < view.num_parameters:
            stop = min(done + UPDATE_STEP.get(view.kind, SLOW_UPDATE_STEP), view.num_parameters)
            if not self._append(Slice("update", view.version, 0, done, stop)):
                return
            done = stop

    def backward(self, view: BackwardView) -> None:
        lost, layer, stop, is_dense = view.lost, view.layer, view.stop, view.is_dense
        while lost < view.num_counted:
            window = self._window("loss", view.num_counted - lost)
            if not self._append(Slice("loss", view.batch, self.num_layers, lost, lost + window)):
                return
            lost += window
        while view.learns and layer >= 0:
            first = stop == view.num_tokens
            unpacks = first and not is_dense
            window = self._window("backward", stop, view.rows, stop, unpacks)
            pairs = pairs_of(view.rows, stop - window, stop)
            if not self._append(Slice("backward", view.batch, layer, stop - window, stop), pairs, unpacks):
                return
            stop -= window
            if stop == 0:
                layer, stop, is_dense = layer - 1, view.num_tokens, False

    def forward(self, view: ForwardView) -> None:
        layer, cut = (0, view.done) if view.layer is None else (view.layer, view.cut)
        while layer < self.num_layers:
            window = self._window("forward", view.num_tokens - cut, view.rows, -cut)
            pairs = pairs_of(view.rows, cut, cut + window)
            if not self._append(Slice("forward", view.batch, layer, cut, cut + window), pairs):
                return
            cut += window
            if cut == view.num_tokens:
                layer, cut = layer + 1, view.done

    def _window(
        self, kind: str, remaining: int, rows: Sequence[TrainRow] = (), edge: int = 0, unpacks: bool = False
    ) -> int:
        """The longest window that fits the time left, of those that split what remains evenly; the shortest if none
        does. Only a step's first slice is cut shorter for that: what a step leaves unused, the next one has more. It
        ends at token `edge`, or begins at -`edge`."""
        limits = self.limits
        largest = limits.window or LARGEST_WINDOW
        if limits.deterministic:
            return min(limits.window or FIXED_WINDOW, remaining)
        parts = -(-remaining // largest)
        window = min(remaining, largest)
        while True:
            start = edge - window if edge > 0 else -edge
            pairs = pairs_of(rows, start, start + window) if rows else 0
            if self.slices or limits.cost.seconds(kind, window, pairs, unpacks) <= self.room_s:
                return window
            parts += 1
            shorter = _rounded(-(-remaining // parts))
            if shorter < min(LEAST_WINDOW, largest) or shorter >= window:
                return window
            window = shorter

    def _append(self, piece: Slice, pairs: int = 0, unpacks: bool = False) -> bool:
        seconds = self.limits.cost.seconds(piece.kind, piece.stop - piece.start, pairs, unpacks)
        if self.slices_s + seconds > self.room_s and (self.slices or seconds > self.first_s):
            return False
        self.slices.append(piece)
        self.slices_s += seconds
        return True


def _rounded(tokens: int) -> int:
    return -(-tokens // WINDOW_STEP) * WINDOW_STEP
