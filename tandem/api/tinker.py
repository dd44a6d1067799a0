"""Tinker's API at /api/v1: training loops of the user's own, as its public SDKs drive them.

Here: the routes, who asks, and how answers travel. What they do is in `tinker_sessions.py`, `tinker_training.py`,
`tinker_sampling.py`; saving is in `tinker_saving.py`, listings in `tinker_rest.py` and `tinker_usage.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tandem.api import tinker_rest, tinker_sampling, tinker_saving, tinker_training, tinker_usage
from tandem.api.serving import Serving
from tandem.api.tinker_futures import Future
from tandem.api.tinker_http import answer, body_of, tenant_of
from tandem.api.tinker_results import Result
from tandem.api.tinker_schemas import (
    CreateModel,
    CreateSamplingSession,
    CreateSession,
    FinishSession,
    FutureName,
    LoadWeights,
    ModelName,
    OptimStep,
    RetrieveFuture,
    RetrieveFutures,
    Sample,
    SamplerName,
    SaveWeights,
    SessionName,
)
from tandem.api.tinker_sessions import Patience, Sessions
from tandem.api.tinker_wire import PROTOBUF, read_pass, unpack
from tandem.errors import InvalidRequest
from tandem.jobs.checkpoints import Checkpoints

HOLD_S = 25.0  # the SDKs give up a poll after 45
LARGEST_UNPACKED = 2**28
CONFIG = {
    "pjwt_auth_enabled": False,
    "use_pyqwest_transport": False,
    "proto_write_fwdbwd": True,
    "fwd_via_fwdbwd": True,
    "sample_max_concurrent_requests": 1024,
    "sample_use_retrieve_futures": False,
    "custom_loss_server_side": False,
    "sample_join_sampling_session": True,
}
DYNAMIC_CONFIG = {"refresh_interval_sec": 300, "sample_cancel_enabled": True}
HEAD_NOTE = "train_unembed has no effect here: adapters sit on attention and MLP, never on the output head."


def router(serving: Serving, root: Path, patience: Patience | None = None) -> APIRouter:
    """`root`: where runs and checkpoints are kept. Raises OSError where it cannot be."""
    sessions = Sessions(serving, Checkpoints(root), patience or Patience())
    serving.more_models.append(sessions.resident)
    routes = APIRouter(prefix="/api/v1", tags=["Tinker"])
    _add_sessions(routes, sessions)
    _add_training(routes, sessions)
    _add_weights(routes, sessions)
    _add_sampling(routes, sessions)
    _add_futures(routes, sessions)
    tinker_rest.add_routes(routes, sessions)
    tinker_usage.add_routes(routes, sessions)
    return routes


# ---------------------------------------------------------------- who asks, and how


def promise(future: Future) -> Response:
    content: dict[str, Any] = {"request_id": future.request_id}
    if future.sequence_ids:
        content["sample_sequence_ids"] = future.sequence_ids
    return answer(content)


Handler = Callable[..., Awaitable[Response]]


def _post(routes: APIRouter, path: str) -> Callable[[Handler], Handler]:
    return routes.post(path, response_model=None)


def _get(routes: APIRouter, path: str) -> Callable[[Handler], Handler]:
    return routes.get(path, response_model=None)


# ---------------------------------------------------------------- sessions


def _add_sessions(routes: APIRouter, sessions: Sessions) -> None:
    serving = sessions.serving

    @_get(routes, "/healthz")
    async def healthz(http: HttpRequest) -> Response:
        return answer({"status": "ok"})

    @_post(routes, "/client/config")
    async def client_config(http: HttpRequest) -> Response:
        """How the SDK should talk to this server."""
        return answer(CONFIG)

    @_post(routes, "/client/dynamic_config")
    async def client_dynamic_config(http: HttpRequest) -> Response:
        return answer(DYNAMIC_CONFIG)

    @_get(routes, "/get_server_capabilities")
    async def capabilities(http: HttpRequest) -> Response:
        """The base model by its names."""
        length = serving.report.max_model_len
        models = [
            {"model_name": name, "max_context_length": length, "trainable": True, "sampleable": True}
            for name in dict.fromkeys([*serving.model_names, serving.report.model])
        ]
        return answer({"supported_models": models})

    @_post(routes, "/create_session")
    async def create_session(http: HttpRequest) -> Response:
        """Begin a session; without heartbeats it expires."""
        body = await body_of(http, CreateSession)
        session = sessions.create(
            tenant_of(http), user_metadata=body.user_metadata, display_name=body.display_name,
            project_id=body.project_id, tags=body.tags,
        )  # fmt: skip
        return answer({"type": "create_session", "session_id": session.session_id, "info_message": HEAD_NOTE})

    @_post(routes, "/session_heartbeat")
    async def heartbeat(http: HttpRequest) -> Response:
        """A sign of life. 410: the session is over."""
        body = await body_of(http, SessionName)
        sessions.session(tenant_of(http), body.session_id)
        return answer({"type": "session_heartbeat"})

    @_post(routes, "/sessions/{session_id}/finish")
    async def finish(http: HttpRequest, session_id: str) -> Response:
        """End a session and free what it holds. What it saved stays."""
        body = await body_of(http, FinishSession)
        session = sessions.known(tenant_of(http), session_id)
        if session.is_open:
            sessions.end(
                session, {"type": "client_finished", "reason": {"type": body.reason.type}, "detail": body.detail}
            )
        return answer({})

    @_post(routes, "/telemetry")
    async def telemetry(http: HttpRequest) -> Response:
        """Accepted and dropped."""
        return answer({"status": "accepted"})


# ---------------------------------------------------------------- training


def _add_training(routes: APIRouter, sessions: Sessions) -> None:
    serving = sessions.serving

    @_post(routes, "/create_model")
    async def create_model(http: HttpRequest) -> Response:
        """A new LoRA of the base model."""
        body = await body_of(http, CreateModel)
        session = sessions.session(tenant_of(http), body.session_id)
        return promise(tinker_training.create_model(sessions, session, body))

    @_post(routes, "/unload_model")
    async def unload_model(http: HttpRequest) -> Response:
        body = await body_of(http, ModelName)
        return promise(tinker_training.unload(sessions, sessions.model(tenant_of(http), body.model_id)))

    @_post(routes, "/get_info")
    async def get_info(http: HttpRequest) -> Response:
        """What a model is, and where its tokenizer comes from."""
        body = await body_of(http, ModelName)
        model = sessions.model(tenant_of(http), body.model_id)
        data = {
            "arch": serving.report.architecture, "model_name": model.base_model, "tokenizer_id": serving.tokenizer_id,
        }  # fmt: skip
        return answer(
            {
                "type": "get_info", "model_id": model.model_id, "model_data": data, "is_lora": True,
                "lora_rank": model.rank, "model_name": model.base_model, "optimizer_config": {"type": model.optimizer},
            }  # fmt: skip
        )

    async def run_pass(http: HttpRequest, forward_only: bool) -> Response:
        kind = http.headers.get("content-type", "").lower()
        if not kind.startswith(("application/json", PROTOBUF)):
            raise HTTPException(415, f"Send the body as application/json or {PROTOBUF}")
        packed = await http.body()
        encoding = http.headers.get("content-encoding", "").strip().lower()
        body = await asyncio.to_thread(unpack, packed, encoding, LARGEST_UNPACKED) if encoding else packed
        request = read_pass(body, kind, forward_only)
        model = sessions.model(tenant_of(http), request.model_id)
        return promise(await tinker_training.run_pass(sessions, model, request, len(body)))

    @_post(routes, "/forward_backward")
    async def forward_backward(http: HttpRequest) -> Response:
        """Loss, log-probabilities and gradients of some examples; gradients add up until optim_step."""
        return await run_pass(http, False)

    @_post(routes, "/forward")
    async def forward(http: HttpRequest) -> Response:
        """Loss and log-probabilities alone."""
        return await run_pass(http, True)

    @_post(routes, "/optim_step")
    async def optim_step(http: HttpRequest) -> Response:
        """One update with the gradients added up so far."""
        body = await body_of(http, OptimStep)
        model = sessions.model(tenant_of(http), body.model_id)
        return promise(tinker_training.optim_step(sessions, model, body))


def _add_weights(routes: APIRouter, sessions: Sessions) -> None:
    @_post(routes, "/save_weights")
    async def save_weights(http: HttpRequest) -> Response:
        """Adapter and optimizer state to disk, whole or not at all."""
        body = await body_of(http, SaveWeights)
        model = sessions.model(tenant_of(http), body.model_id)
        return promise(tinker_saving.save(sessions, model, body, "training"))

    @_post(routes, "/save_weights_for_sampler")
    async def save_weights_for_sampler(http: HttpRequest) -> Response:
        """With a name, the adapter to disk; without one, a version in memory and a sampling session for it."""
        body = await body_of(http, SaveWeights)
        model = sessions.model(tenant_of(http), body.model_id)
        if body.path is None:
            return promise(tinker_saving.snapshot(sessions, model, body))
        return promise(tinker_saving.save(sessions, model, body, "sampler"))

    @_post(routes, "/save_weights_external")
    async def save_weights_external(http: HttpRequest) -> Response:
        """The adapter in PEFT's format, to be downloaded."""
        body = await body_of(http, SaveWeights)
        model = sessions.model(tenant_of(http), body.model_id)
        return promise(tinker_saving.save(sessions, model, body, "external"))

    @_post(routes, "/load_weights")
    async def load_weights(http: HttpRequest) -> Response:
        """A checkpoint into a model, or as a new one."""
        return promise(tinker_saving.load(sessions, tenant_of(http), await body_of(http, LoadWeights)))


