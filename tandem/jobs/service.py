"""`Jobs`: all that the API asks of files, fine-tuning jobs, adapters and aliases. Async; the event loop never waits for
SQL or a disk here.

Opening it takes the state directory for this process and puts what a crash left behind in order.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import sqlalchemy as sa

from tandem.config import JobsConfig
from tandem.errors import Conflict, InvalidRequest, NotFound
from tandem.finetune import graders
from tandem.finetune.graders import Grader
from tandem.jobs import files, intake, opening, queries, recipe
from tandem.jobs.adapters import Adapters
from tandem.jobs.grading import Grade, Grading
from tandem.jobs.queue import Queue
from tandem.jobs.records import (
    PURPOSES,
    AdapterRecord,
    Alias,
    Checkpoint,
    Event,
    File,
    Job,
    JobRequest,
    Status,
    new_id,
)
from tandem.jobs.shop import Shop, lora_config
from tandem.jobs.store import Database
from tandem.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tandem.engine.client import EngineClient

log = logging.getLogger("tandem.jobs")

RESUME_EVERY_S = 30.0
EXPIRY_PERIOD_S = 60.0


class Jobs:
    """One per server. Every method raises TandemErrors whose message says what to do."""

    def __init__(
        self, config: JobsConfig, root: Path, lock: files.Lock, db: Database, adapters: Adapters, queue: Queue,
        engine: EngineClient, tokenizer: Tokenizer, model_names: Sequence[str], grading: Grading,
    ) -> None:  # fmt: skip
        """Use `open`."""
        self._config = config
        self._root = root
        self._lock = lock
        self._db = db
        self._adapters = adapters
        self._queue = queue
        self._engine = engine
        self._tokenizer = tokenizer
        self._model_names = list(model_names)
        self._grading = grading
        self._expiry = asyncio.create_task(self._expire_files())

    @property
    def root(self) -> Path:
        """The state directory."""
        return self._root

    @classmethod
    async def open(
        cls, config: JobsConfig, engine: EngineClient, tokenizer: Tokenizer, model_names: Sequence[str],
        resume_every_s: float = RESUME_EVERY_S,
    ) -> Jobs:  # fmt: skip
        """Take the state directory, bring the database up to date, requeue what was interrupted, start the queue.

        Raises ConfigError: another process has the directory, it is no place to write, the database cannot be used or
        is that of another directory.
        """
        root = Path(config.state_dir).expanduser().resolve()
        lock = await asyncio.to_thread(files.Lock, root)
        db = None
        try:
            db = await asyncio.to_thread(Database.open, config.database_url, root)
            await db.run(opening.identify, root)
            await db.run(opening.tidy, root)
            adapters = await Adapters.open(db, engine, root, model_names)
        except BaseException:
            if db is not None:
                await asyncio.to_thread(db.close)
            lock.release()
            raise
        grading = Grading(engine, tokenizer, adapters, model_names, config.grader_hosts)
        shop = Shop(db, engine, adapters, root, config.organization, resume_every_s, tokenizer, grading)
        foreign = {base for base in await db.run(queries.unfinished_bases) if not adapters.has_base(base)}
        if foreign:
            log.warning("jobs on %s wait for a server of that model", ", ".join(sorted(foreign)))
        queue = Queue(shop, tokenizer, config.max_running_jobs, foreign)
        queue.wake()
        return cls(config, root, lock, db, adapters, queue, engine, tokenizer, model_names, grading)

    async def close(self) -> None:
        """Running jobs save a resume point and stop; they go on at the next start. Releases everything."""
        self._expiry.cancel()
        await asyncio.gather(self._expiry, return_exceptions=True)
        await self._queue.close()
        await self._grading.close()
        await asyncio.to_thread(self._db.close)
        self._lock.release()

    # ------------------------------------------------------------ files

    async def save_file(
        self, filename: str, purpose: str, chunks: AsyncIterator[bytes], expires_after_s: int | None = None
    ) -> File:
        """Store an upload. Raises InvalidRequest: unknown purpose, empty, too large, or binary though for training."""
        if purpose not in PURPOSES:
            raise InvalidRequest(f"purpose must be one of {', '.join(PURPOSES)}, not {purpose!r}", param="purpose")
        recipe.check_text(filename, "file")
        file_id = new_id("file-")
        target = self._root / files.FILES / file_id
        check = files.TextCheck() if purpose == "fine-tune" else None
        size = await files.save(target, chunks, self._config.max_file_bytes, check)
        created_at = queries.now()
        file = File(
            file_id=file_id, filename=filename, purpose=purpose, bytes=size, created_at=created_at,
            expires_at=created_at + expires_after_s if expires_after_s is not None else None,
        )  # fmt: skip
        try:
            await self._db.run(queries.add_file, file)
        except BaseException:
            await asyncio.to_thread(files.remove, target)
            raise
        return file

    async def files(
        self, purpose: str | None = None, after: str | None = None, limit: int = 10000,
        order: Literal["asc", "desc"] = "desc",
    ) -> tuple[list[File], bool]:  # fmt: skip
        return await self._db.run(queries.list_files, purpose, after, limit, order)

    async def file(self, file_id: str) -> File:
        return await self._db.run(queries.file, file_id)

    async def delete_file(self, file_id: str) -> None:
        """Raises NotFound, Conflict while an unfinished job needs it."""
        await self._db.run(queries.delete_file, file_id)
        await asyncio.to_thread(files.remove, self._root / files.FILES / file_id)

    async def file_path(self, file_id: str) -> Path:
        """Where the bytes are. Raises NotFound."""
        file = await self._db.run(queries.file, file_id)
        path = self._root / files.FILES / file.file_id
        if not await asyncio.to_thread(path.is_file):
            raise NotFound(f"the content of {file_id} is gone from the disk: upload it again", param="file_id")
        return path

    async def _expire_files(self) -> None:
        while True:
            try:
                for file_id in await self._db.run(queries.expire_files):
                    await asyncio.to_thread(files.remove, self._root / files.FILES / file_id)
            except (sa.exc.SQLAlchemyError, OSError):
                log.exception("files past their time stay for now")
            await asyncio.sleep(EXPIRY_PERIOD_S)

    # ------------------------------------------------------------ jobs

    async def create(self, request: JobRequest) -> Job:
        """Check what can be checked at once, and put the job where its files are checked next.

        Raises InvalidRequest naming the field, NotFound, BudgetError where it cannot fit the memory there is.
        """
        recipe.check(request)
        base_model, parent = intake.starting_point(request.model, self._adapters, self._model_names)
        limit = self._engine.report.max_model_len
        extras = await asyncio.to_thread(intake.shaped, request.tandem, parent, limit)
        uploads = {
            param: await self._for_training(param, file_id)
            for param, file_id in (
                ("training_file", request.training_file),
                ("validation_file", request.validation_file),
            )
            if file_id is not None
        }
        extras, longest = await asyncio.to_thread(
            intake.measured, extras, list(uploads.values()), limit, self._tokenizer
        )
        if request.method == "reinforcement":
            self._grading.check(graders.parse(request.grader))
            extras, longest = intake.exploring(extras, longest, limit)
        job = intake.job(request, extras, base_model, parent)
        await self._engine.check_run(lora_config(job), longest)
        await self._db.run(queries.add_job, job)
        self._queue.wake()
        return job

    async def _for_training(self, param: str, file_id: str) -> tuple[File, Path]:
        """An upload that a job may train on. Its content is checked later. Raises NotFound, InvalidRequest."""
        try:
            file, path = await self.file(file_id), await self.file_path(file_id)
        except NotFound as error:
            raise NotFound(error.message, param=param) from None
        if file.purpose != "fine-tune":
            raise InvalidRequest(f"{file_id} has purpose {file.purpose!r}: upload it with 'fine-tune'", param=param)
        return file, path

    async def job(self, job_id: str) -> Job:
        return await self._db.run(queries.job, job_id)

    async def jobs(
        self, after: str | None = None, limit: int = 20, metadata: dict[str, str] | None = None
    ) -> tuple[list[Job], bool]:
        """Newest first; those whose metadata has all that is asked for."""
        return await self._db.run(queries.list_jobs, after, limit, metadata)

    async def events(self, job_id: str, after: str | None = None, limit: int = 20) -> tuple[list[Event], bool]:
        """Newest first."""
        return await self._db.run(queries.list_events, job_id, after, limit)

    async def checkpoints(
        self, job_id: str, after: str | None = None, limit: int = 10
    ) -> tuple[list[Checkpoint], bool]:
        """Newest first."""
        found, more = await self._db.run(queries.list_checkpoints, job_id, after, limit)
        return [msgspec.structs.replace(c, path=str(self._root / c.path)) for c in found], more

    async def cancel(self, job_id: str) -> Job:
        """End a job; its checkpoints stay. Raises NotFound, Conflict when it has ended."""
        job = await self._db.run(queries.move, job_id, "cancelled", "The job was cancelled")
        if not self._queue.stop(job_id, "cancel"):
            await asyncio.to_thread(files.remove_resume_points, self._root, job_id)
        return job

    async def pause(self, job_id: str) -> Job:
        """Stop a job with its progress saved, until `resume`. Raises NotFound, Conflict when it does not go on."""

        def pause(connection: sa.Connection) -> Job:
            match queries.job(connection, job_id).status:
                case "running":
                    return queries.move(connection, job_id, "pausing", "Pausing the job")
                case "validating_files" | "queued":
                    return queries.move(connection, job_id, "paused", "The job is paused")
                case status:
                    raise Conflict(f"the job {job_id} is {status}: there is nothing to pause")

        job = await self._db.run(pause)
        if job.status == "pausing":
            self._queue.stop(job_id, "pause")
        return job

    async def resume(self, job_id: str) -> Job:
        """Queue a paused job again. Raises NotFound, Conflict when it is not paused."""

        def resume(connection: sa.Connection) -> Job:
            job = queries.job(connection, job_id)
            if job.status != "paused":
                raise Conflict(f"the job {job_id} is {job.status}: only a paused job can be resumed")
            # Paused before its files were checked, it has no number of steps yet.
            following: Status = "queued" if job.total_steps else "validating_files"
            return queries.move(connection, job_id, following, "The job was resumed")

        job = await self._db.run(resume)
        self._queue.wake()
        return job

    # ------------------------------------------------------------ graders

    def grader(self, raw: Any) -> Grader:
        """A grader as a job of this server could have it. Raises InvalidRequest."""
        grader = graders.parse(raw, "grader")
        self._grading.check(grader, "grader")
        return grader

    async def grade(self, grader: Grader, item: dict[str, Any], text: str) -> Grade:
        """What it says of an answer. Raises as `Grading.grade`."""
        graders.check_item(grader, item)
        return await self._grading.grade(grader, item, text)

    # ------------------------------------------------------------ adapters

    async def adapters(self) -> list[AdapterRecord]:
        """Oldest first."""
        return self._adapters.records()

    async def aliases(self) -> list[Alias]:
        return self._adapters.aliases()

    async def adapter(self, name: str) -> AdapterRecord:
        """What a name or alias stands for. Raises NotFound."""
        return self._adapters.get(name)

    async def import_adapter(self, name: str, path: str | Path) -> AdapterRecord:
        """Copy a PEFT directory into the state directory. Raises InvalidRequest, ModelError, Conflict."""
        return await self._adapters.import_(name, Path(path))

    async def delete_adapter(self, name: str) -> None:
        """Delete an adapter's files, or an alias. Raises NotFound, Conflict while something depends on it."""
        await self._adapters.delete(name)

    async def promote(self, alias: str, target: str) -> Alias:
        """Point an alias at an adapter, now. Raises NotFound, Conflict, InvalidRequest."""
        return await self._adapters.promote(alias, target)

    async def rollback(self, alias: str) -> Alias:
        """Point an alias at what it pointed at before. Raises NotFound, Conflict."""
        return await self._adapters.rollback(alias)

    def resident_now(self, name: str) -> str | None:
        """The engine's adapter for a name or alias, if the engine has it now."""
        return self._adapters.resident_now(name)

    async def resident(self, name: str) -> str | None:
        """The same, loading it where needed; None when there is no such name."""
        return await self._adapters.resident(name)
