"""Builds the HTTP app: routes, key, request ids, body limit, and the way of every error into OpenAI's shape.

What the routes do is in `openai.py`, `finetuning.py`, `adapters.py` and `admin.py`. The engine is another process,
known only by its client.
"""

from __future__ import annotations

import hmac
import html
import itertools
import math
import re
import secrets
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tandem import __version__
from tandem.api import adapters, admin, finetuning, openai, tinker
from tandem.api.serving import Serving
from tandem.api.stream import error_body
from tandem.api.tinker_downloads import DOWNLOAD_PREFIX
from tandem.api.tinker_sessions import Patience
from tandem.config import JobsConfig, ServerConfig
from tandem.engine.client import EngineClient
from tandem.errors import InvalidRequest, Overloaded, TandemError
from tandem.telemetry import Exposition, Telemetry
from tandem.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tandem.jobs.service import Jobs

# Probes and scrapers come without a key, and what they read tells nothing of anybody's requests.
OPEN_PATHS = frozenset(("/health", "/ping", "/ready", "/version", "/load", "/metrics", "/docs", "/openapi.json"))
UPLOAD_PATH = "/v1/files"
# What an upload's body has beside the file: boundaries, headers and the other fields.
FORM_ROOM_BYTES = 2**16


def build_app(
    engine: EngineClient,
    tokenizer: Tokenizer,
    config: ServerConfig,
    lora_root: str | None = None,
    max_loras: int = 0,
    jobs: Jobs | None = None,
    jobs_config: JobsConfig | None = None,
    patience: Patience | None = None,
) -> FastAPI:
    """The app for a started engine. `lora_root`: see `AdapterConfig`; `max_loras` is only shown in the metrics.

    `jobs` is what was opened with `jobs_config` (default: its defaults). Without it there are no fine-tuning routes,
    none of Tinker's, and adapters are only those that the engine has. `patience`: how long Tinker's sessions wait.
    """
    jobs_config = jobs_config or JobsConfig()
    exports = Path(jobs_config.state_dir).expanduser() / "exports"
    serving = Serving(engine, tokenizer, config, Path(lora_root) if lora_root else None, jobs, exports)
    exposition = Exposition(
        serving.telemetry, lambda: engine.stats, engine.report, serving.model_name, max_loras, config.vllm_metrics
    )
    app = FastAPI(title="Tandem", version=__version__, docs_url=None, redoc_url=None, root_path=config.root_path)
    app.state.serving = serving
    app.include_router(openai.router(serving))
    app.include_router(adapters.router(serving))
    app.include_router(admin.router(serving, exposition))
    if jobs is not None:
        app.include_router(finetuning.router(serving, jobs, jobs_config))
        app.include_router(tinker.router(serving, jobs.root / "tinker", patience))
    app.add_route("/docs", _docs, include_in_schema=False)
    app.add_exception_handler(TandemError, _on_tandem_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    max_form = jobs_config.max_file_bytes + FORM_ROOM_BYTES if jobs is not None else config.max_body_bytes
    app.add_middleware(Gate, config=config, telemetry=serving.telemetry, max_form=max_form)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.allowed_origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=["x-request-id"],
        )  # fmt: skip
    return app


