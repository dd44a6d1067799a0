"""Engine events -> text deltas -> HTTP: the way of every generated token, written for few microseconds per token.

`Answer` turns the events of one HTTP request into `Delta`s, one per step and choice; `Reply` sends them as server-sent
events or collects them into one body. How a delta looks in JSON is the writer's business (`replies.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tandem.engine.client import EngineClient, Stream
from tandem.errors import ContextTooLong, EngineDead, NotFound, Overloaded, TandemError
from tandem.telemetry import Telemetry
from tandem.tokenizer import Detokenizer, StopMatcher, Tokenizer
from tandem.work import Request, TokenEvent, TopLogprobs

SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text. `continues`: the output continues the prompt's text (completions), so its first piece
    keeps its leading space. `keep_tokens`: the writer needs the events themselves (log-probabilities, token ids)."""

    stops: Sequence[str] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    continues: bool = False
    keep_tokens: bool = False


@dataclass(slots=True)
class Delta:
    """What one step added to one choice. `events` is empty unless the options keep tokens."""

    choice: Choice
    text: str
    events: list[TokenEvent]
    finish_reason: str | None


class Choice:
    """One text in the making. `index` counts over all prompts of the HTTP request."""

    __slots__ = ("index", "request", "num_tokens", "finish_reason", "stop_reason", "prompt_logprobs", "opened",
                 "text_length", "first_s", "last_s", "queue_s", "_options", "_detokenizer", "_matcher")  # fmt: skip

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer, options: TextOptions) -> None:
        self.index = index
        self.request = request
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.prompt_logprobs: list[TopLogprobs] = []
        self.opened = False
        self.text_length = 0
        self.first_s = 0.0
        self.last_s = 0.0
        self.queue_s: float | None = None
        self._options = options
        context = request.prompt[-8:] if options.continues else ()
        self._detokenizer = Detokenizer(tokenizer, options.skip_special_tokens, context)
        self._matcher = StopMatcher(options.stops, options.include_stop) if options.stops else None

    def push(self, event: TokenEvent) -> Delta:
        """Take the next event of this choice. A stop string found here sets `finish_reason` before the engine does."""
        text = ""
        if event.token_id is not None:
            self.num_tokens += 1
            if not event.stop_token or self._options.include_stop:
                text = self._detokenizer.push(event.token_id)
            if event.stop_token and event.token_id in self.request.sampling.stop_token_ids:
                self.stop_reason = event.token_id
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        if event.finish_reason is not None:
            self.finish_reason = "abort" if event.finish_reason == "cancelled" else event.finish_reason
            text += self._detokenizer.finish()
        matcher = self._matcher
        if matcher is not None:
            if self.num_tokens > self.request.sampling.min_tokens:
                text = matcher.push(text)
            if matcher.matched is not None:
                self.finish_reason, self.stop_reason = "stop", matcher.matched
            elif self.finish_reason is not None:
                text += matcher.finish()
        keep = self._options.keep_tokens and event.token_id is not None
        return Delta(self, text, [event] if keep else [], self.finish_reason)


