"""What is asked of the database: plain functions over a connection, each inside its caller's transaction.

A job's status changes in `move` only, along records.TRANSITIONS. Paths are relative to the state directory here.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from typing import Any, Literal, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tandem.errors import Cancelled, Conflict, InvalidRequest, NotFound
from tandem.jobs import store
from tandem.jobs.records import (
    TRANSITIONS,
    UNFINISHED,
    AdapterRecord,
    Alias,
    Checkpoint,
    Event,
    File,
    Job,
    ResumePoint,
    Status,
    new_id,
)

S = TypeVar("S", bound=msgspec.Struct)


def now() -> int:
    return int(time.time())


def _columns(table: sa.Table, kind: type[msgspec.Struct]) -> list[sa.Column[Any]]:
    return [table.c[name] for name in kind.__struct_fields__]


def _records(connection: Connection, query: sa.Select[Any], kind: type[S]) -> list[S]:
    names = kind.__struct_fields__
    return [msgspec.convert(dict(zip(names, row, strict=True)), kind) for row in connection.execute(query)]


def _one(connection: Connection, table: sa.Table, kind: type[S], **where: Any) -> S | None:
    query = sa.select(*_columns(table, kind)).where(*(table.c[name] == value for name, value in where.items()))
    return next(iter(_records(connection, query, kind)), None)


def _insert(connection: Connection, table: sa.Table, record: msgspec.Struct, **more: Any) -> None:
    connection.execute(sa.insert(table).values(msgspec.to_builtins(record) | more))


def _page(
    connection: Connection, table: sa.Table, kind: type[S], key: str, after: str | None, limit: int,
    *where: sa.ColumnElement[bool], ascending: bool = False,
) -> tuple[list[S], bool]:  # fmt: skip
    """Up to `limit` records behind the one called `after`, newest first, and whether there are more."""
    query = sa.select(*_columns(table, kind)).where(*where)
    if after is not None:
        place = connection.scalar(sa.select(table.c.seq).where(table.c[key] == after, *where))
        if place is None:
            raise InvalidRequest(f"after={after!r} is not in this list", param="after")
        query = query.where(table.c.seq > place if ascending else table.c.seq < place)
    query = query.order_by(table.c.seq if ascending else table.c.seq.desc()).limit(limit + 1)
    found = _records(connection, query, kind)
    return found[:limit], len(found) > limit


def mark(connection: Connection, name: str) -> str | None:
    """One of the database's own notes."""
    return connection.scalar(sa.select(store.marks.c.value).where(store.marks.c.name == name))


def set_mark(connection: Connection, name: str, value: str) -> None:
    connection.execute(sa.insert(store.marks).values(name=name, value=value))


# Files


def add_file(connection: Connection, file: File) -> None:
    _insert(connection, store.files, file)


def file(connection: Connection, file_id: str, may_be_past: bool = False) -> File:
    """Raises NotFound, also for a file past its time unless that does not matter: unfinished jobs keep theirs."""
    found = _one(connection, store.files, File, file_id=file_id)
    if found is None or (not may_be_past and found.expires_at is not None and found.expires_at <= now()):
        raise NotFound(f"there is no file {file_id!r}", param="file_id")
    return found


def list_files(
    connection: Connection, purpose: str | None, after: str | None, limit: int, order: Literal["asc", "desc"]
) -> tuple[list[File], bool]:
    files = store.files.c
    where = [sa.or_(files.expires_at.is_(None), files.expires_at > now())]
    if purpose is not None:
        where.append(files.purpose == purpose)
    return _page(connection, store.files, File, "file_id", after, limit, *where, ascending=order == "asc")


def delete_file(connection: Connection, file_id: str) -> None:
    """Raises NotFound, Conflict while an unfinished job needs it."""
    file(connection, file_id)
    jobs = store.jobs.c
    user = connection.scalar(
        sa.select(jobs.job_id).where(
            jobs.status.in_(UNFINISHED), sa.or_(jobs.training_file == file_id, jobs.validation_file == file_id)
        )
    )
    if user is not None:
        raise Conflict(f"the job {user} still needs {file_id}: cancel it, or wait for its end", param="file_id")
    connection.execute(sa.delete(store.files).where(store.files.c.file_id == file_id))


def expire_files(connection: Connection) -> list[str]:
    """Forget files past their time that no unfinished job needs. Returns their ids."""
    jobs, files = store.jobs.c, store.files.c
    needed = sa.select(jobs.job_id).where(
        jobs.status.in_(UNFINISHED), sa.or_(jobs.training_file == files.file_id, jobs.validation_file == files.file_id)
    )
    gone = sa.delete(store.files).where(files.expires_at <= now(), ~needed.exists()).returning(files.file_id)
    return list(connection.scalars(gone))


# Jobs


def add_job(connection: Connection, job: Job) -> None:
    """A new job and the first lines of its log."""
    _insert(connection, store.jobs, job, priority=job.tandem.priority)
    add_event(connection, job.job_id, f"Created fine-tuning job: {job.job_id}")


