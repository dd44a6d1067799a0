"""Talking to a running server: the options client verbs share, one plain or streamed request, its errors in words.

Works with any OpenAI-compatible server. What is done with the answer is the verbs' business.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tandem.config import option
from tandem.errors import TandemError

if TYPE_CHECKING:
    import httpx

DEFAULT_SERVER = "http://127.0.0.1:8000"
DEFAULT_URL = DEFAULT_SERVER + "/v1"


@dataclass(frozen=True)
class ServerAddress:
    """Which server, which model."""

    url: str = option(DEFAULT_URL, "the server's OpenAI base URL", env="OPENAI_BASE_URL")
    api_key: str | None = option(None, "its API key", env="OPENAI_API_KEY")
    model_name: str | None = option(None, "model or adapter to talk to (default: the first the server lists)")


@dataclass(frozen=True)
class Server:
    """Which server."""

    server: str = option(DEFAULT_SERVER, "the server's address", env="OPENAI_BASE_URL")
    api_key: str | None = option(None, "its API key", env="OPENAI_API_KEY")


def connect_to(server: str, api_key: str | None) -> httpx.Client:
    """A client for the server at `server`, given with or without /v1; routes are relative to /v1."""
    root = server.rstrip("/").removesuffix("/v1")
    return connect(ServerAddress(url=root + "/v1", api_key=api_key))


def connect(address: ServerAddress) -> httpx.Client:
    """A client for the server; opens no connection yet."""
    import httpx

    headers = {"Authorization": f"Bearer {address.api_key}"} if address.api_key else {}
    return httpx.Client(base_url=address.url.rstrip("/") + "/", headers=headers, timeout=httpx.Timeout(10, read=None))


def model_name(http: httpx.Client, address: ServerAddress) -> str:
    """The model asked for, or the first the server lists. TandemError where no server answers."""
    import httpx

    if address.model_name:
        return address.model_name
    try:
        response = http.get("models")
    except httpx.TransportError as error:
        raise unreachable(address.url, error) from error
    if response.status_code != 200:
        raise TandemError(failure(response.status_code, response.content))
    return response.json()["data"][0]["id"]


def call(http: httpx.Client, method: str, route: str, **content: Any) -> Any:
    """The JSON (or the text, where it is none) of one reply. TandemError for whatever the server refuses."""
    import httpx

    try:
        response = http.request(method, route, **content)
    except httpx.ConnectError as error:
        raise unreachable(str(http.base_url).rstrip("/"), error) from error
    except httpx.TransportError as error:
        raise TandemError(f"the connection to the server broke: {error}") from error
    if not response.is_success:
        raise TandemError(failure(response.status_code, response.content))
    is_json = response.headers.get("content-type", "").startswith("application/json")
    return response.json() if is_json else response.text


def unreachable(url: str, error: Exception) -> TandemError:
    """The error for a server that does not answer, with what to do."""
    ours = url.startswith(DEFAULT_SERVER)
    advice = "start one in another terminal with: tandem serve" if ours else "check the address"
    return TandemError(f"no server answers at {url} ({error}): {advice}")


def failure(status: int, body: bytes) -> str:
    """An error reply in words: the message of OpenAI's error shape where there is one."""
    try:
        return f"the server answered {status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status}: {body[:300].decode(errors='replace')}"


def stream_text(http: httpx.Client, route: str, body: dict[str, Any]) -> Iterator[str]:
    """The pieces of text of one streamed chat or text completion. TandemError for whatever the server refuses."""
    import httpx

    try:
        with http.stream("POST", route, json={**body, "stream": True}) as response:
            if response.status_code != 200:
                raise TandemError(failure(response.status_code, response.read()))
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise TandemError(f"the server broke off: {chunk['error'].get('message')}")
                for choice in chunk["choices"]:
                    yield choice.get("text") or choice.get("delta", {}).get("content") or ""
    except httpx.ConnectError as error:
        raise unreachable(str(http.base_url).rstrip("/"), error) from error
    except httpx.TransportError as error:
        raise TandemError(f"the connection to the server broke: {error}") from error