class Gate:
    """Around every request: its id and arrival time, the key, the size of its body.

    Plain ASGI, because what wraps `send` is paid for with every streamed token.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, telemetry: Telemetry, max_form: int) -> None:
        """`max_form`: bytes that the body of an upload may have; all others are bounded by the config."""
        self._app = app
        self._key = config.api_key.encode() if config.api_key else None
        self._max_body = config.max_body_bytes
        self._max_form = max_form
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began_s = perf_counter()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = b"req_" + secrets.token_hex(12).encode()
        scope.setdefault("state", {}).update(began_s=began_s, request_id=request_id)

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                spent_ms = b"%d" % ((perf_counter() - began_s) * 1000)
                named = [(b"x-request-id", request_id), (b"openai-processing-ms", spent_ms)]
                message = {**message, "headers": [*message.get("headers", ()), *named]}
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            return await refusal(scope, receive, send_named)
        self._telemetry.in_flight += 1
        try:
            await self._app(scope, self._bounded(receive, self._limit(scope)), send_named)
        finally:
            self._telemetry.in_flight -= 1

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> Response | None:
        is_open = self._path(scope) in OPEN_PATHS or self._path(scope).startswith(DOWNLOAD_PREFIX)
        if self._key is not None and not is_open and not self._has_key(headers):
            message = "Incorrect or missing API key. Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
            return _error(401, message, "authentication_error", "invalid_api_key")
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            return _error(400, "The URL holds a NUL character.", "invalid_request_error")
        length = headers.get(b"content-length", b"0")
        limit = self._limit(scope)
        if not length.isdigit() or int(length[:20]) > limit:
            return self._too_large(limit)
        return None

    @staticmethod
    def _path(scope: Scope) -> str:
        path: str = scope["path"]
        return path.removeprefix(scope.get("root_path", ""))

    def _limit(self, scope: Scope) -> int:
        is_upload = scope["method"] == "POST" and self._path(scope) == UPLOAD_PATH
        return max(self._max_form, self._max_body) if is_upload else self._max_body

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        assert self._key is not None
        # Tinker's SDK takes no key without this prefix; both are compared whatever the first one says.
        is_plain, is_prefixed = (hmac.compare_digest(given, prefix + self._key) for prefix in (b"", b"tml-"))
        return is_plain or is_prefixed

    def _bounded(self, receive: Receive, limit: int) -> Receive:
        """For bodies that do not say their length: stop reading where the limit is passed."""
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > limit:
                    raise HTTPException(413, self._size_message(limit))
            return message

        return bounded

    def _too_large(self, limit: int) -> Response:
        response = _error(413, self._size_message(limit), "invalid_request_error", "request_too_large")
        response.headers["connection"] = "close"
        return response

    def _size_message(self, limit: int) -> str:
        flag = "--max-body-bytes" if limit == self._max_body else "--max-file-bytes"
        return f"The request body is larger than {limit} bytes ({flag})."


_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


# ---------------------------------------------------------------- errors


def _error(status: int, message: str, kind: str, code: str | None = None, param: str | None = None) -> Response:
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return Response(orjson.dumps(body), status, media_type="application/json")


async def _on_tandem_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, TandemError)
    response = Response(orjson.dumps(error_body(error)), error.status, media_type="application/json")
    if isinstance(error, Overloaded):
        response.headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    return response


async def _on_invalid_body(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    params = [_field_name(problem) for problem in problems]
    # The branches of a union each report the same field: say all they accept.
    said = dict.fromkeys(_problem_text(p) for p, param in zip(problems, params, strict=True) if param == params[0])
    text = "; or ".join(list(said)[:4])
    return _error(400, f"{params[0]}: {text}" if params[0] else text, "invalid_request_error", None, params[0] or None)


def _field_name(problem: dict[str, Any]) -> str:
    """`messages.0.content` of ("body", "messages", 0, "content", "str"): without pydantic's names of union branches."""
    loc = problem["loc"]
    parts = [str(part) for part in (loc[1:] if loc[:1] in _PLACES else loc)]
    parts = list(itertools.takewhile(lambda part: not _UNION_BRANCH.fullmatch(part), parts))
    error = problem.get("ctx", {}).get("error")
    if isinstance(error, InvalidRequest) and error.param:  # a validator of the whole object that blames one field
        parts.append(error.param)
    return ".".join(parts)[:256]


_PLACES = (("body",), ("query",), ("path",))
_UNION_BRANCH = re.compile(r"str|int|float|bool|constrained-.*|literal\[.*|(list|dict|function).*\[.*|\[key\]")


def _problem_text(problem: dict[str, Any]) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])[:300]
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']}"
    if problem["type"] == "missing" and problem["loc"] == ("body",):
        return "the request has no body: send JSON"
    return str(problem["msg"])[:300]


async def _on_http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = f"{message}: {request.method} {request.url.path[:256]}. GET /docs lists the routes."
    codes = {404: "unknown_url", 413: "request_too_large"}
    response = _error(error.status_code, message, "invalid_request_error", codes.get(error.status_code))
    response.headers.update(error.headers or {})
    if error.status_code == 413:
        response.headers["connection"] = "close"
    return response


async def _on_bug(request: HttpRequest, _: Exception) -> Response:
    """The last resort; the server logs the traceback. Runs outside of the Gate, so it names the request itself."""
    message = "The server failed to handle this request; its log says why."
    response = _error(500, message, "server_error", "internal_error")
    response.headers["x-request-id"] = request.state.request_id.decode()
    return response


# ---------------------------------------------------------------- docs


async def _docs(request: HttpRequest) -> Response:
    """The routes as one plain page that needs no script and no network; `/openapi.json` has the details."""
    rows = []
    for path, methods in request.app.openapi()["paths"].items():
        for method, about in methods.items():
            text = html.escape(about.get("description", ""))
            rows.append(f"<tr><td>{method.upper()}</td><td><code>{html.escape(path)}</code></td><td>{text}</td></tr>")
    return HTMLResponse(
        "<!doctype html><meta charset=utf-8><title>Tandem API</title>"
        "<style>body{font-family:sans-serif;margin:2rem}td{padding:.2rem 1rem .2rem 0}</style>"
        f"<h1>Tandem {__version__}</h1><p>The OpenAI API with vLLM's extra fields. "
        '<a href="openapi.json">openapi.json</a> describes every field.</p><table>' + "".join(rows) + "</table>"
    )
