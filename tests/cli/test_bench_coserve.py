"""`tandem bench coserve`: traces, arrivals, the search for 100 %, rows, and whole runs on an engine that is a clock."""

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tandem.cli import (
    bench_coserve,
    coserve_cells,
    coserve_figures,
    coserve_options,
    coserve_peers,
    coserve_plan,
    options,
)
from tandem.cli.coserve_cells import Job, Span
from tandem.cli.coserve_figures import Cell, Targets
from tandem.cli.latency import Trial
from tandem.cli.workload import Arrival, Shape
from tandem.errors import Cancelled, Diverged, EngineDead, Overloaded, TandemError
from tandem.work import EngineReport, EngineStats, PassReport, TokenEvent, UpdateReport

KEYS = [
    "load", "mode", "requests_per_s", "ttft_p50", "ttft_p95", "ttft_p99", "tpot_p50", "tpot_p95", "tpot_p99",
    "slo_attainment", "train_tokens_per_s", "retained",
]  # fmt: skip
CSV = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{10 + i}.6805900,{context},{generated}\n"
    for i, (context, generated) in enumerate([(80, 16), (3, 2), (800, 160), (160, 24), (240, 8)])
)
TARGETS = Targets(ttft_s=1.0, tpot_s=0.1)


def trial(ttft=0.5, tpot=0.05, tokens=5, **more):
    return Trial(10.0, 4, tokens, 200, chunks=[10.0 + ttft + i * tpot for i in range(tokens)], **more)


# ---------------------------------------------------------------- traces and arrivals


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(CSV)
    return str(path)


def test_lengths_are_divided_and_never_vanish(trace):
    shapes, left_out = coserve_figures.sample_shapes(trace, 8.0, 4096, seed=1)
    assert sorted((s.prompt_len, s.output_len) for s in shapes) == [(1, 1), (10, 2), (20, 3), (30, 1), (100, 20)]
    assert left_out == 0


def test_json_lines_are_read_too(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0]}\n')
    assert coserve_figures.sample_shapes(str(path), 8.0, 4096, 0) == ([Shape(0.0, 845, 62)], 0)


def test_what_exceeds_the_context_is_counted(trace):
    shapes, left_out = coserve_figures.sample_shapes(trace, 8.0, 100, seed=1)
    assert left_out == 1 and max(s.prompt_len for s in shapes) == 30
    with pytest.raises(TandemError, match="--max-model-len"):
        coserve_figures.sample_shapes(trace, 8.0, 1, seed=1)


def test_the_seed_decides_the_order(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(f'{{"timestamp": 0, "input_length": {8 * i}, "output_length": 8}}\n' for i in range(1, 50)))
    first, again, other = (coserve_figures.sample_shapes(str(path), 8.0, 99, seed)[0] for seed in (1, 1, 2))
    assert first == again != other


def test_request_i_is_the_same_at_every_rate_and_comes_proportionally_earlier():
    shapes = [Shape(0.0, 3 + i, 1 + i) for i in range(7)]
    slow = coserve_figures.arrivals(shapes, 1.0, 400.0, 100, seed=5)
    fast = coserve_figures.arrivals(shapes, 4.0, 400.0, 100, seed=5)
    assert 340 < len(slow) < 460 and 1480 < len(fast) < 1720
    for a, b in zip(slow, fast, strict=False):
        assert a.at_s == pytest.approx(4 * b.at_s) and (a.prompt, a.output_len) == (b.prompt, b.output_len)
    assert [len(a.prompt) for a in slow[:8]] == [3, 4, 5, 6, 7, 8, 9, 3]
    assert all(10 <= token < 100 for a in slow for token in a.prompt) and slow[0].prompt != slow[7].prompt
    gaps = [b.at_s - a.at_s for a, b in zip(fast, fast[1:], strict=False)]
    # Exponential: as much spread as mean.
    mean = sum(gaps) / len(gaps)
    assert (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.1)
    assert coserve_figures.arrivals(shapes, 1.0, 400.0, 100, seed=6)[0].at_s != slow[0].at_s


# ---------------------------------------------------------------- attainment, rates, rows


def test_whatever_is_not_answered_in_time_is_a_miss():
    trials = [
        trial(), trial(tokens=1), trial(ttft=1.2), trial(tpot=0.11), Trial(10.0, status=429, error="later"),
        Trial(10.0, error="cut off", chunks=[10.1]),
    ]  # fmt: skip
    assert coserve_figures.attainment(trials, TARGETS) == pytest.approx(2 / 6)
    assert coserve_figures.attainment([], TARGETS) is None


