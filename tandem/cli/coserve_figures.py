"""What `tandem bench coserve` concludes from what it saw: attainment, rates, rows, the search for 100 % load. Pure; it
knows neither engine nor clock.

Times are seconds; a load is per cent of the highest Poisson rate at which serving alone reaches `ATTAINMENT`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tandem.cli import workload
from tandem.cli.latency import Trial, percentile
from tandem.cli.workload import Arrival, Shape
from tandem.errors import TandemError

MODES = ("serve", "train", "coserve", "temporal", "two-processes")
PERCENTILES = (50, 95, 99)
# The share of requests within both targets that counts as keeping them.
ATTAINMENT = 0.95
MOST_DOUBLINGS = 6
# The search ends when the rates that did and did not work are this close.
CLOSE_ENOUGH = 1.06


@dataclass(frozen=True)
class Targets:
    """What a request must keep, in seconds."""

    ttft_s: float
    tpot_s: float

    @property
    def goals_ms(self) -> dict[str, float]:
        return {"ttft": self.ttft_s * 1e3, "tpot": self.tpot_s * 1e3}


@dataclass(frozen=True)
class Row:
    """One line of the result: the fields are the JSON's keys. None where a figure does not apply.

    `load` is in per cent; that of a closed loop is what its rate comes to. `requests_per_s` is the rate offered, or
    what a closed loop achieved.
    """

    load: float
    mode: str
    requests_per_s: float
    ttft_p50: float | None
    ttft_p95: float | None
    ttft_p99: float | None
    tpot_p50: float | None
    tpot_p95: float | None
    tpot_p99: float | None
    slo_attainment: float | None
    train_tokens_per_s: float
    retained: float | None


@dataclass(frozen=True)
class Cell:
    """What one run under one load was and saw: `trials` are of the requests that came within the measured time."""

    label: str
    mode: str
    load: float
    requests_per_s: float
    trials: tuple[Trial, ...]
    train_tokens_per_s: float
    is_closed: bool = False

    @property
    def counts(self) -> dict[str, Any]:
        """How many requests there were, and what became of those that were not answered."""
        return {
            "label": self.label,
            "requests": len(self.trials),
            "completed": sum(t.completed for t in self.trials),
            "rejected": sum(t.rejected for t in self.trials),
            "errors": sorted({t.error for t in self.trials if t.error}),
        }


def attainment(trials: Sequence[Trial], targets: Targets) -> float | None:
    """The share of requests within both targets; those rejected, failed or cut off missed them. None of no requests."""
    if not trials:
        return None
    return sum(t.completed and t.meets(targets.goals_ms) for t in trials) / len(trials)


def row(cell: Cell, targets: Targets, alone_tokens_per_s: float | None) -> Row:
    """A cell's figures; `alone_tokens_per_s` is the better of training alone here and the PEFT loop."""
    done = [t for t in cell.trials if t.completed]
    share = attainment(cell.trials, targets)
    trains = cell.mode != "serve"
    retained = cell.train_tokens_per_s / alone_tokens_per_s if trains and alone_tokens_per_s else None
    return Row(
        load=cell.load,
        mode=cell.mode,
        requests_per_s=round(cell.requests_per_s, 4),
        **_percentiles("ttft", [t.ttft for t in done]),
        **_percentiles("tpot", [t.tpot for t in done if t.tpot is not None]),
        slo_attainment=None if share is None else round(share, 4),
        train_tokens_per_s=round(cell.train_tokens_per_s, 2),
        retained=None if retained is None else round(retained, 4),
    )


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, Any]:
    found = {f"{name}_p{p}": percentile(seconds, p) for p in PERCENTILES}
    return {key: None if math.isnan(value) else round(value, 4) for key, value in found.items()}


def tokens_per_s(counter: Sequence[tuple[float, int]], start: float, stop: float) -> float:
    """The rate between two times of a counter read as (time, value) each time it had changed, taken as growing evenly
    between those; 0 after the last."""
    return (_at(counter, stop) - _at(counter, start)) / (stop - start)


def _at(counter: Sequence[tuple[float, int]], moment: float) -> float:
    before = [(at, value) for at, value in counter if at <= moment]
    after = [(at, value) for at, value in counter if at > moment]
    if not before or not after:
        return float((before[-1] if before else after[0])[1]) if counter else 0.0
    (low, a), (high, b) = before[-1], after[0]
    return a + (b - a) * (moment - low) / (high - low)


def arrivals(shapes: Sequence[Shape], rate: float, duration_s: float, vocab_size: int, seed: int) -> list[Arrival]:
    """The requests of `duration_s` seconds at `rate` per second: Poisson times, random prompts of the shapes' lengths.

    Request i is the same at every rate, and times at one rate are those at another, stretched: what differs between
    two runs is what was meant to differ.
    """
    rng, now = random.Random(seed), 0.0
    found: list[Arrival] = []
    vocabulary = range(10, vocab_size)
    while True:
        now += rng.expovariate(1.0) / rate
        if now >= duration_s:
            return found
        shape = shapes[len(found) % len(shapes)]
        prompt = random.Random(f"{seed}-{len(found)}").choices(vocabulary, k=shape.prompt_len)
        found.append(Arrival(now, prompt, shape.output_len))


