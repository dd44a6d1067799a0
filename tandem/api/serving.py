"""What all routes share: the engine, the tokenizer, the models' names and the checks that need them, reading JSON."""

from __future__ import annotations

import asyncio
import email.message
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import orjson
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tandem.config import DEMO_MODEL, ServerConfig
from tandem.engine.client import EngineClient
from tandem.errors import ContextTooLong, InvalidRequest, NotFound
from tandem.telemetry import Telemetry
from tandem.tokenizer import Tokenizer
from tandem.work import Adapter, EngineReport

if TYPE_CHECKING:
    from tandem.jobs.records import AdapterRecord
    from tandem.jobs.service import Jobs


@dataclass(frozen=True)
class Serving:
    """One per app. `lora_root`: the directory outside of which no adapter is read (None: anywhere). `jobs`: None where
    there is no fine-tuning and no registry of adapters. `exports`: where adapters may be written beside `lora_root`.
    `ignored_fields`: the unknown request fields that were logged already. `adapter_locks`: those held or waited for.
    `more_models`: who else may know a model's name, and have the engine's adapter for it."""

    engine: EngineClient
    tokenizer: Tokenizer
    config: ServerConfig
    lora_root: Path | None = None
    jobs: Jobs | None = None
    exports: Path = Path("exports")
    telemetry: Telemetry = field(default_factory=Telemetry)
    ignored_fields: set[str] = field(default_factory=set)
    adapter_locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)
    created: int = field(default_factory=lambda: int(time.time()))
    more_models: list[Callable[[str], Awaitable[str | None]]] = field(default_factory=list)

    @property
    def report(self) -> EngineReport:
        return self.engine.report

    @property
    def model_names(self) -> list[str]:
        """What the base model is called in listings; it also answers to the path or id it was loaded from."""
        return self.config.served_model_name or [self.report.model]

    @property
    def model_name(self) -> str:
        return self.model_names[0]

    @property
    def tokenizer_id(self) -> str:
        """What loads the same tokenizer elsewhere: a hub id, or a directory."""
        return str(DEMO_MODEL) if self.report.model == "demo" else self.report.model

    def is_base(self, model: str | None) -> bool:
        """Whether this is a name of the base model, or none at all."""
        return model is None or model in self.model_names or model in (self.report.model, self.tokenizer_id)

    def visible_adapters(self) -> list[Adapter]:
        """Those of the engine for everybody to see: not the ones of somebody's training loop, nor of a job's."""
        hidden = ("tinker:", "rollouts:")
        return [adapter for adapter in self.engine.adapters.values() if not adapter.name.startswith(hidden)]

    async def resolve(self, model: str | None) -> str | None:
        """The engine's adapter that a model name stands for, None for the base model.

        An adapter of the registry is loaded into the engine first where it is not there. Raises NotFound, and what
        the loading raises.
        """
        if model is None or self.is_base(model):
            return None
        if self.jobs is None:
            found = model if model in self.engine.adapters else None
        else:
            found = self.jobs.resident_now(model)
            if found is None:
                found = await self.jobs.resident(model)
        for ask in self.more_models:
            if found is None:
                found = await ask(model)
        if found is None:
            raise self.unknown(model)
        return found

    async def check_model(self, model: str | None) -> None:
        """Raise NotFound for a name that stands for no model. Loads nothing."""
        if model is None or self.is_base(model) or model in self.engine.adapters:
            return
        if await self.record(model) is None:
            raise self.unknown(model)

    async def record(self, name: str) -> AdapterRecord | None:
        """The adapter of the registry that a name or an alias stands for."""
        try:
            return None if self.jobs is None else await self.jobs.adapter(name)
        except NotFound:
            return None

    @staticmethod
    def unknown(model: str) -> NotFound:
        return NotFound(f"The model `{model[:256]}` does not exist. GET /v1/models lists those that do.", "model")

    def adapter_lock(self, name: str) -> asyncio.Lock:
        """Held while `name` is loaded or unloaded: what was checked of it stays true until the engine has answered."""
        return self.adapter_locks.setdefault(name, asyncio.Lock())

    def template_of(self, chat_template: str | None) -> str | None:
        """The request's own chat template, where the server lets requests bring one."""
        if chat_template is not None and not self.config.trust_request_chat_template:
            raise InvalidRequest(
                "requests may not bring a chat_template: start the server with --trust-request-chat-template",
                "chat_template",
            )
        return chat_template

    def check_choices(self, num_prompts: int, n: int) -> None:
        """Refuse a request that could not even run alone on an idle engine."""
        queue, seats = self.engine.max_num_queued_reqs, self.report.max_num_seqs
        if num_prompts * n > queue + seats:
            raise InvalidRequest(
                f"{num_prompts} prompts x n={n} are more than the {queue + seats} choices this server takes at once "
                f"(--max-num-seqs {seats}, --max-num-queued-reqs {queue}): split the request",
                "n" if num_prompts == 1 else "prompt",
            )

    def check_size(self, num_chars: int, is_truncated: bool, param: str) -> None:
        """Refuse, before spending time on encoding it, a text that can only be too long."""
        least = num_chars // self.tokenizer.longest_token
        if least > self.report.max_model_len and not is_truncated:
            raise ContextTooLong(
                f"This model's maximum context length is {self.report.max_model_len} tokens, "
                f"the prompt has at least {least}. Please reduce its length.",
                param,
            )


class JsonRoute(APIRoute):
    """A route that reads its body with orjson, and only where the client says it is JSON.

    The content type is what makes browsers ask before they let a foreign page post to a local server.
    """

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        reads_body = self.body_field is not None

        async def handle(request: HttpRequest) -> Response:
            if reads_body and not _is_json(request.headers.get("content-type", "")):
                raise HTTPException(415, "Send the body as JSON, with the header 'Content-Type: application/json'")
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle


class _JsonRequest(HttpRequest):
    async def json(self) -> Any:
        return orjson.loads(await self.body())


def _is_json(content_type: str) -> bool:
    message = email.message.Message()
    message["content-type"] = content_type
    return message.get_content_maintype() == "application" and message.get_content_subtype().endswith("json")