def test_tokens_per_s_between_readings():
    counter = [(0.0, 0), (10.0, 1000), (20.0, 3000)]
    assert coserve_figures.tokens_per_s(counter, 0.0, 20.0) == 150.0
    assert coserve_figures.tokens_per_s(counter, 5.0, 15.0) == pytest.approx((2000 - 500) / 10)
    # Nothing is made up after the last reading, nor before the first.
    assert coserve_figures.tokens_per_s(counter, 15.0, 35.0) == pytest.approx(1000 / 20)
    assert coserve_figures.tokens_per_s([(3.0, 500)], 0.0, 10.0) == 0.0
    assert coserve_figures.tokens_per_s([], 0.0, 10.0) == 0.0


def test_a_row_has_the_keys_of_the_format():
    cell = Cell("coserve", "coserve", 50.0, 0.5, (trial(), trial(ttft=1.5), Trial(10.0, status=429, error="x")), 60.0)
    (row,) = coserve_figures.as_json([coserve_figures.row(cell, TARGETS, 80.0)])
    assert list(row) == KEYS
    assert row["ttft_p50"] == pytest.approx(1.0) and row["ttft_p99"] == pytest.approx(1.49)
    assert row["tpot_p95"] == pytest.approx(0.05)
    assert (row["slo_attainment"], row["train_tokens_per_s"], row["retained"]) == (
        pytest.approx(1 / 3, abs=1e-4),
        60,
        0.75,
    )


@pytest.mark.parametrize("mode", ["serve", "train"])
def test_figures_that_do_not_apply_are_null(mode):
    cell = Cell(mode, mode, 0.0, 0.0, (), 0.0 if mode == "serve" else 90.0)
    (row,) = coserve_figures.as_json([coserve_figures.row(cell, TARGETS, 90.0)])
    assert list(row) == KEYS and row["retained"] == (None if mode == "serve" else 1.0)
    assert [row[k] for k in KEYS[3:10]] == [None] * 7
    json.dumps(row, allow_nan=False)


def test_verdicts_compare_like_with_like():
    def row(mode, load, rate, ttft):
        return coserve_figures.row(Cell(mode, mode, load, 0.5, (trial(ttft=ttft),), rate), TARGETS, 100.0)

    rows = [row("serve", 25.0, 0.0, 0.4), row("coserve", 25.0, 80.0, 0.5), row("temporal", 25.0, 64.0, 0.6)]
    (said,) = coserve_figures.verdicts(rows)
    closed = [row("coserve", 33.0, 90.0, 0.5), row("two-processes", 30.0, 60.0, 0.7)]
    (other,) = coserve_figures.verdicts([], closed)
    assert "1.50x the training of two processes" in other and "TTFT p95 500 ms against 700 ms" in other
    assert "80% of training retained" in said and "1.25x of serving alone" in said and "1.25x the training" in said


# ---------------------------------------------------------------- 100 % load


def queue_attainment(rate, service_s=0.5, limit_s=3.0, num=4000):
    """A single server, Poisson arrivals, fixed service: the share of requests that wait no longer than the limit."""
    rng, now, free, good = random.Random(3), 0.0, 0.0, 0
    for _ in range(num):
        now += rng.expovariate(1.0) / rate
        free = max(free, now) + service_s
        good += free - now <= limit_s
    return good / num


async def test_the_search_finds_the_highest_rate_that_works():
    asked = []

    async def measure(rate):
        asked.append(rate)
        return queue_attainment(rate)

    for guess in (0.05, 1.0, 20.0):
        asked.clear()
        found = await coserve_figures.highest_rate(measure, guess, steps=6)
        assert queue_attainment(found) >= 0.95 > queue_attainment(found * 1.08)
        assert found in asked and len(asked) <= 12


async def test_the_search_says_when_there_is_nothing_to_find():
    async def never(rate):
        return 0.0

    async def always(rate):
        return 1.0

    with pytest.raises(TandemError, match="--target-ttft-ms"):
        await coserve_figures.highest_rate(never, 1.0, 3)
    with pytest.raises(TandemError, match="--capacity"):
        await coserve_figures.highest_rate(always, 1.0, 3)


# ---------------------------------------------------------------- options and order


