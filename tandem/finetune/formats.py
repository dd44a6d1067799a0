"""The formats of training rows: telling them apart, checking every field, one shape for all of them.

JSON values in, `Chat` and `Plain` out. Knows no files, tokens or templates: a row as the model sees it is render.py's.
Errors here are InvalidRequest without a place; data.py adds file and line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec

from tandem.errors import InvalidRequest
from tandem.finetune.files import Document

# What makes a row of each format; alpaca's `input` and chat's `tools` may be missing.
KEYS = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
FORMATS = ("auto", *KEYS)
_OPTIONAL = {
    "chat": ("tools", "parallel_tool_calls"),
    "completion": (),
    "alpaca": ("input", "system"),
    "sharegpt": ("system", "tools"),
    "text": (),
}
_SHAPES = (
    'chat {"messages": [...]}, completion {"prompt", "completion"}, alpaca {"instruction", "input", "output"}, '
    'sharegpt {"conversations": [...]} and text {"text"}'
)
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SPEAKERS = {
    "system": "system",
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "tool": "tool", "observation": "tool",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation as chat templates want it. `trained`: the places of the assistant turns to learn from."""

    messages: list[dict[str, Any]]
    trained: list[int]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Plain:
    """Text without a template: `prompt` is only read, `text` and the end of text are learnt."""

    prompt: str
    text: str


def detect(row: Any) -> str:
    """The format of a row, by its keys. Raises InvalidRequest where none or several fit."""
    if isinstance(row, Document):
        return "text"
    keys = _object(row).keys()
    found = [name for name, needed in KEYS.items() if all(key in keys for key in needed)]
    partly = [name for name, needed in KEYS.items() if name not in found and any(key in keys for key in needed)]
    if len(found) == 1 and not partly:
        return found[0]
    if found:
        both = ", ".join(found + partly)
        raise InvalidRequest(
            f"has the keys of several formats ({both}): remove what is not needed, or say which it is (format)"
        )
    if {"chosen", "rejected"} & keys or {"preferred_output", "non_preferred_output"} & keys:
        raise InvalidRequest("is a preference row; supervised training needs one answer: keep the better one as chat")
    if partly:
        missing = [key for key in KEYS[partly[0]] if key not in keys]
        raise InvalidRequest(f"looks like {partly[0]} but has no {missing[0]!r}: add it")
    shown = ", ".join(sorted(keys)[:8]) or "nothing"
    raise InvalidRequest(f"is in no known format (it has {shown}); known are {_SHAPES}")


def convert(row: Any, format: str) -> Chat | Plain:
    """A row of `format` as what the model reads. Raises InvalidRequest naming the field that is wrong."""
    if isinstance(row, Document):
        row = {"text": row.text}
    row = _object(row)
    for key in KEYS[format]:
        if key not in row:
            raise InvalidRequest(f"has no {key!r}, which {format} rows need")
    if format == "chat":
        return _chat(_list(row, "messages"), _tools(row), "messages")
    if format == "completion":
        if not row["completion"]:
            raise InvalidRequest("has nothing to learn: 'completion' is empty")
        return Plain(_string(row, "prompt"), _string(row, "completion"))
    if format == "alpaca":
        question = "\n\n".join(part for part in (_string(row, "instruction"), _string(row, "input")) if part)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": _string(row, "output")}]
        return _chat(_system(row) + turns, None, "row")
    if format == "sharegpt":
        turns = [_turn(turn, f"conversations[{i}]") for i, turn in enumerate(_list(row, "conversations"))]
        return _chat(_system(row) + turns, _tools(row), "conversations")
    if not row["text"]:
        raise InvalidRequest("has nothing to learn: 'text' is empty")
    return Plain("", _string(row, "text"))


def unused_keys(row: dict[str, Any] | Document, format: str) -> list[str]:
    """The keys of a row that training does not look at."""
    if isinstance(row, Document):
        return []
    return [key for key in row if key not in KEYS[format] and key not in _OPTIONAL[format]]


