"""Listings of Tinker's API: runs, checkpoints and their files, sessions and what they used.

What these tell about is in `jobs/checkpoints.py` and `tinker_sessions.py`. Nothing here has a price.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from tandem.api.tinker_downloads import DOWNLOAD_S, packed, pieces
from tandem.api.tinker_http import answer, body_of, tenant_of
from tandem.api.tinker_schemas import CopyWeights, Project, SearchSessions, TinkerPath, Ttl
from tandem.api.tinker_sessions import Session, Sessions
from tandem.errors import InvalidRequest, NotFound
from tandem.jobs.checkpoints import CheckpointRecord, RunRecord, expiry, parse

MAX_PAGE = 1000


def add_routes(routes: APIRouter, sessions: Sessions) -> None:
    _add_runs(routes, sessions)
    _add_checkpoints(routes, sessions)
    _add_sessions(routes, sessions)
    _add_downloads(routes, sessions)
    _add_usage(routes, sessions)


def iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def page(http: HttpRequest, default: int) -> tuple[int, int]:
    """offset and limit. Raises InvalidRequest."""
    try:
        offset, limit = int(http.query_params.get("offset", 0)), int(http.query_params.get("limit", default))
    except ValueError:
        raise InvalidRequest("offset and limit must be whole numbers", "limit") from None
    if not 0 <= offset < 2**31 or not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(f"offset must be 0 or more, limit 1 to {MAX_PAGE}", "limit")
    return offset, limit


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


def texts(metadata: dict[str, Any] | None) -> dict[str, str] | None:
    """The SDKs read strings only."""
    return None if metadata is None else {str(key): str(value) for key, value in metadata.items()}


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


# ---------------------------------------------------------------- sessions


def _add_sessions(routes: APIRouter, sessions: Sessions) -> None:
    def summary(session: Session) -> dict[str, Any]:
        saved = [c for c in sessions.store.checkpoints(session.tenant) if c.run_id in session.model_ids]
        return {
            "session_id": session.session_id, "created_at": iso(session.created_at), "owner": session.tenant,
            "project_id": session.project_id or "default", "status": session.status,
            "checkpoints_count": len(saved), "checkpoint_storage_bytes": sum(c.size_bytes for c in saved),
            "display_name": session.display_name, "user_metadata": texts(session.user_metadata),
        }  # fmt: skip

    @routes.get("/sessions", response_model=None)
    async def list_sessions(http: HttpRequest) -> Response:
        """The newest first, since the server started."""
        offset, limit = page(http, 20)
        found = sessions.of_tenant(tenant_of(http))
        return answer({"sessions": [s.session_id for s in found[offset : offset + limit]]})

    @routes.get("/sessions/{session_id}", response_model=None)
    async def get_session(http: HttpRequest, session_id: str) -> Response:
        session = sessions.known(tenant_of(http), session_id)
        return answer(
            {
                "training_run_ids": session.model_ids, "sampler_ids": list(session.samplers),
                "user_metadata": texts(session.user_metadata), "display_name": session.display_name,
            }  # fmt: skip
        )

    @routes.put("/sessions/{session_id}/project", response_model=None)
    async def set_project(http: HttpRequest, session_id: str) -> Response:
        """Remembered with the session; projects have no meaning here."""
        sessions.known(tenant_of(http), session_id).project_id = (await body_of(http, Project)).project_id
        return answer({})

    @routes.post("/sessions/search", response_model=None)
    async def search_sessions(http: HttpRequest) -> Response:
        """The newest first."""
        body = await body_of(http, SearchSessions)
        if not 1 <= body.limit <= 200:
            raise InvalidRequest(f"limit must be 1 to 200, not {body.limit}", "limit")
        found = [s for s in sessions.of_tenant(tenant_of(http)) if _matches(body, s)]
        if body.cursor is not None:
            last = body.cursor.get("last_session_id")
            at = next((i for i, s in enumerate(found) if s.session_id == last), None)
            if at is None:
                raise InvalidRequest("cursor names no session of this search", "cursor")
            found = found[at + 1 :]
        cut = found[: body.limit]
        more = {"last_created_at": iso(cut[-1].created_at), "last_session_id": cut[-1].session_id} if cut else None
        following = more if len(found) > body.limit else None
        return answer({"sessions": [summary(s) for s in cut], "next_cursor": following})

    @routes.get("/sessions/{session_id}/trace_export", response_model=None)
    async def trace_export(http: HttpRequest, session_id: str) -> Response:
        """The session's operations over time, for Perfetto."""
        session = sessions.known(tenant_of(http), session_id)
        content = orjson.dumps({"traceEvents": list(_trace(session))})
        url = sessions.downloads.offer(http, {"trace.json": content})
        return answer({"status": "ready", "url": url["trace.json"]})


