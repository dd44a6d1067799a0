"""One run of `tandem bench coserve` on an engine: requests sent at their times or in a closed loop, training kept busy
beside them, what came of both. Speaks to `EngineClient` without HTTP; concludes nothing (`coserve_figures`).

Times are seconds on the clock of time.perf_counter.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from tandem.cli import coserve_figures
from tandem.cli.latency import Trial
from tandem.cli.workload import Arrival
from tandem.engine.client import EngineClient
from tandem.errors import InvalidRequest, Overloaded, TandemError
from tandem.work import Example, LoraConfig, OptimParams, Request, SamplingParams

# Requests not answered so long after the last one came are cut off.
DRAIN_S = 60.0
CUT_OFF = "cut off"
# A client of a closed loop whose request failed waits so long before the next.
RETRY_S = 1.0
# How often the engine's counters are looked at.
GLANCE_S = 0.1
# Optimiser steps kept queued, so that the engine never waits for the next.
STEPS_IN_FLIGHT = 2
_run_numbers = itertools.count(1)


@dataclass(frozen=True)
class Span:
    """A run's time: `seconds` that count, and before and after them some during which everything goes on as well."""

    warm_up_s: float
    seconds: float
    cool_down_s: float = 0.0

    @property
    def stop_s(self) -> float:
        return self.warm_up_s + self.seconds

    @property
    def total_s(self) -> float:
        return self.stop_s + self.cool_down_s


@dataclass(frozen=True)
class Job:
    """What is trained: random sequences of `length` tokens, `batch` of them per optimiser step."""

    batch: int = 4
    length: int = 512
    rank: int = 16

    def batches(self, vocab_size: int, seed: int) -> Iterator[list[Example]]:
        """Endless batches; every batch's weights add up to 1."""
        rng, vocabulary = random.Random(seed), range(10, vocab_size)
        weights = [1.0 / (self.batch * self.length)] * self.length
        while True:
            drawn = [rng.choices(vocabulary, k=self.length + 1) for _ in range(self.batch)]
            yield [Example(tokens[:-1], tokens[1:], weights) for tokens in drawn]


