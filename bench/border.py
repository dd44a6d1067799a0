"""What HTTP and the process border cost per generated token: processor time, 16 streams, the embedded model.

    python bench/border.py [--streams 16] [--tokens 200] [--rounds 3]

Starts a server, streams from it with many clients at once, and reads the processor time of the HTTP process from the
operating system; the engine's side of the border (encoding a step's news and sending it, the receiving socket included)
is timed on its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import httpx
import psutil
import zmq

from tandem.engine import messages
from tandem.work import EngineStats, TokenEvent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    command = [sys.executable, "-m", "tandem", "serve", "--demo", "--port", "0", "--disable-log-stats"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = _url(server)
        _seconds_per_token(server, url, args.streams, 20)  # warm-up
        http = [_seconds_per_token(server, url, args.streams, args.tokens) for _ in range(args.rounds)]
    finally:
        server.terminate()
        server.wait(20)
    border = _engine_side(args.streams)
    total = statistics.median(http) + border
    print(
        json.dumps(
            {
                "streams": args.streams,
                "http_process_us_per_token": [round(s * 1e6, 1) for s in http],
                "engine_side_us_per_token": round(border * 1e6, 1),
                "total_ms_per_token": round(total * 1e3, 4),
                "load": os.getloadavg()[0],
            }
        )
    )


def _url(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"(http://\S+)/v1 ", line):
            return found[1]
    raise SystemExit("the server did not start")


def _seconds_per_token(server: subprocess.Popen[str], url: str, streams: int, tokens: int) -> float:
    process = psutil.Process(server.pid)
    before = process.cpu_times()
    received = asyncio.run(_stream_all(url, streams, tokens))
    after = process.cpu_times()
    assert received == streams * tokens, f"{received} tokens came, not {streams * tokens}"
    return (after.user + after.system - before.user - before.system) / received


async def _stream_all(url: str, streams: int, tokens: int) -> int:
    async with httpx.AsyncClient(timeout=600) as client:
        return sum(await asyncio.gather(*(_stream(client, url, tokens) for _ in range(streams))))


async def _stream(client: httpx.AsyncClient, url: str, tokens: int) -> int:
    body = {
        "model": "demo", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": tokens,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    received = 0
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            if '"usage":{' in line:
                received = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    return received


def _engine_side(streams: int, steps: int = 3000) -> float:
    context = zmq.Context()
    outbox, inbox = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    address = f"ipc://{tempfile.mkdtemp(prefix='tandem-border-')}/socket"
    inbox.bind(address)
    outbox.connect(address)
    events = [TokenEvent(request_id=f"chatcmpl-{i:032x}", token_id=1000 + i) for i in range(streams)]
    begun = time.process_time()
    for _ in range(steps):
        outbox.send(messages.encode(messages.Stepped(events, EngineStats())))
        inbox.recv()
    seconds = time.process_time() - begun
    context.destroy(linger=0)
    return seconds / steps / streams


if __name__ == "__main__":
    main()
