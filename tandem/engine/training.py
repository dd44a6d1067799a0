"""Training's side of the step: what could run, which blocks it holds, running a plan's slices, reports of what is done.

The integers are in `scheduler/progress`, the tensors in `trainer`; here they meet the block pool and the adapter table.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace

from tandem.config import TrainingConfig
from tandem.engine.residents import Residents
from tandem.engine.worker import RowInput, Worker
from tandem.errors import BudgetError, Cancelled, Conflict, Diverged, InvalidRequest, NotFound, TandemError
from tandem.finetune.run import Run
from tandem.memory.adapters import AdapterTable
from tandem.memory.blocks import BlockPool
from tandem.model.decoder import Record
from tandem.model.kept import Computed, all_of
from tandem.scheduler.budget import CostModel
from tandem.scheduler.progress import Batch, Progress, Queued, RunQueue
from tandem.scheduler.training import TrainLimits, TrainRow, TrainView, first_guess, pairs_of
from tandem.work import (
    LoraConfig,
    Nudge,
    Pass,
    PassReport,
    Probe,
    Publish,
    PublishReport,
    Restore,
    RunReport,
    Save,
    Slice,
    StepPlan,
    TrainOp,
    Update,
    UpdateReport,
)

# How much of what riding took is still believed a step later.
RIDE_MEMORY = 0.97
# Slices keep an arriving request waiting for at most this share of its target.
TTFT_SHARE = 0.25
# What comes of an operation: None of a save or a load.
Report = PassReport | UpdateReport | PublishReport | TandemError | None


class Training:
    """All training runs of an engine."""

    def __init__(
        self, config: TrainingConfig, worker: Worker, blocks: BlockPool, adapters: AdapterTable, cost: CostModel
    ) -> None:
        spec = worker.spec
        self.trainer = worker.trainer
        self._worker = worker
        self._blocks = blocks
        self._adapters = adapters
        self._progress = Progress(
            len(spec.layers), self.trainer.batch_tokens(), not config.deterministic, config.share_prefixes
        )
        head = spec.vocab_size * spec.hidden_size
        layer = max(1, (spec.num_parameters - head) // len(spec.layers))
        self.limits = TrainLimits(
            step_s=min(config.train_step_ms, TTFT_SHARE * config.slo_ttft_ms) / 1e3,
            window=config.train_window,
            share_forward=config.share_forward,
            deterministic=config.deterministic,
            cost=first_guess(cost, len(spec.layers), head / layer),
        )
        self.residents = Residents(
            self.trainer, self._progress, config.max_resident_runs, config.train_spill_dir, self._give_up
        )
        self._versions: dict[str, int] = {}
        self._closing: set[int] = set()
        self._began: dict[int, float] = {}
        self._next_op = 1
        self._helps: dict[int, int] = {}  # operations that nobody asked for, to the one that needs them
        self._reports: list[tuple[int, Report]] = []
        self._filer = ThreadPoolExecutor(1, thread_name_prefix="files")
        self._files: dict[int, tuple[str | None, Future[None]]] = {}  # operation -> run if open, the thread's answer
        self._gone: list[int] = []
        self._num_tokens = 0  # of finished microbatches
        self._told_tokens = 0  # a counter never falls, also not when a microbatch is given up
        self._seconds = 0.0
        self.parts_s: dict[str, float] = {}  # the same by kind of slice

    # ------------------------------------------------------------ runs and operations

    def open(
        self, run_id: str, lora: LoraConfig, init_from: str | None, resume_from: str | None, priority: int
    ) -> RunReport:
        if run_id in self._versions:
            raise Conflict(f"the training run {run_id} is open already", "run_id")
        num_bytes = self.trainer.state_bytes(lora, has_reference=init_from is not None)
        if init_from is not None or resume_from is not None:
            self.residents.make_room(num_bytes)  # what cannot be read is refused here, so it is read now
        is_here = init_from is not None or resume_from is not None or self.residents.fits(num_bytes)
        needed = self.trainer.check(lora, 1, 0 if is_here else num_bytes)
        version = self._adapters.begin_training(lora.rank)
        try:
            run = self.trainer.open(version, lora, init_from, resume_from, is_here)
        except (MemoryError, RuntimeError) as error:
            self._adapters.end_training(version)
            raise BudgetError(f"there is no memory for the training run: {error}") from error
        except BaseException:
            self._adapters.end_training(version)
            raise
        self._worker.install(version, self.trainer.weights(version))
        self._versions[run_id] = version
        self._progress.open(run_id, version, run.num_parameters, priority, may_ride=lora.dropout == 0)
        self._progress.runs[run_id].is_away = not is_here
        self.residents.open(version, num_bytes, is_here)
        return RunReport(
            run_id=run_id, num_parameters=run.num_parameters, step=run.optimizer.step, bytes_needed=needed
        )

    def device_run(self, run_id: str) -> Run:
        """The run's tensors, which are here when this returns. Raises NotFound, TandemError."""
        version = self._version(run_id)
        self.residents.bring(version)
        return self.trainer.slots[version].run

    def check_run(self, lora: LoraConfig, longest: int) -> int:
        """Bytes that a run with examples of this length needs. Raises BudgetError where that is too much."""
        num_bytes = self.trainer.state_bytes(lora)
        return self.trainer.check(lora, longest, 0 if self.residents.fits(num_bytes) else num_bytes)

    def _version(self, run_id: str) -> int:
        if run_id not in self._versions:
            raise NotFound(f"there is no open training run {run_id}", "run_id")
        return self._versions[run_id]

    def enqueue(self, op: TrainOp) -> int:
        """Add an operation to its run's queue, and before it what it needs. Raises NotFound, ModelError."""
        version = self._version(op.run_id)
        needed: list[TrainOp | Nudge] = []
        if isinstance(op, Pass):
            if op.loss == "dpo" and not op.examples[0].logprobs:
                needed.append(Pass(op.run_id, op.examples, learns=False, frozen=True))
            if needed or op.frozen:
                self.trainer.prepare_reference(version)
        elif isinstance(op, Probe):
            for distance in (op.radius, -op.radius):
                needed += [Nudge(op.run_id, op.seed, distance), op.side()]
        op_id = self._next_op + len(needed)
        for helper_id, helper in enumerate(needed, self._next_op):
            self._helps[helper_id] = op_id
            self._progress.enqueue(helper_id, helper)
        self._progress.enqueue(op_id, op)
        self.residents.use(self._progress.runs[op.run_id])
        self._next_op = op_id + 1
        self._began[op_id] = time.monotonic()
        return op_id

    def close(self, run_id: str) -> list[int]:
        """End a run. Returns the adapter versions gone by this: none while a shared microbatch holds its rows."""
        version = self._version(run_id)
        dropped, idle = self._progress.close(run_id)
        del self._versions[run_id]
        for queued in dropped:
            if queued.op_id in self._files:  # it cannot be stopped any more: what comes of it is still reported
                self._files[queued.op_id] = (None, self._files[queued.op_id][1])
                continue
            self.trainer.forget_op(queued.op_id)
            self._report(queued.op_id, Cancelled(f"the training run {run_id} was closed before this was done"))
        for batch in idle:
            self._end(batch)
        self._closing.add(version)
        return self._close_unused()

    def _close_unused(self) -> list[int]:
        gone: list[int] = []
        for version in [v for v in self._closing if not self._progress.uses(v)]:
            self._closing.remove(version)
            self.residents.close(version)
            self.trainer.close(version)
            gone += self._adapters.end_training(version)
        return gone

    def _give_up(self, run: RunQueue, error: TandemError) -> None:
        """A run's state cannot come: what it has queued fails, and with a pass that is half done its gradients."""
        if any(queued.num_taken and queued.num_left for queued in run.ops):
            self.trainer.discard(run.version)
        for queued in self._progress.drop(run.run_id):
            self.trainer.forget_op(queued.op_id)
            self._report(queued.op_id, error)

    def take_reports(self) -> list[tuple[int, Report]]:
        """What has come of operations since the last call; files written or read are noticed here."""
        for op_id, (run_id, future) in list(self._files.items()):
            if future.done():
                del self._files[op_id]
                if run_id is not None and isinstance(self._progress.pop(run_id).op, Restore):
                    self._adapters.outdate(self._versions[run_id])
                error = future.exception()
                if error is not None and not isinstance(error, TandemError):
                    traceback.print_exception(error)
                    error = TandemError(f"the adapter's files failed: {type(error).__name__}: {error}")
                self._report(op_id, error)
        reports, self._reports = self._reports, []
        return reports

    def wait(self) -> None:
        """Until a file being written or read is done; at once if there are none."""
        futures = [*(future for _, future in self._files.values()), *self.residents.futures]
        wait(futures, timeout=1.0, return_when=FIRST_COMPLETED)

    def _report(self, op_id: int, report: Report) -> None:
        if self._helps.pop(op_id, None) is not None:
            return  # whoever needed it fails with it
        self._began.pop(op_id, None)
        self._reports.append((op_id, report))

    @property
    def has_work(self) -> bool:
        if self._progress.has_work or any(q.op_id not in self._files for _, q in self._progress.due_files()):
            return True
        return self.residents.has_work

    @property
    def figures(self) -> tuple[int, int, float]:
        """Open runs; tokens trained and seconds of slices so far."""
        self._told_tokens = max(self._told_tokens, self._num_tokens + int(self._progress.trained_tokens))
        return len(self._versions), self._told_tokens, self._seconds

    # ------------------------------------------------------------ before a plan

    def begin(self) -> None:
        """Do what needs no plan: moves into and out of memory, publications, files, and the next microbatch."""
        self.residents.begin()
        while due := self._progress.due_publications():
            for run, publication in due:
                self._publish(run, publication)
        for run, queued in self._progress.due_files():
            if queued.op_id not in self._files:
                op = queued.op
                assert isinstance(op, Save | Restore)
                act = self.trainer.save if isinstance(op, Save) else self.trainer.load
                self._files[queued.op_id] = (
                    run.run_id, self._filer.submit(act, run.version, op.path, op.with_optimizer)
                )  # fmt: skip
        while (batch := self._progress.assemble()) is not None:
            try:
                known = self.trainer.known(batch)
                batch.skip(known)
                self.trainer.begin(batch, known)
            except (MemoryError, RuntimeError) as error:
                traceback.print_exc()
                self._abandon(error)
                break
            if not self._progress.turn():
                break

    def _publish(self, run: RunQueue, op: Publish) -> None:
        """The run's factors as they are now become the newest version of a name; nothing touches a disk."""
        queued, began_s = self._progress.pop(run.run_id), time.perf_counter()
        try:
            weights = self.trainer.snapshot(run.version)
            adapter = self._adapters.publish(op.name, weights.rank, "", weights.base_model)
        except TandemError as error:
            self._report(queued.op_id, error)
        except (MemoryError, RuntimeError) as error:
            self._report(queued.op_id, BudgetError(f"there is no memory for another adapter: {error}"))
        else:
            self._worker.install(adapter.version, weights)
            self.trainer.kept.publish(run.version, adapter.version)
            self._gone += self._adapters.take_freed()
            seconds = time.perf_counter() - began_s
            self._report(queued.op_id, PublishReport(adapter=adapter, seconds=seconds))

    def take_gone(self) -> list[int]:
        """Adapter versions that publications have replaced and nobody uses any more."""
        gone, self._gone = self._gone, []
        return gone

    def view(self) -> TrainView | None:
        down = self._progress.backward
        dense = {down.back_layer: self.trainer.dense.holds(down.back_layer)} if down is not None else {}
        return self._progress.view(self.num_blocks, dense)

    @property
    def num_blocks(self) -> int:
        """KV blocks held by the microbatch on its way up."""
        batch = self._progress.forward
        return sum(self._blocks.num_held(row.row) for row in batch.rows) if batch is not None else 0

    # ------------------------------------------------------------ a plan

    def reserve(self, plan: StepPlan) -> None:
        """Take or give up the blocks that a plan's training rows need."""
        batch = self._progress.forward
        if plan.evicts_training:
            self._release(self._progress.evict())
        elif batch is not None and any(s.row < 0 for s in plan.segments):
            for row in batch.rows:
                self._blocks.hold(row.row, row.length)

    def inputs(self, plan: StepPlan) -> dict[int, RowInput]:
        """What the device must know of the plan's training rows."""
        batch, riding = self._progress.forward, {s.row for s in plan.segments if s.row < 0}
        if batch is None or not riding:
            return {}
        return {
            row.row: RowInput(
                self.trainer.tokens(batch.batch_id, row.row), self._blocks.table(row.row), row.run.version
            )
            for row in batch.rows
            if row.row in riding
        }

    def versions(self, plan: StepPlan) -> set[int]:
        """Adapter versions of the plan's training rows."""
        return {row.version for row in self.inputs(plan).values()}

    def recorder(
        self, plan: StepPlan, keeping: Mapping[int, RowInput]
    ) -> Callable[[Mapping[int, int]], Record | None] | None:
        """What keeps the activations of the plan's training rows, and of the requests' rows `keeping` that are going to
        be trained on, once their places in the batch are known."""
        batch = self._progress.forward
        rides = batch is not None and any(s.row < 0 for s in plan.segments)
        kept = [s for s in plan.requests if s.row in keeping and self.trainer.kept.keeps(keeping[s.row].version)]
        if not rides and not kept:
            return None

        def make(starts: Mapping[int, int]) -> Record | None:
            computed = [
                Computed(s.row, keeping[s.row].version, keeping[s.row].tokens, s.start, s.length, starts[s.row])
                for s in kept
            ]
            records = [self.trainer.kept.record(computed)]
            if rides and batch is not None:
                records.append(self.trainer.recorder(batch.batch_id, plan.segments, starts))
            return all_of([record for record in records if record is not None])

        return make

    def run(self, plan: StepPlan, somebody_waits: Callable[[], bool] = lambda: False) -> None:
        """Execute the plan's slices and move the cursors; once `somebody_waits`, what is left of them is planned anew.
        A run that diverges loses its update and its gradients; what torch cannot do (no memory, mostly) ends the
        operations under way, not the engine."""
        done: list[Slice] = []
        failed: tuple[Queued, TandemError] | None = None
        broken: tuple[Slice, Exception] | None = None
        for piece in plan.slices:
            if done and somebody_waits():
                break
            try:
                self._run(piece)
            except (Diverged, InvalidRequest) as error:
                failed = self._refused(piece, error)
                break
            except (MemoryError, RuntimeError) as error:
                traceback.print_exc()
                broken = piece, error
                break
            done.append(piece)
        finished_ops, finished = self._progress.commit(replace(plan, slices=tuple(done)))
        if failed is not None:
            self._report(failed[0].op_id, failed[1])
        for queued in finished_ops:
            if (needed_by := self._helps.pop(queued.op_id, None)) is not None:
                self.trainer.help(queued, needed_by)
                self._adapters.outdate(self._versions[queued.op.run_id])
            else:
                self._report(queued.op_id, self._outcome(queued))
        for batch in finished:
            self._num_tokens += batch.num_read if batch.learns else 0
            self._end(batch)
        # Once no more tokens ride, keys and values are rebuilt from what is kept.
        up, down = self._progress.forward, self._progress.backward
        if up is not None and up.layer is not None:
            self._release(up)
        if down is not None:
            self._release(down)
        if broken is not None:
            self._abandon(broken[1], [self._run_of(broken[0]).run_id] if broken[0].kind == "update" else [])
        elif finished:
            self._forget_unused()

    def _forget_unused(self) -> None:
        for version in self._close_unused():
            self._worker.forget(version)

    def _run(self, piece: Slice) -> None:
        due, unpacks = None, False
        rows: tuple[TrainRow, ...] = ()
        if piece.kind == "update":
            due = self._run_of(piece).ops[0]
        else:
            batch = self._progress.forward if piece.kind == "forward" else self._progress.backward
            assert batch is not None
            rows = batch.train_rows
            unpacks = piece.kind == "backward" and not self.trainer.dense.holds(piece.layer)
        pairs = pairs_of(rows, piece.start, piece.stop) if piece.kind in ("forward", "backward") else 0
        predicted_s = self.limits.cost.seconds(piece.kind, piece.stop - piece.start, pairs, unpacks)
        seconds = self.trainer.run(piece, due)
        self._seconds += seconds
        self.parts_s[piece.kind] = self.parts_s.get(piece.kind, 0.0) + seconds
        cost = self.limits.cost.corrected(piece.kind, predicted_s, seconds, unpacks)
        self.limits = replace(self.limits, cost=cost)

    def learn_ride(self, rest_s: float, tokens: int, step_s: float) -> None:
        """A step of `step_s` in which so many tokens rode took `rest_s` more than serving's cost model says."""
        self.limits = replace(self.limits, cost=self.limits.cost.corrected_ride(rest_s, tokens, step_s))

    def doubt_ride(self) -> None:
        """A step without riding tokens: what they would take is remembered less and less, or a few slow steps would
        keep them out for good."""
        cost = self.limits.cost
        self.limits = replace(self.limits, cost=replace(cost, ride_s=RIDE_MEMORY * cost.ride_s))

    def _refused(self, piece: Slice, error: TandemError) -> tuple[Queued, TandemError]:
        run = self._run_of(piece)
        if isinstance(error, Diverged) and isinstance(run.ops[0].op, Update):
            self.trainer.discard(run.version)
        self.trainer.undo_probe(run.version)
        self.trainer.forget_op(run.ops[0].op_id)
        return self._progress.pop(run.run_id), error

    def _abandon(self, error: Exception, run_ids: Sequence[str] = ()) -> None:
        dropped, batches = self._progress.abandon(run_ids)
        versions = {row.run.version for batch in batches for row in batch.rows}
        for version in (versions | {self._versions[r] for r in run_ids}) & self.trainer.slots.keys():
            self.trainer.discard(version)
        for batch in batches:
            self._end(batch)
        for queued in dropped:
            self.trainer.forget_op(queued.op_id)
            self._report(queued.op_id, BudgetError(f"training could not go on: {error}"))
        self._forget_unused()

    def _run_of(self, piece: Slice) -> RunQueue:
        return next(r for r in self._progress.runs.values() if r.version == piece.batch)

    def _outcome(self, queued: Queued) -> Report:
        if isinstance(queued.op, Pass):
            return self.trainer.pass_report(queued.op_id, time.monotonic() - self._began[queued.op_id])
        version = self._versions[queued.op.run_id]
        self._adapters.outdate(version)
        if isinstance(queued.op, Probe):
            return self.trainer.probe_report(queued.op_id, version, time.monotonic() - self._began[queued.op_id])
        return self.trainer.update_report(version)

    def _end(self, batch: Batch) -> None:
        self._release(batch)
        self.trainer.end(batch.batch_id)

    def _release(self, batch: Batch) -> None:
        for row in batch.rows:
            self._blocks.release(row.row)