class Counter:
    """The tokens trained so far, each time there were more: what `coserve_figures.tokens_per_s` reads."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self.readings = [(time.perf_counter(), engine.stats.train_tokens)]

    async def watch(self) -> None:
        """Look until cancelled. Raises EngineDead when the engine dies."""
        while True:
            await asyncio.sleep(GLANCE_S)
            if self._engine.stats.train_tokens != self.readings[-1][1]:
                self.readings.append((time.perf_counter(), self._engine.stats.train_tokens))


@contextlib.asynccontextmanager
async def training(engine: EngineClient, job: Job | None, seed: int) -> AsyncIterator[Counter]:
    """A training run kept busy for as long as the block lasts (none without a `job`); its failure ends the block."""
    counter = Counter(engine)
    if job is None:
        yield counter
        return
    run_id = f"bench-{next(_run_numbers)}"
    await engine.open_run(run_id, LoraConfig(rank=job.rank, alpha=2.0 * job.rank))
    owner = asyncio.current_task()
    assert owner is not None
    feeding = asyncio.create_task(_feed(engine, run_id, job, seed))
    feeding.add_done_callback(lambda task: None if task.cancelled() else owner.cancel())
    watching = asyncio.create_task(counter.watch())
    try:
        yield counter
    except asyncio.CancelledError:
        if feeding.done() and not feeding.cancelled() and (error := feeding.exception()):
            owner.uncancel()
            raise error from None
        raise
    finally:
        await _end(feeding)
        await _end(watching)
        if engine.dead is None:
            await engine.close_run(run_id)


async def _feed(engine: EngineClient, run_id: str, job: Job, seed: int) -> None:
    """Keep STEPS_IN_FLIGHT optimiser steps on their way, until cancelled. Raises what a step failed with."""
    params = OptimParams(learning_rate=1e-4, max_grad_norm=1.0)
    sent: deque[asyncio.Future] = deque()
    try:
        for batch in job.batches(engine.report.vocab_size, seed):
            sent.append(asyncio.gather(engine.forward_backward(run_id, batch), engine.optim_step(run_id, params)))
            if len(sent) == STEPS_IN_FLIGHT:
                # Unlike awaiting the future, this leaves the engine's own futures alone when the feed is cancelled.
                await asyncio.wait((sent[0],))
                sent.popleft().result()
    finally:
        for future in sent:  # closing the run fails what is still queued, which is no news
            future.add_done_callback(lambda f: f.cancelled() or f.exception())


async def _end(task: asyncio.Task) -> None:
    task.cancel()
    await asyncio.wait((task,))


# ------------------------------------------------------------ requests


def planned(arrival: Arrival, sent: float) -> Trial:
    """A request of which nothing is known but when it is sent."""
    return Trial(sent, prompt_tokens=len(arrival.prompt), error=CUT_OFF)


async def ask(engine: EngineClient, arrival: Arrival, request_id: str, trial: Trial) -> None:
    """Send one request and note in its `planned` trial what comes of it: CUT_OFF if this is cancelled. Raises
    EngineDead."""
    assert isinstance(arrival.prompt, list)
    sampling = SamplingParams(max_tokens=arrival.output_len, temperature=0.0, ignore_eos=True)
    try:
        stream = engine.submit(Request(request_id=request_id, prompt=arrival.prompt, sampling=sampling))
        try:
            async for news in stream:
                now, num = time.perf_counter(), sum(event.token_id is not None for event in news)
                trial.chunks += [now] * num
                trial.output_tokens += num
        finally:
            await stream.aclose()
    except (Overloaded, InvalidRequest) as error:
        trial.status, trial.error = error.status, str(error)
    else:
        trial.status, trial.error = 200, None


async def open_loop(
    engine: EngineClient,
    arrivals: Sequence[Arrival],
    span: Span,
    job: Job | None,
    seed: int,
    drain_s: float | None = None,
) -> tuple[list[Trial], float]:
    """Send each request at its time whatever became of the earlier ones. The trials of those that came within the
    measured time, and the tokens trained per second of it. Answers are waited for `drain_s` (default: DRAIN_S)."""
    async with training(engine, job, seed) as counter:
        begin = time.perf_counter()
        trials: list[Trial] = []
        tasks: list[asyncio.Task[None]] = []
        try:
            for i, arrival in enumerate(arrivals):
                await _until(begin + arrival.at_s)
                _raise_dead(tasks)
                trials.append(planned(arrival, begin + arrival.at_s))
                tasks.append(asyncio.create_task(ask(engine, arrival, f"bench-{begin:.3f}-{i}", trials[-1])))
            await _until(begin + span.total_s)
            if counted := [t for t, a in zip(tasks, arrivals, strict=True) if _counts(a, span)]:
                await asyncio.wait(counted, timeout=DRAIN_S if drain_s is None else drain_s)
            _raise_dead(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        rate = coserve_figures.tokens_per_s(counter.readings, begin + span.warm_up_s, begin + span.stop_s)
    return [t for t, a in zip(trials, arrivals, strict=True) if _counts(a, span)], rate


def _counts(arrival: Arrival, span: Span) -> bool:
    return span.warm_up_s <= arrival.at_s < span.stop_s


async def closed_loop(
    engine: EngineClient, requests: Sequence[Arrival], streams: int, span: Span, job: Job | None, seed: int
) -> tuple[list[Trial], float]:
    """`streams` clients, each of which sends its next request when the last one is done. As `open_loop`; the requests
    that were done within the measured time count."""
    queue = enumerate(itertools.cycle(requests))
    async with training(engine, job, seed) as counter:
        begin = time.perf_counter()
        trials: list[Trial] = []

        async def client() -> None:
            for number, arrival in queue:
                trials.append(trial := planned(arrival, time.perf_counter()))
                await ask(engine, arrival, f"bench-{begin:.3f}-{number}", trial)
                if trial.error:
                    await asyncio.sleep(RETRY_S)

        await for_a_while([client() for _ in range(streams)], span.total_s)
        rate = coserve_figures.tokens_per_s(counter.readings, begin + span.warm_up_s, begin + span.stop_s)
    return within(trials, begin + span.warm_up_s, begin + span.stop_s), rate


def within(trials: Sequence[Trial], start: float, stop: float) -> list[Trial]:
    """The trials that were done, or had failed when they were sent, between two times."""
    return [t for t in trials if t.error != CUT_OFF and start <= (t.chunks[-1] if t.chunks else t.sent) <= stop]


async def for_a_while(clients: Sequence, seconds: float) -> None:
    """Run endless coroutines for so long. Raises what one of them raised."""
    tasks = [asyncio.ensure_future(client) for client in clients]
    try:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.perf_counter()))


def _raise_dead(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()


async def single_stream(engine: EngineClient, prompt_len: int = 128, output_len: int = 64, runs: int = 3) -> Trial:
    """One request at a time with nothing else to do, after one that does not count: the run of the median TPOT.
    Raises TandemError where a request fails."""
    rng, trials = random.Random(0), []
    for _ in range(runs + 1):
        prompt = rng.choices(range(10, engine.report.vocab_size), k=prompt_len)
        arrival, now = Arrival(0.0, prompt, output_len), time.perf_counter()
        trial = planned(arrival, now)
        await ask(engine, arrival, f"bench-alone-{now:.6f}", trial)
        if not trial.completed:
            raise TandemError(f"a request alone failed: {trial.error}")
        trials.append(trial)
    ordered = sorted(trials[1:], key=lambda t: t.tpot or 0.0)
    return ordered[len(ordered) // 2]


def first_guess(alone: Trial, arrivals: Sequence[Arrival]) -> float:
    """Requests/s that one stream after another would come to, from one request alone: where the search begins."""
    prompt_len = statistics.fmean(len(a.prompt) for a in arrivals)
    output_len = statistics.fmean(a.output_len for a in arrivals)
    return 1.0 / (alone.ttft * prompt_len / alone.prompt_tokens + (output_len - 1) * (alone.tpot or 0.0))
