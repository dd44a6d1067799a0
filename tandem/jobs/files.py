"""The state directory: its lock, uploaded files and other blobs, written so that a name is there wholly or not at all.

Temporary name, fsync, rename; the database's row comes after. What has no row is swept at start. Knows no SQL.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import IO, Any, TypeVar

from tandem.errors import ConfigError, InvalidRequest, TandemError

T = TypeVar("T")

FILES, ADAPTERS, RESUME = "files", "adapters", "resume"
IDENTITY = "id"


class Lock:
    """The state directory, for this process alone. Raises ConfigError when another process has it, or it is no place
    to write."""

    def __init__(self, state_dir: Path) -> None:
        try:
            for name in (FILES, ADAPTERS, RESUME):
                (state_dir / name).mkdir(parents=True, exist_ok=True)
            self._fd = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot use the state directory {state_dir}: {error}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise ConfigError(
                f"another Tandem server uses the state directory {state_dir}: stop it, or give --state-dir another one"
            ) from None

    def release(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class TextCheck:
    """Looks at a file for training as it arrives. `feed` raises InvalidRequest at the first byte that is no text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._seen = 0

    def feed(self, chunk: bytes, is_last: bool = False) -> None:
        at = chunk.find(b"\0")
        try:
            if at < 0:
                self._decoder.decode(chunk, is_last)
        except UnicodeDecodeError as error:
            at = max(0, error.start)
        if at >= 0:
            raise InvalidRequest(
                f"the file is not text but binary (near byte {self._seen + at}): upload JSON lines in UTF-8",
                param="file",
            )
        self._seen += len(chunk)


async def save(target: Path, chunks: AsyncIterator[bytes], max_bytes: int, check: TextCheck | None) -> int:
    """Write an upload. Returns its size in bytes.

    Raises InvalidRequest (empty, too large, binary where text is needed), TandemError when the disk refuses it.
    """
    temporary, size = _temporary(target), 0
    try:
        stream = await _disk(lambda: open(temporary, "wb"))
        try:
            async for chunk in chunks:
                size += len(chunk)
                if size > max_bytes:
                    raise InvalidRequest(f"the file has more than {max_bytes} bytes (--max-file-bytes)", param="file")
                if check is not None:
                    check.feed(chunk)
                await _disk(stream.write, chunk)
            if size == 0:
                raise InvalidRequest("the file is empty", param="file")
            if check is not None:
                check.feed(b"", is_last=True)
            await _disk(_seal, stream, temporary, target)
        finally:
            await asyncio.to_thread(_close, stream)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return size


async def _disk(act: Callable[..., T], *args: Any) -> T:
    try:
        return await asyncio.to_thread(act, *args)
    except OSError as error:
        raise TandemError(f"cannot store the file: {explain(error)}") from error


def _close(stream: IO[bytes]) -> None:
    """What closing flushes was flushed before, or is given up."""
    with contextlib.suppress(OSError):
        stream.close()


def write(target: Path, content: bytes) -> None:
    """Write a small blob. Raises OSError and leaves nothing."""
    temporary = _temporary(target)
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            _seal(stream, temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def copy_tree(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy the files `names` of a directory into a new one. Raises OSError and leaves nothing."""
    temporary = _temporary(target)
    try:
        temporary.mkdir()
        for name in names:
            with open(source / name, "rb") as reader, open(temporary / name, "wb") as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)
                writer.flush()
                os.fsync(writer.fileno())
        sync_directory(temporary)
        os.rename(temporary, target)
        sync_directory(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove(path: Path) -> None:
    """Remove a file or a directory; one that is not there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def sweep(directory: Path, known: set[str]) -> list[Path]:
    """Remove what is in `directory` and not called one of `known`. Returns what went."""
    gone = [path for path in sorted(directory.iterdir()) if path.name not in known]
    for path in gone:
        remove(path)
    return gone


def remove_resume_points(state_dir: Path, job_id: str) -> None:
    """Remove all directories that `resume_path` named for a job."""
    for path in (state_dir / RESUME).glob(f"{job_id}.*"):
        remove(path)


def explain(error: OSError) -> str:
    """An OSError for people."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space is left on the disk: free some and try again"
    return error.strerror or str(error)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")


def _seal(stream: IO[bytes], temporary: Path, target: Path) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    os.rename(temporary, target)
    sync_directory(target.parent)