def test_loads_and_modes():
    peers = coserve_options.PeerOptions()
    assert coserve_options.parse_loads("50,0,25,25") == [0.0, 25.0, 50.0]
    assert coserve_options.parse_modes("coserve,serve", peers) == ("serve", "coserve")
    assert coserve_options.parse_modes("", peers) == ("serve", "train", "coserve", "temporal")
    both = coserve_options.PeerOptions(vllm_python="a", peft_python="b")
    assert coserve_options.parse_modes("", both)[-1] == "two-processes"
    for bad in ("two-processes", "serve,nothing"):
        with pytest.raises(options.UsageError):
            coserve_options.parse_modes(bad, peers)
    for bad in ("", "x", "-1", "inf", "nan"):
        with pytest.raises(options.UsageError, match="--loads"):
            coserve_options.parse_loads(bad)


def test_what_is_compared_runs_close_together_with_few_starts():
    found = coserve_options.order([0.0, 25.0, 50.0], ("serve", "train", "coserve", "temporal"))
    assert found == [
        (0.0, "train"), (0.0, "coserve"), (0.0, "temporal"),
        (25.0, "temporal"), (25.0, "serve"), (25.0, "coserve"),
        (50.0, "serve"), (50.0, "coserve"), (50.0, "temporal"),
    ]  # fmt: skip


# ---------------------------------------------------------------- runs on an engine that is a clock


class FakeEngine:
    """Tokens every `tpot_s` after `ttft_s`; a training pass takes its time; figures as the engine's."""

    def __init__(self, config=None, ttft_s=0.01, tpot_s=0.005, limit=99, tokens_per_s=4000.0):
        self.config, self.ttft_s, self.tpot_s, self.limit, self.speed = config, ttft_s, tpot_s, limit, tokens_per_s
        self.stats, self.dead, self.open, self.most_open, self.closed = EngineStats(), None, 0, 0, False
        self.runs, self.opened, self.fails, self.tasks, self.prompts = {}, [], None, set(), []
        self.pending, self.most_pending = 0, 0
        self.report = EngineReport(
            model="fake", architecture="x", num_parameters=1, weight_bytes=2, load_s=0.0, device="cpu", isa="none",
            num_threads=1, dtype="float32", block_size=16, num_blocks=9, kv_bytes=9, max_model_len=64, vocab_size=50,
        )  # fmt: skip

    def submit(self, request):
        if self.dead:
            raise EngineDead(self.dead)
        if self.open >= self.limit:
            raise Overloaded("too many")
        self.prompts.append(request.prompt)
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        return FakeStream(self, request)

    def later(self, work):
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        return task

    def open_run(self, run_id, lora, **_):
        self.runs[run_id], lock = [], asyncio.Lock()
        self.opened.append((run_id, lora, lock))
        return self.later(asyncio.sleep(0))

    def forward_backward(self, run_id, examples):
        self.pending += 1
        self.most_pending = max(self.pending, self.most_pending)
        tokens = sum(len(e.tokens) for e in examples)
        assert sum(w for e in examples for w in e.weights) == pytest.approx(1.0)
        lock = self.opened[-1][2]

        async def work():
            async with lock:
                await asyncio.sleep(tokens / self.speed)
                if run_id not in self.runs:
                    raise Cancelled("closed")
                self.pending -= 1
                self.stats.train_tokens += tokens
                return PassReport(loss=1.0, nll=1.0, num_tokens=tokens, num_correct=0)

        return self.later(work())

    def optim_step(self, run_id, params):
        async def work():
            if self.fails:
                raise self.fails
            return UpdateReport(step=1, grad_norm=1.0)

        return self.later(work())

    def close_run(self, run_id):
        del self.runs[run_id]
        self.pending = 0
        return self.later(asyncio.sleep(0))

    async def close(self):
        self.closed = True
        for task in self.tasks:
            task.cancel()


class FakeStream:
    def __init__(self, engine, request):
        self.engine, self.left, self.first, self.is_open = engine, request.sampling.max_tokens, True, True
        self.request_id = request.request_id

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.left:
            raise StopAsyncIteration
        await asyncio.sleep(self.engine.ttft_s if self.first else self.engine.tpot_s)
        self.first, self.left = False, self.left - 1
        return [TokenEvent(request_id=self.request_id, token_id=7, finish_reason=None if self.left else "length")]

    async def aclose(self):
        if self.is_open:
            self.is_open = False
            self.engine.open -= 1


JOB = Job(batch=2, length=20, rank=4)


