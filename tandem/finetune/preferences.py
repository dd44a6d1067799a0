"""Preference rows, as OpenAI's API has them: one input, an answer that was preferred and one that was not.

A row becomes two chats, of which the last answer alone is learnt. Knows no files, tokens or templates: errors here are
InvalidRequest without a place; data.py adds file and line.
"""

from __future__ import annotations

import json
from typing import Any

from tandem.errors import InvalidRequest
from tandem.finetune import formats
from tandem.finetune.formats import Chat

KEYS = ("input", "preferred_output", "non_preferred_output")
_INPUT_KEYS = ("messages", "tools", "parallel_tool_calls")
_HINT = '{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}'


def convert(row: Any) -> tuple[Chat, Chat]:
    """The preferred conversation and the other. Raises InvalidRequest naming the field that is wrong."""
    if not isinstance(row, dict):
        raise InvalidRequest(f"must be a JSON object of the form {_HINT}")
    for key in KEYS:
        if key not in row:
            raise InvalidRequest(f"has no {key!r}: preference rows are {_HINT}")
    given = row["input"]
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list) or not given["messages"]:
        raise InvalidRequest("input must be an object with a list of messages, at least one")
    if unknown := sorted(given.keys() - set(_INPUT_KEYS)):
        raise InvalidRequest(f"input.{unknown[0][:64]} is not known: input takes {', '.join(_INPUT_KEYS)}")
    for i, message in enumerate(given["messages"]):
        if isinstance(message, dict) and "weight" in message:
            raise InvalidRequest(f"input.messages[{i}].weight: preference rows have no weights; remove it")
    preferred, other = (_chat(given, row[key], key) for key in KEYS[1:])
    if preferred.messages == other.messages:
        raise InvalidRequest("preferred_output and non_preferred_output are the same: there is nothing to prefer")
    return preferred, other


def unused_keys(row: dict[str, Any]) -> list[str]:
    """The keys of a row that training does not look at."""
    return [key for key in row if key not in KEYS]


def _chat(given: dict[str, Any], output: Any, name: str) -> Chat:
    if not isinstance(output, list) or len(output) != 1:
        count = f"it has {len(output)}" if isinstance(output, list) else "it is not a list"
        raise InvalidRequest(f"{name} must be a list with one assistant message ({count})")
    role = output[0].get("role") if isinstance(output[0], dict) else None
    if role != "assistant":
        raise InvalidRequest(f"{name}[0].role must be assistant, not {json.dumps(role)[:40]}")
    row = {"messages": [*given["messages"], output[0]]} | ({"tools": given["tools"]} if given.get("tools") else {})
    try:
        chat = formats.convert(row, "chat")
    except InvalidRequest as error:
        last = len(given["messages"])
        message = error.message.replace(f"messages[{last}]", f"{name}[0]").replace("messages[", "input.messages[")
        raise InvalidRequest(message) from error
    assert isinstance(chat, Chat)
    return Chat(chat.messages, [len(given["messages"])], chat.tools)
