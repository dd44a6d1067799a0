"""Tensors of a training run in a scratch file, and back bit for bit. For the length of a process: what the file means
is kept in memory, and nothing is fsynced. Not here: when (`engine/residents.py`), checkpoints (`checkpoint.py`).
"""

from __future__ import annotations

import errno
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

# Of the same size, for bits to be looked at.
WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: where its bytes begin and their CRC-32. `start` None: all its bits are zero, and none are written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int | None
    checksum: int = 0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Spilled:
    """What is in a file."""

    path: Path
    entries: Mapping[str, Entry]

    def zeroed(self, name: str) -> Spilled:
        """The same with zeros for one tensor."""
        return replace(self, entries={**self.entries, name: replace(self.entries[name], start=None)})


def write(tensors: Mapping[str, Tensor], path: Path) -> Spilled:
    """Put tensors, which must not change meanwhile, into a new file. Raises OSError; then there is no such file."""
    entries: dict[str, Entry] = {}
    file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed before a broken one is removed
    try:
        with file:
            for name, tensor in tensors.items():
                flat = tensor.detach().cpu().contiguous().view(-1)
                if not flat.view(WHOLE[flat.dtype.itemsize]).any():
                    entries[name] = Entry(tensor.dtype, tuple(tensor.shape), None)
                    continue
                raw, start = _bytes(flat), file.tell()
                entries[name] = Entry(tensor.dtype, tuple(tensor.shape), start, zlib.crc32(raw))
                while raw:
                    raw = raw[file.write(raw) :]
    except BaseException:
        os.unlink(path)
        raise
    return Spilled(path, entries)


def read(spilled: Spilled, device: torch.device) -> dict[str, Tensor]:
    """The tensors that were written. Raises OSError, also where the bytes are not those any more."""
    tensors: dict[str, Tensor] = {}
    with open(spilled.path, "rb", buffering=0) as file:
        for name, entry in spilled.entries.items():
            if entry.start is None:
                tensors[name] = torch.zeros(entry.shape, dtype=entry.dtype, device=device)
                continue
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            raw, done = _bytes(tensor.view(-1)), 0
            file.seek(entry.start)
            while done < len(raw):
                if not (num_read := file.readinto(raw[done:])):
                    raise OSError(errno.EIO, "the file is cut short", str(spilled.path))
                done += num_read
            if zlib.crc32(raw) != entry.checksum:
                raise OSError(errno.EIO, "the bytes are not those that were written", str(spilled.path))
            tensors[name] = tensor.to(device)
    return tensors


def _bytes(flat: Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data