async def test_an_open_loop_measures_requests_and_training():
    engine = FakeEngine()
    requests = [Arrival(i / 20, [11, 12], 5) for i in range(24)]
    trials, rate = await coserve_cells.open_loop(engine, requests, Span(0.2, 0.6, 0.4), JOB, seed=1)
    assert len(trials) == 12  # those that came from 0.2 s to 0.8 s
    assert all(t.completed and t.output_tokens == 5 for t in trials)
    assert all(t.ttft >= 0.01 and t.tpot >= 0.004 for t in trials)
    assert 0 < rate <= 4000
    assert engine.most_pending == 2 and engine.runs == {} and engine.open == 0
    assert (engine.opened[0][1].rank, engine.opened[0][1].target_modules) == (4, ("all-linear",))


async def test_without_a_job_nothing_is_trained():
    engine = FakeEngine()
    trials, rate = await coserve_cells.open_loop(engine, [Arrival(0.0, [11], 2)], Span(0.0, 0.1), None, 1)
    assert rate == 0.0 and engine.opened == [] and len(trials) == 1


async def test_rejections_and_unfinished_requests_are_seen(monkeypatch):
    monkeypatch.setattr(coserve_cells, "DRAIN_S", 0.1)
    engine = FakeEngine(limit=2, ttft_s=0.05, tpot_s=0.3)
    requests = [Arrival(0.0, [11], 1), Arrival(0.0, [12], 50), Arrival(0.0, [13], 1)]
    trials, _ = await coserve_cells.open_loop(engine, requests, Span(0.0, 0.2), None, 1)
    assert [(t.status, t.completed, t.rejected) for t in trials] == [
        (200, True, False),
        (0, False, False),
        (429, False, True),
    ]
    assert trials[1].error == coserve_cells.CUT_OFF and engine.open == 0


async def test_what_training_fails_with_ends_the_run():
    engine = FakeEngine()
    engine.fails = Diverged("not finite")
    with pytest.raises(Diverged, match="not finite"):
        await coserve_cells.open_loop(engine, [Arrival(0.0, [11], 2)], Span(0.0, 5.0), JOB, 1)
    assert engine.runs == {} and engine.open == 0


async def test_a_dead_engine_ends_the_run():
    engine = FakeEngine()
    requests = [Arrival(0.05 * i, [11], 2) for i in range(100)]
    asyncio.get_running_loop().call_later(0.2, setattr, engine, "dead", "gone")
    with pytest.raises(EngineDead, match="gone"):
        await coserve_cells.open_loop(engine, requests, Span(0.0, 5.0), None, 1)


async def test_cancelling_a_run_cleans_up():
    engine = FakeEngine()
    work = asyncio.create_task(coserve_cells.open_loop(engine, [Arrival(0.0, [11], 500)], Span(0.0, 9.0), JOB, 1))
    await asyncio.sleep(0.1)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert engine.runs == {} and engine.open == 0


async def test_a_closed_loop_keeps_its_streams_busy():
    engine = FakeEngine()
    requests = [Arrival(0.0, [11 + i], 4) for i in range(5)]
    trials, rate = await coserve_cells.closed_loop(engine, requests, 3, Span(0.1, 0.4, 0.1), JOB, 1)
    assert engine.most_open == 3 and engine.open == 0 and rate > 0
    # One request takes 25 ms, so that a stream is through with 16 of them in 0.4 s, and two are under way.
    assert 3 <= len(trials) <= 54 and all(t.completed for t in trials)
    assert engine.prompts[:7] == [[11], [12], [13], [14], [15], [11], [12]]


async def test_a_closed_loop_does_not_hammer_an_engine_that_refuses():
    engine = FakeEngine(limit=0)
    trials, _ = await coserve_cells.closed_loop(engine, [Arrival(0.0, [11], 1)], 4, Span(0.0, 0.2), None, 1)
    assert len(trials) == 4 and all(t.rejected for t in trials)


async def test_one_stream_alone():
    alone = await coserve_cells.single_stream(FakeEngine(ttft_s=0.02), prompt_len=10, output_len=9, runs=3)
    assert alone.prompt_tokens == 10 and 0.005 <= alone.tpot < 0.03 and alone.ttft >= 0.02
    # Prompts four times as long take four times as long; then 4 more tokens.
    guess = coserve_cells.first_guess(alone, [Arrival(0.0, [1] * 40, 5)])
    assert guess == pytest.approx(1 / (4 * alone.ttft + 4 * alone.tpot))


