"""Files of checkpoints and traces under addresses that need no key and hold for a while: browsers and `curl` send none.

Which files there are is in `jobs/checkpoints.py`.
"""

from __future__ import annotations

import io
import secrets
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request as HttpRequest

from tandem.errors import NotFound

DOWNLOAD_S = 900.0
MAX_DOWNLOADS = 4096
DOWNLOAD_PREFIX = "/api/v1/downloads/"  # what follows is a secret, so no key is asked for


@dataclass(frozen=True)
class Offer:
    expires_s: float
    content: Path | bytes
    name: str


class Downloads:
    """The files on offer."""

    def __init__(self) -> None:
        self._offers: dict[str, Offer] = {}

    def offer(self, http: HttpRequest, files: dict[str, Path | bytes]) -> dict[str, str]:
        """Addresses of some files, by name."""
        now_s = time.monotonic()
        self._offers = {token: o for token, o in self._offers.items() if o.expires_s > now_s}
        while len(self._offers) + len(files) > MAX_DOWNLOADS:
            del self._offers[next(iter(self._offers))]
        found = {}
        base = str(http.base_url).rstrip("/")
        for name, content in files.items():
            token = secrets.token_urlsafe(32)
            self._offers[token] = Offer(now_s + DOWNLOAD_S, content, name)
            found[name] = f"{base}{DOWNLOAD_PREFIX}{token}/{name}"
        return found

    def take(self, token: str) -> Offer:
        """Raises NotFound."""
        offer = self._offers.get(token)
        if offer is None or offer.expires_s < time.monotonic():
            raise NotFound("there is no such download, or its time is over: ask for its address again")
        return offer


def packed(directory: Path) -> bytes:
    """An adapter's files as .tar.gz, without an optimizer's state."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz", compresslevel=1) as tar:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            tar.add(directory / name, name)
    return target.getvalue()


def pieces(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 20):
            yield piece