# ---------------------------------------------------------------- sampling


def _add_sampling(routes: APIRouter, sessions: Sessions) -> None:
    @_post(routes, "/create_sampling_session")
    async def create_sampling_session(http: HttpRequest) -> Response:
        """Sample from a checkpoint or from the base model."""
        body = await body_of(http, CreateSamplingSession)
        session = sessions.session(tenant_of(http), body.session_id)
        sampler = tinker_sampling.create_sampler(sessions, session, body)
        return answer({"type": "create_sampling_session", "sampling_session_id": sampler.sampler_id})

    @_post(routes, "/join_sampling_session")
    async def join_sampling_session(http: HttpRequest) -> Response:
        """A number for one more client of a sampling session, which numbers its requests from there."""
        body = await body_of(http, SamplerName)
        sampler = sessions.sampler(tenant_of(http), body.sampling_session_id)
        sampler.num_clients += 1
        return answer({"type": "join_sampling_session", "client_counter": sampler.num_clients - 1})

    @_get(routes, "/samplers/{sampler_id}")
    async def get_sampler(http: HttpRequest, sampler_id: str) -> Response:
        sampler = sessions.sampler(tenant_of(http), sampler_id)
        content = {"sampler_id": sampler_id, "base_model": sampler.base_model, "model_path": sampler.model_path}
        return answer(content)

    @_post(routes, "/asample")
    async def asample(http: HttpRequest) -> Response:
        """Samples, log-probabilities of the prompt, or both. 429: too many wait."""
        body = await body_of(http, Sample)
        if body.sampling_session_id is None:
            raise InvalidRequest(
                "give sampling_session_id: create_sampling_session makes one of a model", "sampling_session_id"
            )
        sampler = sessions.sampler(tenant_of(http), body.sampling_session_id)
        return promise(tinker_sampling.sample(sessions, sampler, body))


