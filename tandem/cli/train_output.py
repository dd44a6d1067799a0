"""The output directory of a run without a server: whose it is, what an interrupted run left there, what an ended one
leaves. The job store lives in its folder .tandem while the run lasts; what is in there is the business of `jobs/`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.errors import ConfigError, TandemError
from tandem.jobs import files

if TYPE_CHECKING:
    from tandem.jobs.service import Jobs

PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
METRICS_FILE = "metrics.csv"


@dataclass(frozen=True)
class Output:
    """`signature`: what has to be the same for an interrupted run to go on, by the names of the options."""

    path: Path
    signature: dict[str, Any]

    @property
    def state(self) -> Path:
        """The job store's directory."""
        return self.path / ".tandem"

    @property
    def _record(self) -> Path:
        return self.state / "run.json"

    @property
    def has_job(self) -> bool:
        """Whether there is a run to go on with."""
        return self._record.is_file()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the directory for this process alone; at the end, what leads nowhere is removed.

        Raises ConfigError where another process has it, it cannot be written, or it has something else in it.
        """
        with _locked(self.path):
            try:
                self._prepare()
                yield
            finally:
                if not self.has_job:
                    shutil.rmtree(self.state, ignore_errors=True)
                    with contextlib.suppress(OSError):  # not empty: it has results
                        self.path.rmdir()

    def _prepare(self) -> None:
        if self.has_job:
            saved = json.loads(self._record.read_text(encoding="utf-8"))
            if changed := [name for name, value in self.signature.items() if saved.get(name) != value]:
                raise ConfigError(
                    f"{self.path} holds an interrupted run with other options ({', '.join(sorted(changed))}): "
                    f"give those again to go on with it, choose another --output, or remove {self.path}"
                )
            return
        try:
            if self.state.exists():  # of a run that ended before its job was made
                shutil.rmtree(self.state)
            if any(self.path.iterdir()):
                raise ConfigError(f"--output {self.path} exists already: choose another directory, or remove it first")
            self.state.mkdir()
        except OSError as error:
            raise ConfigError(f"cannot write to --output {self.path}: {error}") from error

    def remember(self) -> None:
        """Now there is a job."""
        try:
            files.write(self._record, json.dumps(self.signature).encode())
        except OSError as error:
            raise _unwritable(self._record, error) from error

    async def keep(self, jobs: Jobs, job_id: str) -> None:
        """Copy the job's checkpoints, its result file and the final adapter here. Raises TandemError on a full disk."""
        job = await jobs.job(job_id)
        after, has_more = None, True
        while has_more:
            found, has_more = await jobs.checkpoints(job_id, after, 100)
            for checkpoint in found:
                after = checkpoint.checkpoint_id
                target = self.path / f"checkpoint-{checkpoint.step}"
                await asyncio.to_thread(_copy_adapter, Path(checkpoint.path), target)
        for file_id in job.result_files:
            await asyncio.to_thread(_copy, await jobs.file_path(file_id), self.path / METRICS_FILE)
        if job.status == "succeeded":
            assert job.fine_tuned_model is not None
            adapter = await jobs.adapter(job.fine_tuned_model)
            await asyncio.to_thread(_copy_adapter, Path(adapter.path), self.path)

    def finish(self) -> str:
        """Remove the job store; the names of what stays."""
        shutil.rmtree(self.state)
        return ", ".join(sorted(path.name for path in self.path.iterdir()))


def digest(path: Path) -> str:
    """What tells a file's content from another's. Raises ConfigError where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"cannot write to --output {path}: {error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another run writes to {path}: wait for it, or choose another --output") from None
        yield
    finally:
        os.close(descriptor)


def _copy_adapter(source: Path, target: Path) -> None:
    """PEFT's two files, the config last: a directory that has one is whole."""
    try:
        target.mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from error
    for name in PEFT_FILES:
        _copy(source / name, target / name)


def _copy(source: Path, target: Path) -> None:
    """Under another name first: what has the name is whole."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.copyfile(source, partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(target)
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> TandemError:
    return TandemError(f"cannot write {target}: {error}; the same command tries again")