# ---------------------------------------------------------------- the whole command


@pytest.fixture
def engines(monkeypatch):
    """Every engine that the command starts."""
    started = []

    async def start(config, on_progress=None):
        assert all(engine.closed for engine in started), "one engine at a time"
        started.append(FakeEngine(config))
        return started[-1]

    monkeypatch.setattr(coserve_plan.EngineClient, "start", start)
    return started


def arguments(trace, *more):
    line = ["--demo", "--trace", trace, "--seconds", "0.5", "--warm-up-seconds", "0.1", "--train-length", "20"]
    return bench_coserve.parser("tandem bench coserve").parse([*line, *more], options.note)


def test_the_whole_command(trace, tmp_path, capsys, engines):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "rows.json", tmp_path / "rows.png"
    argv = ["--loads", "0,50", "--capacity", "20", "--json", str(out), "--plot", str(plot)]
    assert bench_coserve.run(arguments(trace, *argv)) == 0
    rows = json.loads(out.read_text())
    assert [(r["load"], r["mode"]) for r in rows] == [
        (0, "train"), (0, "coserve"), (0, "temporal"), (50, "serve"), (50, "coserve"), (50, "temporal"),
    ]  # fmt: skip
    assert all(list(r) == KEYS for r in rows)
    assert {r["requests_per_s"] for r in rows if r["load"] == 50} == {10.0}
    assert all(r["slo_attainment"] is not None for r in rows if r["load"] == 50)
    assert all(r["retained"] > 0 for r in rows if r["mode"] != "serve")
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000
    # First to see how fast it is; then with the targets; temporal sharing apart; and back.
    assert [e.config.training.share_forward for e in engines] == [True, True, False, True]
    assert all(e.closed for e in engines)
    told = engines[1].config.training
    ground = json.loads(Path(f"{out}.run.json").read_text())
    assert told.slo_ttft_ms == 3000.0 and told.slo_tpot_ms == pytest.approx(ground["targets"]["tpot_s"] * 1e3, rel=0.01)
    assert ground["targets"]["tpot_s"] == pytest.approx(2 * ground["single_stream"]["tpot_s"], rel=0.01)
    assert ground["requests_per_s_at_100"] == 20.0 and len(ground["runs"]) == 6 and ground["machine"]["cores"]
    said = capsys.readouterr().out
    assert '"targets"' in said and "50 % load:" in said and said.count("coserve") >= 2


def test_every_mode_sees_the_same_requests(trace, engines):
    argv = ["--loads", "50", "--capacity", "30", "--modes", "serve,coserve,temporal"]
    assert bench_coserve.run(arguments(trace, *argv)) == 0
    _, shared, turns = engines
    half = len(shared.prompts) // 2
    assert half > 5 and shared.prompts[:half] == shared.prompts[half:] == turns.prompts


def test_the_search_for_100_percent(trace, engines, monkeypatch, capsys):
    # Four requests at once are all this engine takes: a hundred a second are too many.
    monkeypatch.setattr(FakeEngine.__init__, "__defaults__", (None, 0.05, 0.005, 4, 4000.0))
    argv = ["--loads", "100", "--modes", "serve", "--search-seconds", "0.5", "--search-steps", "2"]
    assert bench_coserve.run(arguments(trace, *argv)) == 0
    said = capsys.readouterr()
    assert "serving alone at" in said.err and "within the targets" in said.err


def test_two_processes_are_measured_like_us(trace, tmp_path, engines, fake_server, monkeypatch):
    import httpx

    fake_server.pause_s = 0.01
    asked = []

    @contextlib.asynccontextmanager
    async def serving(python, model, dtype, longest):
        asked.append((python, dtype, longest))
        async with httpx.AsyncClient(base_url=fake_server.url, timeout=None) as http:
            yield http

    monkeypatch.setattr(coserve_peers, "serving", serving)
    monkeypatch.setattr(coserve_peers, "peft_command", lambda python, *_: [sys.executable, "-c", CHATTY])
    out = tmp_path / "rows.json"
    argv = ["--loads", "0", "--capacity", "20", "--modes", "two-processes", "--json", str(out), "--vllm-python", "v"]
    assert bench_coserve.run(arguments(trace, *argv, "--peft-python", "p", "--peft-tokens-per-s", "1600")) == 0
    rows = json.loads(out.read_text())
    assert [r["mode"] for r in rows] == ["serve", "coserve", "two-processes", "two-processes"]
    assert all(list(r) == KEYS and r["load"] == pytest.approx(5 * r["requests_per_s"], abs=0.1) for r in rows)
    assert all(r["retained"] == pytest.approx(r["train_tokens_per_s"] / 1600, abs=1e-3) for r in rows[1:])
    labels = [run["label"] for run in json.loads(Path(f"{out}.run.json").read_text())["runs"]]
    assert [label.partition(", closed")[0] for label in labels] == [
        "serve", "coserve", "two processes", "two processes, nice 19"
    ]  # fmt: skip
    assert asked == [("v", "bfloat16", 34)]  # the demo's dtype; what the longest request may need
    assert all(e.closed for e in engines) and {b["max_tokens"] for b in fake_server.bodies} <= {1, 2, 3, 4}