# ---------------------------------------------------------------- futures


def _add_futures(routes: APIRouter, sessions: Sessions) -> None:
    def render(http: HttpRequest, result: Result) -> Response:
        if PROTOBUF in http.headers.get("accept", "") and (message := result.protobuf()) is not None:
            return Response(message, media_type=PROTOBUF)
        return answer(result.json())

    @_post(routes, "/retrieve_future")
    async def retrieve_future(http: HttpRequest) -> Response:
        """The result of a request, waiting for it a while. 408: not yet, ask again. 410: dropped."""
        body = await body_of(http, RetrieveFuture)
        tenant = tenant_of(http)
        future = sessions.futures.get(tenant, body.request_id)
        sessions.session(tenant, future.session_id)
        result = await sessions.futures.wait(future, HOLD_S)
        if result is None:
            return answer({"type": "try_again", "request_id": body.request_id, "queue_state": "active"}, 408)
        return await asyncio.to_thread(render, http, result)

    @_post(routes, "/retrieve_futures")
    async def retrieve_futures(http: HttpRequest) -> Response:
        """The requests of a sampling session that were done since a cursor, waiting for the first one a while."""
        body = await body_of(http, RetrieveFutures)
        tenant = tenant_of(http)
        sampler = sessions.sampler(tenant, body.target.sampling_session_id)
        deadline_s = time.monotonic() + min(HOLD_S, HOLD_S if body.timeout is None else max(0.0, body.timeout))
        cursor = max(0, body.prev_cursor)
        while sampler.num_finished <= cursor and (left_s := deadline_s - time.monotonic()) > 0:
            sampler.news.clear()
            try:
                await asyncio.wait_for(sampler.news.wait(), left_s)
            except TimeoutError:
                break
        new = [{"state": "finished", "request_id": request_id} for request_id in sampler.finished_since(cursor)]
        return answer({"completions": new, "cursor": max(cursor, sampler.num_finished)})

    @_post(routes, "/cancel_future")
    async def cancel_future(http: HttpRequest) -> Response:
        """Stop a sample request that nobody waits for any more; training operations run on."""
        body = await body_of(http, FutureName)
        future = sessions.futures.get(tenant_of(http), body.request_id)
        if future.kind != "sample":
            raise InvalidRequest("only sample requests can be cancelled", "request_id")
        sessions.futures.cancel(future)
        return answer({})


