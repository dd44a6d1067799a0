"""OpenAI's files and fine-tuning routes: from a body to a call of `Jobs`, and back.

What a job is and does is in `jobs/`, what it looks like on the wire in `finetuning_schemas.py`.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import orjson
from fastapi import APIRouter, Query
from fastapi import Request as HttpRequest
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from tandem.api import graders
from tandem.api.finetuning_schemas import (
    JobBody,
    checkpoint_object,
    event_object,
    file_object,
    job_object,
    page,
)
from tandem.api.serving import JsonRoute, Serving
from tandem.api.upload import read_form
from tandem.config import JobsConfig
from tandem.errors import InvalidRequest
from tandem.jobs.records import PURPOSES

if TYPE_CHECKING:
    from tandem.jobs.service import Jobs

FORM_FIELDS = frozenset(("purpose", "expires_after[anchor]", "expires_after[seconds]"))
SHORTEST_LIFE_S, LONGEST_LIFE_S = 3600, 2_592_000
_METADATA = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)
_FORM_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer", "minimum": SHORTEST_LIFE_S, "maximum": LONGEST_LIFE_S
                        },
                    },
                }
            }
        },
    }
}  # fmt: skip

After = Annotated[str | None, Query(max_length=256)]
Limit = Annotated[int, Query(ge=1, le=1000)]


def router(serving: Serving, jobs: Jobs, config: JobsConfig) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute, tags=["Fine-tuning"])
    _add_files(routes, serving, jobs, config.max_file_bytes)
    _add_jobs(routes, jobs, config.organization)
    _add_progress(routes, jobs)
    graders.add(routes, jobs)
    return routes


def _json(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


# ---------------------------------------------------------------- files


def _add_files(routes: APIRouter, serving: Serving, jobs: Jobs, max_bytes: int) -> None:
    @routes.post("/v1/files", response_model=None, openapi_extra=_FORM_SCHEMA)
    async def create_file(http: HttpRequest) -> Response:
        """Upload a file, as a form with the fields file and purpose."""
        _check_origin(http, serving.config.allowed_origins)
        form = await read_form(http, FORM_FIELDS, "purpose", max_bytes)
        async with contextlib.aclosing(form.chunks) as chunks:
            purpose, life_s = _purpose(form.fields), _life_s(form.fields)
            return _json(file_object(await jobs.save_file(form.filename, purpose, chunks, life_s)))

    @routes.get("/v1/files", response_model=None)
    async def list_files(
        purpose: Annotated[str | None, Query(max_length=64)] = None,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """The uploaded files and the jobs' result files, newest first."""
        files, has_more = await jobs.files(purpose, after, limit, order)
        return _json(page([file_object(file) for file in files], has_more))

    @routes.get("/v1/files/{file_id}", response_model=None)
    async def retrieve_file(file_id: str) -> Response:
        """What is known of a file."""
        return _json(file_object(await jobs.file(file_id)))

    @routes.delete("/v1/files/{file_id}", response_model=None)
    async def delete_file(file_id: str) -> Response:
        """Delete a file that no unfinished job needs."""
        await jobs.delete_file(file_id)
        return _json({"id": file_id, "object": "file", "deleted": True})

    @routes.get("/v1/files/{file_id}/content", response_model=None)
    async def file_content(file_id: str) -> Response:
        """The file's bytes."""
        file, path = await jobs.file(file_id), await jobs.file_path(file_id)
        return FileResponse(path, media_type="application/octet-stream", filename=file.filename)


def _check_origin(http: HttpRequest, allowed: list[str]) -> None:
    """Browsers send forms to foreign servers without asking them, so a page must come from here or be allowed."""
    origin = http.headers.get("origin")
    if origin is None or origin in allowed or "*" in allowed:
        return
    if urlsplit(origin).netloc != http.headers.get("host"):
        raise HTTPException(403, "Pages of other origins may not upload files (--allowed-origins).")


