"""From the times at which tokens arrived to TTFT, TPOT, ITL, E2E, goodput and stalls. Pure arithmetic; no HTTP.

Times are seconds on one clock; figures in reports are milliseconds. Keys are those of vLLM's benchmark.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

METRICS = {"ttft": "Time to First Token", "tpot": "Time per Output Token (excl. 1st token)",
           "itl": "Inter-token Latency", "e2el": "End-to-end Latency"}  # fmt: skip
PERCENTILES = (95, 99)


@dataclass
class Trial:
    """One request as the client saw it. `chunks`: arrival times of its pieces. `status`: HTTP, 0 without a reply."""

    sent: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    status: int = 0
    error: str | None = None
    chunks: list[float] = field(default_factory=list)

    @property
    def completed(self) -> bool:
        return self.error is None and bool(self.chunks)

    @property
    def rejected(self) -> bool:
        return self.status in (429, 503)

    @property
    def ttft(self) -> float:
        return self.chunks[0] - self.sent

    @property
    def e2el(self) -> float:
        return self.chunks[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        return (self.chunks[-1] - self.chunks[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]

    def meets(self, goals_ms: dict[str, float]) -> bool:
        """Whether it stayed within every goal; a request of one token has no TPOT to miss."""
        seen = {"ttft": self.ttft, "tpot": self.tpot or 0.0, "e2el": self.e2el}
        return all(seen[name] * 1e3 <= limit for name, limit in goals_ms.items())


def percentile(values: Sequence[float], p: float) -> float:
    """Linear interpolation between order statistics, as numpy does it; NaN of nothing."""
    if not values:
        return math.nan
    ordered, place = sorted(values), (len(values) - 1) * p / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(trials: Sequence[Trial], duration_s: float, goals_ms: dict[str, float]) -> dict[str, Any]:
    """All figures of a run under vLLM's names; `rejected` (429, 503) is counted apart from `failed`."""
    done = [t for t in trials if t.completed]
    num_out = sum(t.output_tokens for t in done)
    num_in = sum(t.prompt_tokens for t in done)
    figures: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "rejected": sum(t.rejected for t in trials),
        "failed": sum(not t.completed and not t.rejected for t in trials),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "request_throughput": len(done) / duration_s,
        "output_throughput": num_out / duration_s,
        "total_token_throughput": (num_in + num_out) / duration_s,
        "request_goodput": sum(t.meets(goals_ms) for t in done) / duration_s if goals_ms else None,
    }
    series = {
        "ttft": [t.ttft for t in done],
        "tpot": [t.tpot for t in done if t.tpot is not None],
        "itl": [gap for t in done for gap in t.gaps],
        "e2el": [t.e2el for t in done],
    }
    for name, values in series.items():
        ms = [v * 1e3 for v in values]
        figures[f"mean_{name}_ms"] = statistics.fmean(ms) if ms else math.nan
        figures[f"median_{name}_ms"] = percentile(ms, 50)
        for p in PERCENTILES:
            figures[f"p{p}_{name}_ms"] = percentile(ms, p)
    return figures


def stall(trials: Sequence[Trial], sent: float, first_token: float) -> dict[str, float]:
    """The gaps (ms) of the streams that ended before a long prompt came, and those that overlap its prefill."""
    before, during = [], []
    for trial in trials:
        for start, end in zip(trial.chunks, trial.chunks[1:], strict=False):
            if end <= sent:
                before.append((end - start) * 1e3)
            elif start < first_token:
                during.append((end - start) * 1e3)
    return {
        f"{name}_{key}_gap_ms": percentile(gaps, p)
        for name, gaps in (("before", before), ("during", during))
        for key, p in (("median", 50), ("p99", 99), ("max", 100))
    }


def table(figures: dict[str, Any], metrics: Sequence[str]) -> list[str]:
    """The figures as lines to print."""
    lines = [
        f"Successful requests:     {figures['completed']}",
        f"Rejected (429, 503):     {figures['rejected']}",
        f"Failed requests:         {figures['failed']}",
        f"Duration (s):            {figures['duration']:.2f}",
        f"Input, output tokens:    {figures['total_input_tokens']}, {figures['total_output_tokens']}",
        f"Request throughput:      {figures['request_throughput']:.2f} req/s",
        f"Output throughput:       {figures['output_throughput']:.1f} tokens/s",
        f"Total throughput:        {figures['total_token_throughput']:.1f} tokens/s",
    ]
    if figures["request_goodput"] is not None:
        lines.append(f"Request goodput:         {figures['request_goodput']:.2f} req/s")
    columns = ["mean", "median", *(f"p{p}" for p in PERCENTILES)]
    lines.append(f"{'milliseconds':<42}" + "".join(f"{c:>10}" for c in columns))
    for name in metrics:
        cells = "".join(f"{figures[f'{column}_{name}_ms']:>10.1f}" for column in columns)
        lines.append(f"{METRICS[name] + f' ({name})':<42}{cells}")
    return lines
