"""What a server does before anything runs: see that its state is its own, and put in order what a crash left."""

from __future__ import annotations

import uuid
from pathlib import Path

import sqlalchemy as sa

from tandem.errors import ConfigError
from tandem.jobs import files, queries


def identify(connection: sa.Connection, root: Path) -> None:
    """Make sure that directory and database belong together: the wrong pair would lose what either knows."""
    note = root / files.IDENTITY
    here = note.read_text().strip() if note.exists() else None
    there = queries.mark(connection, "state_dir")
    if here is None and there is None:
        here = uuid.uuid4().hex
        files.write(note, here.encode())
    is_empty = not any(any((root / name).iterdir()) for name in (files.FILES, files.ADAPTERS))
    if there is None and is_empty:
        queries.set_mark(connection, "state_dir", str(here))
    elif here != there:
        raise ConfigError(
            f"the state directory {root} and the database do not belong together: give --state-dir and --database-url "
            "as when the server last ran, or an empty directory and an empty database"
        )


def tidy(connection: sa.Connection, root: Path) -> None:
    """Remove what no row knows of, and put jobs that were interrupted where they can go on."""
    known = {Path(path).name for path in queries.known_paths(connection)}
    for directory in (files.FILES, files.ADAPTERS, files.RESUME):
        files.sweep(root / directory, known)
    for job in queries.jobs_in(connection, "running", "pausing"):
        point = queries.resume_point(connection, job.job_id)
        where = f"goes on from step {point.step}" if point else "starts over"
        if job.status == "pausing":
            queries.move(connection, job.job_id, "paused", f"The server stopped; once resumed, the job {where}")
        else:
            queries.move(connection, job.job_id, "queued", f"The server stopped; the job {where}")
