"""Rows of reinforcement: a conversation that ends with the user's turn, and whatever else its grader looks at.

Knows no files, tokens or templates: errors here are InvalidRequest without a place; data.py adds file and line.
"""

from __future__ import annotations

from typing import Any

from tandem.errors import InvalidRequest
from tandem.finetune import formats

_ANSWER = {"role": "assistant", "content": "-"}
_HINT = '{"messages": [{"role": "user", "content": "..."}], ...}'


def convert(row: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The messages to answer as chat templates want them, and the tools. Raises InvalidRequest naming the field."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(f"must be an object with a list of messages, at least one: {_HINT}")
    for i, message in enumerate(messages):
        if isinstance(message, dict) and "weight" in message:
            raise InvalidRequest(f"messages[{i}].weight: prompts have no weights; remove it")
    asked = {"messages": [*messages, _ANSWER]} | {key: row[key] for key in ("tools", "functions") if key in row}
    chat = formats.convert(asked, "chat")
    assert isinstance(chat, formats.Chat)
    if (last := chat.messages[-2]["role"]) not in ("user", "tool"):
        raise InvalidRequest(f"the last message must be the user's, not the {last}'s: the model writes the answer")
    return chat.messages[:-1], chat.tools


def check_length(num_tokens: int, max_tokens: int, max_seq_len: int) -> None:
    """Raises InvalidRequest where an answer does not fit behind the prompt."""
    if num_tokens + max_tokens > max_seq_len:
        raise InvalidRequest(
            f"has {num_tokens} tokens, which leaves no room for an answer of {max_tokens} in {max_seq_len}: "
            "shorten it, or lower tandem.max_tokens"
        )
