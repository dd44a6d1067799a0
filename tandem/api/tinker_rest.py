"""Listings of Tinker's API: runs, checkpoints and their files. Sessions and what they used are in `tinker_usage.py`.

What these tell about is in `jobs/checkpoints.py`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from tandem.api.tinker_downloads import DOWNLOAD_S, packed, pieces
from tandem.api.tinker_http import answer, body_of, iso, page, tenant_of, texts
from tandem.api.tinker_schemas import CopyWeights, TinkerPath, Ttl
from tandem.api.tinker_sessions import Sessions
from tandem.errors import NotFound
from tandem.jobs.checkpoints import CheckpointRecord, RunRecord, expiry


def add_routes(routes: APIRouter, sessions: Sessions) -> None:
    _add_runs(routes, sessions)
    _add_checkpoints(routes, sessions)
    _add_downloads(routes, sessions)


def checkpoint_object(record: CheckpointRecord) -> dict[str, Any]:
    return {
        "checkpoint_id": record.checkpoint_id,
        "checkpoint_type": record.kind,
        "time": iso(record.created_at),
        "tinker_path": record.path,
        "size_bytes": record.size_bytes,
        "public": record.public,
        "expires_at": iso(record.expires_at),
        "user_metadata": texts(record.user_metadata),
    }


# ---------------------------------------------------------------- runs


def _add_runs(routes: APIRouter, sessions: Sessions) -> None:
    store = sessions.store

    def run_object(run: RunRecord) -> dict[str, Any]:
        saved = store.checkpoints(run.tenant, run.run_id)
        newest = {kind: next((checkpoint_object(c) for c in saved if c.kind == kind), None)
                  for kind in ("training", "sampler")}  # fmt: skip
        return {
            "training_run_id": run.run_id, "base_model": run.base_model, "model_owner": run.tenant, "is_lora": True,
            "lora_rank": run.rank, "corrupted": False, "last_request_time": iso(run.last_request_at),
            "last_checkpoint": newest["training"], "last_sampler_checkpoint": newest["sampler"],
            "user_metadata": texts(run.user_metadata),
        }  # fmt: skip

    @routes.get("/training_runs", response_model=None)
    async def list_runs(http: HttpRequest) -> Response:
        """The newest first."""
        offset, limit = page(http, 20)
        runs = store.runs(tenant_of(http))
        cursor = {"offset": offset, "limit": limit, "total_count": len(runs)}
        return answer({"training_runs": [run_object(r) for r in runs[offset : offset + limit]], "cursor": cursor})

    @routes.get("/training_runs/{run_id}", response_model=None)
    async def get_run(http: HttpRequest, run_id: str) -> Response:
        return answer(run_object(store.run(tenant_of(http), run_id)))

    @routes.get("/training_runs/{run_id}/checkpoints", response_model=None)
    async def list_run_checkpoints(http: HttpRequest, run_id: str) -> Response:
        """All of a run, the newest first."""
        tenant = tenant_of(http)
        store.run(tenant, run_id)
        return answer({"checkpoints": [checkpoint_object(c) for c in store.checkpoints(tenant, run_id)]})

    @routes.post("/weights_info", response_model=None)
    async def weights_info(http: HttpRequest) -> Response:
        """What it takes to load a checkpoint."""
        record = store.readable(tenant_of(http), (await body_of(http, TinkerPath)).tinker_path)
        return answer(
            {
                "base_model": record.base_model, "is_lora": True, "lora_rank": record.rank, "train_unembed": False,
                "train_mlp": record.train_mlp, "train_attn": record.train_attn, "optimizer_config": {"type": "adamw"},
            }  # fmt: skip
        )


# ---------------------------------------------------------------- checkpoints


def _add_checkpoints(routes: APIRouter, sessions: Sessions) -> None:
    store = sessions.store
    one = "/training_runs/{run_id}/checkpoints/{segment}/{name}"

    def own(http: HttpRequest, run_id: str, segment: str, name: str) -> CheckpointRecord:
        return store.own(tenant_of(http), f"tinker://{run_id}/{segment}/{name}")

    @routes.get("/checkpoints", response_model=None)
    async def list_checkpoints(http: HttpRequest) -> Response:
        """Of all runs, the newest first."""
        offset, limit = page(http, 100)
        found = store.checkpoints(tenant_of(http))
        cursor = {"offset": offset, "limit": limit, "total_count": len(found)}
        return answer(
            {"checkpoints": [checkpoint_object(c) for c in found[offset : offset + limit]], "cursor": cursor}
        )

    @routes.delete(one, response_model=None)
    async def delete_checkpoint(http: HttpRequest, run_id: str, segment: str, name: str) -> Response:
        """Samplers of it that have it loaded go on until their session ends."""
        record = own(http, run_id, segment, name)
        sessions.note(record.tenant, "checkpoint_delete", record.path)
        await store.delete(record)
        sessions.residents.forget(record.path)
        return answer({})

    async def set_public(http: HttpRequest, run_id: str, segment: str, name: str, public: bool) -> Response:
        record = own(http, run_id, segment, name)
        record.public = public
        await store.put(record)
        sessions.note(record.tenant, "checkpoint_publish" if public else "checkpoint_unpublish", record.path)
        return answer({})

    @routes.post(one + "/publish", response_model=None)
    async def publish(http: HttpRequest, run_id: str, segment: str, name: str) -> Response:
        """Let everybody with a key load it and sample from it."""
        return await set_public(http, run_id, segment, name, True)

    @routes.delete(one + "/publish", response_model=None)
    async def unpublish(http: HttpRequest, run_id: str, segment: str, name: str) -> Response:
        return await set_public(http, run_id, segment, name, False)

    @routes.put(one + "/ttl", response_model=None)
    async def set_ttl(http: HttpRequest, run_id: str, segment: str, name: str) -> Response:
        """Seconds until it is deleted; none: it stays."""
        record = own(http, run_id, segment, name)
        record.expires_at = expiry((await body_of(http, Ttl)).ttl_seconds, time.time())
        await store.put(record)
        return answer({})

    @routes.post("/copy_weights", response_model=None)
    async def copy_weights(http: HttpRequest) -> Response:
        """A checkpoint of one's own, or a public one, as a run of its own that nobody trains."""
        body, tenant = await body_of(http, CopyWeights), tenant_of(http)
        record = store.readable(tenant, body.source_path)
        now = time.time()
        expires_at = expiry(body.ttl_seconds, now)
        if body.session_id is not None:
            session = sessions.session(tenant, body.session_id)
            run_id = f"{session.session_id}:train:{body.model_seq_id or 0}"
        else:
            run_id = f"copy-{secrets.token_hex(12)}:train:0"
        run = RunRecord(
            run_id=run_id, tenant=tenant, session_id=body.session_id or "", base_model=record.base_model,
            rank=record.rank, train_attn=record.train_attn, train_mlp=record.train_mlp, created_at=now,
            last_request_at=now,
        )  # fmt: skip
        copied = await store.copy(record, run, expires_at)
        await store.put_run(run)
        return answer({"tinker_path": copied.path})