def _purpose(fields: dict[str, str]) -> str:
    purpose = fields.get("purpose")
    if purpose not in PURPOSES:
        said = f"not {purpose[:64]!r}" if purpose is not None else "the form has none"
        raise InvalidRequest(f"purpose must be one of {', '.join(PURPOSES)}; {said}", "purpose")
    return purpose


def _life_s(fields: dict[str, str]) -> int | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest("the anchor must be 'created_at'", "expires_after[anchor]")
    if seconds is None or not re.fullmatch(r"[0-9]{1,9}", seconds) or not (
        SHORTEST_LIFE_S <= int(seconds) <= LONGEST_LIFE_S
    ):  # fmt: skip
        raise InvalidRequest(
            f"must be a whole number from {SHORTEST_LIFE_S} to {LONGEST_LIFE_S}", "expires_after[seconds]"
        )
    return int(seconds)


# ---------------------------------------------------------------- jobs


def _add_jobs(routes: APIRouter, jobs: Jobs, organization: str) -> None:
    @routes.post("/v1/fine_tuning/jobs", response_model=None)
    async def create_job(body: JobBody) -> Response:
        """Create a fine-tuning job. Unknown fields are refused."""
        return _json(job_object(await jobs.create(body.to_record()), organization))

    @routes.get("/v1/fine_tuning/jobs", response_model=None)
    async def list_jobs(http: HttpRequest, after: After = None, limit: Limit = 20) -> Response:
        """The jobs, newest first. metadata[k]=v keeps those that have it."""
        found, has_more = await jobs.jobs(after, limit, _metadata_filter(http))
        return _json(page([job_object(job, organization) for job in found], has_more))

    @routes.get("/v1/fine_tuning/jobs/{job_id}", response_model=None)
    async def retrieve_job(job_id: str) -> Response:
        """One job."""
        return _json(job_object(await jobs.job(job_id), organization))

    @routes.post("/v1/fine_tuning/jobs/{job_id}/cancel", response_model=None)
    async def cancel_job(job_id: str) -> Response:
        """End a job. Its checkpoints stay."""
        return _json(job_object(await jobs.cancel(job_id), organization))

    @routes.post("/v1/fine_tuning/jobs/{job_id}/pause", response_model=None)
    async def pause_job(job_id: str) -> Response:
        """Save where the job is and free its memory."""
        return _json(job_object(await jobs.pause(job_id), organization))

    @routes.post("/v1/fine_tuning/jobs/{job_id}/resume", response_model=None)
    async def resume_job(job_id: str) -> Response:
        """Let a paused job go on where it was."""
        return _json(job_object(await jobs.resume(job_id), organization))


def _metadata_filter(http: HttpRequest) -> dict[str, str] | None:
    wanted = {}
    for name, value in http.query_params.multi_items():
        if not name.startswith("metadata"):
            continue
        match = _METADATA.fullmatch(name)
        if match is None:
            raise InvalidRequest("filter by metadata with metadata[key]=value", name[:64])
        wanted[match[1]] = value
    return wanted or None


def _add_progress(routes: APIRouter, jobs: Jobs) -> None:
    @routes.get("/v1/fine_tuning/jobs/{job_id}/events", response_model=None)
    async def list_events(job_id: str, after: After = None, limit: Limit = 20) -> Response:
        """What happened to the job, newest first: messages, and metrics step by step."""
        events, has_more = await jobs.events(job_id, after, limit)
        return _json(page([event_object(event) for event in events], has_more))

    @routes.get("/v1/fine_tuning/jobs/{job_id}/checkpoints", response_model=None)
    async def list_checkpoints(job_id: str, after: After = None, limit: Limit = 10) -> Response:
        """The job's checkpoints, newest first. Each can be used as a model."""
        checkpoints, has_more = await jobs.checkpoints(job_id, after, limit)
        return _json(page([checkpoint_object(checkpoint) for checkpoint in checkpoints], has_more))
