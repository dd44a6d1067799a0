"""A fine-tuning job's events as they come: a progress bar on a terminal, lines elsewhere.

Knows neither HTTP nor the job store: whoever follows brings two functions that ask for the status and for events.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tandem.cli.startup import say

if TYPE_CHECKING:
    from rich.progress import Progress

    from tandem.jobs.records import Event

FINAL = ("succeeded", "failed", "cancelled")
PERIOD_S = 0.5
# The pace of so many last steps says when the job will end: a pause or a busy hour before does not count for long.
PACE_STEPS = 50
Show = Callable[["Event"], None]


@dataclass(frozen=True)
class Source:
    """`status()` is the job's; `page(after)` its events, newest first, older than the one with id `after`, and whether
    there are more."""

    status: Callable[[], Awaitable[str]]
    page: Callable[[str | None], Awaitable[tuple[list[Event], bool]]]


async def follow(source: Source, show: Show, period_s: float = PERIOD_S) -> str:
    """Show every event, oldest first, each once, until the job has ended; returns how it did."""
    seen: str | None = None
    while True:
        # The status first: what led to a final one is then among the events.
        status = await source.status()
        for event in await unseen(source, seen):
            show(event)
            seen = event.event_id
        if status in FINAL:
            return status
        await asyncio.sleep(period_s)


async def unseen(source: Source, seen: str | None) -> list[Event]:
    """The events after the one with id `seen` (None: all), oldest first."""
    fresh: list[Event] = []
    has_more = True
    while has_more:
        events, has_more = await source.page(fresh[-1].event_id if fresh else None)
        for event in events:
            if event.event_id == seen:
                return fresh[::-1]
            fresh.append(event)
        has_more = has_more and bool(events)
    return fresh[::-1]


@contextlib.contextmanager
def display() -> Iterator[Show]:
    """What to show events with: a bar that stays at the bottom of a terminal, plain lines elsewhere."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        pace = Pace()
        yield lambda event: say(line(event, pace))
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("step {task.completed:.0f}/{task.fields[of]}"), BarColumn(), TextColumn("{task.fields[now]}"))
    with Progress(*columns, console=console) as bar:
        yield Bar(bar)


class Bar:
    """Metrics move the bar, messages are printed above it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._pace = Pace()
        self._task = progress.add_task("training", total=None, of="?", now="")

    def __call__(self, event: Event) -> None:
        data = event.data or {}
        if event.type != "metrics" or "step" not in data:
            self._progress.console.print(line(event, self._pace), markup=False)
            return
        self._pace.add(event.created_at, data["step"])
        total = data.get("total_steps")
        now = ", ".join(figures(data, self._pace, with_loss=True))
        self._progress.update(self._task, completed=data["step"], total=total, of=total or "?", now=now)


@dataclass
class Pace:
    """How fast steps go by, from the times (whole seconds) of the last ones."""

    points: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=PACE_STEPS))

    def add(self, at: int, step: int) -> None:
        # A job that went back to a checkpoint repeats steps; the time before says nothing of those to come.
        if self.points and step <= self.points[-1][1]:
            self.points.clear()
        self.points.append((at, step))

    def remaining_s(self, total: int) -> float | None:
        """Seconds to step `total`; None while there is nothing to judge by."""
        (first_at, first), (last_at, last) = (self.points[0], self.points[-1]) if self.points else ((0, 0), (0, 0))
        if last == first or last_at == first_at:
            return None
        return (last_at - first_at) / (last - first) * (total - last)


def line(event: Event, pace: Pace) -> str:
    """One line of a log: local time, level where it is not info, message, and what metrics know beyond it."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.created_at))
    words = [event.message]
    if event.type == "metrics" and event.data:
        if "step" in event.data:
            pace.add(event.created_at, event.data["step"])
        is_said = "loss" in event.message or "reward" in event.message
        words += figures(event.data, pace, with_loss=not is_said)
    level = "" if event.level == "info" else event.level.upper() + " "
    return f"{when} {level}{', '.join(words)}"


def figures(data: dict[str, Any], pace: Pace, with_loss: bool) -> list[str]:
    """The figures of a metrics event in words, as far as it has them."""
    rewards = [("reward {:.3f}", "train_mean_reward"), ("validation reward {:.3f}", "valid_mean_reward")]
    losses = [*rewards, ("loss {:.4f}", "train_loss"), ("validation loss {:.4f}", "valid_loss")] if with_loss else []
    speeds = [("{:.0f} tokens/s", "tokens_per_s"), ("serving p95 {:.0f} ms", "serving_tpot_p95_ms")]
    # A p95 of 0 says that nothing is served.
    found = [form.format(data[name]) for form, name in losses + speeds if data.get(name)]
    remaining_s = pace.remaining_s(data["total_steps"]) if data.get("total_steps") else None
    return found if remaining_s is None else [*found, f"ETA {duration(remaining_s)}"]


def duration(seconds: float) -> str:
    """3723 -> '1:02:03'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
