"""What the replies of OpenAI's generation routes look like, streamed and whole.

A token without extras is written as prefix + JSON string + suffix, both baked when its choice opens; everything else is
a dict through orjson.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import orjson

from tandem.api.stream import Answer, Choice, Delta
from tandem.tokenizer import Tokenizer
from tandem.work import TokenEvent, TopLogprobs


@dataclass(frozen=True, slots=True)
class Style:
    """What the reply shows. `echo` holds the prompts' texts (None where a prompt came as token ids)."""

    family: Literal["chat", "text"]
    logprobs: bool = False
    token_ids: bool = False
    names_are_ids: bool = False
    prompt_logprobs: bool = False
    echo: list[str | None] | None = None
    include_usage: bool = False
    running_usage: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether a delta is nothing but text."""
        return not (self.logprobs or self.token_ids or self.running_usage)


class Writer:
    """Writes one HTTP reply, as chunks or whole."""

    def __init__(self, answer: Answer, tokenizer: Tokenizer, style: Style, envelope: dict[str, Any]) -> None:
        self._answer = answer
        self._tokenizer = tokenizer
        self._style = style
        self._envelope = envelope
        self._is_plain = style.is_plain
        self._frames: list[tuple[bytes, bytes]] = [(b"", b"")] * len(answer.choices)
        self._texts: list[list[str]] = [[] for _ in answer.choices]
        self._events: list[list[TokenEvent]] = [[] for _ in answer.choices]

    # ------------------------------------------------------------ streaming

    def events(self, deltas: list[Delta]) -> bytes:
        """The server-sent events of one engine step; empty where nothing became visible."""
        parts = []
        for delta in deltas:
            choice = delta.choice
            if not choice.opened:
                parts.append(self._opening(choice))
            if delta.finish_reason is None and self._is_plain:
                if delta.text:
                    prefix, suffix = self._frames[choice.index]
                    parts += (prefix, orjson.dumps(delta.text), suffix)
            elif delta.text or delta.events or delta.finish_reason:
                parts.append(self._chunk(self._choice_chunk(delta)))
        return b"".join(parts)

    def last_event(self) -> bytes:
        if not self._style.include_usage:
            return b""
        return _event({**self._envelope, "choices": [], "usage": self._answer.usage()})

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        chunk = {**self._envelope, "choices": [choice]}
        if self._style.running_usage:
            chunk["usage"] = self._answer.usage()
        elif self._style.include_usage:
            chunk["usage"] = None
        return _event(chunk)

    def _opening(self, choice: Choice) -> bytes:
        """The role (chat) or the echoed prompt (text), and the frame of all plain chunks to come."""
        choice.opened = True
        style = self._style
        hole = "\0"
        frame = self._chunk(self._bare_chunk(choice, hole))
        before, after = frame.split(orjson.dumps(hole))
        self._frames[choice.index] = (before, after)
        if style.family == "chat":
            first = self._bare_chunk(choice, "")
            first["delta"] = {"role": "assistant", "content": ""}
        elif style.echo is not None:
            first = self._bare_chunk(choice, self._echo_text(choice))
            if style.logprobs:
                first["logprobs"] = self._text_logprobs(choice, self._prompt_entries(choice), 0)
            choice.text_length = len(first["text"])
        elif not style.token_ids:
            return b""
        else:
            first = self._bare_chunk(choice, "")
        if style.token_ids:
            first["prompt_token_ids"] = choice.request.prompt
        return self._chunk(first)

    def _bare_chunk(self, choice: Choice, text: str) -> dict[str, Any]:
        shown = {"delta": {"content": text}} if self._style.family == "chat" else {"text": text}
        return {"index": choice.index, **shown, "logprobs": None, "finish_reason": None}

    def _choice_chunk(self, delta: Delta) -> dict[str, Any]:
        choice, style = delta.choice, self._style
        chunk = self._bare_chunk(choice, delta.text)
        if style.family == "chat" and not delta.text and delta.finish_reason:
            chunk["delta"] = {}
        if style.logprobs and delta.events:
            chunk["logprobs"] = self._logprobs(choice, delta.events)
        if style.token_ids:
            chunk["token_ids"] = [event.token_id for event in delta.events]
        if delta.finish_reason:
            chunk["finish_reason"] = delta.finish_reason
            chunk["stop_reason"] = choice.stop_reason
        choice.text_length += len(delta.text)
        return chunk

    # ------------------------------------------------------------ one body

    def add(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            self._texts[delta.choice.index].append(delta.text)
            self._events[delta.choice.index] += delta.events

    def body(self) -> bytes:
        whole = {**self._envelope, "choices": [self._whole(choice) for choice in self._answer.choices]}
        whole["usage"] = self._answer.usage()
        if self._style.family == "chat":
            choice = self._answer.choices[0]
            if self._style.prompt_logprobs:
                whole["prompt_logprobs"] = self._prompt_logprobs(choice)
            if self._style.token_ids:
                whole["prompt_token_ids"] = choice.request.prompt
        return orjson.dumps(whole, option=orjson.OPT_NON_STR_KEYS)

    def _whole(self, choice: Choice) -> dict[str, Any]:
        style = self._style
        text, events = "".join(self._texts[choice.index]), self._events[choice.index]
        whole: dict[str, Any] = {"index": choice.index}
        if style.family == "chat":
            whole["message"] = {"role": "assistant", "content": text, "refusal": None}
            whole["logprobs"] = self._logprobs(choice, events) if style.logprobs else None
        else:
            entries = [_entry(event) for event in events]
            if style.echo is not None:
                text = self._echo_text(choice) + text
                entries = self._prompt_entries(choice) + entries
            whole["text"] = text
            whole["logprobs"] = self._text_logprobs(choice, entries, 0) if style.logprobs else None
            if style.prompt_logprobs:
                whole["prompt_logprobs"] = self._prompt_logprobs(choice)
            if style.token_ids:
                whole["prompt_token_ids"] = choice.request.prompt
        if style.token_ids:
            whole["token_ids"] = [event.token_id for event in events]
        whole["finish_reason"], whole["stop_reason"] = choice.finish_reason, choice.stop_reason
        return whole

    # ------------------------------------------------------------ log-probabilities

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._style.names_are_ids else self._tokenizer.token_text(token_id)

    def _logprobs(self, choice: Choice, events: list[TokenEvent]) -> dict[str, Any]:
        if self._style.family == "chat":
            return {"content": [self._chat_logprob(event) for event in events]}
        return self._text_logprobs(choice, [_entry(event) for event in events], choice.text_length)

    def _chat_logprob(self, event: TokenEvent) -> dict[str, Any]:
        token_id, top = _entry(event)
        assert top is not None
        alternatives = zip(top.token_ids, top.logprobs, strict=True)
        return {
            **self._named(token_id, top.logprob),
            "top_logprobs": [self._named(other, logprob) for other, logprob in alternatives],
        }

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": self._name(token_id), "logprob": _finite(logprob), "bytes": list(raw)}

    def _text_logprobs(self, choice: Choice, entries: list[Entry], offset: int) -> dict[str, Any]:
        """The completions shape. A token without log-probability (the prompt's first) has null in both lists."""
        shape: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        wanted = choice.request.sampling.logprobs
        for token_id, top in entries:
            name = self._name(token_id)
            shape["tokens"].append(name)
            shape["token_logprobs"].append(None if top is None else _finite(top.logprob))
            shape["top_logprobs"].append(self._alternatives(token_id, top, wanted or 0) if top and wanted else None)
            shape["text_offset"].append(offset)
            offset += len(self._tokenizer.token_text(token_id))
        return shape

    def _alternatives(self, token_id: int, top: TopLogprobs, wanted: int) -> dict[str, float]:
        """Best first, the chosen token always among them; of tokens that read the same the best one counts."""
        named: dict[str, float] = {}
        for other, logprob in zip(top.token_ids[:wanted], top.logprobs[:wanted], strict=True):
            named.setdefault(self._name(other), _finite(logprob))
        named.setdefault(self._name(token_id), _finite(top.logprob))
        return named

    def _prompt_entries(self, choice: Choice) -> list[Entry]:
        prompt = choice.request.prompt
        logprobs = choice.prompt_logprobs or self._answer.choices[self._first(choice)].prompt_logprobs
        known: list[TopLogprobs | None] = [None, *logprobs]
        return list(zip(prompt, known + [None] * (len(prompt) - len(known)), strict=True))

    def _prompt_logprobs(self, choice: Choice) -> list[dict[int, dict[str, Any]] | None]:
        """vLLM's shape: per prompt token a map from token id to its log-probability, rank and text."""
        shape: list[dict[int, dict[str, Any]] | None] = []
        for token_id, top in self._prompt_entries(choice):
            if top is None:
                shape.append(None)
                continue
            ranked = [(other, logprob, rank) for rank, (other, logprob) in
                      enumerate(zip(top.token_ids, top.logprobs, strict=True), 1)]  # fmt: skip
            shape.append({
                other: {"logprob": _finite(logprob), "rank": rank, "decoded_token": self._tokenizer.token_text(other)}
                for other, logprob, rank in [(token_id, top.logprob, top.rank), *ranked]
            })  # fmt: skip
        return shape

    def _first(self, choice: Choice) -> int:
        """Index of the first choice of the same prompt."""
        return choice.index - choice.index % choice.request.sampling.n

    def _echo_text(self, choice: Choice) -> str:
        assert self._style.echo is not None
        text = self._style.echo[choice.index // choice.request.sampling.n]
        return self._tokenizer.decode(choice.request.prompt) if text is None else text


Entry = tuple[int, TopLogprobs | None]


def _entry(event: TokenEvent) -> Entry:
    assert event.token_id is not None
    return event.token_id, event.logprob


def _finite(logprob: float) -> float:
    """JSON knows no infinity."""
    return max(logprob, -9999.0)


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"
