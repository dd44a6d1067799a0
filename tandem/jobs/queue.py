"""Which job is checked and which runs: one file check at a time, a bounded number of runs, priority before age.

What a run does is in `runner.py`, what users may ask in `service.py`; here a job's status follows from what happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa

from tandem.errors import BudgetError, Cancelled, EngineDead, InvalidRequest, NotFound, TandemError
from tandem.finetune import data, graders
from tandem.jobs import files, queries
from tandem.jobs.recipe import num_answers, resolve
from tandem.jobs.records import Job
from tandem.jobs.reinforcement import ReinforcementRun
from tandem.jobs.runner import How, Run
from tandem.jobs.shop import Failure, Loaded, Shop, lora_config
from tandem.tokenizer import Tokenizer

T = TypeVar("T")
log = logging.getLogger("tandem.jobs")

CLOSE_GRACE_S = 8.0
RETRY_S = 2.0


@dataclass(frozen=True)
class Checked:
    """The files of the job that was checked last: most often it is the next to run."""

    job_id: str
    loaded: Loaded


class Queue:
    """Keeps jobs moving. `wake` after anything that may let one move."""

    def __init__(self, shop: Shop, tokenizer: Tokenizer, max_running: int, foreign: set[str]) -> None:
        """Jobs on the `foreign` base models wait for a server that has them."""
        self._shop = shop
        self._db = shop.db
        self._tokenizer = tokenizer
        self._max_running = max_running
        self._foreign = foreign
        self._runs: dict[str, Run] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}  # running jobs, also while they load their files or end
        self._check: asyncio.Task[None] | None = None
        self._checked: Checked | None = None
        self._crowded: set[str] = set()  # jobs that wait for others' memory
        self._stopping: dict[str, How] = {}  # asked to stop before there was a Run
        self._is_closing = False
        self._awake = asyncio.Event()
        self._loop = asyncio.create_task(self._keep_moving())

    def wake(self) -> None:
        self._awake.set()

    def stop(self, job_id: str, how: How) -> bool:
        """Stop a job's run. False where there is none."""
        if run := self._runs.get(job_id):
            run.stop(how)
        elif job_id in self._tasks:
            self._stopping[job_id] = how
        return job_id in self._tasks

    async def close(self) -> None:
        """Let running jobs save where they are, for some seconds, and stop."""
        self._is_closing = True
        self._loop.cancel()
        for job_id in self._tasks:
            self.stop(job_id, "close")
        if self._tasks:
            _, late = await asyncio.wait(self._tasks.values(), timeout=CLOSE_GRACE_S)
            for task in late:
                log.warning("a job did not stop in time: it will go on from its last resume point")
                task.cancel()
        waiting = [self._loop, *self._tasks.values(), *([self._check] if self._check else [])]
        if self._check is not None:
            self._check.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    async def _keep_moving(self) -> None:
        while True:
            self._awake.clear()
            try:
                await self._start_check()
                await self._start_runs()
            except Exception:
                log.exception("the queue of jobs stands still; trying again in %s s", RETRY_S)
                asyncio.get_running_loop().call_later(RETRY_S, self.wake)
            await self._awake.wait()

    # ------------------------------------------------------------ checking files

    async def _start_check(self) -> None:
        if self._is_closing or (self._check is not None and not self._check.done()):
            return
        job = await self._db.run(queries.next_job, "validating_files", (), self._foreign)
        if job is not None:
            self._check = asyncio.create_task(self._settle(job, self._validate(job)))
            self._check.add_done_callback(lambda _: self.wake())

    async def _validate(self, job: Job) -> None:
        """Read the job's files, resolve what depends on them, and queue it: unless it was stopped meanwhile."""
        await self._db.run(queries.add_event, job.job_id, f"Validating training file: {job.training_file}")
        if job.validation_file:
            await self._db.run(queries.add_event, job.job_id, f"Validating validation file: {job.validation_file}")
        loaded = await self._load(job)
        longest = max(len(row.tokens) for row in (*loaded.train.rows, *(loaded.valid.rows if loaded.valid else ())))
        longest += job.tandem.max_tokens or 0
        try:
            await self._shop.engine.check_run(lora_config(job), longest)
        except BudgetError as error:
            raise Failure("insufficient_memory", str(error), "tandem.max_seq_len") from error
        resolved = resolve(job, loaded.train.num_groups, self._shop.engine.report.hidden_size)
        summary = await asyncio.to_thread(_summary, resolved, loaded.train)
        numbers = ", ".join(f"{name}={value}" for name, value in resolved.hyperparameters.items())

        def queue_it(connection: sa.Connection) -> bool:
            if queries.job(connection, job.job_id).status != "validating_files":
                return False
            for level, message in summary:
                queries.add_event(connection, job.job_id, message, level)
            queries.move(
                connection, job.job_id, "queued", f"Files validated, moving job to queued state: {numbers}",
                hyperparameters=resolved.hyperparameters, tandem=resolved.tandem, total_steps=resolved.total_steps,
            )  # fmt: skip
            return True

        if await self._db.run(queue_it):
            self._checked = Checked(job.job_id, loaded)

    async def _load(self, job: Job) -> Loaded:
        """Both files as rows. Raises Failure."""
        if self._checked is not None and self._checked.job_id == job.job_id:
            checked, self._checked = self._checked, None
            return checked.loaded
        train = await self._dataset(job, job.training_file, "training_file")
        valid = await self._dataset(job, job.validation_file, "validation_file") if job.validation_file else None
        return Loaded(train, valid)

    async def _dataset(self, job: Job, file_id: str, param: str) -> data.Dataset:
        path = self._shop.root / files.FILES / file_id
        assert job.tandem.max_seq_len is not None
        try:
            file = await self._db.run(queries.file, file_id, may_be_past=True)
            if not await asyncio.to_thread(path.is_file):
                raise NotFound(f"the content of {file_id} is gone from the disk: upload it again")
            limit = job.tandem.max_seq_len
            if job.method == "reinforcement":
                assert job.tandem.max_tokens is not None
                check = functools.partial(graders.check_item, graders.parse(job.grader))
                found = await _in_background(
                    data.load_prompts, path, self._tokenizer, limit, job.tandem.max_tokens, check, file.filename
                )  # fmt: skip
            elif job.method == "dpo":
                found = await _in_background(data.load_preferences, path, self._tokenizer, limit, file.filename)
            else:
                found = await _in_background(
                    data.load, path, self._tokenizer, limit, job.tandem.format, file.filename
                )  # fmt: skip
        except (InvalidRequest, NotFound) as error:
            raise Failure(f"invalid_{param}", str(error), param) from error
        except OSError as error:
            raise Failure(f"invalid_{param}", f"{file_id} cannot be read: {files.explain(error)}", param) from error
        if not found.rows:
            raise Failure(f"invalid_{param}", f"{file.filename} has no row to learn from", param)
        return found

    # ------------------------------------------------------------ running

    async def _start_runs(self) -> None:
        while len(self._tasks) < self._max_running and not self._is_closing:
            job = await self._db.run(queries.claim, self._crowded | self._tasks.keys(), self._foreign)
            if job is None:
                return
            task = self._tasks[job.job_id] = asyncio.create_task(self._settle(job, self._run(job)))
            task.add_done_callback(functools.partial(self._forget, job.job_id))

    def _forget(self, job_id: str, _task: asyncio.Task[None]) -> None:
        del self._tasks[job_id]
        self._stopping.pop(job_id, None)
        self.wake()

    async def _run(self, job: Job) -> None:
        loaded = await self._load(job)
        kind = ReinforcementRun if job.method == "reinforcement" else Run
        run = self._runs[job.job_id] = kind(job, loaded, self._shop)
        was_alone = len(self._runs) == 1
        if how := self._stopping.pop(job.job_id, None):
            run.stop(how)
        try:
            ended = await run.run()
        except BudgetError as error:
            is_alone = len(self._runs) == 1
            if was_alone and is_alone:
                raise Failure("insufficient_memory", str(error)) from error
            await self._db.run(_requeue, job.job_id, f"Waiting for the memory that other jobs hold: {error}")
            if not is_alone:
                self._crowded.add(job.job_id)
            return
        except BaseException:
            self._crowded.clear()
            raise
        finally:
            del self._runs[job.job_id]
        self._crowded.clear()  # there is more room now
        if ended == "pause":
            await self._db.run(queries.move, job.job_id, "paused", "The job is paused")
        elif ended in ("finished", "cancel"):
            await asyncio.to_thread(files.remove_resume_points, self._shop.root, job.job_id)

    # ------------------------------------------------------------ endings

    async def _settle(self, job: Job, work: Any) -> None:
        """Do the work; where it fails, the job has failed, and says why."""
        try:
            await work
        except EngineDead as error:
            self._is_closing = True  # the server is about to end, and nothing could run or be checked
            log.warning("the job %s goes on after a restart: %s", job.job_id, error)
        except Cancelled as error:
            await self._fail(job, Failure("server_error", f"The engine dropped the job: {error}"))
        except Failure as failure:
            await self._fail(job, failure)
        except TandemError as error:
            await self._fail(job, Failure("server_error", str(error), error.param))
        except sa.exc.SQLAlchemyError as error:
            log.exception("the job %s stops: the database cannot be used", job.job_id)
            await self._fail(job, Failure("server_error", f"The database could not be used: {type(error).__name__}"))
        except Exception as error:
            log.exception("the job %s failed", job.job_id)
            await self._fail(job, Failure("server_error", f"{type(error).__name__}: {error}"))

    async def _fail(self, job: Job, failure: Failure) -> None:
        """Give the job its error, unless it has ended or stopped already. Keeps trying while the database refuses."""

        def fail(connection: sa.Connection) -> bool:
            status = queries.job(connection, job.job_id).status
            if status in ("validating_files", "running", "pausing"):
                queries.move(
                    connection, job.job_id, "failed", failure.message, level="error",
                    error={"code": failure.code, "message": failure.message, "param": failure.param},
                )  # fmt: skip
            return status != "paused"

        while True:
            try:
                has_ended = await self._db.run(fail)
                break
            except sa.exc.SQLAlchemyError:
                log.exception("cannot write that the job %s failed; trying again", job.job_id)
                await asyncio.sleep(RETRY_S)
        if has_ended:
            await asyncio.to_thread(files.remove_resume_points, self._shop.root, job.job_id)