def test_sigterm_ends_everything(trace, engines):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(TandemError, match="SIGTERM"):
        bench_coserve.run(arguments(trace, "--loads", "50", "--capacity", "5", "--seconds", "60"))
    assert engines and all(e.closed and e.runs == {} and e.open == 0 for e in engines)


def test_what_is_missing_is_said(trace):
    with pytest.raises(options.UsageError, match="--trace"):
        bench_coserve.run(bench_coserve.parser("x").parse(["--demo"], options.note))
    with pytest.raises(options.UsageError, match="--vllm-python"):
        bench_coserve.run(arguments(trace, "--modes", "two-processes"))


# ---------------------------------------------------------------- peers

CHATTY = """
import json, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("not JSON", flush=True)
while True:
    time.sleep(0.05)
    print(json.dumps({"tokens": 100, "seconds": 0.05, "peak": 12345, "child": child.pid}), flush=True)
"""


async def test_a_peer_ends_with_its_children():
    async with coserve_peers.running([sys.executable, "-c", CHATTY], nice=True) as (process, _):
        await process.stdout.readline()
        child = json.loads(await process.stdout.readline())["child"]
        assert psutil.Process(process.pid).nice() == 19 and psutil.pid_exists(child)
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != "zombie" and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert process.returncode is not None
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


async def test_the_peft_loop_alone():
    rate, peak = await coserve_peers.train_alone([sys.executable, "-c", CHATTY], 0.5)
    assert 0 < rate <= 2000 and peak == 12345


async def test_a_peer_that_fails_is_quoted():
    with pytest.raises(TandemError, match="no such thing as peft"):
        await coserve_peers.train_alone([sys.executable, "-c", "raise SystemExit('no such thing as peft')"], 5.0)
    with pytest.raises(TandemError, match="cannot run"):
        await coserve_peers.train_alone(["/nowhere/python"], 5.0)


async def test_two_processes_in_a_closed_loop(fake_server):
    import httpx

    fake_server.pause_s = 0.01
    requests = [Arrival(0.0, [1, 2], 3)]
    async with httpx.AsyncClient(base_url=fake_server.url, timeout=None) as http:
        trials, rate = await coserve_peers.closed_loop(
            http, "fake-model", requests, 2, Span(0.2, 0.6, 0.1), [sys.executable, "-c", CHATTY], False
        )
        assert len(trials) > 5 and all(t.completed and t.output_tokens == 3 for t in trials) and 0 < rate <= 2000
        with pytest.raises(TandemError, match="PEFT loop ended"):
            await coserve_peers.closed_loop(
                http, "m", requests, 2, Span(0.1, 9.0), [sys.executable, "-c", "raise SystemExit('broken')"], False
            )
    assert {body["ignore_eos"] for body in fake_server.bodies} == {True}


async def test_the_loop_that_peers_run(tiny_model):
    """PEFT itself trains a tiny model, one sequence a pass."""
    command = coserve_peers.peft_command(
        sys.executable, str(tiny_model("llama")), "float32", Job(2, 16, 4), checkpointing=True
    )
    rate, peak = await asyncio.wait_for(coserve_peers.train_alone(command, 0.2), 100)
    assert rate > 0 and peak > 50e6


def test_the_whole_batch_may_go_at_once():
    one, whole = (coserve_peers.peft_command("p", "m", "bfloat16", Job(), whole_batch=b) for b in (False, True))
    assert one[3:] == ["m", "bfloat16", "16", "1", "512", "4"] and whole[3:] == ["m", "bfloat16", "16", "4", "512", "1"]