def _chat(messages: list[Any], tools: list[dict[str, Any]] | None, where: str) -> Chat:
    trained, plain = [], []
    for i, message in enumerate(messages):
        at = f"{where}[{i}]"
        if not isinstance(message, dict):
            raise InvalidRequest(f"{at} must be an object with role and content, not {_kind(message)}")
        role = message.get("role")
        if role not in _ROLES:
            raise InvalidRequest(f"{at}.role must be one of {', '.join(_ROLES)}, not {json.dumps(role)[:40]}")
        if _weight(message, at) and role == "assistant":
            trained.append(i)
        plain.append(_message(message, at))
    if not messages or plain[-1]["role"] != "assistant":
        last = f"the last is the {plain[-1]['role']}'s" if plain else "there are none"
        raise InvalidRequest(f"the last message must be the assistant's ({last}): end with the answer to learn")
    if not trained:
        raise InvalidRequest("has nothing to learn: every assistant turn has weight 0")
    return Chat(plain, trained, tools)


def _weight(message: dict[str, Any], at: str) -> int:
    weight = message.get("weight", 1)
    if "weight" in message and message["role"] != "assistant":
        raise InvalidRequest(f"{at}.weight: only assistant messages may have a weight; remove it")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise InvalidRequest(f"{at}.weight must be 0 or 1, not {json.dumps(weight)[:40]}")
    return int(weight)


def _message(message: dict[str, Any], at: str) -> dict[str, Any]:
    """As the chat API hands it to the template: text content, tool arguments as objects."""
    if "function_call" in message:
        raise InvalidRequest(f"{at}.function_call is the old form: write tool_calls")
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{at}.content[{i}]") for i, part in enumerate(content))
    if content is not None and not isinstance(content, str):
        raise InvalidRequest(f"{at}.content must be text, not {_kind(content)}")
    extra = {key: value for key, value in message.items() if key not in ("role", "content", "tool_calls", "weight")}
    if content is None and not (message["role"] == "assistant" and (calls or extra)):
        raise InvalidRequest(f"{at} has no content")
    plain = {**extra, "role": message["role"], "content": content or ""}
    if calls:
        if not isinstance(calls, list):
            raise InvalidRequest(f"{at}.tool_calls must be a list, not {_kind(calls)}")
        plain["tool_calls"] = [_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return plain


def _part(part: Any, at: str) -> str:
    if not isinstance(part, dict):
        raise InvalidRequest(f"{at} must be an object with type and text, not {_kind(part)}")
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise InvalidRequest(f"{at} is of type {str(kind)[:40]!r}: this model reads text only")
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{at} has no text")
    return text


def _call(call: Any, at: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise InvalidRequest(f"{at} needs a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except (msgspec.DecodeError, RecursionError) as e:
            raise InvalidRequest(f"{at}.function.arguments is not JSON: {e}") from e
    return {**call, "function": {**function, "arguments": arguments}}


def _turn(turn: Any, at: str) -> dict[str, Any]:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise InvalidRequest(f"{at} must be an object with 'from' and 'value'")
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        known = ", ".join(_SPEAKERS)
        raise InvalidRequest(f"{at}.from must be one of {known}, not {json.dumps(speaker)[:40]}")
    weight = {"weight": turn["weight"]} if "weight" in turn else {}
    return {"role": _SPEAKERS[speaker], "content": turn["value"], **weight}


def _system(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": _string(row, "system")}] if row.get("system") else []


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InvalidRequest("'tools' must be a list of objects")
    if "functions" in row:
        raise InvalidRequest("'functions' is the old form: write 'tools'")
    return tools or None


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InvalidRequest(f"must be a JSON object, not {_kind(row)}")
    return row


def _list(row: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(row[key], list):
        raise InvalidRequest(f"{key!r} must be a list, not {_kind(row[key])}")
    return row[key]


def _string(row: dict[str, Any], key: str) -> str:
    value = row.get(key, "")
    if not isinstance(value, str):
        raise InvalidRequest(f"{key!r} must be text, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