def _matches(body: SearchSessions, session: Session) -> bool:
    metadata = texts(session.user_metadata) or {}
    if any(metadata.get(key) != value for key, value in body.user_metadata.items()):
        return False
    if body.project_ids is not None and (session.project_id or "default") not in body.project_ids:
        return False
    if body.statuses is not None and session.status["type"] not in [s.get("type") for s in body.statuses]:
        return False
    name = (session.display_name or "").lower()
    named = body.display_name is not None and all(word in name for word in body.display_name.lower().split())
    if body.session_id is None and body.display_name is None:
        return True
    return named or session.session_id == body.session_id


def _trace(session: Session) -> Iterator[dict[str, Any]]:
    rows = {what: i for i, what in enumerate(dict.fromkeys(of for _, of, _, _ in session.timeline))}
    for what, row in rows.items():
        yield {"ph": "M", "name": "thread_name", "pid": 1, "tid": row, "args": {"name": what}}
    for kind, of, began, ended in session.timeline:
        at, lasted = (began - session.created_at) * 1e6, (ended - began) * 1e6
        yield {"ph": "X", "name": kind, "pid": 1, "tid": rows[of], "ts": at, "dur": lasted}


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


# ---------------------------------------------------------------- usage


def _add_usage(routes: APIRouter, sessions: Sessions) -> None:
    @routes.get("/billing/usage/checkpoints/current", response_model=None)
    async def storage(http: HttpRequest) -> Response:
        """Bytes of the caller's checkpoints; nothing costs anything."""
        saved = sessions.store.checkpoints(tenant_of(http))
        size = sum(c.size_bytes for c in saved)
        row = {"checkpoint_count": len(saved), "size_bytes": size, "size_gigabytes": size / 1e9}
        return answer({"data": [row]})

    @routes.get("/billing/usage/events", response_model=None)
    async def usage(http: HttpRequest) -> Response:
        """Tokens by the hour, since the server started; nothing costs anything."""
        tenant, (first, last) = tenant_of(http), (_hour(http, "starting_on"), _hour(http, "ending_before"))
        rows = []
        for (who, hour, session_id, kind), num_tokens in sorted(sessions.usage.items()):
            if who == tenant and first <= hour < last:
                cached = {"cached": False} if kind == "sampling_prefill" else {}
                rows.append(
                    {
                        "bucket_start": iso(hour * 3600), "bucket_end": iso(hour * 3600 + 3600),
                        "base_model": sessions.serving.model_name, "session_id": session_id,
                        "event_info": {"type": kind, "token_count": num_tokens} | cached,
                    }  # fmt: skip
                )
        named = {row["session_id"] for row in rows}
        described = {s.session_id: {"user_metadata": texts(s.user_metadata)} for s in sessions.of_tenant(tenant)}
        return answer({"data": rows, "sessions": {k: v for k, v in described.items() if k in named}})

    @routes.get("/audit", response_model=None)
    async def audit(http: HttpRequest) -> Response:
        """What was done to the caller's checkpoints since the server started."""
        tenant = tenant_of(http)
        entries = [
            {"timestamp": iso(at), "event": event, "event_details": {"tinker_path": path}, "tinker_path": path,
             "model_id": parse(path)[0]}
            for who, at, event, path in sessions.notes if who == tenant
        ]  # fmt: skip
        return answer({"entries": entries})


def _hour(http: HttpRequest, name: str) -> int:
    """A query parameter that names an hour, in hours since 1970. Raises InvalidRequest."""
    text = http.query_params.get(name, "")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(f"{name} must be a time in ISO 8601, not {text[:60]!r}", name) from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() // 3600)
