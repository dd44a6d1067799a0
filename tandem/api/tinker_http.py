"""What Tinker's routes share: who asks, reading bodies, writing answers."""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import orjson
from fastapi import Request as HttpRequest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tandem.api.tinker_schemas import read

T = TypeVar("T")


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
