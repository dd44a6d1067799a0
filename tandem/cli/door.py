"""The address `tandem serve` listens on, and who answers there while the engine loads.

What is behind the door is the app of `api/`; when it opens is decided in `serve.py`.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from tandem.errors import ConfigError


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, taken before anything slow happens. ConfigError says what is wrong with the address."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {error}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; try another --port (0: any free one)") from error
    listener.setblocking(False)
    return listener


class FrontDoor:
    """The ASGI app of the whole life: while the engine loads it answers probes and lets everything else wait."""

    def __init__(self) -> None:
        self._app: Any = None
        self._opened = asyncio.Event()

    @property
    def is_open(self) -> bool:
        return self._opened.is_set()

    def open(self, app: Any) -> None:
        """Let everybody through to `app`."""
        self._app = app
        self._opened.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self.is_open and scope.get("path") in ("/health", "/ready"):
            status = 200 if scope["path"] == "/health" else 503
            headers = [(b"content-length", b"0"), (b"retry-after", b"1")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return
        await self._opened.wait()
        await self._app(scope, receive, send)