def job(connection: Connection, job_id: str) -> Job:
    """Raises NotFound."""
    found = _one(connection, store.jobs, Job, job_id=job_id)
    if found is None:
        raise NotFound(f"there is no fine-tuning job {job_id!r}", param="fine_tuning_job_id")
    return found


def list_jobs(
    connection: Connection, after: str | None, limit: int, wanted: dict[str, str] | None
) -> tuple[list[Job], bool]:
    """Newest first; those whose metadata has all that is `wanted`."""
    if not wanted:
        return _page(connection, store.jobs, Job, "job_id", after, limit)
    found: list[Job] = []
    more = True
    while more and len(found) <= limit:
        page, more = _page(connection, store.jobs, Job, "job_id", after, 500)
        found += [job for job in page if wanted.items() <= (job.metadata or {}).items()]
        after = page[-1].job_id if page else after
    return found[:limit], len(found) > limit


def next_job(connection: Connection, status: Status, without: Collection[str], foreign: Collection[str]) -> Job | None:
    """The job in `status` whose turn it is: highest priority first, then the oldest; none on a `foreign` base model."""
    jobs = store.jobs.c
    query = sa.select(*_columns(store.jobs, Job)).where(
        jobs.status == status, jobs.job_id.not_in(without), jobs.base_model.not_in(foreign)
    )
    found = _records(connection, query.order_by(jobs.priority.desc(), jobs.seq).limit(1), Job)
    return found[0] if found else None


def claim(connection: Connection, without: Collection[str], foreign: Collection[str]) -> Job | None:
    """The queued job whose turn it is, now running."""
    found = next_job(connection, "queued", without, foreign)
    return move(connection, found.job_id, "running") if found else None


def unfinished_bases(connection: Connection) -> set[str]:
    """The base models of jobs that have not ended."""
    jobs = store.jobs.c
    return set(connection.scalars(sa.select(jobs.base_model).where(jobs.status.in_(UNFINISHED)).distinct()))


def jobs_in(connection: Connection, *statuses: Status) -> list[Job]:
    """Oldest first."""
    table = store.jobs
    query = sa.select(*_columns(table, Job)).where(table.c.status.in_(statuses)).order_by(table.c.seq)
    return _records(connection, query, Job)


def update_job(connection: Connection, job_id: str, **changes: Any) -> None:
    """Change anything but the status."""
    assert "status" not in changes
    connection.execute(sa.update(store.jobs).where(store.jobs.c.job_id == job_id).values(msgspec.to_builtins(changes)))


def move(
    connection: Connection, job_id: str, status: Status, *messages: str, level: str = "info", **changes: Any
) -> Job:
    """Give a job its next status, say so in its log, and change what goes with it.

    Raises NotFound, and Conflict where no way leads from its present status to the new one.
    """
    current = job(connection, job_id)
    if status not in TRANSITIONS[current.status]:
        raise Conflict(f"the job {job_id} is {current.status}: it cannot become {status}")
    if status not in ("running", "pausing"):
        changes = {"estimated_finish": None} | changes
    if not TRANSITIONS[status]:
        changes = {"finished_at": now()} | changes
        connection.execute(sa.delete(store.resume_points).where(store.resume_points.c.job_id == job_id))
    values = msgspec.to_builtins(changes) | {"status": status}
    connection.execute(sa.update(store.jobs).where(store.jobs.c.job_id == job_id).values(values))
    for message in messages:
        add_event(connection, job_id, message, level)
    return job(connection, job_id)


def add_event(
    connection: Connection, job_id: str, message: str, level: str = "info", data: dict[str, Any] | None = None
) -> None:
    """A line of the job's log; one with `data` is of type metrics. What a database cannot hold is escaped."""
    message = message.replace("\0", "\\0").encode(errors="backslashreplace").decode()
    connection.execute(
        sa.insert(store.events).values(
            event_id=new_id("ftevent-"), job_id=job_id, created_at=now(), level=level, message=message,
            type="message" if data is None else "metrics", data=data,
        )
    )  # fmt: skip


def must_run(connection: Connection, job_id: str) -> Job:
    """The job, if its run may still leave traces. Raises Cancelled when it was ended meanwhile."""
    found = job(connection, job_id)
    if found.status not in ("running", "pausing"):
        raise Cancelled(f"the job {job_id} is {found.status}")
    return found


def record_step(connection: Connection, job_id: str, message: str, data: dict[str, Any], **changes: Any) -> None:
    """An optimiser step is done: its metrics, and how far the job is. Raises Cancelled."""
    must_run(connection, job_id)
    add_event(connection, job_id, message, data=data)
    update_job(connection, job_id, step=data["step"], **changes)


def list_events(connection: Connection, job_id: str, after: str | None, limit: int) -> tuple[list[Event], bool]:
    job(connection, job_id)
    return _page(connection, store.events, Event, "event_id", after, limit, store.events.c.job_id == job_id)


def step_metrics(connection: Connection, job_id: str) -> list[dict[str, Any]]:
    """The metrics of each optimiser step, in order; of a step done twice, after an interruption, the later ones."""
    events = store.events.c
    found = connection.scalars(
        sa.select(events.data).where(events.job_id == job_id, events.type == "metrics").order_by(events.seq)
    )
    by_step = {entry["step"]: entry for entry in found}
    return [by_step[step] for step in sorted(by_step)]


