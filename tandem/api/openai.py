"""OpenAI's generation routes: chat and text completions, from the body to the engine's requests.

Names, limits and refusals of the request fields are in `schemas.py`, what the replies look like is in `replies.py`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Literal, TypeVar

from fastapi import APIRouter
from fastapi import Request as HttpRequest

from tandem import __version__
from tandem.api.replies import Style, Writer
from tandem.api.schemas import ChatRequest, CompletionRequest, Generation, check_ids
from tandem.api.serving import JsonRoute, Serving
from tandem.api.stream import Answer, Reply, TextOptions
from tandem.errors import ContextTooLong, InvalidRequest
from tandem.work import Request, SamplingParams

T = TypeVar("T")
FINGERPRINT = f"tandem-{__version__}"
# The texts of longer bodies are rendered and encoded in a thread, so that one request cannot stop the others' streams.
INLINE_BYTES = 8192


def router(serving: Serving) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    @routes.post("/v1/chat/completions", response_model=None)
    async def chat_completions(http: HttpRequest, body: ChatRequest) -> Reply:
        """Answer a conversation."""
        adapter = await serving.resolve(body.model)
        body.check_fields(serving.ignored_fields)
        serving.check_choices(1, body.n)
        template = serving.template_of(body.chat_template)
        messages = body.plain_messages()
        tools = body.tools if body.tools and body.tool_choice != "none" else None
        size = sum(len(message["content"]) for message in messages)

        def render() -> list[int]:
            return serving.tokenizer.render(
                messages, tools, body.add_generation_prompt, body.continue_final_message, body.chat_template_kwargs,
                template, bool(body.add_special_tokens),
            )  # fmt: skip

        serving.check_size(size, body.truncate_prompt_tokens is not None, "messages")
        prompt = body.truncated(await timely(http, render), serving.report)
        check_prompt(prompt, serving, "messages")
        params = body.to_work(len(prompt), serving.report)
        return await _reply(serving, http, body, "chat", adapter, [(None, prompt, params)])

    @routes.post("/v1/completions", response_model=None)
    async def completions(http: HttpRequest, body: CompletionRequest) -> Reply:
        """Continue one or several texts."""
        adapter = await serving.resolve(body.model)
        body.check_fields(serving.ignored_fields)
        work = []
        prompts = body.prompts()
        serving.check_choices(len(prompts), body.n)
        for given in prompts:
            text = given if isinstance(given, str) else None
            prompt = body.truncated(await _encode(serving, http, body, given), serving.report)
            check_prompt(prompt, serving, "prompt")
            work.append((text, prompt, body.to_work(len(prompt), serving.report)))
        return await _reply(serving, http, body, "text", adapter, work)

    return routes


async def timely(http: HttpRequest, work: Callable[[], T]) -> T:
    """`work()`, in a thread if the body is so long that it may take a while: text hides in tools and arguments too."""
    is_short = len(await http.body()) < INLINE_BYTES
    return work() if is_short else await asyncio.to_thread(work)


async def _encode(serving: Serving, http: HttpRequest, body: CompletionRequest, prompt: str | list[int]) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    special = body.add_special_tokens is not False
    serving.check_size(len(prompt), body.truncate_prompt_tokens is not None, "prompt")
    return await timely(http, lambda: serving.tokenizer.encode(prompt, special))


def check_prompt(ids: list[int], serving: Serving, param: str) -> None:
    """Raise InvalidRequest or ContextTooLong for a prompt that can never run."""
    if not ids:
        raise InvalidRequest(f"{param} is empty: there is no token to start from", param)
    check_ids(ids, serving.report.vocab_size, param)
    if len(ids) > serving.report.max_model_len:
        raise ContextTooLong(
            f"This model's maximum context length is {serving.report.max_model_len} tokens, "
            f"the prompt has {len(ids)}. Please reduce its length.",
            param,
        )


async def _reply(
    serving: Serving, http: HttpRequest, body: Generation, family: Literal["chat", "text"], adapter: str | None,
    work: list[tuple[str | None, list[int], SamplingParams]],
) -> Reply:  # fmt: skip
    unique = secrets.token_hex(12)
    requests = [
        Request(request_id=f"{unique}-{i}", prompt=prompt, sampling=params, adapter=adapter, priority=body.priority)
        for i, (_, prompt, params) in enumerate(work)
    ]
    chat = family == "chat"
    wants_logprobs = work[0][2].logprobs is not None
    options = TextOptions(
        stops=body.stops,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        continues=not chat,
        keep_tokens=wants_logprobs or body.return_token_ids,
    )
    answer = Answer(serving.engine, serving.tokenizer, serving.telemetry, requests, options, http.state.began_s)
    style = Style(
        family=family,
        logprobs=wants_logprobs,
        token_ids=body.return_token_ids,
        names_are_ids=body.return_tokens_as_token_ids,
        prompt_logprobs=body.prompt_logprobs is not None,
        echo=None if not getattr(body, "echo", False) or chat else [text for text, _, _ in work],
        include_usage=body.stream and body.stream_options.include_usage,
        running_usage=body.stream and body.stream_options.continuous_usage_stats,
    )
    envelope = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{body.request_id or unique}",
        "object": ("chat.completion.chunk" if body.stream else "chat.completion") if chat else "text_completion",
        "created": int(time.time()),
        "model": body.model or serving.model_name,
        "system_fingerprint": FINGERPRINT,
    }
    await answer.submit()
    return Reply(answer, Writer(answer, serving.tokenizer, style, envelope), body.stream)
