"""One running job: its examples go to the engine, its progress to the database, its checkpoints to the disk.

Two optimiser steps are always under way in the engine, so that the process border costs nothing. Everything a step
needs is decided when it is sent: the engine executes a run's calls in the order in which they were made. Which job
runs when is said in `queue.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from tandem.errors import Cancelled, Diverged, EngineDead, InvalidRequest, ModelError, NotFound, TandemError
from tandem.finetune import data
from tandem.jobs import files, queries, results
from tandem.jobs.adapters import read_shape
from tandem.jobs.recipe import checkpoint_name, model_name, recipe
from tandem.jobs.records import AdapterRecord, Checkpoint, Job, ResumePoint, new_id
from tandem.jobs.shop import Failure, Loaded, Shop, lora_config
from tandem.work import OptimParams, PassReport

DEPTH = 2  # optimiser steps in the engine's queue
VALIDATION_ROWS = 32  # in one call
ABANDON_S = 5.0
F = TypeVar("F")
S = TypeVar("S", bound="Sent")
How = Literal["pause", "close", "cancel"]


@dataclass(frozen=True)
class Save:
    """A directory that the engine is about to write; `path` is relative to the state directory."""

    path: str
    done: asyncio.Future[None]


@dataclass(frozen=True)
class Sent:
    """An optimiser step on its way through the engine. `step` counts from 1, as users see it."""

    step: int
    num_tokens: int
    learning_rate: float
    learnt: list[asyncio.Future[PassReport]]
    updated: asyncio.Future[Any] | None
    validated: list[asyncio.Future[PassReport]] = field(default_factory=list)
    checkpoint: Save | None = None
    resume: Save | None = None


class Run:
    """One job from its claim until it ends, pauses or the server stops. `stop` may be called at any time."""

    def __init__(self, job: Job, loaded: Loaded, shop: Shop) -> None:
        self.job = job
        self._train, self._valid = loaded.train, loaded.valid
        self._shop = shop
        self._db, self._engine = shop.db, shop.engine
        self._recipe = recipe(job, loaded.train.num_groups)
        self._name = model_name(job.base_model, shop.organization, job.suffix, job.job_id)
        self._stop: How | None = None
        self._stopped = asyncio.Event()
        self._is_open = False
        self._sent: deque[Sent] = deque()
        self._next = 0  # the next step to send, from 0
        self._kept: set[int] = set()  # steps whose checkpoint is published already
        self._trained_tokens = 0
        self._pending: set[asyncio.Future[Any]] = set()
        self._unrecorded: set[str] = set()
        self._saved_at = self._ticked_at = self._began_at = time.monotonic()
        self._began_step = 0

    def stop(self, how: How) -> None:
        """pause and close end the run behind what is on its way; cancel drops that."""
        if self._stop != "cancel":
            self._stop = how
        self._stopped.set()
        if how == "cancel" and self._is_open:
            self._close()

    async def run(self) -> Literal["finished"] | How:
        """Train until the job is done, or until it is stopped with its progress saved.

        Raises Failure, BudgetError where the engine has no room now, Cancelled, EngineDead.
        """
        try:
            await self._open()
            await self._fill()
            while self._sent:
                await self._after(self._sent.popleft())
            if self._next == self._recipe.total_steps:
                return "finished"
            assert self._stop is not None
            await self._suspend()
            return self._stop
        finally:
            await self._abandon()

    # ------------------------------------------------------------ begin and end

    async def _open(self) -> None:
        job_id = self.job.job_id
        point = await self._db.run(queries.resume_point, job_id)
        if point is not None and not (self._shop.root / point.path).is_dir():
            await self._say("The saved progress is gone from the disk; training starts over", "warn")
            point = None
        self._kept = await self._db.run(queries.checkpoint_steps, job_id)
        if self._stop is not None:
            return
        self._is_open = True
        try:
            report = await self._track(
                self._engine.open_run(
                    job_id, lora_config(self.job),
                    init_from=self._parent() if point is None or self.job.method == "dpo" else None,
                    resume_from=str(self._shop.root / point.path) if point else None, priority=self.job.tandem.priority,
                )
            )  # fmt: skip
        except (ModelError, NotFound, InvalidRequest) as error:
            if point is not None:
                raise Failure("resume_failed", f"Cannot go on from step {point.step}: {error}") from error
            raise Failure("model_not_found", f"Cannot start from {self.job.model}: {error}", "model") from error
        if point is not None:
            if not self._has_step(report.step, point.step):
                raise Failure("resume_failed", f"The saved progress is of step {report.step}, not of {point.step}")
            self._next, self._trained_tokens = point.step, point.trained_tokens
        verb = f"resumed from step {point.step}" if point else "started"
        await self._say(f"Fine-tuning job {verb}")
        self._began_step = self._next
        self._saved_at = self._ticked_at = self._began_at = time.monotonic()

    def _has_step(self, step: int, wanted: int) -> bool:
        """Whether a saved run of so many optimiser steps can be the one after `wanted` steps of the job."""
        return step == wanted

    def _parent(self) -> str | None:
        if self.job.parent is None:
            return None
        path = self._shop.adapters.get(self.job.parent).path
        read_shape(Path(path))  # says it better than the engine if it has vanished
        return path

    async def _suspend(self) -> None:
        """Save where the run stands, for the next time."""
        if not self._is_open:
            return
        try:
            await self._keep(self._next, self._save(self._resume_path()))
        except Failure as failure:
            if self._stop == "pause":
                raise
            # The server stops anyway, and an earlier resume point may be there.
            await self._say(f"{failure.message}; the job will go on from an earlier point", "warn")
        else:
            await self._say(f"Stopped at step {self._next}; progress is saved")

    def _close(self) -> None:
        self._is_open = False
        self._track(self._engine.close_run(self.job.job_id))

    async def _abandon(self) -> None:
        """Leave nothing behind in the engine, nor on the disk what nobody knows of."""
        with contextlib.suppress(EngineDead):  # whoever waits for the engine hears of it
            if self._is_open:
                self._close()
        if self._pending:
            _, late = await asyncio.wait(self._pending, timeout=ABANDON_S)
            if late:
                return  # what it still writes is swept at the next start
        if self._unrecorded:
            # A call to the database that was cut short may have come through.
            known = await self._db.run(queries.known_paths)
            for path in self._unrecorded - known:
                await asyncio.to_thread(files.remove, self._shop.root / path)

    def _track(self, future: asyncio.Future[F]) -> asyncio.Future[F]:
        """Remember a call, so that its end is awaited even where its result no longer matters."""
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        future.add_done_callback(_retrieve)
        return future

    # ------------------------------------------------------------ steps

    async def _fill(self) -> None:
        """Send steps until enough are on their way."""
        if not self._recipe.is_ready(self._next + DEPTH - 1):
            await asyncio.to_thread(self._recipe.make_ready, self._next + DEPTH - 1)
        while self._stop is None and len(self._sent) < DEPTH and self._next < self._recipe.total_steps:
            self._sent.append(self._send(self._next))
            self._next += 1

    def _send(self, index: int) -> Sent:
        rows = [row for number in self._recipe.batch(index) for row in self._train.group(number)]
        rate, step = self._recipe.learning_rate(index), index + 1
        learnt, updated = self._learn(rows, rate, index)
        sent = Sent(step, sum(len(row.tokens) - 1 for row in rows), rate, [learnt], updated)
        if self._valid and (self._is_checkpoint(step) or is_due(step, self.job.tandem.validate_every)):
            sent.validated.extend(self._validate(self._valid))
        return self._with_saves(sent)

    def _is_checkpoint(self, step: int) -> bool:
        is_end = step == self._recipe.total_steps or self._recipe.is_epoch_end(step - 1)
        return is_end or is_due(step, self.job.tandem.checkpoint_every)

    def _with_saves(self, sent: S) -> S:
        """The step, with what is to be saved after it on its way."""
        if self._is_checkpoint(sent.step) and sent.step not in self._kept:
            self._saved_at = time.monotonic()
            return dataclasses.replace(sent, checkpoint=self._save(f"{files.ADAPTERS}/{new_id('step-')}"))
        is_last = sent.step == self._recipe.total_steps
        if not is_last and time.monotonic() - self._saved_at >= self._shop.resume_every_s:
            self._saved_at = time.monotonic()
            return dataclasses.replace(sent, resume=self._save(self._resume_path()))
        return sent

    def _params(self, rate: float) -> OptimParams:
        extras = self.job.tandem
        return OptimParams(
            learning_rate=rate, weight_decay=extras.weight_decay, max_grad_norm=extras.max_grad_norm,
            kind="adamw" if extras.optimizer == "mezo" else extras.optimizer,
        )  # fmt: skip

    def _learn(
        self, rows: Sequence[data.Row], rate: float, index: int
    ) -> tuple[asyncio.Future[PassReport], asyncio.Future[Any]]:
        """One optimiser step from these rows, in the mean over their tokens, or over their pairs."""
        job_id, extras, engine, params = self.job.job_id, self.job.tandem, self._engine, self._params(rate)
        if self.job.method == "dpo":
            examples = [data.example(row, 1.0) for row in rows]
            learnt = self._track(engine.forward_backward(job_id, examples, "dpo", self._preference(len(rows) // 2)))
            return learnt, self._track(engine.optim_step(job_id, params))
        scale = 1.0 / math.fsum(weight for row in rows for weight in row.mask)
        examples = [data.example(row, scale) for row in rows]
        if extras.optimizer == "mezo":
            probed = self._track(engine.probe(job_id, examples, params, self.job.seed * 2**31 + index))
            return probed, probed
        learnt = self._track(engine.forward_backward(job_id, examples))
        return learnt, self._track(engine.optim_step(job_id, params))

    def _preference(self, num_pairs: int) -> dict[str, float]:
        return {"beta": float(self.job.hyperparameters["beta"]), "scale": 1.0 / num_pairs}

    def _validate(self, valid: data.Dataset) -> list[asyncio.Future[PassReport]]:
        """Forward passes over the whole validation file. Their weights only say which tokens count."""
        sent = []
        for start in range(0, len(valid.rows), VALIDATION_ROWS):
            examples = [data.example(row, 1.0) for row in valid.rows[start : start + VALIDATION_ROWS]]
            loss = ("dpo", self._preference(1)) if self.job.method == "dpo" else ()
            sent.append(self._track(self._engine.forward(self.job.job_id, examples, *loss)))
        return sent

    async def _after(self, sent: Sent) -> None:
        """See a step through. The engine gets its next work first."""
        await self._arrival(sent)
        await self._fill()
        await self._record(sent)

    async def _arrival(self, sent: Sent) -> None:
        try:
            for learnt in sent.learnt:
                await learnt
            if sent.updated is not None:
                await sent.updated
        except Diverged as error:
            raise Failure(
                "diverged",
                f"Training diverged at step {sent.step}: {error}. Earlier checkpoints stay; try a lower learning rate",
                "hyperparameters.learning_rate_multiplier",
            ) from error

    async def _record(self, sent: Sent) -> None:
        """Write down what came of a step, while the engine has the next ones."""
        metrics = self._metrics(sent, [await future for future in sent.validated])
        await self._db.run(
            queries.record_step, self.job.job_id, results.step_message(metrics), metrics,
            trained_tokens=self._trained_tokens, estimated_finish=self._estimated_finish(sent.step),
        )  # fmt: skip
        if sent.checkpoint is not None:
            await self._publish(sent, sent.checkpoint, metrics)
        if sent.resume is not None:
            await self._keep(sent.step, sent.resume)

    def _metrics(self, sent: Sent, validated: list[PassReport]) -> dict[str, Any]:
        found = results.means("train", [learnt.result() for learnt in sent.learnt], is_mean=True)
        return self._line(sent, found | (results.means("valid", validated) if validated else {}))

    def _line(self, sent: Sent, found: dict[str, Any]) -> dict[str, Any]:
        """The metrics of a step: what was `found`, where it is and how fast it went."""
        now = time.monotonic()
        elapsed, self._ticked_at = now - self._ticked_at, now
        self._trained_tokens += sent.num_tokens
        return {
            "step": sent.step,
            "total_steps": self._recipe.total_steps,
            **found,
            "learning_rate": sent.learning_rate,
            "tokens_per_s": round(sent.num_tokens / max(elapsed, 1e-9), 1),
            "serving_tpot_p95_ms": round(self._engine.stats.tpot_p95_s * 1e3, 2),
        }

    def _estimated_finish(self, step: int) -> int:
        per_step = (time.monotonic() - self._began_at) / (step - self._began_step)
        return int(time.time() + per_step * (self._recipe.total_steps - step))

    # ------------------------------------------------------------ what stays

    def _save(self, relative: str) -> Save:
        self._unrecorded.add(relative)
        return Save(relative, self._track(self._engine.save_run(self.job.job_id, str(self._shop.root / relative))))

    def _resume_path(self) -> str:
        return f"{files.RESUME}/{self.job.job_id}.{new_id('')}"

    async def _keep(self, step: int, save: Save) -> None:
        """Make a saved state the one that the job resumes from, and let the one before go."""
        await _saved(save, f"the progress at step {step}")
        old = await self._db.run(queries.set_resume_point, self._point(step, save))
        self._unrecorded.discard(save.path)
        await self._let_go(old)

    def _point(self, step: int, save: Save) -> ResumePoint:
        epoch, cursor = self._recipe.place(step)
        return ResumePoint(
            job_id=self.job.job_id, step=step, epoch=epoch, cursor=cursor, trained_tokens=self._trained_tokens,
            path=save.path,
        )  # fmt: skip

    async def _let_go(self, path: str | None) -> None:
        if path is not None:
            await asyncio.to_thread(files.remove, self._shop.root / path)

    async def _publish(self, sent: Sent, save: Save, metrics: dict[str, Any]) -> None:
        """Make a saved state an adapter that can be served; the last one is the job's model, and from any other the
        job goes on if it is interrupted."""
        await _saved(save, f"the checkpoint of step {sent.step}")
        is_last = sent.step == self._recipe.total_steps
        name = self._name if is_last else checkpoint_name(self._name, sent.step)
        adapter = AdapterRecord(
            name=name, path=save.path, base_model=self.job.base_model, created_at=queries.now(),
            rank=self.job.tandem.rank, job_id=self.job.job_id, kind="final" if is_last else "checkpoint",
        )  # fmt: skip
        checkpoint = Checkpoint(
            checkpoint_id=new_id("ftckpt_"), job_id=self.job.job_id, created_at=queries.now(), step=sent.step,
            name=name, path=save.path, metrics=results.checkpoint_metrics(metrics),
        )  # fmt: skip
        if is_last:
            await self._succeed(checkpoint, adapter)
        else:
            old = await self._db.run(queries.keep_checkpoint, checkpoint, adapter, self._point(sent.step, save))
            await self._let_go(old)
        self._unrecorded.discard(save.path)
        self._shop.adapters.add(adapter)
        try:
            await self._shop.adapters.resident(name)
        except (TandemError, OSError) as error:
            if isinstance(error, EngineDead):
                raise
            await self._say(f"{name} is saved, but the engine cannot serve it now: {error}", "warn")

    async def _succeed(self, checkpoint: Checkpoint, adapter: AdapterRecord) -> None:
        table = results.table(await self._db.run(queries.step_metrics, self.job.job_id))
        result = results.file(table)
        target = f"{files.FILES}/{result.file_id}"
        self._unrecorded.add(target)
        try:
            await asyncio.to_thread(files.write, self._shop.root / target, table)
        except OSError as error:
            raise Failure("save_failed", f"Cannot save the results: {files.explain(error)}") from error
        await self._db.run(queries.finish, checkpoint, adapter, result, self._trained_tokens)
        self._unrecorded.discard(target)

    async def _say(self, message: str, level: str = "info") -> None:
        await self._db.run(queries.add_event, self.job.job_id, message, level)


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Errors of calls that nobody awaits any more are not news to asyncio's log either."""
    if not future.cancelled():
        future.exception()


def is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


async def _saved(save: Save, what: str) -> None:
    try:
        await save.done
    except (EngineDead, Cancelled):
        raise
    except (TandemError, OSError) as error:
        reason = files.explain(error) if isinstance(error, OSError) else str(error)
        raise Failure("save_failed", f"Cannot save {what}: {reason}") from error