# ---------------------------------------------------------------- files


def _add_downloads(routes: APIRouter, sessions: Sessions) -> None:
    store = sessions.store
    one = "/training_runs/{run_id}/checkpoints/{segment}/{name}"

    @routes.get(one + "/external_weights_urls", response_model=None)
    async def weights_urls(http: HttpRequest, run_id: str, segment: str, name: str) -> Response:
        """Addresses of a checkpoint's files, which are in PEFT's format."""
        record = store.readable(tenant_of(http), f"tinker://{run_id}/{segment}/{name}")
        files: dict[str, Path | bytes] = {f.name: f for f in sorted(store.directory(record).iterdir())}
        expires = datetime.now(UTC) + timedelta(seconds=DOWNLOAD_S)
        return answer({"urls": sessions.downloads.offer(http, files), "expires": expires.isoformat()})

    @routes.get(one + "/archive", response_model=None)
    async def archive(http: HttpRequest, run_id: str, segment: str, name: str) -> Response:
        """302 to a checkpoint's files in one .tar.gz."""
        record = store.readable(tenant_of(http), f"tinker://{run_id}/{segment}/{name}")
        url = sessions.downloads.offer(http, {f"{record.name}.tar.gz": store.directory(record)})
        expires = datetime.now(UTC) + timedelta(seconds=DOWNLOAD_S)
        headers = {"location": next(iter(url.values())), "expires": expires.strftime("%a, %d %b %Y %H:%M:%S GMT")}
        return Response(status_code=302, headers=headers)

    @routes.get("/downloads/{token}/{name}", response_model=None)
    async def download(http: HttpRequest, token: str, name: str) -> Response:
        """What a listing gave the address of; it needs no key."""
        offer = sessions.downloads.take(token)
        if isinstance(offer.content, bytes):
            return Response(offer.content, media_type="application/octet-stream")
        if not offer.content.exists():
            raise NotFound("the checkpoint was deleted")
        if offer.content.is_dir():
            content = await asyncio.to_thread(packed, offer.content)
            return Response(content, media_type="application/gzip")
        return StreamingResponse(pieces(offer.content), media_type="application/octet-stream")
