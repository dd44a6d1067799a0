"""Rows of every format, and every way a row is wrong."""

import pytest

from tandem.errors import InvalidRequest
from tandem.finetune import formats
from tandem.finetune.formats import Chat, Plain

ANSWER = {"role": "assistant", "content": "yes"}
ASK = {"role": "user", "content": "is it?"}


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        ({"messages": [ASK, ANSWER]}, "chat", Chat([ASK, ANSWER], [1])),
        ({"messages": [ASK, ANSWER], "parallel_tool_calls": False, "tools": []}, "chat", Chat([ASK, ANSWER], [1])),
        (
            {"messages": [ASK, {**ANSWER, "weight": 0}, ASK, {**ANSWER, "weight": 1}]},
            "chat",
            Chat([ASK, ANSWER, ASK, ANSWER], [3]),
        ),
        ({"prompt": "2+2=", "completion": "4"}, "completion", Plain("2+2=", "4")),
        ({"prompt": "", "completion": "4"}, "completion", Plain("", "4")),
        ({"instruction": "is it?", "output": "yes"}, "alpaca", Chat([ASK, ANSWER], [1])),
        (
            {"instruction": "add", "input": "2, 2", "output": "4", "system": "calm"},
            "alpaca",
            Chat(
                [
                    {"role": "system", "content": "calm"},
                    {"role": "user", "content": "add\n\n2, 2"},
                    {"role": "assistant", "content": "4"},
                ],
                [2],
            ),
        ),
        (
            {"conversations": [{"from": "human", "value": "is it?"}, {"from": "gpt", "value": "yes"}], "id": 1},
            "sharegpt",
            Chat([ASK, ANSWER], [1]),
        ),
        ({"text": "a"}, "text", Plain("", "a")),
    ],
)
def test_formats(row, format, expected):
    assert formats.detect(row) == format
    assert formats.convert(row, format) == expected


def test_keys_that_training_does_not_look_at():
    assert formats.unused_keys({"messages": [], "tools": [], "id": 1, "topic": "x"}, "chat") == ["id", "topic"]
    assert formats.unused_keys({"prompt": "a", "completion": "b", "text": "c"}, "completion") == ["text"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [], "text": ""}, "several formats .chat, text."),
        ({"text": "", "prompt": ""}, "several formats .text, completion."),
        ({"instruction": "", "output": "", "prompt": "", "completion": ""}, "several formats .completion, alpaca."),
        ({"prompt": "a"}, "looks like completion but has no 'completion'"),
        ({"instruction": "a", "input": "b"}, "looks like alpaca but has no 'output'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference row"),
        ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "preference row"),
        ({"question": "a"}, "no known format .it has question."),
        ({}, "no known format .it has nothing."),
        ([1], "must be a JSON object, not a list"),
        ("a", "must be a JSON object, not text"),
        (None, "must be a JSON object, not null"),
    ],
)
def test_rows_of_no_or_several_formats(row, words):
    with pytest.raises(InvalidRequest, match=words):
        formats.detect(row)


def with_message(message, *after):
    return {"messages": [ASK, message, *after]}


@pytest.mark.parametrize(
    ("row", "format", "words"),
    [
        ({"text": "a"}, "chat", "has no 'messages', which chat rows need"),
        ({"messages": "hello"}, "chat", "'messages' must be a list, not text"),
        ({"messages": []}, "chat", "there are none"),
        (with_message("hi"), "chat", r"messages\[1\] must be an object"),
        (with_message({"content": "x"}), "chat", r"messages\[1\].role must be one of .* not null"),
        (with_message({"role": "asistant", "content": "x"}), "chat", 'not "asistant"'),
        (with_message({"role": ["user"], "content": "x"}), "chat", r"messages\[1\].role must be one of"),
        (with_message({"role": "assistant"}), "chat", r"messages\[1\] has no content"),
        (
            with_message({"role": "assistant", "content": 7}),
            "chat",
            r"messages\[1\].content must be text, not a number",
        ),
        (with_message({**ANSWER, "weight": 2}), "chat", r"messages\[1\].weight must be 0 or 1, not 2"),
        (with_message({**ANSWER, "weight": 0.5}), "chat", "weight must be 0 or 1"),
        (with_message({**ANSWER, "weight": True}), "chat", "weight must be 0 or 1, not true"),
        (with_message({**ANSWER, "weight": [1]}), "chat", "weight must be 0 or 1"),
        (with_message({**ANSWER, "weight": 0}), "chat", "every assistant turn has weight 0"),
        ({"messages": [{**ASK, "weight": 1}, ANSWER]}, "chat", "only assistant messages may have a weight"),
        ({"messages": [ASK, ANSWER, ASK]}, "chat", "the last is the user's"),
        ({"messages": [ASK]}, "chat", "the last message must be the assistant's"),
        (
            with_message({"role": "assistant", "content": [{"type": "image_url", "image_url": {}}]}),
            "chat",
            r"messages\[1\].content\[0\] is of type 'image_url'",
        ),
        (with_message({"role": "assistant", "content": [{"type": "text"}]}), "chat", r"content\[0\] has no text"),
        (with_message({"role": "assistant", "content": ["x"]}), "chat", r"content\[0\] must be an object"),
        (with_message({"role": "assistant", "tool_calls": "f"}), "chat", "tool_calls must be a list"),
        (with_message({"role": "assistant", "tool_calls": [1]}), "chat", r"tool_calls\[0\] needs a function"),
        (
            with_message({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
            "chat",
            r"tool_calls\[0\].function.arguments is not JSON",
        ),
        (with_message({"role": "assistant", "function_call": {}}), "chat", "write tool_calls"),
        ({"messages": [ASK, ANSWER], "functions": []}, "chat", "write 'tools'"),
        ({"messages": [ASK, ANSWER], "tools": {}}, "chat", "'tools' must be a list of objects"),
        ({"prompt": "a", "completion": ""}, "completion", "'completion' is empty"),
        ({"prompt": None, "completion": "b"}, "completion", "'prompt' must be text, not null"),
        ({"prompt": [ASK], "completion": [ANSWER]}, "completion", "'prompt' must be text, not a list"),
        ({"instruction": "a", "output": 1}, "alpaca", "'output' must be text"),
        ({"conversations": [{"role": "user"}]}, "sharegpt", r"conversations\[0\] must be an object with 'from'"),
        ({"conversations": [{"from": "me", "value": ""}]}, "sharegpt", r"conversations\[0\].from must be one of"),
        ({"text": ""}, "text", "'text' is empty"),
        ({"text": 1}, "text", "'text' must be text, not a number"),
    ],
)
def test_rows_with_wrong_fields(row, format, words):
    with pytest.raises(InvalidRequest, match=words):
        formats.convert(row, format)