async def _in_background(act: Callable[..., T], *args: Any) -> T:
    """act(*args) on a thread that a server need not wait for when it stops: large files take minutes to read."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = act(*args)
        except Exception as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name="tandem-data", daemon=True).start()
    return await done


def _requeue(connection: sa.Connection, job_id: str, message: str) -> None:
    """Back to the queue, or to where a pause that was asked for meanwhile leads."""
    is_pausing = queries.job(connection, job_id).status == "pausing"
    queries.move(connection, job_id, "paused" if is_pausing else "queued", message)


def _summary(job: Job, train: data.Dataset) -> list[tuple[str, str]]:
    """(level, message) lines on what a training file holds."""
    if job.method == "reinforcement":
        held = f"{len(train.rows)} prompts with {train.num_tokens} tokens"
        return [("info", f"{held}; {num_answers(job)} answers to each in a step")]
    lines = [
        ("info", f"{len(train.rows)} rows ({train.format}) with {train.num_tokens} tokens, "
                 f"{train.num_trained_tokens} of them learnt"),
    ]  # fmt: skip
    if train.num_truncated:
        lines.append(("warn", f"{train.num_truncated} rows were cut to max_seq_len={job.tandem.max_seq_len} tokens"))
    if train.unused_keys:
        keys = ", ".join(f"{key} ({count} rows)" for key, count in sorted(train.unused_keys.items()))
        lines.append(("warn", f"Training does not look at these keys: {keys}"))
    return lines
