"""What Tinker's routes share: who asks, reading bodies and pages, writing answers."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any, TypeVar

import orjson
from fastapi import Request as HttpRequest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tandem.api.tinker_schemas import read
from tandem.errors import InvalidRequest

T = TypeVar("T")
MAX_PAGE = 1000


def tenant_of(http: HttpRequest) -> str:
    """Whose request this is: everybody's who sends the same key. The SDK's prefix does not make another key of it."""
    bearer = http.headers.get("authorization", "").partition(" ")[2].strip()
    key = (http.headers.get("x-api-key") or bearer).removeprefix("tml-")
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:24]


async def body_of(http: HttpRequest, kind: type[T]) -> T:
    """The JSON body. A browser asks before it lets a foreign page send this content type."""
    if not http.headers.get("content-type", "").lower().startswith("application/json"):
        raise HTTPException(415, "Send the body as JSON, with the header 'Content-Type: application/json'")
    return read(await http.body(), kind)


def answer(content: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def page(http: HttpRequest, default: int) -> tuple[int, int]:
    """offset and limit. Raises InvalidRequest."""
    try:
        offset, limit = int(http.query_params.get("offset", 0)), int(http.query_params.get("limit", default))
    except ValueError:
        raise InvalidRequest("offset and limit must be whole numbers", "limit") from None
    if not 0 <= offset < 2**31 or not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(f"offset must be 0 or more, limit 1 to {MAX_PAGE}", "limit")
    return offset, limit


def texts(metadata: dict[str, Any] | None) -> dict[str, str] | None:
    """The SDKs read strings only."""
    return None if metadata is None else {str(key): str(value) for key, value in metadata.items()}
