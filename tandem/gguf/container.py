"""The GGUF container: header, metadata and the table of tensors (versions 2 and 3, little-endian).

Not here: the numbers inside the tensors (`model/gguf_blocks.py`), what metadata mean (`model/gguf_config.py`,
`vocabulary.py`). The `gguf` package's reader makes an array object per string, which takes seconds for a large
vocabulary; this one takes a tenth of that and refuses broken files by name.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tandem.errors import ModelError

MAGIC = b"GGUF"
OLDER_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg", b"ggml", b"ggmf", b"ggjt", b"ggla")
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4

# Number of a type in the file -> name, numbers in a block, bytes of a block.
BLOCKS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
}
# Types that exist and are not read, to name them in a refusal.
UNREAD = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4",
}  # fmt: skip

_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `shape` as torch has it, `offset` from the start of the file, both sizes in bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Gguf:
    """What a GGUF file says before its numbers begin."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


def read_gguf(path: Path) -> Gguf:
    """Header, metadata and tensor table of the file at `path`.

    Raises ModelError naming the file and the defect: not a GGUF file, big-endian, another version, truncated, one part
    of several, a tensor of a type that is not read.
    """
    try:
        with open(path, "rb") as file:
            if file.seek(0, 2) < 24:
                raise ModelError(f"{path} is too short for a GGUF file: download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(path, data)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from None


def _read(path: Path, data: mmap.mmap) -> Gguf:
    magic = data[:4]
    if magic != MAGIC:
        remedy = "a format older than GGUF: convert the model again" if magic in OLDER_MAGICS else "not a GGUF file"
        raise ModelError(f"{path} begins with {magic!r}: {remedy}")
    version, num_tensors, num_values = struct.unpack_from("<IQQ", data, 4)
    if version & 0xFFFF == 0:
        raise ModelError(f"{path} is a big-endian GGUF file, which is not supported: take the little-endian one")
    if version not in VERSIONS:
        raise ModelError(f"{path} is GGUF version {version}; supported are {', '.join(map(str, VERSIONS))}")
    cursor = _Cursor(data, 24)
    try:
        metadata = {cursor.string(): cursor.value() for _ in range(cursor.plausible(num_values, 13))}
        table = [cursor.tensor() for _ in range(cursor.plausible(num_tensors, 24))]
    except (struct.error, UnicodeDecodeError, _BrokenError) as error:
        raise ModelError(f"{path} is truncated or damaged in its header ({error}): download it again") from None
    parts = metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise ModelError(
            f"{path} is one of {parts} parts of a model, which is not supported: join them with "
            "llama-gguf-split --merge FIRST_PART OUTPUT"
        )
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ModelError(f"{path}: general.alignment={alignment!r} must be a power of two")
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in table:
        if name in tensors:
            raise ModelError(f"{path}: tensor {name} is there twice")
        tensors[name] = _placed(path, name, shape, kind, start + offset, len(data))
    return Gguf(path, metadata, tensors)


def _placed(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, size: int) -> TensorInfo:
    if kind not in BLOCKS:
        supported = ", ".join(known for known, _, _ in BLOCKS.values())
        raise ModelError(f"{path}: tensor {name} is {UNREAD.get(kind, f'of type {kind}')}; supported are {supported}")
    type_name, numbers, nbytes = BLOCKS[kind]
    if not shape or shape[-1] % numbers:
        raise ModelError(f"{path}: tensor {name} of shape {list(shape)} does not divide into {type_name} blocks")
    total = prod(shape) // numbers * nbytes
    if offset + total > size:
        raise ModelError(
            f"{path} is truncated: tensor {name} ends at byte {offset + total} of {size}: download it again"
        )
    return TensorInfo(name, shape, type_name, offset, total)


class _BrokenError(Exception):
    """Something in the header that cannot be."""


class _Cursor:
    """A place in the header, moved by reading."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data = data
        self.size = len(data)
        self.at = at

    def plausible(self, count: int, smallest: int) -> int:
        """`count`, if so many things of at least `smallest` bytes can still follow."""
        if count * smallest > self.size - self.at:
            raise _BrokenError(f"{count} entries do not fit into the file")
        return count

    def unpack(self, layout: str) -> Any:
        value = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        begin = self.at
        self.at += self.plausible(length, 1)
        return self.data[begin : self.at].decode("utf-8")

    def value(self) -> Any:
        (kind,) = self.unpack("<I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        (value,) = self.unpack(_layout(kind))
        return _as_written(value) if kind == _FLOAT32 else value

    def array(self) -> list[Any]:
        kind, count = self.unpack("<IQ")
        if kind == _STRING:
            return self.strings(self.plausible(count, 8))
        layout = _layout(kind)  # arrays of arrays are in the format's text and in no file
        self.plausible(count, struct.calcsize(layout))
        return list(self.unpack(f"<{count}{layout[1]}"))

    def strings(self, count: int) -> list[str]:
        """As `string`, many at once: vocabularies have hundreds of thousands."""
        data, size, at, length_at, found = self.data, self.size, self.at, struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            begin = at + 8
            at = begin + length_at(data, at)[0]
            if at > size:
                raise _BrokenError("a string ends behind the file")
            # Vocabularies may hold pieces of characters.
            found.append(data[begin:at].decode("utf-8", "replace"))
        self.at = at
        return found

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        (dimensions,) = self.unpack("<I")
        if dimensions > MOST_DIMENSIONS:
            raise _BrokenError(f"tensor {name!r} has {dimensions} dimensions")
        shape = self.unpack(f"<{dimensions}Q")
        kind, offset = self.unpack("<IQ")
        return name, shape[::-1], kind, offset


def _layout(kind: int) -> str:
    if kind not in _SCALARS:
        raise _BrokenError(f"metadata of unknown type {kind}")
    return _SCALARS[kind]


def _as_written(value: float) -> float:
    """The shortest decimal number that is this float32: 1e-06 again, not 9.99999997e-07."""
    wanted = struct.pack("<f", value)
    for digits in range(1, 9):
        shorter = float(f"{value:.{digits}g}")
        try:
            if struct.pack("<f", shorter) == wanted:
                return shorter
        except OverflowError:  # rounded up beyond the largest float32
            continue
    return value
