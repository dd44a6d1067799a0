"""The routes around generation: models, adapters, tokenizing, health, version, load, metrics."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import orjson
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from tandem import __version__
from tandem.api.openai import timely
from tandem.api.schemas import (
    DetokenizeRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
    check_ids,
)
from tandem.api.serving import JsonRoute, Serving
from tandem.errors import Conflict, EngineDead, InvalidRequest, NotFound
from tandem.telemetry import CONTENT_TYPE, Exposition
from tandem.work import Adapter


def router(serving: Serving, exposition: Exposition) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute)
    _add_models(routes, serving)
    _add_adapters(routes, serving)
    _add_tokenizing(routes, serving)
    _add_health(routes, serving, exposition)
    return routes


def _json(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


# ---------------------------------------------------------------- models and adapters


def _add_models(routes: APIRouter, serving: Serving) -> None:
    @routes.get("/v1/models", response_model=None, tags=["OpenAI"])
    async def list_models() -> Response:
        """The base model under its names, then the adapters."""
        cards = [_base_card(serving, name) for name in serving.model_names]
        cards += [_adapter_card(serving, adapter) for adapter in serving.engine.adapters.values()]
        return _json({
            "object": "list", "data": cards, "has_more": False, "first_id": cards[0]["id"], "last_id": cards[-1]["id"]
        })  # fmt: skip

    @routes.get("/v1/models/{model:path}", response_model=None, tags=["OpenAI"])
    async def retrieve_model(model: str) -> Response:
        """One model or adapter. Names may hold slashes and colons."""
        if serving.resolve(model) is None:
            return _json(_base_card(serving, model))
        return _json(_adapter_card(serving, serving.engine.adapters[model]))

    @routes.delete("/v1/models/{model:path}", response_model=None, tags=["OpenAI"])
    async def delete_model(model: str) -> Response:
        """Unload an adapter; requests that use it finish with it."""
        if serving.resolve(model) is None:
            raise InvalidRequest("the base model cannot be deleted, only adapters", "model")
        async with serving.adapter_lock(model):
            await serving.engine.unload_adapter(model)
        return _json({"id": model, "object": "model", "deleted": True})


def _base_card(serving: Serving, name: str) -> dict[str, Any]:
    return _card(serving, name, root=serving.report.model, parent=None)


def _adapter_card(serving: Serving, adapter: Adapter) -> dict[str, Any]:
    return _card(serving, adapter.name, root=adapter.path, parent=serving.model_name)


def _card(serving: Serving, name: str, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "tandem",
        "root": root,
        "parent": parent,
        "max_model_len": serving.report.max_model_len,
        "shutdown_date": None,
        "permission": [],
    }


def _add_adapters(routes: APIRouter, serving: Serving) -> None:
    @routes.post("/v1/load_lora_adapter", response_model=None, tags=["Adapters"])
    async def load_lora_adapter(body: LoadAdapterRequest) -> Response:
        """Publish a PEFT directory as a model."""
        name = body.lora_name
        if name in serving.model_names or name == serving.report.model:
            raise Conflict(f"'{name}' is the base model's name: choose another", "lora_name")
        async with serving.adapter_lock(name):
            if name in serving.engine.adapters and not body.load_inplace:
                raise Conflict(
                    f"the adapter '{name}' is loaded already: unload it first, or send load_inplace=true", "lora_name"
                )
            await serving.engine.load_adapter(name, str(_allowed_path(body.lora_path, serving.lora_root)))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter", response_model=None, tags=["Adapters"])
    async def unload_lora_adapter(body: UnloadAdapterRequest) -> Response:
        """Unpublish an adapter; requests that use it finish with it."""
        name = body.lora_name
        async with serving.adapter_lock(name):
            if name not in serving.engine.adapters:
                raise NotFound(f"There is no adapter '{name}'. GET /v1/models lists those loaded.", "lora_name")
            await serving.engine.unload_adapter(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _allowed_path(path: str, root: Path | None) -> Path:
    """`path` with links followed; inside `root` where there is one. Says nothing of what exists outside."""
    try:
        resolved = Path(os.path.realpath((root or Path.cwd()) / path))
        inside = root is None or resolved.is_relative_to(os.path.realpath(root))
        if inside and not resolved.is_dir():
            raise InvalidRequest(f"there is no adapter directory {path}", "lora_path")
    except (OSError, ValueError) as e:
        if isinstance(e, InvalidRequest):
            raise
        raise InvalidRequest(f"lora_path is not a usable path: {e}", "lora_path") from e
    if not inside:
        raise InvalidRequest("lora_path lies outside of the directory given with --lora-root", "lora_path")
    return resolved


# ---------------------------------------------------------------- tokenizing


def _add_tokenizing(routes: APIRouter, serving: Serving) -> None:
    tokenizer = serving.tokenizer

    @routes.post("/tokenize", response_model=None, tags=["Tokenizer"])
    async def tokenize(http: HttpRequest, body: TokenizeRequest) -> Response:
        """Token ids of a text, or of a conversation as the chat template renders it."""
        serving.resolve(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("give either prompt or messages", "prompt")
        template = serving.template_of(body.chat_template)
        messages = [message.plain(f"messages.{i}") for i, message in enumerate(body.messages or [])]

        def encode() -> list[int]:
            if body.prompt is not None:
                return tokenizer.encode(body.prompt, body.add_special_tokens is not False)
            opens = body.add_generation_prompt and not body.continue_final_message
            return tokenizer.render(
                messages, body.tools or None, opens, body.continue_final_message, body.chat_template_kwargs, template,
                bool(body.add_special_tokens),
            )  # fmt: skip

        def answer() -> Response:
            ids = encode()
            strings = [tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
            return _json({
                "count": len(ids), "max_model_len": serving.report.max_model_len, "tokens": ids, "token_strs": strings
            })  # fmt: skip

        size = len(body.prompt or "") + sum(len(message["content"]) for message in messages)
        serving.check_size(size, False, "messages" if body.prompt is None else "prompt")
        return await timely(http, answer)

    @routes.post("/detokenize", response_model=None, tags=["Tokenizer"])
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens included."""
        serving.resolve(body.model)
        check_ids(body.tokens, serving.report.vocab_size, "tokens")
        return _json({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, False)})


# ---------------------------------------------------------------- health and figures


def _add_health(routes: APIRouter, serving: Serving, exposition: Exposition) -> None:
    def alive() -> None:
        if serving.engine.dead is not None:
            raise EngineDead(serving.engine.dead)

    @routes.get("/health", response_model=None, tags=["Server"])
    @routes.get("/ping", response_model=None, tags=["Server"])
    @routes.post("/ping", response_model=None, tags=["Server"])
    async def health() -> Response:
        """200 while the engine lives, else 503."""
        alive()
        return Response()

    @routes.get("/ready", response_model=None, tags=["Server"])
    async def ready() -> Response:
        """200 once the model is loaded, else 503."""
        alive()
        return Response(status_code=200 if getattr(serving.engine, "report", None) is not None else 503)

    @routes.get("/version", response_model=None, tags=["Server"])
    async def version() -> Response:
        return _json({"version": __version__})

    @routes.get("/load", response_model=None, tags=["Server"])
    async def load() -> Response:
        """HTTP requests being answered."""
        return _json({"server_load": serving.telemetry.in_flight})

    @routes.get("/metrics", response_model=None, tags=["Server"])
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(exposition.text(), headers={"content-type": CONTENT_TYPE})
