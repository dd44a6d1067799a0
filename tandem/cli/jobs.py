"""`tandem jobs ls|show|logs|pause|resume|cancel`: a running server's fine-tuning jobs, over the OpenAI API.

Here are the verbs and what they print; how a job is followed is in `follow.py`, how one is started in `train.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tandem.cli import client, follow, options

if TYPE_CHECKING:
    import httpx

    from tandem.jobs.records import Event

ROUTE = "fine_tuning/jobs"
PAGE = 100


def parser(prog: str) -> options.Parser:
    """The server, and what the verb `prog` ends with takes."""
    verb = prog.split()[-1]
    run, about = VERBS[verb]
    made = options.Parser(prog=prog, description=about)
    made.set_defaults(verb=run)
    if verb != "ls":
        made.add_argument("job", metavar="JOB", help="its id, ftjob-...")
    if verb in ("ls", "show"):
        made.add_argument("--json", action="store_true", help="print what the server says as JSON")
    if verb == "ls":
        made.add_argument("--limit", type=int, default=20, metavar="INT", help="newest jobs to list (default: 20)")
    if verb == "logs":
        made.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")
    options.add(made, client.Server)
    return made


def run(namespace: argparse.Namespace) -> int:
    """Do what the verb says and return its exit code."""
    (server,) = options.resolve(namespace, client.Server)
    with client.connect_to(server.server, server.api_key) as http:
        return namespace.verb(http, namespace)


def route(job_id: str, action: str = "") -> str:
    """The route of one job, or of something below it."""
    return f"{ROUTE}/{quote(job_id, safe='')}{action and '/' + action}"


def source(http: httpx.Client, job_id: str) -> follow.Source:
    """A job of the server as something that can be followed."""

    async def status() -> str:
        return (await asyncio.to_thread(client.call, http, "GET", route(job_id)))["status"]

    async def page(after: str | None) -> tuple[list[Event], bool]:
        params = {"limit": PAGE} | ({"after": after} if after else {})
        reply = await asyncio.to_thread(client.call, http, "GET", route(job_id, "events"), params=params)
        return [event(entry, job_id) for entry in reply["data"]], reply["has_more"]

    return follow.Source(status, page)


def event(entry: dict[str, Any], job_id: str) -> Event:
    """An event as the API writes it -> the record it was."""
    from tandem.jobs.records import Event

    return Event(
        event_id=entry["id"], job_id=job_id, created_at=entry["created_at"], level=entry["level"],
        message=entry["message"], type=entry.get("type") or "message", data=entry.get("data"),
    )  # fmt: skip


def progress(job: dict[str, Any]) -> str:
    """'12/88', or nothing for a job without steps yet."""
    extras = job.get("tandem") or {}
    return f"{extras.get('step', 0)}/{extras['total_steps']}" if extras.get("total_steps") else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in (head, *rows)]


def when(seconds: int | None) -> str:
    """Local time of a time stamp."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _ls(http: httpx.Client, namespace: argparse.Namespace) -> int:
    if namespace.limit < 1:
        raise options.UsageError(f"--limit must be at least 1, not {namespace.limit}")
    found: list[dict[str, Any]] = []
    has_more = True
    while has_more and len(found) < namespace.limit:
        params = {"limit": min(PAGE, namespace.limit - len(found))} | ({"after": found[-1]["id"]} if found else {})
        reply = client.call(http, "GET", ROUTE, params=params)
        found += reply["data"]
        has_more = reply["has_more"] and bool(reply["data"])
    if namespace.json:
        print(json.dumps(found, indent=2))
    elif not found:
        print("no jobs; start one with: tandem train --server URL --data FILE")
    else:
        rows = [
            [job["id"], job["status"], progress(job), when(job["created_at"]), job["model"],
             job["fine_tuned_model"] or ""] for job in found
        ]  # fmt: skip
        print("\n".join(table(["JOB", "STATUS", "STEP", "CREATED", "MODEL", "FINE-TUNED MODEL"], rows)))
    return 0


def _show(http: httpx.Client, namespace: argparse.Namespace) -> int:
    job = client.call(http, "GET", route(namespace.job))
    if namespace.json:
        print(json.dumps(job, indent=2))
        return 0
    checkpoints: list[dict[str, Any]] = []
    has_more = True
    while has_more:
        params = {"limit": PAGE} | ({"after": checkpoints[-1]["id"]} if checkpoints else {})
        reply = client.call(http, "GET", route(namespace.job, "checkpoints"), params=params)
        checkpoints += reply["data"]
        has_more = reply["has_more"] and bool(reply["data"])
    print("\n".join(_lines(job, checkpoints)))
    return 0


def _lines(job: dict[str, Any], checkpoints: list[dict[str, Any]]) -> list[str]:
    error = job.get("error") or {}
    pairs = [
        ("job", job["id"]),
        ("status", job["status"]),
        ("error", error.get("message")),
        ("step", progress(job)),
        ("model", job["model"]),
        ("fine-tuned model", job["fine_tuned_model"]),
        ("created", when(job["created_at"])),
        ("estimated finish", when(job.get("estimated_finish"))),
        ("finished", when(job["finished_at"])),
        ("trained tokens", job["trained_tokens"]),
        ("training file", job["training_file"]),
        ("validation file", job["validation_file"]),
        ("result files", ", ".join(job["result_files"])),
        ("seed", job["seed"]),
        *(job.get("hyperparameters") or {}).items(),
        *(pair for pair in (job.get("tandem") or {}).items() if pair[0] not in ("step", "total_steps")),
        *(("checkpoint", f"{c['fine_tuned_model_checkpoint']} (step {c['step_number']})") for c in checkpoints[::-1]),
    ]
    shown = [(name, ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for name, v in pairs if v is not None]
    return [f"{name:<24} {value}" for name, value in shown if value]


def _logs(http: httpx.Client, namespace: argparse.Namespace) -> int:
    async def logs() -> str:
        events = source(http, namespace.job)
        if namespace.follow:
            with follow.display() as show:
                return await follow.follow(events, show)
        pace = follow.Pace()
        for found in await follow.unseen(events, None):
            print(follow.line(found, pace))
        return ""

    return 1 if asyncio.run(logs()) in ("failed", "cancelled") else 0


def _changed(action: str) -> Verb:
    def run(http: httpx.Client, namespace: argparse.Namespace) -> int:
        job = client.call(http, "POST", route(namespace.job, action))
        print(f"{job['id']} is {job['status']}")
        return 0

    return run


Verb = Callable[["httpx.Client", argparse.Namespace], int]
VERBS: dict[str, tuple[Verb, str]] = {
    "ls": (_ls, "List fine-tuning jobs, newest first."),
    "show": (_show, "Show one fine-tuning job with its checkpoints."),
    "logs": (_logs, "Print a fine-tuning job's events. With -f: 0 if it succeeds, 1 if not."),
    "pause": (_changed("pause"), "Save a fine-tuning job's state and give its memory back; resume goes on from there."),
    "resume": (_changed("resume"), "Let a paused fine-tuning job go on."),
    "cancel": (_changed("cancel"), "End a fine-tuning job; its checkpoints stay."),
}
