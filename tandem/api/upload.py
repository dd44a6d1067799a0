"""A multipart form with one file in it, read as it arrives: the file's bytes go on before the rest has come.

What the fields mean and where the bytes go is the caller's affair.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from tandem.errors import InvalidRequest

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELDS = 16
MAX_FIELD_BYTES = 4096
MAX_NAME_CHARS = 255
SPOOL_BYTES = 2**20
PIECE_BYTES = 2**18


@dataclass
class Form:
    """`fields` as text; `chunks` yields the bytes of the part called "file" and has to be closed."""

    fields: dict[str, str]
    filename: str
    chunks: AsyncGenerator[bytes, None]


@dataclass
class _Part:
    name: str = ""
    filename: str | None = None
    value: bytearray = field(default_factory=bytearray)


async def read_form(http: HttpRequest, known: frozenset[str], needed: str, max_bytes: int) -> Form:
    """Read up to where the file's bytes begin, or to the end where the field `needed` has not come before them.

    Raises InvalidRequest naming the field for one that is not in `known`, comes twice, or comes too late to be heeded,
    and for what is no form; HTTPException 413 (also from `chunks`) for a file of more than `max_bytes`.
    """
    parts = _parts(http, max_bytes)
    fields: dict[str, str] = {}
    async for part in parts:
        assert isinstance(part, _Part)
        if part.filename is None:
            _add(fields, part, known)
        elif needed in fields:
            return Form(fields, part.filename, _bytes_of(parts, None, known))
        else:
            return await _spooled(fields, part.filename, parts, known)
    raise InvalidRequest("the form has no file: send the file's bytes as a part called 'file' with a filename", "file")


def _add(fields: dict[str, str], part: _Part, known: frozenset[str]) -> None:
    name = part.name[:64]
    if part.name == "file":
        raise InvalidRequest("'file' has no filename: send it as a file, not as text", "file")
    if part.name not in known:
        raise InvalidRequest(f"unknown field '{name}': the form takes file, {', '.join(sorted(known))}", name)
    if name in fields:
        raise InvalidRequest(f"'{name}' is there twice", name)
    try:
        fields[name] = part.value.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"'{name}' is not UTF-8", name) from None


async def _bytes_of(
    parts: AsyncGenerator[_Part | bytes, None], late: dict[str, str] | None, known: frozenset[str]
) -> AsyncGenerator[bytes, None]:
    """The bytes of the file that has begun. Fields after it go into `late`, or are refused where that is None."""
    async with contextlib.aclosing(parts):
        async for part in parts:
            if isinstance(part, bytes):
                yield part
            elif part.filename is not None:
                raise InvalidRequest("one file at a time: the form has two", "file")
            elif late is None:
                raise InvalidRequest(f"send '{part.name[:64]}' before the file", part.name[:64])
            else:
                _add(late, part, known)


async def _spooled(
    fields: dict[str, str], filename: str, parts: AsyncGenerator[_Part | bytes, None], known: frozenset[str]
) -> Form:
    """For a file that came first: it waits in a temporary file, in memory while it is small."""
    spool = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 - closed by `pieces`
    try:
        async for chunk in _bytes_of(parts, fields, known):
            await asyncio.to_thread(spool.write, chunk)
        spool.seek(0)
    except BaseException:
        spool.close()
        raise

    async def pieces() -> AsyncGenerator[bytes, None]:
        with spool:
            while piece := await asyncio.to_thread(spool.read, PIECE_BYTES):
                yield piece

    return Form(fields, filename, pieces())


async def _parts(http: HttpRequest, max_bytes: int) -> AsyncGenerator[_Part | bytes, None]:
    """A field as one `_Part`; a file as a `_Part` with a filename, then its bytes in pieces."""
    kind, options = parse_options_header(http.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise HTTPException(415, "Send the file as a form: 'Content-Type: multipart/form-data; boundary=...'")
    collector = _Collector(max_bytes)
    try:
        parser = MultipartParser(options[b"boundary"], collector.callbacks())
        async for chunk in http.stream():
            for start in range(0, len(chunk), PIECE_BYTES):
                parser.write(chunk[start : start + PIECE_BYTES])
                for part in collector.taken():
                    yield part
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequest(f"the body is not a multipart form: {str(error)[:200]}") from None
    except ClientDisconnect:
        raise InvalidRequest("the connection was closed before the form was complete") from None
    if not collector.is_complete:
        raise InvalidRequest("the form ends before its last boundary: it was cut off")


class _Collector:
    """Takes the parser's calls and keeps what they amount to until it is taken."""

    def __init__(self, max_bytes: int) -> None:
        self.is_complete = False
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._num_parts = 0
        self._found: list[_Part | bytes] = []
        self._part = _Part()
        self._header = (bytearray(), bytearray())
        self._disposition = b""

    def taken(self) -> list[_Part | bytes]:
        found, self._found = self._found, []
        return found

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add_bytes,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_FIELDS:
            raise InvalidRequest(f"the form has more than {MAX_FIELDS} fields")
        self._part, self._disposition = _Part(), b""

    def _end_header(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = (bytearray(), bytearray())

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise InvalidRequest("a part of the form has no name in its Content-Disposition")
        self._part.name = options[b"name"].decode(errors="replace")
        if b"filename" in options:
            if self._part.name != "file":
                name = self._part.name[:64]
                raise InvalidRequest(f"the form takes one file, called 'file', not '{name}'", name)
            self._part.filename = plain_name(options[b"filename"].decode(errors="replace"))
            self._found.append(self._part)

    def _add_bytes(self, data: bytes, start: int, end: int) -> None:
        if self._part.filename is None:
            self._part.value += data[start:end]
            if len(self._part.value) > MAX_FIELD_BYTES:
                name = self._part.name[:64]
                raise InvalidRequest(f"'{name}' is longer than {MAX_FIELD_BYTES} bytes", name)
            return
        self._left -= end - start
        if self._left < 0:
            raise HTTPException(413, f"The file is larger than {self._max_bytes} bytes (--max-file-bytes).")
        self._found.append(data[start:end])

    def _end_part(self) -> None:
        if self._part.filename is None:
            self._found.append(self._part)

    def _end(self) -> None:
        self.is_complete = True


def plain_name(filename: str) -> str:
    """The last component, without control characters, of reasonable length."""
    last = re.split(r"[/\\]", filename)[-1]
    return re.sub(r"[\x00-\x1f\x7f]", "", last)[-MAX_NAME_CHARS:] or "file"
