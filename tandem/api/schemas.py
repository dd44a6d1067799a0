"""The request bodies of the wire as pydantic types, their limits, and their way into `work.SamplingParams`.

A null means the default. Unknown fields are let through and logged once; fields whose effect we cannot give are refused
by name. Replies are plain dicts, built where they are written (`replies.py`, `admin.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from tandem.errors import ContextTooLong, InvalidRequest
from tandem.work import SamplingParams

log = logging.getLogger("tandem.api")

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 64
MAX_BIASES = 4096
# Prompts of one request times n.
MAX_ANSWERS = 4096
INT32_MAX = 2**31 - 1
GREEDY_BELOW = 1e-5

# Fields we cannot honour: the values that change nothing, and what to say of any other.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "suffix": (("",), "text insertion is not supported"),
    "bad_words": (([],), "use logit_bias to forbid tokens"),
    "allowed_token_ids": ((), "use logit_bias to forbid tokens"),
    "guided_json": ((), "structured output is not supported yet"),
    "guided_regex": ((), "structured output is not supported yet"),
    "guided_choice": ((), "structured output is not supported yet"),
    "guided_grammar": ((), "structured output is not supported yet"),
    "structured_outputs": (({},), "structured output is not supported yet"),
    "functions": (([],), "use tools"),
    "function_call": (("none", "auto"), "use tools"),
    "use_beam_search": ((False,), "beam search is not supported"),
    "logits_processors": (([],), "logits processors are not supported"),
    "prompt_embeds": ((), "only text and token ids are supported"),
    "modalities": ((["text"], []), "this model writes text only"),
    "audio": ((), "this model writes text only"),
    "web_search_options": ((), "the server does not search the web"),
}
_KNOWN_AND_IGNORED = frozenset(
    "user metadata service_tier store prediction parallel_tool_calls reasoning_effort verbosity safety_identifier "
    "prompt_cache_key prompt_cache_retention cache_salt mm_processor_kwargs spaces_between_special_tokens "
    "length_penalty early_stopping detokenize".split()
)


class Limits(Protocol):
    """What of the engine's report bounds a request."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


class Wire(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: Any) -> Any:
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body


def _is_prompt(prompt: Any) -> Any:
    """By hand, since a union would report each of a million wrong items."""
    items = prompt if isinstance(prompt, list) else [prompt]
    if not items:
        raise ValueError("is empty")
    if all(type(item) is str for item in items) or (prompt is items and all(type(item) is int for item in items)):
        return prompt
    if all(type(item) is list for item in items) and all(type(i) is int for item in items for i in item):
        return prompt
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _is_bias(bias: Any) -> Any:
    if isinstance(bias, dict) and len(bias) > MAX_BIASES:
        raise ValueError(f"has more than {MAX_BIASES} entries")
    return bias


_IDS_SCHEMA = {"type": "array", "items": {"type": "integer"}}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        _IDS_SCHEMA,
        {"type": "array", "items": _IDS_SCHEMA},
    ]
}
# fail_fast: one error for a list, not one for each of a million items.
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]


class StreamOptions(Wire):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Generation(Wire):
    """What chat and text completions share: OpenAI's fields, then vLLM's."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_is_bias)] = {}
    response_format: dict[str, Any] | None = None

    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    min_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] = 0
    ignore_eos: bool = False
    stop_token_ids: Annotated[TokenIds, Field(max_length=1024)] = []
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-INT32_MAX, le=INT32_MAX)] = 0
    request_id: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")] | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def check_fields(self, logged: set[str]) -> None:
        """Refuse what cannot be honoured; log what is ignored, unless it is in `logged`, which remembers it."""
        extra = self.model_extra or {}
        for name in extra:
            if name in _REFUSED and extra[name] not in _REFUSED[name][0]:
                raise InvalidRequest(f"'{name}' is not supported: {_REFUSED[name][1]}", name)
            if name not in _REFUSED and name not in _KNOWN_AND_IGNORED and name not in logged and len(logged) < 256:
                logged.add(name)
                log.warning("ignoring the unknown request field %.64r", name)
        if self.response_format is not None and self.response_format.get("type", "text") != "text":
            kind = str(self.response_format["type"])
            raise InvalidRequest(f"response_format of type {kind!r} is not supported yet", "response_format")
        if "" in self.stops or any(len(stop) > 1000 for stop in self.stops):
            raise InvalidRequest("stop strings have 1 to 1000 characters", "stop")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs cannot be streamed: set stream to false", "prompt_logprobs")

    def sampling(
        self, prompt_len: int, limits: Limits, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """The work's own parameters for a prompt of `prompt_len` tokens. Raises InvalidRequest, ContextTooLong."""
        if prompt_len + max_tokens > limits.max_model_len:
            raise ContextTooLong(
                f"This model's maximum context length is {limits.max_model_len} tokens. However, you requested "
                f"{prompt_len + max_tokens} tokens ({prompt_len} in the prompt, {max_tokens} in the completion). "
                "Please reduce the length of the prompt or completion.",
                "messages" if isinstance(self, ChatRequest) else "prompt",
            )
        if self.min_tokens > max_tokens:
            raise InvalidRequest(f"min_tokens {self.min_tokens} is more than max_tokens {max_tokens}", "min_tokens")
        check_ids(self.logit_bias, limits.vocab_size, "logit_bias")
        check_ids(self.stop_token_ids, limits.vocab_size, "stop_token_ids")
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            # Logits divided by less would overflow; the draw is the best token by far already.
            temperature=self.temperature if self.temperature >= GREEDY_BELOW else 0.0,
            top_k=max(self.top_k, 0),
            # OpenAI allows 0 and means the single best token; the sampler keeps at least that.
            top_p=max(self.top_p, 1e-9),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            seed=None if self.seed is None else self.seed & (2**63 - 1),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            n=self.n,
        )

    def truncated(self, ids: list[int], limits: Limits) -> list[int]:
        """The last `truncate_prompt_tokens` ids (-1: as many as the context holds)."""
        keep = self.truncate_prompt_tokens
        if keep is None:
            return ids
        if keep == -1:
            keep = max(limits.max_model_len - (self.max_tokens or 1), 1)
        return ids[max(len(ids) - keep, 0) :]


Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class Message(Wire):
    role: Role
    content: str | Objects | None = None
    tool_calls: Objects = []

    def plain(self, at: str) -> dict[str, Any]:
        """As chat templates want it: text content, tool arguments as objects. `at` names the message in errors."""
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.model_extra)):
            raise InvalidRequest(f"{at} has no content", f"{at}.content")
        message = {**(self.model_extra or {}), "role": self.role, "content": self._text(at)}
        if self.tool_calls:
            message["tool_calls"] = [_with_parsed_arguments(call, at) for call in self.tool_calls]
        return message

    def _text(self, at: str) -> str:
        if isinstance(self.content, list):
            return "\n".join(_part_text(part, f"{at}.content.{i}") for i, part in enumerate(self.content))
        return self.content or ""


