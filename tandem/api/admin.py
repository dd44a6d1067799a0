"""The routes around generation: models, tokenizing, health, version, load, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from tandem import __version__
from tandem.api.finetuning_schemas import page
from tandem.api.openai import timely
from tandem.api.schemas import (
    DetokenizeRequest,
    TokenizeRequest,
    check_ids,
)
from tandem.api.serving import JsonRoute, Serving
from tandem.errors import EngineDead, InvalidRequest
from tandem.jobs.records import AdapterRecord
from tandem.telemetry import CONTENT_TYPE, Exposition
from tandem.work import Adapter


def router(serving: Serving, exposition: Exposition) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute)
    _add_models(routes, serving)
    _add_tokenizing(routes, serving)
    _add_health(routes, serving, exposition)
    return routes


def _json(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


# ---------------------------------------------------------------- models


def _add_models(routes: APIRouter, serving: Serving) -> None:
    @routes.get("/v1/models", response_model=None, tags=["OpenAI"])
    async def list_models() -> Response:
        """The base model under its names, the adapters that are loaded or on disk, and the aliases."""
        cards = {name: _base_card(serving, name) for name in serving.model_names}
        if serving.jobs is not None:
            for record in await serving.jobs.adapters():
                cards.setdefault(record.name, _record_card(serving, record, record.name))
            for alias in await serving.jobs.aliases():
                cards.setdefault(alias.name, _card(serving, alias.name, root=alias.target, parent=serving.model_name))
        for adapter in serving.visible_adapters():
            cards.setdefault(adapter.name, _adapter_card(serving, adapter))
        return _json(page(list(cards.values()), False))

    @routes.get("/v1/models/{model:path}", response_model=None, tags=["OpenAI"])
    async def retrieve_model(model: str) -> Response:
        """One model, adapter or alias. Names may hold slashes and colons."""
        if serving.is_base(model):
            return _json(_base_card(serving, model))
        record = await serving.record(model)
        if record is not None:
            return _json(_record_card(serving, record, model))
        if model in serving.engine.adapters:
            return _json(_adapter_card(serving, serving.engine.adapters[model]))
        raise serving.unknown(model)

    @routes.delete("/v1/models/{model:path}", response_model=None, tags=["OpenAI"])
    async def delete_model(model: str) -> Response:
        """Delete an adapter, from disk too if it is in the registry, or an alias; running requests finish with it."""
        if serving.is_base(model):
            raise InvalidRequest("the base model cannot be deleted, only adapters", "model")
        async with serving.adapter_lock(model):
            if serving.jobs is not None and await serving.record(model) is not None:
                await serving.jobs.delete_adapter(model)
            elif model in serving.engine.adapters:
                await serving.engine.unload_adapter(model)
            else:
                raise serving.unknown(model)
        return _json({"id": model, "object": "model", "deleted": True})


def _base_card(serving: Serving, name: str) -> dict[str, Any]:
    return _card(serving, name, root=serving.report.model, parent=None)


def _adapter_card(serving: Serving, adapter: Adapter) -> dict[str, Any]:
    return _card(serving, adapter.name, root=adapter.path, parent=serving.model_name)


def _record_card(serving: Serving, record: AdapterRecord, name: str) -> dict[str, Any]:
    """`name` may be an alias, whose root is the adapter it stands for."""
    root = record.path if name == record.name else record.name
    return {**_card(serving, name, root=root, parent=serving.model_name), "created": record.created_at}


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


# ---------------------------------------------------------------- tokenizing


def _add_tokenizing(routes: APIRouter, serving: Serving) -> None:
    tokenizer = serving.tokenizer

    @routes.post("/tokenize", response_model=None, tags=["Tokenizer"])
    async def tokenize(http: HttpRequest, body: TokenizeRequest) -> Response:
        """Token ids of a text, or of a conversation as the chat template renders it."""
        await serving.check_model(body.model)
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
        await serving.check_model(body.model)
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
