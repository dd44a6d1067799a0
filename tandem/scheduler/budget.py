"""The step-time model: seconds predicted from token counts, fitted to a calibration and corrected online.

Pure arithmetic on plain numbers. Who measures is the worker; who spends the budget is `policy`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

from tandem.work import Segment


class Load(NamedTuple):
    """What a step's time depends on, summed over its segments."""

    tokens: int = 0  # rows of every matmul
    context: int = 0  # cached tokens read by segments of one token
    pairs: int = 0  # query x key pairs of longer segments
    samples: int = 0  # rows of the LM head and the sampler

    def plus(self, start: int, length: int, samples: int) -> Load:
        """This load with one more segment of `length` tokens from position `start`, `samples` of which reach
        the head."""
        context, pairs = self.context, self.pairs
        if length == 1:
            context += start + 1
        else:
            pairs += length * start + length * (length + 1) // 2
        return Load(self.tokens + length, context, pairs, self.samples + samples)


class Measurement(NamedTuple):
    """One calibration step: its load and how long it took."""

    load: Load
    seconds: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """Predicted seconds of a step. `points` are (tokens, seconds) with both growing; between them it is linear,
    after the last it continues at the last slope. The default is the shape of a small CPU, good enough to start.
    """

    points: tuple[tuple[int, float], ...] = (
        (1, 0.020), (4, 0.021), (16, 0.025), (32, 0.032), (64, 0.048), (256, 0.14), (1024, 0.55)
    )  # fmt: skip
    per_context_s: float = 1e-6
    per_pair_s: float = 1e-7
    per_sample_s: float = 1e-4
    scale: float = 1.0

    def predict(self, segments: Iterable[Segment]) -> float:
        """Seconds of a step made of `segments`."""
        load = Load()
        for s in segments:
            load = load.plus(s.start, s.length, s.samples)
        return self.seconds(load)

    def seconds(self, load: Load) -> float:
        """Seconds of a step with this load; an empty step takes none."""
        if not load.tokens:
            return 0.0
        attention = self.per_context_s * load.context + self.per_pair_s * load.pairs
        return self.scale * (self._base(load.tokens) + attention + self.per_sample_s * load.samples)

    def corrected(self, predicted_s: float, measured_s: float) -> CostModel:
        """The model after one more step: `scale` moves a tenth of the way, in logarithms, to what was measured.

        One step counts as at most twice or half of its prediction, so that a pause of the machine moves the scale
        by 7 %, and the scale stays within a factor of 16 of the calibration.
        """
        if predicted_s <= 0 or measured_s <= 0:
            return self
        ratio = min(max(measured_s / predicted_s, 0.5), 2.0)
        return replace(self, scale=min(max(self.scale * ratio**0.1, 1 / 16), 16.0))

    def _base(self, tokens: int) -> float:
        points = self.points
        if len(points) == 1 or tokens <= points[0][0]:
            return points[0][1]
        above = min(bisect_right(points, tokens, key=_tokens_of), len(points) - 1)
        (x0, y0), (x1, y1) = points[above - 1], points[above]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


def fit(measurements: Sequence[Measurement]) -> CostModel:
    """The cost model nearest to the measurements in relative error, with every coefficient at least 0.

    Repeats of one load count by their median. The knots are the token counts measured, so the base cost never falls
    with more tokens. Raises ValueError without measurements.
    """
    repeats = defaultdict(list)
    for load, seconds in measurements:
        if load.tokens > 0 and seconds > 0:
            repeats[load].append(seconds)
    if not repeats:
        raise ValueError("no calibration measurements to fit a cost model to")
    knots = sorted({load.tokens for load in repeats})
    rows = []
    for load, times in repeats.items():
        steps = [1.0 if load.tokens >= knot else 0.0 for knot in knots]
        seconds = median(times)
        features = [*steps, float(load.context), float(load.pairs), float(load.samples)]
        rows.append([value / seconds for value in features])
    solution = _nonnegative_least_squares(rows, [1.0] * len(rows))
    points, height = [], 0.0
    for knot, step in zip(knots, solution):
        height += step
        points.append((knot, max(height, 1e-9)))
    per_context_s, per_pair_s, per_sample_s = solution[len(knots) :]
    return CostModel(tuple(points), per_context_s, per_pair_s, per_sample_s)


def predicted_wait(
    queued_tokens: int, tokens_per_s: float, queued_rows: int = 0, free_seats: int = 0, rows_per_s: float = 0.0
) -> float:
    """Seconds until a request that arrives now would start.

    Whatever is scarcer decides: the tokens queued before it at the recent rate of prompt tokens, or the seats
    (`max_num_seqs`) at the recent rate of finished rows. A rate of 0 means nothing is known yet and counts as no wait.
    """
    by_tokens = queued_tokens / tokens_per_s if tokens_per_s > 0 else 0.0
    seats_short = queued_rows + 1 - free_seats
    by_seats = seats_short / rows_per_s if seats_short > 0 and rows_per_s > 0 else 0.0
    return max(by_tokens, by_seats)


def _tokens_of(point: tuple[int, float]) -> int:
    return point[0]


def _nonnegative_least_squares(rows: list[list[float]], target: list[float], rounds: int = 4000) -> list[float]:
    """x >= 0 with `rows` @ x nearest to `target`: cyclic coordinate descent on the normal equations."""
    n = len(rows[0])
    size = [sum(r[j] * r[j] for r in rows) ** 0.5 for j in range(n)]  # columns differ by many orders of magnitude
    live = [j for j in range(n) if size[j] > 0]
    unit = [[r[j] / size[j] for j in live] for r in rows]
    gram = [[sum(u[i] * u[j] for u in unit) for j in range(len(live))] for i in range(len(live))]
    slope = [-sum(u[i] * t for u, t in zip(unit, target)) for i in range(len(live))]  # gradient at x = 0
    x = [0.0] * len(live)
    for _ in range(rounds):
        largest = 0.0
        for i, line in enumerate(gram):
            change = max(x[i] - slope[i] / line[i], 0.0) - x[i]
            if change:
                x[i] += change
                largest = max(largest, abs(change))
                slope = [s + change * g for s, g in zip(slope, line)]
        if largest < 1e-12:
            break
    solution = [0.0] * n
    for i, j in enumerate(live):
        solution[j] = x[i] / size[j]
    return solution
