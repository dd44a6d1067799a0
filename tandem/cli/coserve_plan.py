"""What `tandem bench coserve` does, from the first look to the last run, and the engine that lives through it.

A run on the engine is `coserve_cells`, one on the peers `coserve_peers`; what the figures mean is `coserve_figures`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

from tandem.cli import coserve_cells, coserve_figures, options
from tandem.cli.coserve_cells import Job, Span
from tandem.cli.coserve_figures import Cell, Targets
from tandem.cli.coserve_options import (
    SINGLE_STREAM_FACTOR,
    CoserveOptions,
    PeerOptions,
    order,
    parse_loads,
    parse_modes,
)
from tandem.cli.coserve_report import Report, machine
from tandem.cli.latency import Trial
from tandem.cli.workload import Arrival, Shape
from tandem.config import DEMO_MODEL, EngineConfig
from tandem.engine.client import EngineClient
from tandem.errors import ConfigError
from tandem.hub import is_gguf, resolve_model

# Requests of a closed loop before they come round again.
LOOP_REQUESTS = 512


class Plan:
    """The order of everything, and the one engine that lives at a time."""

    def __init__(self, wanted: CoserveOptions, peers: PeerOptions, config: EngineConfig) -> None:
        if not wanted.trace:
            raise options.UsageError("--trace FILE is needed: a CSV with TIMESTAMP, ContextTokens, GeneratedTokens, or "
                                     "JSON lines with timestamp, input_length, output_length")  # fmt: skip
        self.wanted = wanted
        self.peers = peers
        self.loads = parse_loads(wanted.loads)
        self.modes = parse_modes(wanted.modes, peers)
        self.config = replace(config, cache=replace(config.cache, enable_prefix_caching=False))
        self.job = Job(wanted.train_batch, wanted.train_length, wanted.train_rank)
        self.span = Span(wanted.warm_up_seconds, wanted.seconds, wanted.warm_up_seconds)
        self.seed = config.model.seed
        self.shapes: list[Shape] = []
        self.capacity = wanted.capacity
        self._engine: EngineClient | None = None
        self._running: EngineConfig | None = None
        self._requests: list[Arrival] = []

    async def measure(self) -> Report:
        """Everything, in this order: the PEFT loop alone, one stream alone, what 100 % is, the runs by load, the closed
        loops on our engine and on the peers."""
        peft = await self._peft_alone()
        try:
            report, alone = await self._first_look(peft)
            await self._find_capacity(report, alone)
            report.print_ground()
            for load, mode in order(self.loads, self.modes):
                report.add(await self._cell(load, mode), self.wanted.json)
            if "two-processes" in self.modes:
                for mode in ("serve", "coserve"):
                    report.add(await self._closed(mode), self.wanted.json)
        finally:
            await self._stop()
        if "two-processes" in self.modes:
            async for cell in self._two_processes(report):
                report.add(cell, self.wanted.json)
        return report

    # ------------------------------------------------------------ before the runs

    async def _peft_alone(self) -> float | None:
        given, python = self.peers.peft_tokens_per_s, self.peers.peft_python
        if given is not None or python is None:
            return given
        from tandem.cli import coserve_peers

        options.note("the PEFT loop alone ...")
        command = coserve_peers.peft_command(python, self._model_path(), self._dtype(), self.job)
        found, _ = await coserve_peers.train_alone(command, min(self.wanted.seconds, 60.0))
        options.note(f"the PEFT loop alone: {found:.1f} training tokens/s")
        return found

    async def _first_look(self, peft: float | None) -> tuple[Report, Trial]:
        """One stream alone, whose time per token sets the target; then the engine is told the targets."""
        wanted = self.wanted
        engine = await self._start(self.config)
        report, alone = engine.report, await coserve_cells.single_stream(engine)
        assert alone.tpot is not None
        self.shapes, left_out = coserve_figures.sample_shapes(
            str(wanted.trace), wanted.trace_scale, report.max_model_len, self.seed
        )
        if left_out:
            options.note(f"{left_out} lines of the trace exceed the context of {report.max_model_len} and are left out")
        tpot_s = SINGLE_STREAM_FACTOR * alone.tpot if wanted.target_tpot_ms is None else wanted.target_tpot_ms / 1e3
        targets = Targets(wanted.target_ttft_ms / 1e3, tpot_s)
        training = self.config.training
        self.config = replace(
            self.config,
            training=replace(
                training,
                slo_ttft_ms=wanted.target_ttft_ms,
                slo_tpot_ms=training.slo_tpot_ms if training.slo_tpot_ms is not None else tpot_s * 1e3,
            ),
        )
        ground = {
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "machine": machine(),
            "model": {"name": report.model, "parameters": report.num_parameters, "dtype": report.dtype,
                      "isa": report.isa, "threads": report.num_threads, "kv_bytes": report.kv_bytes},
            "trace": {"file": Path(str(wanted.trace)).name, "lengths_divided_by": wanted.trace_scale,
                      "requests": len(self.shapes), "left_out": left_out},
            "targets": {"ttft_s": targets.ttft_s, "tpot_s": round(targets.tpot_s, 5),
                        "engine_tpot_s": (self.config.training.slo_tpot_ms or 0.0) / 1e3},
            "single_stream": {"tpot_s": round(alone.tpot, 5), "ttft_s": round(alone.ttft, 5),
                              "prompt_tokens": alone.prompt_tokens, "output_tokens": alone.output_tokens},
            "training": {"rank": self.job.rank, "targets": "all-linear", "sequences_per_step": self.job.batch,
                         "tokens_per_sequence": self.job.length},
            "peft_tokens_per_s": peft,
            "seconds": wanted.seconds, "warm_up_seconds": wanted.warm_up_seconds, "seed": self.seed,
        }  # fmt: skip
        return Report(ground, targets, peft), alone

    async def _find_capacity(self, report: Report, alone: Trial) -> None:
        if self.capacity is None and any(self.loads):
            engine = await self._engine_for("serve")
            span = Span(min(self.wanted.warm_up_seconds, 10.0), self.wanted.search_seconds)

            async def measure(rate: float) -> float | None:
                asked = self._arrivals(rate, span)
                # Whoever is not done by then has missed a target.
                targets, longest = report.targets, max((a.output_len for a in asked), default=0)
                drain_s = targets.ttft_s + longest * targets.tpot_s
                trials, _ = await coserve_cells.open_loop(engine, asked, span, None, self.seed, drain_s)
                share = coserve_figures.attainment(trials, report.targets)
                said = "no request came" if share is None else f"{share:.1%} of {len(trials)} within the targets"
                options.note(f"serving alone at {rate:.3f} requests/s: {said}")
                return share

            guess = coserve_cells.first_guess(alone, self._arrivals(1.0, Span(0.0, 200.0)))
            self.capacity = await coserve_figures.highest_rate(measure, 2.0 * guess, self.wanted.search_steps)
        report.ground["requests_per_s_at_100"] = self.capacity

    def _arrivals(self, rate: float, span: Span) -> list[Arrival]:
        assert self._engine is not None
        vocab_size = self._engine.report.vocab_size
        return coserve_figures.arrivals(self.shapes, rate, span.total_s, vocab_size, self.seed)

    # ------------------------------------------------------------ runs on our engine

    async def _cell(self, load: float, mode: str) -> Cell:
        engine = await self._engine_for(mode)
        rate = load / 100 * (self.capacity or 0.0)
        arrivals = self._arrivals(rate, self.span) if rate else []
        job = None if mode == "serve" else self.job
        trials, tokens_per_s = await coserve_cells.open_loop(engine, arrivals, self.span, job, self.seed)
        return Cell(mode, mode, load, rate, tuple(trials), tokens_per_s)

    async def _closed(self, mode: str) -> Cell:
        engine, streams = await self._engine_for(mode), self.wanted.closed_streams
        requests = self._loop_requests()
        job = None if mode == "serve" else self.job
        trials, rate = await coserve_cells.closed_loop(engine, requests, streams, self.span, job, self.seed)
        return self._closed_cell(f"{mode}, closed loop of {streams}", mode, trials, rate)

    def _closed_cell(self, label: str, mode: str, trials: Sequence[Trial], tokens_per_s: float) -> Cell:
        per_s = sum(t.completed for t in trials) / self.wanted.seconds
        load = round(100 * per_s / self.capacity, 1) if self.capacity else 0.0
        return Cell(label, mode, load, per_s, tuple(trials), tokens_per_s, is_closed=True)

    def _loop_requests(self) -> list[Arrival]:
        """What the closed loops send, the same on every side."""
        if not self._requests:
            self._requests = self._arrivals(1.0, Span(0.0, float(LOOP_REQUESTS)))
        return self._requests

    async def _engine_for(self, mode: str) -> EngineClient:
        training = replace(self.config.training, share_forward=mode != "temporal")
        return await self._start(replace(self.config, training=training))

    async def _start(self, config: EngineConfig) -> EngineClient:
        """The running engine if it has this config, else a new one in its place."""
        if self._engine is None or self._running != config:
            await self._stop()
            self._engine, self._running = await EngineClient.start(config), config
        return self._engine

    async def _stop(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()

    # ------------------------------------------------------------ runs on the peers

    async def _two_processes(self, report: Report) -> AsyncIterator[Cell]:
        from tandem.cli import coserve_peers

        assert self.peers.vllm_python and self.peers.peft_python
        model, dtype, streams = self._model_path(), self._dtype(), self.wanted.closed_streams
        # The test request asks for four tokens.
        longest = max(s.prompt_len + max(4, s.output_len) for s in self.shapes)
        train = coserve_peers.peft_command(self.peers.peft_python, model, dtype, self.job)
        options.note("starting vLLM ...")
        async with contextlib.AsyncExitStack() as stack:
            http = await stack.enter_async_context(coserve_peers.serving(self.peers.vllm_python, model, dtype, longest))
            for nice in (False, True):
                trials, rate = await coserve_peers.closed_loop(
                    http, model, self._loop_requests(), streams, self.span, train, nice
                )
                label = f"two processes{', nice 19' * nice}, closed loop of {streams}"
                yield self._closed_cell(label, "two-processes", trials, rate)

    def _model_path(self) -> str:
        model = self.config.model
        path = DEMO_MODEL if model.model == "demo" else resolve_model(model.model, model.revision)
        if is_gguf(path):
            raise ConfigError(f"{path}: the other programs need a Hugging Face directory, not a GGUF file")
        return str(path)

    def _dtype(self) -> str:
        """The dtype that the engine chooses, which the peers are to use as well."""
        if self.config.model.dtype != "auto":
            return self.config.model.dtype
        declared = json.loads((Path(self._model_path()) / "config.json").read_text(encoding="utf-8"))
        is_float32 = "float32" in (declared.get("dtype"), declared.get("torch_dtype"))
        return "float32" if is_float32 else "bfloat16"
