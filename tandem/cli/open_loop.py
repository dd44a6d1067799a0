"""Sending requests at their times, whatever became of earlier ones, and noting when the pieces of answers arrive.

What is asked comes from `workload.py`; what the times mean is in `latency.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tandem.cli import client
from tandem.cli.latency import Trial
from tandem.cli.workload import Arrival
from tandem.errors import TandemError

if TYPE_CHECKING:
    import httpx


async def warm_up(http: httpx.AsyncClient, endpoint: str, body: dict[str, Any], like: Arrival) -> None:
    """One short request whose failure ends the run before it starts."""
    trial = await _request(http, endpoint, body, Arrival(0.0, like.prompt, 4))
    if not trial.completed:
        raise TandemError(f"the test request failed: {trial.error}")


async def send_all(
    http: httpx.AsyncClient,
    endpoint: str,
    body: dict[str, Any],
    arrivals: list[Arrival],
    limit: int | None,
    begin: float,
) -> list[Trial]:
    """Send each request at its time after `begin`, at most `limit` open at once. One Trial each, in order."""
    gate = asyncio.Semaphore(limit) if limit else contextlib.nullcontext()
    with _progress(len(arrivals)) as advance:

        async def one(arrival: Arrival) -> Trial:
            async with gate:
                trial = await _request(http, endpoint, body, arrival)
            advance()
            return trial

        tasks = []
        for arrival in arrivals:
            await _until(begin + arrival.at_s)
            tasks.append(asyncio.create_task(one(arrival)))
        return await asyncio.gather(*tasks)


async def send_at(
    http: httpx.AsyncClient, endpoint: str, body: dict[str, Any], arrival: Arrival, begin: float
) -> Trial:
    """Send one request at its time after `begin`."""
    await _until(begin + arrival.at_s)
    return await _request(http, endpoint, body, arrival)


async def _until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.perf_counter()))


async def _request(http: httpx.AsyncClient, endpoint: str, body: dict[str, Any], arrival: Arrival) -> Trial:
    """Send one request and note when its pieces arrive. Whatever goes wrong is in the Trial."""
    import httpx

    asked = {**body, "prompt": arrival.prompt, "max_tokens": arrival.output_len, "stream": True,
             "stream_options": {"include_usage": True}}  # fmt: skip
    trial = Trial(time.perf_counter())
    try:
        async with http.stream("POST", endpoint, json=asked) as response:
            trial.status = response.status_code
            if response.status_code != 200:
                trial.error = client.failure(response.status_code, await response.aread())
                return trial
            rest = b""
            async for raw in response.aiter_raw():
                now = time.perf_counter()
                *events, rest = (rest + raw).split(b"\n\n")
                for event in events:
                    _note_event(trial, event, now)
    except httpx.TransportError as error:
        trial.error = f"{type(error).__name__}: {error}"
    if not trial.chunks and trial.error is None:
        trial.error = "the stream ended without a token"
    return trial


def _note_event(trial: Trial, event: bytes, now: float) -> None:
    if not event.startswith(b"data: ") or event == b"data: [DONE]":
        return
    chunk = json.loads(event[6:])
    if "error" in chunk:
        trial.error = str(chunk["error"].get("message"))
    elif chunk["choices"]:
        trial.chunks.append(now)
    if usage := chunk.get("usage"):
        trial.prompt_tokens, trial.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda: bar.advance(task)
