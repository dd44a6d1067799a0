"""The step loop in one process: snapshot -> plan -> reserve -> execute -> commit.

Here the scheduler (what next), memory (who owns what) and the worker (one device) meet; none of them knows the others.
No text, no HTTP, no processes: those are `tokenizer`, `api` and `engine/client`.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from tandem.config import EngineConfig, cache_dir
from tandem.engine.calibration import calibrate
from tandem.engine.pace import Pace
from tandem.engine.sampler import Draw
from tandem.engine.training import Report, Training
from tandem.engine.worker import RowInput, Worker
from tandem.errors import ContextTooLong, InvalidRequest, Overloaded, TandemError
from tandem.finetune.inputs import check_pass, check_probe, check_update
from tandem.finetune.run import LayerPairs, Pair
from tandem.memory import arena
from tandem.memory.adapters import AdapterTable
from tandem.memory.blocks import BlockPool
from tandem.model.adapter import AdapterWeights
from tandem.scheduler import budget, policy
from tandem.scheduler.budget import Load, Measurement
from tandem.scheduler.replay import PlanRecord
from tandem.scheduler.state import Row, State
from tandem.work import (
    Adapter,
    EngineReport,
    EngineStats,
    Example,
    LoraConfig,
    OptimParams,
    Pass,
    PassReport,
    Probe,
    Publish,
    PublishReport,
    Request,
    Restore,
    RunReport,
    SamplingParams,
    Save,
    StepPlan,
    StepResult,
    TokenEvent,
    TrainOp,
    Update,
    UpdateReport,
)

# Steps kept for `plan_log`: a bad minute can be looked at afterwards.
PLAN_LOG_STEPS = 4096
# Steps over which the rate of finished sequences is taken.
RECENT_STEPS = 256
ENOUGH_FINISHED = 8


class Engine:
    """A model being served. `submit` requests, call `step` while `has_work`; each step returns the news.

    `owns_process`: the number of torch's threads, which is the whole process's, may be chosen by the calibration.
    Raises ModelError or ConfigError where the model cannot run here.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_progress: Callable[[int, int], None] | None = None,
        owns_process: bool = False,
    ) -> None:
        self.config = config
        self.worker = Worker(
            config.model, config.cache, config.scheduler, config.adapters, config.training, on_progress
        )
        self.blocks = BlockPool(self.worker.num_blocks, config.cache.block_size, config.cache.enable_prefix_caching)
        self.adapters = AdapterTable(config.adapters.max_cpu_loras)
        self.state = State(self.worker.spec.eos_token_ids, self.worker.max_model_len)
        self.calibration = calibrate(
            self.worker, config.model.model, config.model.autotune, cache_dir() / "calibration",
            self.worker.num_threads, may_choose=owns_process and self.worker.may_choose_threads,
        )  # fmt: skip
        cost = budget.fit([Measurement(Load(*load), seconds) for *load, seconds in self.calibration.steps])
        self.worker.clear_cache()
        arena.return_free_memory()  # what loading and measuring took
        self.limits = policy.Limits(
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            block_size=config.cache.block_size,
            max_loras=config.adapters.max_loras,
            cost=cost,
        )
        self.pace = Pace(config.training, cost)
        # A shared forward pass leaves its training rows' keys and values in the cache, where they must be exact.
        training = config.training
        if not self.worker.keeps_keys_exact:
            training = replace(training, share_forward=False)
        self.training = Training(training, self.worker, self.blocks, self.adapters, cost)
        self.stats = EngineStats(blocks_total=self.blocks.num_total)
        self.plan_log: deque[PlanRecord] = deque(maxlen=PLAN_LOG_STEPS)
        self._seeds = random.Random(config.model.seed)  # of requests that bring none
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT_STEPS)
        self._arrived: dict[int, float] = {}  # monotonic seconds, of rows never admitted
        self._queued: dict[tuple[str, int], float] = {}  # seconds in the queue, of rows without an event yet
        self._known_inputs: dict[int, RowInput] = {}  # of rows that run; what they refer to grows by itself

    @property
    def report(self) -> EngineReport:
        return msgspec.structs.replace(
            self.worker.report(),
            max_num_seqs=self.limits.max_num_seqs,
            adapter_names=self.adapters.names(),
            slo_tpot_s=self.pace.tpot_s,
            slo_ttft_s=self.pace.ttft_s,
            calibration=self.calibration.origin,
        )

    @property
    def has_work(self) -> bool:
        return self.is_serving or self.training.has_work

    @property
    def is_serving(self) -> bool:
        return self.state.num_running + self.state.num_waiting > 0

    def close(self) -> None:
        """Remove what runs have on disk while they are open. Nothing can be trained afterwards."""
        self.training.residents.close_all()

    # ------------------------------------------------------------ requests

    def submit(self, request: Request) -> None:
        """Queue a request; its adapter version is pinned now.

        Raises InvalidRequest, ContextTooLong, NotFound (adapter) or Overloaded; then nothing was queued.
        """
        self._check(request)
        version = self.adapters.resolve(request.adapter)
        seed = request.sampling.seed
        rows = self.state.add(request, version, self._seeds.getrandbits(63) if seed is None else seed)
        for row in rows:
            self.adapters.pin(version)
            self._arrived[row.row_id] = time.monotonic()
            self.pace.arrive(row.row_id, self._arrived[row.row_id])

    def _check(self, request: Request) -> None:
        vocab, longest = self.worker.spec.vocab_size, self.worker.max_model_len
        prompt, sampling = request.prompt, request.sampling
        if not prompt:
            raise InvalidRequest("the prompt is empty: send at least one token", "prompt")
        outside = next((t for t in prompt if not 0 <= t < vocab), None)
        if outside is not None:
            raise InvalidRequest(f"token id {outside} is outside the vocabulary of {vocab}", "prompt")
        for param, named in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            if any(not 0 <= t < vocab for t in named):
                raise InvalidRequest(f"{param} names a token id outside the vocabulary of {vocab}", param)
        if len(prompt) + sampling.max_tokens > longest:
            raise ContextTooLong(
                f"prompt ({len(prompt)} tokens) and max_tokens ({sampling.max_tokens}) exceed the context of "
                f"{longest} tokens: shorten the prompt or lower max_tokens",
                "prompt" if len(prompt) >= longest else "max_tokens",
            )
        if self.state.has_request(request.request_id):
            raise InvalidRequest(f"request id {request.request_id} is in use: choose another", "request_id")
        limit = self.config.scheduler.max_num_queued_reqs
        free_seats = max(0, self.limits.max_num_seqs - self.state.num_running)
        if self.state.num_waiting + sampling.n > limit + free_seats:
            raise Overloaded(f"{self.state.num_waiting} requests wait already (limit {limit}): try again later")
        wait_s = self._predicted_wait()
        if wait_s > self.config.scheduler.max_wait_s:
            raise Overloaded(f"a new request would wait about {wait_s:.0f} s: try again later", retry_after=wait_s)

    def cancel(self, request_id: str, index: int | None = None) -> list[TokenEvent]:
        """Drop a request, or one choice of it; its blocks are free when this returns. Unknown ids do nothing."""
        rows = self.state.cancel(request_id, index)
        self._release(rows)
        return [TokenEvent(request_id=request_id, index=row.index, finish_reason="cancelled") for row in rows]

    # ------------------------------------------------------------ adapters

    def load_adapter(self, name: str, path: str, weights: AdapterWeights | None = None) -> Adapter:
        """Publish a PEFT directory as the newest version of `name`. Raises ModelError, InvalidRequest, Conflict."""
        self._check_name(name)
        weights = weights or self.worker.read_adapter(path)
        adapter = self.adapters.publish(name, weights.rank, str(path), weights.base_model)
        self.worker.install(adapter.version, weights)
        self._forget(self.adapters.take_freed())
        return adapter

    def _check_name(self, name: str) -> None:
        if not name or name == self.config.model.model:
            raise InvalidRequest(f"{name!r} cannot name an adapter: it is empty or the base model's", "lora_name")

    def unload_adapter(self, name: str) -> None:
        """Unpublish `name` at once; its bytes go with the last request that uses it. Raises NotFound."""
        self._forget(self.adapters.retire(name))

    def published(self) -> list[Adapter]:
        """The adapter versions that new requests may use, oldest name first."""
        return [self.adapters.adapter(self.adapters.resolve(name)) for name in self.adapters.names()]

    def _forget(self, versions: Sequence[int]) -> None:
        for version in versions:
            self.blocks.drop_version(version)
            self.worker.forget(version)

    # ------------------------------------------------------------ the step

    def step(
        self,
        deliver: Callable[[list[TokenEvent]], None] | None = None,
        somebody_waits: Callable[[], bool] = lambda: False,
    ) -> list[TokenEvent]:
        """One iteration: everything that runs advances, within the plan's limits. `deliver` gets the news as soon as
        the forward pass is done, before the training slices; they are returned too. `somebody_waits` is asked between
        slices: a request that has arrived waits for one of them, not for all."""
        self.training.begin()
        self._forget(self.training.take_gone())
        snapshot, limits = self._snapshot(), replace(self.limits, train=self.training.limits)
        plan = policy.plan(snapshot, limits)
        self.training.reserve(plan)
        reservation = self.blocks.reserve(plan, self.state.rows)
        result = self._forward(plan, reservation.copies)
        self.plan_log.append(PlanRecord(plan, result.seconds, snapshot, limits))
        events = self._commit(plan, result)
        if deliver is not None:
            deliver(events)
        self.training.run(plan, somebody_waits)
        return events

    def _snapshot(self) -> policy.Snapshot:
        return self.state.snapshot(
            self.blocks,
            self.limits,
            self.pace.slack_s(self.state.running, self.state.waiting, time.monotonic()),
            self.training.view(),
            self.training.num_blocks,
        )

    def _forward(self, plan: StepPlan, copies: Sequence[tuple[int, int]]) -> StepResult:
        if not plan.segments:
            return StepResult()
        rank_rows = self._activate(plan)
        inputs = self._inputs(plan) | self.training.inputs(plan)
        recorder = self.training.recorder(plan, self._keeping(inputs))
        return self.worker.step(plan, inputs, copies, rank_rows, recorder)

    def _keeping(self, inputs: Mapping[int, RowInput]) -> dict[int, RowInput]:
        """The rows of requests that are going to be trained on."""
        if not self.worker.keeps_keys_exact:
            return {}
        return {
            row: each for row, each in inputs.items() if row >= 0 and self.state.row(row).request.keep_for_training
        }

    def _activate(self, plan: StepPlan) -> dict[int, tuple[int, int]]:
        """Rank rows of every adapter version in the plan; versions new to the pool are copied in."""
        versions = {self.state.row(segment.row).version for segment in plan.requests} | self.training.versions(plan)
        active = sorted(versions - {0})
        for load in self.adapters.reserve(active):
            self.worker.load_rows(load.version, load.lo, load.hi, self.adapters.num_rows)
        return {version: self.adapters.rows(version) for version in active}

    def _inputs(self, plan: StepPlan) -> dict[int, RowInput]:
        inputs = {}
        for segment in plan.requests:
            row, blocks = self.state.row(segment.row), self.blocks.table(segment.row)
            known = self._known_inputs.get(segment.row)
            if known is None or known.blocks is not blocks or known.scores != row.wants_prompt_logprobs:
                known = self._known_inputs[segment.row] = self._input(row, blocks)
            inputs[segment.row] = known
        return inputs

    def _input(self, row: Row, blocks: Sequence[int]) -> RowInput:
        draw = Draw(
            row.request.sampling, row.seed, row.index, row.tokens, row.num_prompt, self.worker.spec.eos_token_ids
        )
        return RowInput(row.tokens, blocks, row.version, draw, row.wants_prompt_logprobs)

    def _commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        requests = plan.requests
        rows = [self.state.row(segment.row) for segment in requests]
        events, finished = self.state.commit(plan, result)
        admitted = [row for row in rows if row.row_id in plan.admit] if plan.admit else []
        events = self._with_queue_time(admitted, result, events)
        for row in rows:
            self.blocks.commit(row.row_id, row.version, row.tokens, row.num_computed)
        self.pace.commit(rows, finished, time.monotonic())
        has_prompt = any(segment.length > 1 for segment in requests)
        self.pace.stalled(result.seconds if has_prompt else None, time.monotonic())
        self._release(finished)
        if plan.segments:
            self._correct(plan, result.seconds)
        if requests:
            self._recent.append((result.seconds + plan.slices_s, len(finished)))
        # What a preempted row computes again is no news.
        num_prompt_tokens = sum(
            min(segment.stop, row.num_prompt) - segment.start
            for row, segment in zip(rows, requests, strict=True)
            if segment.start < row.num_prompt and not row.preempted
        )
        self._count(plan, result, events, num_prompt_tokens)
        return events

    def _correct(self, plan: StepPlan, seconds: float) -> None:
        """Learn from a step: what serving takes where it was alone, else what riding adds beyond its tokens."""
        cost = self.limits.cost
        if len(plan.requests) == len(plan.segments):
            self.limits = replace(self.limits, cost=cost.corrected(plan.predicted_s, seconds))
            self.training.doubt_ride()
        else:
            riding = sum(segment.length for segment in plan.segments if segment.row < 0)
            self.training.learn_ride(seconds - cost.predict(plan.segments), riding, seconds)

    def _with_queue_time(
        self, admitted: Sequence[Row], result: StepResult, events: list[TokenEvent]
    ) -> list[TokenEvent]:
        """The first event of a choice says how long its row waited for its first admission."""
        began = time.monotonic() - result.seconds
        for row in admitted:
            if (arrived := self._arrived.pop(row.row_id, None)) is not None:
                self._queued[row.request.request_id, row.index] = max(0.0, began - arrived)
        if not self._queued:
            return events
        return [
            event if (waited := self._queued.pop((event.request_id, event.index), None)) is None
            else msgspec.structs.replace(event, queue_s=waited)
            for event in events
        ]  # fmt: skip

    def _release(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._arrived.pop(row.row_id, None)
            self._known_inputs.pop(row.row_id, None)
            self._queued.pop((row.request.request_id, row.index), None)
            self.pace.forget(row.row_id)
            self.blocks.release(row.row_id)
            self._forget(self.adapters.unpin(row.version))

    # ------------------------------------------------------------ figures

    def _count(
        self, plan: StepPlan, result: StepResult, events: Sequence[TokenEvent], num_prompt_tokens: int
    ) -> None:
        stats = self.stats
        stats.steps += 1
        stats.step_tokens += plan.num_tokens
        stats.step_s += result.seconds
        stats.preemptions += len(plan.preempt)
        stats.generation_tokens += sum(event.token_id is not None for event in events)
        stats.prompt_tokens += num_prompt_tokens
        stats.prefix_queries, stats.prefix_hits = self.blocks.num_queried, self.blocks.num_hit
        self.refresh_stats()

    def refresh_stats(self) -> EngineStats:
        """Bring the gauges up to date and return all figures."""
        stats = self.stats
        stats.num_running, stats.num_waiting = self.state.num_running, self.state.num_waiting
        stats.blocks_used = self.blocks.num_used
        stats.predicted_wait_s = self._predicted_wait()
        stats.ttft_p95_s, stats.tpot_p95_s = self.pace.p95_s(time.monotonic())
        stats.num_runs, stats.train_tokens, stats.train_s = self.training.figures
        stats.train_parts_s = dict(self.training.parts_s)
        stats.num_spilled = self.training.residents.num_spilled
        stats.run_bytes = self.training.residents.residency.used_bytes
        stats.running_adapters = self._adapter_names(self.state.running)
        stats.waiting_adapters = self._adapter_names(self.state.waiting)
        return stats

    def _adapter_names(self, rows: Sequence[Row]) -> list[str]:
        return sorted({self.adapters.adapter(row.version).name for row in rows if row.version})

    def _predicted_wait(self) -> float:
        full = self.limits.max_num_batched_tokens
        return budget.predicted_wait(
            self.state.queued_tokens,
            tokens_per_s=full / self.limits.cost.seconds(Load(tokens=full)),
            queued_rows=self.state.num_waiting,
            free_seats=self.limits.max_num_seqs - self.state.num_running,
            rows_per_s=self._finish_rate(),
        )

    def _finish_rate(self) -> float:
        """Sequences finished per second: counted where enough did lately, else as if each ran to its max_tokens."""
        seconds, finished = sum(s for s, _ in self._recent), sum(num for _, num in self._recent)
        if not seconds or not self.state.num_running:
            return 0.0
        if finished >= ENOUGH_FINISHED:
            return finished / seconds
        left = sum(row.request.sampling.max_tokens - row.num_generated for row in self.state.running)
        mean_left_s = left / self.state.num_running * seconds / len(self._recent)
        return self.state.num_running / mean_left_s if mean_left_s > 0 else 0.0

    def check(self) -> None:
        """The idle integrity check: every block and pin accounted for. Raises AssertionError."""
        self.blocks.check()
        self.adapters.check()
        self.training.residents.check()
        if not self.is_serving and not self.training.num_blocks:
            assert self.blocks.num_used == 0, f"{self.blocks.num_used} blocks leaked"
            assert self.adapters.num_pins == 0, f"{self.adapters.num_pins} adapter pins leaked"

    # ------------------------------------------------------------ training

    def check_run(self, lora: LoraConfig, longest: int) -> int:
        """Bytes that a run with examples of up to `longest` tokens needs. Raises BudgetError, InvalidRequest."""
        if longest > self.worker.max_model_len:
            raise ContextTooLong(
                f"sequences of {longest} tokens exceed the context of {self.worker.max_model_len}: lower max_seq_len",
                "max_seq_len",
            )
        return self.training.check_run(lora, longest)

    def open_run(
        self,
        run_id: str,
        lora: LoraConfig,
        *,
        init_from: str | None = None,
        resume_from: str | None = None,
        priority: int = 0,
    ) -> RunReport:
        """Begin a training run: fresh, from a PEFT directory of its shape, or where `save_run` left one. Raises
        Conflict (the id is in use), InvalidRequest, ModelError, BudgetError."""
        return self.training.open(run_id, lora, init_from, resume_from, priority)

    def enqueue(self, op: TrainOp) -> int:
        """Add an operation to its run's queue; `take_reports` has what came of it under the id returned. Raises
        NotFound (no such run) and InvalidRequest."""
        if isinstance(op, Pass):
            check_pass(op, self.worker.spec.vocab_size, self.worker.max_model_len)
        if isinstance(op, Probe):
            check_probe(op, self.worker.spec.vocab_size, self.worker.max_model_len)
        if isinstance(op, Update):
            check_update(op.params)
        if isinstance(op, Publish):
            self._check_name(op.name)
        return self.training.enqueue(op)

    def close_run(self, run_id: str) -> None:
        """End a run; what it has queued fails with Cancelled. Raises NotFound."""
        self._forget(self.training.close(run_id))

    def take_reports(self) -> list[tuple[int, Report]]:
        """What has come of operations since the last call, by id."""
        return self.training.take_reports()

    # ------------------------------------------------------------ offline use

    def forward_backward(
        self, run_id: str, examples: Sequence[Example], loss: str = "cross_entropy",
        loss_params: dict[str, float] | None = None, wants_logprobs: bool = False,
    ) -> PassReport:  # fmt: skip
        """One pass, stepping until it is done."""
        return self._finish(Pass(run_id, list(examples), True, loss, loss_params or {}, wants_logprobs))

    def forward(
        self, run_id: str, examples: Sequence[Example], loss: str = "cross_entropy",
        loss_params: dict[str, float] | None = None, wants_logprobs: bool = False,
    ) -> PassReport:  # fmt: skip
        """One pass without gradients, stepping until it is done."""
        return self._finish(Pass(run_id, list(examples), False, loss, loss_params or {}, wants_logprobs))

    def optim_step(self, run_id: str, params: OptimParams) -> UpdateReport:
        """One optimiser step, stepping until it is done. Raises Diverged."""
        return self._finish(Update(run_id, params))

    def probe(
        self, run_id: str, examples: Sequence[Example], params: OptimParams, seed: int, radius: float = 1e-2
    ) -> PassReport:
        """One step without gradients, stepping until it is done. Raises Diverged."""
        return self._finish(Probe(run_id, list(examples), params, seed, radius))

    def save_run(self, run_id: str, path: str | Path) -> None:
        """Write the run to a new directory. Raises TandemError."""
        self._finish(Save(run_id, str(path)))

    def load_run(self, run_id: str, path: str | Path, with_optimizer: bool = True) -> None:
        """Put what `save_run` wrote into an open run of the same shape. Raises ModelError, InvalidRequest."""
        self._finish(Restore(run_id, str(path), with_optimizer))

    def publish(self, run_id: str, name: str) -> PublishReport:
        """Let requests use the run as it is now, as the newest version of the adapter `name`. Raises Conflict."""
        return self._finish(Publish(run_id, name))

    def gradients(self, run_id: str) -> dict[tuple[int, str], Pair]:
        """By (layer, target): the gradients of a_RI and b_RO (lora_B transposed, without scaling), float32."""
        return _by_name(self.training.device_run(run_id).gradients)

    def weights(self, run_id: str) -> dict[tuple[int, str], Pair]:
        """By (layer, target): a_RI and b_RO, as `gradients`."""
        return _by_name(self.training.device_run(run_id).weights)

    def _finish(self, op: TrainOp) -> Any:
        op_id = self.enqueue(op)
        while True:
            if self.has_work:
                self.step()
            else:
                self.training.wait()
            for done_id, report in self.take_reports():
                if done_id == op_id:
                    if isinstance(report, TandemError):
                        raise report
                    return report

    def run(self) -> Iterator[list[TokenEvent]]:
        """Step until nothing is left to do."""
        while self.is_serving:
            yield self.step()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, adapter: str | None = None
    ) -> list[list[int]]:
        """Token ids generated for each prompt (choice 0), stop tokens included."""
        tag = f"generate-{time.monotonic_ns()}"
        found: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            found[f"{tag}-{i}"] = []
            self.submit(Request(request_id=f"{tag}-{i}", prompt=list(prompt), sampling=sampling, adapter=adapter))
        for events in self.run():
            for event in events:
                if event.index == 0 and event.token_id is not None and event.request_id in found:
                    found[event.request_id].append(event.token_id)
        return list(found.values())


def _by_name(layers: LayerPairs) -> dict[tuple[int, str], Pair]:
    return {(index, name): pair for index, layer in enumerate(layers) for name, pair in layer.items()}
