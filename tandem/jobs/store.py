"""The database: tables, the one thread that talks to it, and its schema's version.

SQLAlchemy Core, SQLite (WAL) or PostgreSQL. Queries are plain functions over a connection in `queries.py`;
`Database.run` gives each a transaction of its own. Blobs are files, elsewhere.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.engine import Connection, Engine

from tandem.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")

# Any number that no other program is likely to lock; PostgreSQL's advisory locks are per database.
ADVISORY_LOCK = 0x7A4DE13

metadata = sa.MetaData()
_Seq = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite counts up only what is declared INTEGER


def _seq() -> sa.Column[int]:
    """Rows in the order in which they came, which whole seconds could not tell."""
    return sa.Column("seq", _Seq, primary_key=True, autoincrement=True)


marks = sa.Table(
    "marks", metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)  # fmt: skip

files = sa.Table(
    "files", metadata, _seq(),
    sa.Column("file_id", sa.Text, nullable=False, unique=True),
    sa.Column("filename", sa.Text, nullable=False),
    sa.Column("purpose", sa.Text, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("status_details", sa.Text),
    sa.Column("expires_at", sa.BigInteger),
)  # fmt: skip

jobs = sa.Table(
    "jobs", metadata, _seq(),
    sa.Column("job_id", sa.Text, nullable=False, unique=True),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("status", sa.Text, nullable=False, index=True),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("parent", sa.Text),  # the adapter whose weights are the start
    sa.Column("training_file", sa.Text, nullable=False),
    sa.Column("validation_file", sa.Text),
    sa.Column("suffix", sa.Text),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("metadata", sa.JSON),
    sa.Column("method", sa.Text, nullable=False),
    sa.Column("hyperparameters", sa.JSON, nullable=False),
    sa.Column("tandem", sa.JSON, nullable=False),
    sa.Column("fine_tuned_model", sa.Text),
    sa.Column("finished_at", sa.BigInteger),
    sa.Column("trained_tokens", sa.BigInteger),
    sa.Column("estimated_finish", sa.BigInteger),
    sa.Column("error", sa.JSON),
    sa.Column("result_files", sa.JSON, nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("total_steps", sa.BigInteger, nullable=False),
    sa.Column("grader", sa.JSON),
)  # fmt: skip

events = sa.Table(
    "events", metadata, _seq(),
    sa.Column("event_id", sa.Text, nullable=False, unique=True),
    sa.Column("job_id", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("level", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("data", sa.JSON),
    sa.Index("events_of_job", "job_id", "seq"),
)  # fmt: skip

checkpoints = sa.Table(
    "checkpoints", metadata, _seq(),
    sa.Column("checkpoint_id", sa.Text, nullable=False, unique=True),
    sa.Column("job_id", sa.Text, nullable=False, index=True),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
)  # fmt: skip

# Where an unfinished job goes on: after `step` optimiser steps, `cursor` rows into `epoch`.
resume_points = sa.Table(
    "resume_points", metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("cursor", sa.BigInteger, nullable=False),
    sa.Column("trained_tokens", sa.BigInteger, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
)  # fmt: skip

adapters = sa.Table(
    "adapters", metadata, _seq(),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("job_id", sa.Text),
    sa.Column("kind", sa.Text, nullable=False),
)  # fmt: skip

aliases = sa.Table(
    "aliases", metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("history", sa.JSON, nullable=False),
)  # fmt: skip


class Database:
    """One engine, one thread. Several `run`s are executed in the order in which they were called."""

    def __init__(self, engine: Engine, lock: Connection | None) -> None:
        """Use `open`."""
        self._engine = engine
        self._lock = lock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tandem-sql")

    @classmethod
    def open(cls, url: str | None, state_dir: Path) -> Database:
        """Connect, take the database for this process, bring its schema up to date. Blocks.

        Raises ConfigError: a URL that is none, a missing driver, no connection, another server on the database.
        """
        engine, lock = _connect(url, state_dir), None
        shown = engine.url.render_as_string()
        try:
            lock = _locked(engine)
            with engine.connect() as connection:
                migrate(connection)
        except BaseException as error:
            if lock is not None:
                lock.close()
            engine.dispose()
            if isinstance(error, sa.exc.OperationalError):
                reason = str(error.orig).strip().split("\n")[0]
                raise ConfigError(f"cannot use the database {shown}: {reason}") from error
            if isinstance(error, CommandError):
                raise ConfigError(f"the database {shown} is of a newer version than this Tandem: {error}") from error
            raise
        return cls(engine, lock)

    async def run(self, query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """query(connection, ...) in one transaction, on the database's thread."""
        call = functools.partial(self._transaction, query, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _transaction(self, query: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._engine.begin() as connection:
            return query(connection, *args, **kwargs)

    def close(self) -> None:
        """Wait for what was called, then let go. Idempotent."""
        self._thread.shutdown(wait=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        self._engine.dispose()


def _connect(url: str | None, state_dir: Path) -> Engine:
    try:
        parsed = sa.make_url(url or f"sqlite:///{state_dir / 'tandem.db'}")
    except sa.exc.ArgumentError:
        raise ConfigError("--database-url is no URL: write postgresql://user@host/name or sqlite:////path") from None
    kind = parsed.get_backend_name()
    if kind == "postgresql":
        if importlib.util.find_spec("psycopg") is None:
            raise ConfigError("PostgreSQL needs its driver: pip install 'tandem-llm[postgres]'")
        return sa.create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
    if kind == "sqlite":
        engine = sa.create_engine(parsed.set(drivername="sqlite+pysqlite"))
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        return engine
    raise ConfigError(f"--database-url: {kind} is not supported, only sqlite and postgresql are")


def _prepare_sqlite(raw: Any, _record: Any) -> None:
    """The driver's own idea of transactions leaves schema changes outside of them, so it is switched off."""
    raw.isolation_level = None
    for pragma in ("journal_mode=WAL", "busy_timeout=10000", "synchronous=FULL", "foreign_keys=ON"):
        raw.execute(f"PRAGMA {pragma}")


def _locked(engine: Engine) -> Connection | None:
    """PostgreSQL can be reached from any state directory: a lock there keeps a second server away."""
    if engine.dialect.name != "postgresql":
        return None
    connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    if not connection.scalar(sa.select(sa.func.pg_try_advisory_lock(ADVISORY_LOCK))):
        connection.close()
        raise ConfigError("another Tandem server uses this database: stop it, or give --database-url another one")
    return connection


def migrate(connection: Connection) -> None:
    """Bring the schema to the newest version, in one transaction."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