class Answer:
    """All that one HTTP request asked of the engine: one engine request per prompt, `n` choices each."""

    def __init__(
        self, engine: EngineClient, tokenizer: Tokenizer, telemetry: Telemetry, requests: list[Request],
        options: TextOptions, began_s: float,
    ) -> None:  # fmt: skip
        self.requests = requests
        self.cached_tokens = 0
        self._engine = engine
        self._telemetry = telemetry
        self._began_s = began_s
        self._streams: list[Stream] = []
        per_prompt = [(request, i) for request in requests for i in range(request.sampling.n)]
        self.choices = [Choice(at, request, tokenizer, options) for at, (request, _) in enumerate(per_prompt)]
        self._open = len(self.choices)

    async def submit(self) -> None:
        """Hand everything to the engine, or nothing. Raises Overloaded, EngineDead."""
        try:
            for request in self.requests:
                self._streams.append(self._engine.submit(request))
        except TandemError:
            self._open = 0
            await self.aclose()
            raise
        seen = self._telemetry
        for request in self.requests:
            seen.params_n.observe(request.sampling.n)
            seen.params_max_tokens.observe(request.sampling.max_tokens)
            seen.prompt_tokens.observe(len(request.prompt))

    async def steps(self) -> AsyncIterator[list[Delta]]:
        """The deltas of one engine step at a time, until every choice is finished. Raises TandemError."""
        async for first, events in self._news():
            now_s = perf_counter()
            deltas = []
            for event in events:
                choice = self.choices[first + event.index]
                if choice.finish_reason is None:  # news of a choice that a stop string ended is late
                    self._observe(choice, event, now_s)
                    deltas.append(choice.push(event))
                    if choice.finish_reason is not None:
                        self._finish(choice, event, now_s)
            if deltas:
                yield deltas
            if self._open == 0:
                break

    async def _news(self) -> AsyncIterator[tuple[int, list[TokenEvent]]]:
        """(index of the prompt's first choice, events), of all prompts as they come."""
        if len(self._streams) == 1:
            async for events in self._streams[0]:
                yield 0, events
            return
        queue: asyncio.Queue[tuple[int, list[TokenEvent] | TandemError]] = asyncio.Queue()

        async def forward(stream: Stream, first: int) -> None:
            try:
                async for events in stream:
                    queue.put_nowait((first, events))
            except TandemError as error:
                queue.put_nowait((first, error))

        n = self.requests[0].sampling.n
        tasks = [asyncio.create_task(forward(stream, i * n)) for i, stream in enumerate(self._streams)]
        try:
            while self._open:
                first, news = await queue.get()
                if isinstance(news, TandemError):
                    raise news
                yield first, news
        finally:
            for task in tasks:
                task.cancel()

    def _observe(self, choice: Choice, event: TokenEvent, now_s: float) -> None:
        seen = self._telemetry
        if choice.last_s:
            seen.inter_token_latency.observe(now_s - choice.last_s)
        else:
            seen.time_to_first_token.observe(now_s - self._began_s)
            choice.first_s, choice.queue_s = now_s, event.queue_s
            if event.index == 0:  # the prompt is computed once for all its choices
                self.cached_tokens += event.cached_tokens
                seen.cached_tokens += event.cached_tokens
        choice.last_s = now_s

    def _finish(self, choice: Choice, event: TokenEvent, now_s: float) -> None:
        if event.finish_reason is None:
            self._engine.cancel(choice.request.request_id, choice.index % choice.request.sampling.n)
        self._open -= 1
        seen = self._telemetry
        reason = choice.finish_reason or "abort"
        seen.finished[reason] = seen.finished.get(reason, 0) + 1
        seen.generation_tokens.observe(choice.num_tokens)
        e2e_s, decode_s = now_s - self._began_s, now_s - choice.first_s
        seen.e2e_latency.observe(e2e_s)
        seen.decode_time.observe(decode_s)
        if choice.num_tokens > 1:
            seen.time_per_output_token.observe(decode_s / (choice.num_tokens - 1))
        if choice.queue_s is not None:
            seen.queue_time.observe(choice.queue_s)
            seen.prefill_time.observe(max(e2e_s - decode_s - choice.queue_s, 0.0))
            seen.inference_time.observe(max(e2e_s - choice.queue_s, 0.0))

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(request.prompt) for request in self.requests)
        completion = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    async def aclose(self) -> None:
        """Cancel what still runs. Idempotent."""
        if self._open:
            self._telemetry.finished["abort"] += self._open
            self._open = 0
        for stream in self._streams:
            await stream.aclose()


class Writer(Protocol):
    """How deltas look on the wire."""

    def events(self, deltas: list[Delta]) -> bytes: ...
    def last_event(self) -> bytes: ...
    def add(self, deltas: list[Delta]) -> None: ...
    def body(self) -> bytes: ...


class Reply(Response):
    """Runs an answer while the client is there, as events or as one JSON body.

    Nothing is sent before the first news, so that what the engine refuses still gets its status code.
    """

    def __init__(self, answer: Answer, writer: Writer, streaming: bool) -> None:
        super().__init__(headers=SSE_HEADERS if streaming else {"content-type": "application/json"})
        del self.headers["content-length"]
        self._answer = answer
        self._writer = writer
        self._run = self._stream if streaming else self._collect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        running = asyncio.ensure_future(self._run(send))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait((running, gone), return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
        finally:
            for task in (running, gone):
                task.cancel()
            await asyncio.gather(running, gone, return_exceptions=True)
            await self._answer.aclose()

    async def _collect(self, send: Send) -> None:
        async for deltas in self._answer.steps():
            self._writer.add(deltas)
        body = self._writer.body()
        self.headers["content-length"] = str(len(body))
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Send) -> None:
        events: Callable[[list[Delta]], bytes] = self._writer.events
        steps = self._answer.steps()
        first = events(await anext(steps))
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        try:
            async for deltas in steps:
                if body := events(deltas):
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            last = self._writer.last_event()
        except TandemError as error:
            last = b"data: " + orjson.dumps(error_body(error)) + b"\n\n"
        await send({"type": "http.response.body", "body": last + DONE})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def error_body(error: TandemError) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    kind = "server_error" if error.status >= 500 else _TYPES.get(error.status, "invalid_request_error")
    code = next((code for cls, code in _CODES.items() if isinstance(error, cls)), None)
    if isinstance(error, NotFound) and error.param != "model":
        code = "not_found"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES: dict[type[TandemError], str] = {
    ContextTooLong: "context_length_exceeded",
    Overloaded: "rate_limit_exceeded",
    NotFound: "model_not_found",
    EngineDead: "engine_dead",
}