def _part_text(part: dict[str, Any], at: str) -> str:
    kind = part.get("type", "text")
    text = part.get("refusal" if kind == "refusal" else "text")
    if kind not in ("text", "input_text", "output_text", "refusal"):
        kind = str(kind)[:64]
        raise InvalidRequest(f"content parts of type {kind!r} are not supported: this model reads text only", at)
    if not isinstance(text, str):
        raise InvalidRequest(f"{at} has no text", at)
    return text


def _with_parsed_arguments(call: dict[str, Any], at: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict):
        raise InvalidRequest(f"{at}.tool_calls: each call needs a function", f"{at}.tool_calls")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments or "{}")
        except orjson.JSONDecodeError as e:
            raise InvalidRequest(f"{at}.tool_calls: arguments are not JSON: {e}", f"{at}.tool_calls") from e
    return {**call, "function": {**function, "arguments": arguments}}


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class ChatRequest(Generation):
    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Objects = []
    tool_choice: str | dict[str, Any] = "auto"
    echo: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}

    def check_fields(self, logged: set[str]) -> None:
        super().check_fields(logged)
        if self.tools and self.tool_choice not in ("auto", "none"):
            raise InvalidRequest("tool_choice other than 'auto' and 'none' is not supported yet", "tool_choice")
        if self.echo:
            raise InvalidRequest("echo is not supported in chats: use /v1/completions", "echo")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs=true", "top_logprobs")
        if self.max_tokens == 0:
            raise InvalidRequest("max_tokens must be at least 1", "max_tokens")
        if self.continue_final_message and self.add_generation_prompt:
            if "add_generation_prompt" in self.model_fields_set:
                raise InvalidRequest(
                    "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
                )
            self.add_generation_prompt = False

    def plain_messages(self) -> list[dict[str, Any]]:
        return [message.plain(f"messages.{i}") for i, message in enumerate(self.messages)]

    def to_work(self, prompt_len: int, limits: Limits) -> SamplingParams:
        asked = self.max_completion_tokens or self.max_tokens
        if asked is None:  # OpenAI's default: as much as fits, but at least one token must
            asked = max(limits.max_model_len - prompt_len, 1)
        return self.sampling(prompt_len, limits, asked, (self.top_logprobs or 0) if self.logprobs else None,
                             self.prompt_logprobs)  # fmt: skip


class CompletionRequest(Generation):
    prompt: Annotated[Any, BeforeValidator(_is_prompt), WithJsonSchema(_PROMPT_SCHEMA)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    def check_fields(self, logged: set[str]) -> None:
        super().check_fields(logged)
        if self.best_of is not None and self.best_of > self.n:
            raise InvalidRequest("best_of larger than n is not supported", "best_of")

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        if len(self.prompt) * self.n > MAX_ANSWERS:
            raise InvalidRequest(f"{len(self.prompt)} prompts x n={self.n} are more than {MAX_ANSWERS}", "prompt")
        return self.prompt

    def to_work(self, prompt_len: int, limits: Limits) -> SamplingParams:
        asked = self.max_tokens
        if asked is None:
            asked = max(min(16, limits.max_model_len - prompt_len), 1)
        of_prompt = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            of_prompt = max(self.logprobs, of_prompt or 0)
        return self.sampling(prompt_len, limits, asked, self.logprobs, of_prompt)


class TokenizeRequest(Wire):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Objects = []
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    return_token_strs: bool = False


class DetokenizeRequest(Wire):
    model: str | None = None
    tokens: TokenIds


class LoadAdapterRequest(Wire):
    lora_name: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
    load_inplace: bool = False


class UnloadAdapterRequest(Wire):
    lora_name: Annotated[str, Field(min_length=1, max_length=256)]


def check_ids(ids: Sequence[int] | Mapping[int, Any], vocab_size: int, param: str) -> None:
    """Raise InvalidRequest unless all ids are in the vocabulary."""
    if ids and not (0 <= min(ids) and max(ids) < vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise InvalidRequest(f"{param}: token id {wrong} is outside the vocabulary (0 to {vocab_size - 1})", param)