# Checkpoints and resume points


def add_checkpoint(connection: Connection, checkpoint: Checkpoint, adapter: AdapterRecord) -> None:
    """A state of the job that can be served from now on. Raises Cancelled."""
    must_run(connection, checkpoint.job_id)
    _insert(connection, store.checkpoints, checkpoint)
    _insert(connection, store.adapters, adapter)
    add_event(connection, checkpoint.job_id, f"Checkpoint created at step {checkpoint.step}")


def list_checkpoints(
    connection: Connection, job_id: str, after: str | None, limit: int
) -> tuple[list[Checkpoint], bool]:
    job(connection, job_id)
    table = store.checkpoints
    return _page(connection, table, Checkpoint, "checkpoint_id", after, limit, table.c.job_id == job_id)


def checkpoint_steps(connection: Connection, job_id: str) -> set[int]:
    table = store.checkpoints.c
    return set(connection.scalars(sa.select(table.step).where(table.job_id == job_id)))


def set_resume_point(connection: Connection, point: ResumePoint) -> str | None:
    """Replace a job's resume point. Returns the path of the one before, if nothing else needs it. Raises Cancelled."""
    must_run(connection, point.job_id)
    table, adapters = store.resume_points, store.adapters.c
    gone = sa.delete(table).where(table.c.job_id == point.job_id).returning(table.c.path)
    old = connection.scalar(gone)
    _insert(connection, table, point)
    is_adapter = connection.scalar(sa.select(adapters.name).where(adapters.path == old)) is not None
    return None if is_adapter else old


def keep_checkpoint(
    connection: Connection, checkpoint: Checkpoint, adapter: AdapterRecord, point: ResumePoint
) -> str | None:
    """A checkpoint that is also where the job goes on from. Returns and raises as `set_resume_point`."""
    add_checkpoint(connection, checkpoint, adapter)
    return set_resume_point(connection, point)


def finish(
    connection: Connection, checkpoint: Checkpoint, adapter: AdapterRecord, results: File, trained_tokens: int
) -> Job:
    """All that a job's success consists of, at once. Raises Cancelled."""
    add_checkpoint(connection, checkpoint, adapter)
    add_file(connection, results)
    return move(
        connection, checkpoint.job_id, "succeeded",
        f"New fine-tuned model created: {adapter.name}", "The job has successfully completed",
        fine_tuned_model=adapter.name, result_files=[results.file_id], trained_tokens=trained_tokens,
    )  # fmt: skip


def resume_point(connection: Connection, job_id: str) -> ResumePoint | None:
    return _one(connection, store.resume_points, ResumePoint, job_id=job_id)


def known_paths(connection: Connection) -> set[str]:
    """Everything on the disk that a row stands for: files, adapters, resume points."""
    return {
        *(f"files/{file_id}" for file_id in connection.scalars(sa.select(store.files.c.file_id))),
        *connection.scalars(sa.select(store.adapters.c.path)),
        *connection.scalars(sa.select(store.resume_points.c.path)),
    }


# Adapters and aliases


def add_adapter(connection: Connection, adapter: AdapterRecord) -> None:
    _insert(connection, store.adapters, adapter)


def list_adapters(connection: Connection) -> list[AdapterRecord]:
    table = store.adapters
    return _records(connection, sa.select(*_columns(table, AdapterRecord)).order_by(table.c.seq), AdapterRecord)


def list_aliases(connection: Connection) -> list[Alias]:
    table = store.aliases
    return _records(connection, sa.select(*_columns(table, Alias)).order_by(table.c.name), Alias)


def put_alias(connection: Connection, alias: Alias) -> None:
    connection.execute(sa.delete(store.aliases).where(store.aliases.c.name == alias.name))
    _insert(connection, store.aliases, alias)


def delete_alias(connection: Connection, name: str) -> None:
    connection.execute(sa.delete(store.aliases).where(store.aliases.c.name == name))


def delete_adapter(connection: Connection, name: str, changed: Iterable[Alias]) -> bool:
    """Forget an adapter and the checkpoint it was; `changed` aliases no longer remember it.

    Returns whether its files may go: not as long as a job would go on from them. Raises Conflict while an unfinished
    job starts from it.
    """
    jobs = store.jobs.c
    user = connection.scalar(sa.select(jobs.job_id).where(jobs.status.in_(UNFINISHED), jobs.parent == name))
    if user is not None:
        raise Conflict(f"the job {user} continues {name}: cancel it, or wait for its end", param="model")
    points, adapters = store.resume_points.c, store.adapters.c
    path = sa.select(adapters.path).where(adapters.name == name).scalar_subquery()
    is_free = connection.scalar(sa.select(points.job_id).where(points.path == path)) is None
    connection.execute(sa.delete(store.adapters).where(adapters.name == name))
    connection.execute(sa.delete(store.checkpoints).where(store.checkpoints.c.name == name))
    for alias in changed:
        put_alias(connection, alias)
    return is_free
