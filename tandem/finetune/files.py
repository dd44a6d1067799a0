"""Training files as people have them, taken apart into rows: JSONL, one JSON array, plain text.

Bytes in, JSON values with their lines out. What a row means is formats.py's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tandem.errors import DataError

_MAGIC = {
    b"\x1f\x8b": "a gzip file: unpack it first",
    b"PK\x03\x04": "a zip or Excel file: unpack it, or export it as JSONL",
    b"PAR1": "a Parquet file: export it as JSONL",
    b"ARROW1": "an Arrow file: export it as JSONL",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"%PDF": "a PDF: training files are JSONL",
}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Document:
    """The one row of a file that is plain text."""

    text: str


def read(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    """(line, value) for every row of a JSONL file or a .json array; for a .txt file one Document.

    Raises DataError where the file is empty, not text, or a line is not JSON.
    """
    try:
        opened = path.open("rb")
    except OSError as e:
        raise DataError(f"{name}: cannot be read ({e.strerror}): give the path of a training file") from e
    with opened as file:
        head = file.read(4096).removeprefix(_BOM)
        kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
        if kind:
            raise DataError(f"{name}: is {kind}")
        if not head.strip() and not file.read().strip():
            raise DataError(f"{name}: is empty: give at least one row")
        file.seek(0)
        suffix = Path(name).suffix.lower()
        if suffix == ".json" and head.lstrip().startswith(b"["):
            text = _decode(file.read(), 1, name)
            if text.strip()[1:].strip() == "]":
                raise DataError(f"{name}: is empty: give at least one row")
            yield from _array(text, name)
        elif suffix == ".txt" and not head.lstrip().startswith(b"{"):
            yield 1, Document(_decode(file.read(), 1, name))
        else:
            yield from _lines(file, name)


def _lines(file: Any, name: str) -> Iterator[tuple[int, Any]]:
    blank = 0
    for number, raw in enumerate(file, 1):
        line = (raw.removeprefix(_BOM) if number == 1 else raw).strip()
        if not line:
            blank = blank or number
            continue
        if blank:
            raise DataError(f"{name}:{blank}: is blank: only the end of the file may have blank lines; remove it")
        text = _decode(line, number, name)
        try:
            yield number, msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError) as e:
            hint = "write each object on one line" if text in ("{", "[") else "every line must be one JSON object"
            raise DataError(f"{name}:{number}: is not valid JSON ({e}): {hint}") from e


def _array(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """The elements of one JSON array, each with the line that it begins in."""
    decoder, at, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        at = _skip(text, at)
        if text[at : at + 1] == "]":
            break
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{name}:{line}: is not valid JSON ({e}): fix it, or write one object a line") from e
        yield line, value
        at = _skip(text, at)
        if text[at : at + 1] not in (",", "]"):
            line += text.count("\n", counted, at)
            raise DataError(f"{name}:{line}: is not valid JSON: a comma or the end of the array is missing")
        at += text[at] == ","
    if text[at + 1 :].strip():
        line += text.count("\n", counted, at)
        raise DataError(f"{name}:{line}: has more after the end of the array: keep one array in the file")


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n") and at < len(text):
        at += 1
    return at


def _decode(raw: bytes, line: int, name: str) -> str:
    try:
        text = raw.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as e:
        line += raw.count(b"\n", 0, e.start)
        raise DataError(f"{name}:{line}: is not UTF-8 text (byte {raw[e.start]:#04x}): save the file as UTF-8") from e
    if "\0" in text:
        line += text.count("\n", 0, text.index("\0"))
        raise DataError(f"{name}:{line}: is binary (a zero byte): training files are JSONL text in UTF-8")
    return text
