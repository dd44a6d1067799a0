"""Listings of Tinker's API: sessions, what they did and what they used. Nothing here has a price.

What these tell about is in `tinker_sessions.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import orjson
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from tandem.api.tinker_http import answer, body_of, iso, page, tenant_of, texts
from tandem.api.tinker_schemas import Project, SearchSessions
from tandem.api.tinker_sessions import Session, Sessions
from tandem.errors import InvalidRequest
from tandem.jobs.checkpoints import parse


def add_routes(routes: APIRouter, sessions: Sessions) -> None:
    _add_sessions(routes, sessions)
    _add_usage(routes, sessions)


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