def sample_shapes(path: str, scale: float, longest: int, seed: int) -> tuple[list[Shape], int]:
    """All lines of a trace in an order drawn from the seed, lengths divided by `scale`; how many are left out because
    prompt and output exceed `longest` tokens."""
    shapes = workload.read_trace(path, 10**9, scale)
    fitting = [s for s in shapes if s.prompt_len + s.output_len <= longest]
    if not fitting:
        raise TandemError(f"no request of {path} fits a context of {longest} tokens: raise --max-model-len")
    random.Random(seed).shuffle(fitting)
    return fitting, len(shapes) - len(fitting)


async def highest_rate(measure: Callable[[float], Awaitable[float | None]], guess: float, steps: int) -> float:
    """The highest rate found at which `measure` (a rate -> its attainment) reaches ATTAINMENT: doubling or halving from
    `guess` until it is bracketed, then `steps` bisections. Raises TandemError where no rate works."""

    async def works(rate: float) -> bool:
        share = await measure(rate)
        return share is None or share >= ATTAINMENT

    low, high, rate = 0.0, math.inf, guess
    for _ in range(MOST_DOUBLINGS):
        if await works(rate):
            low, rate = rate, rate * 2
        else:
            high, rate = rate, rate / 2
        if low and high < math.inf:
            break
    if not low:
        raise TandemError(
            f"serving alone misses its targets even at {high:.3g} requests/s: loosen --target-ttft-ms or "
            "--target-tpot-ms, or use a smaller model"
        )
    if math.isinf(high):
        raise TandemError(f"serving alone keeps its targets even at {low:.3g} requests/s: give --capacity")
    for _ in range(steps):
        if high / low < CLOSE_ENOUGH:
            break
        rate = math.sqrt(low * high)
        low, high = (rate, high) if await works(rate) else (low, rate)
    return low


HEADER = f"{'run':<38}{'load':>6}{'req/s':>8}{'TTFT p50':>10}{'p95':>8}{'TPOT p50':>10}{'p95':>8}{'in SLO':>8}" \
         f"{'train/s':>9}{'retained':>9}"  # fmt: skip


def line(label: str, found: Row) -> str:
    """A row for the terminal, milliseconds."""

    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1e3:.0f}"

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.1%}"

    return (
        f"{label:<38}{found.load:>6.4g}{found.requests_per_s:>8.3f}{ms(found.ttft_p50):>10}{ms(found.ttft_p95):>8}"
        f"{ms(found.tpot_p50):>10}{ms(found.tpot_p95):>8}{percent(found.slo_attainment):>8}"
        f"{found.train_tokens_per_s:>9.1f}{percent(found.retained):>9}"
    )


def verdicts(rows: Sequence[Row], closed: Sequence[Row] = ()) -> list[str]:
    """Per load, what sharing costs serving and what it keeps of training, in sentences; then the `closed` loops."""
    by_cell = {(r.mode, r.load): r for r in rows}
    said = []
    for both in (r for r in rows if r.mode == "coserve" and r.load and r.retained is not None):
        alone, turns = by_cell.get(("serve", both.load)), by_cell.get(("temporal", both.load))
        if alone is None:
            continue
        text = f"{both.load:.4g} % load: {both.retained:.0%} of training retained"
        if both.slo_attainment is not None:
            text += f", {both.slo_attainment:.1%} of requests within the targets"
        if both.ttft_p95 and alone.ttft_p95:
            text += f", TTFT p95 {both.ttft_p95 / alone.ttft_p95:.2f}x of serving alone"
        if turns is not None and turns.train_tokens_per_s:
            text += f", {both.train_tokens_per_s / turns.train_tokens_per_s:.2f}x the training of temporal sharing"
            if turns.slo_attainment is not None:
                text += f" (which keeps {turns.slo_attainment:.1%} within the targets)"
        said.append(text)
    ours = next((r for r in closed if r.mode == "coserve"), None)
    for theirs in (r for r in closed if r.mode == "two-processes"):
        if ours is not None and theirs.train_tokens_per_s:
            said.append(
                f"closed loop: {ours.train_tokens_per_s / theirs.train_tokens_per_s:.2f}x the training of two "
                f"processes, TPOT p95 {_beside(ours.tpot_p95, theirs.tpot_p95)}, "
                f"TTFT p95 {_beside(ours.ttft_p95, theirs.ttft_p95)}"
            )
    return said


def _beside(ours: float | None, theirs: float | None) -> str:
    cells = ("none" if s is None else f"{s * 1e3:.0f} ms" for s in (ours, theirs))
    return " against ".join(cells)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What is written to --json."""
    return [asdict(r) for r in rows]
