"""How far the running requests are ahead of their latency targets, and what users have seen lately. Clock readings come
in as numbers; nothing here measures or decides."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tandem.config import TrainingConfig
from tandem.scheduler.budget import CostModel, Load
from tandem.scheduler.state import Row

# The default target: so many times one stream's time per token alone, but no less than what a reader can follow.
DEFAULT_SLOWDOWN = 2.0
READABLE_S = 0.02
TYPICAL_CONTEXT = 512
# Predictions miss; training aims at this share of the target.
AIM = 0.99
# A prompt that arrives stalls the rows that decode. So much time is kept for it: what all but a fifth of the recent
# stalls took beyond the aim, put by at most at this share of the target a token: the more, the nearer the recent
# requests' 95th percentile is to the target. LEAST_PUT_BY up to 97 % of it, MOST_PUT_BY from 100 % on.
STALL_QUANTILE = 0.8
LEAST_PUT_BY, MOST_PUT_BY = 0.02, 0.05
RECENT_STALLS = 32
# Once the first of the queue has waited so long, training stands back.
WAIT_SHARE = 0.5
RECENT_S = 60.0
REFRESH_S = 1.0


class Pace:
    """`tpot_s` and `ttft_s` are the targets in seconds."""

    def __init__(self, config: TrainingConfig, cost: CostModel) -> None:
        alone_s = cost.seconds(Load(tokens=1, context=TYPICAL_CONTEXT, samples=1))
        default_s = max(DEFAULT_SLOWDOWN * alone_s, READABLE_S)
        self.tpot_s = default_s if config.slo_tpot_ms is None else config.slo_tpot_ms / 1e3
        self.ttft_s = config.slo_ttft_ms / 1e3
        self._arrived: dict[int, float] = {}
        self._first: dict[int, float] = {}
        self._ttft: deque[tuple[float, float]] = deque()
        self._tpot: deque[tuple[float, float]] = deque()
        self._stalls: deque[tuple[float, float]] = deque(maxlen=RECENT_STALLS)
        self._stall_s: float | None = None  # of the prompts being computed now
        self._reserve_s = 0.0
        self._put_by = LEAST_PUT_BY
        self._refreshed = float("-inf")
        self._p95 = (0.0, 0.0)

    def arrive(self, row: int, now: float) -> None:
        self._arrived[row] = now

    def forget(self, row: int) -> None:
        self._arrived.pop(row, None)
        self._first.pop(row, None)

    def slack_s(self, running: Sequence[Row], waiting: Sequence[Row], now: float) -> float:
        """Seconds until the first running row must have its next token, if the mean time per token of each is to keep
        its target, also when the next prompt arrives; or until a waiting row has used up its share of its target: what
        runs must be done sooner then."""
        aim_s, put_by_s = AIM * self.tpot_s, self._put_by * self.tpot_s
        tokens = (
            first + row.num_generated * aim_s - min(self._reserve_s, row.num_generated * put_by_s) - now
            for row in running
            if (first := self._first.get(row.row_id))
        )
        wait_s = WAIT_SHARE * self.ttft_s
        arrivals = (self._arrived[row.row_id] + wait_s - now for row in waiting[:1] if row.row_id in self._arrived)
        return min((*tokens, *arrivals), default=float("inf"))

    def stalled(self, seconds: float | None, now: float) -> None:
        """A step with prompts in it took so long; None: one without, which ends a stall. The rows that decode got a
        token in each such step, and nobody trained: only what exceeds those tokens' aim is lost."""
        if seconds is not None:
            self._stall_s = (self._stall_s or 0.0) + seconds - AIM * self.tpot_s
        elif self._stall_s is not None:
            self._stalls.append((now, max(self._stall_s, 0.0)))
            self._stall_s = None
            self._set_reserve(now)

    def _set_reserve(self, now: float) -> None:
        recent = sorted(stall_s for ended, stall_s in self._stalls if now - ended <= RECENT_S)
        self._reserve_s = recent[int(STALL_QUANTILE * len(recent))] if recent else 0.0

    def commit(self, rows: Sequence[Row], finished: Sequence[Row], now: float) -> None:
        """Take in a step that ended now: rows that may have got a token, rows that are done."""
        for row in rows:
            if row.row_id not in self._first and row.num_generated:
                self._first[row.row_id] = now
                self._ttft.append((now, now - self._arrived.get(row.row_id, now)))
        for row in finished:
            if row.num_generated > 1 and (first := self._first.get(row.row_id)):
                self._tpot.append((now, (now - first) / (row.num_generated - 1)))

    def p95_s(self, now: float) -> tuple[float, float]:
        """95th percentiles of the last minute: time to first token, mean time per output token of finished requests."""
        if now - self._refreshed >= REFRESH_S:
            self._refreshed = now
            for recent in (self._ttft, self._tpot):
                while recent and now - recent[0][0] > RECENT_S:
                    recent.popleft()
            self._set_reserve(now)
            self._p95 = (_p95([s for _, s in self._ttft]), _p95([s for _, s in self._tpot]))
            nearness = self._p95[1] / self.tpot_s + MOST_PUT_BY - 1.0
            self._put_by = min(max(nearness, LEAST_PUT_BY), MOST_PUT_BY)
        return self._p95


def _p95(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))] if values else 0.0
