"""Preference rows: what they become, and what is said of those that are wrong."""

import json

import chat_templates
import pytest

from tandem.errors import DataError, InvalidRequest
from tandem.finetune import data
from tandem.finetune.preferences import convert, unused_keys
from tandem.tokenizer import Tokenizer

QUESTION = {"role": "user", "content": "Is it raining?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes, a lot.", "No."))
ROW = {"input": {"messages": [QUESTION]}, "preferred_output": [YES], "non_preferred_output": [NO]}


def row(**changes):
    return {**ROW, **changes}


def test_a_row_is_two_chats_of_which_the_answers_are_learnt():
    earlier = [QUESTION, NO, {"role": "user", "content": "Really?"}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    preferred, other = convert(row(input={"messages": earlier, "tools": tools, "parallel_tool_calls": True}))
    assert preferred.messages == [*earlier, YES] and other.messages == [*earlier, NO]
    assert preferred.trained == other.trained == [3] and preferred.tools == tools
    assert unused_keys(row(id=3)) == ["id"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "must be a JSON object"),
        ({"messages": [QUESTION, YES]}, "has no 'input'"),
        (row(input=[QUESTION]), "input must be an object with a list of messages"),
        (row(input={"messages": []}), "at least one"),
        (row(input={"messages": [QUESTION], "temperature": 1}), "input.temperature is not known"),
        (row(input={"messages": [{"role": "user"}]}), r"input.messages\[0\] has no content"),
        (row(input={"messages": [{**NO, "weight": 0}, QUESTION]}), r"input.messages\[0\].weight: preference rows"),
        (row(preferred_output=YES), "preferred_output must be a list with one assistant message .it is not a list"),
        (row(non_preferred_output=[NO, NO]), "non_preferred_output must be a list with one .* .it has 2"),
        (row(preferred_output=[QUESTION]), r"preferred_output\[0\].role must be assistant, not \"user\""),
        (row(non_preferred_output=[{"role": "assistant", "content": 3}]), r"non_preferred_output\[0\].content must be"),
        (row(preferred_output=[NO]), "are the same: there is nothing to prefer"),
    ],
)
def test_what_is_wrong_is_said_by_its_field(wrong, message):
    with pytest.raises(InvalidRequest, match=message):
        convert(wrong)


def test_a_file_becomes_pairs_of_rows(tmp_path):
    tokenizer = Tokenizer(chat_templates.byte_level(), chat_templates.QWEN)
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps(row(preferred_output=[NO], non_preferred_output=[YES], id=1))}\n")
    found = data.load_preferences(path, tokenizer, 200)
    assert (found.format, found.num_groups, len(found.rows)) == ("preference", 2, 4) and found.unused_keys == {"id": 1}
    (chosen, rejected), (other_chosen, other_rejected) = found.group(0), found.group(1)
    assert chosen.tokens == other_rejected.tokens and rejected.tokens == other_chosen.tokens
    for each, text in ((chosen, "Yes, a lot."), (rejected, "No.")):
        learnt = [token for token, weight in zip(each.tokens, each.mask, strict=True) if weight]
        assert text in tokenizer.decode(learnt) and "raining" not in tokenizer.decode(learnt)
    assert [r.line for r in found.rows] == [1, 1, 2, 2]
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(row(preferred_output=[])) + "\n")
    with pytest.raises(DataError, match="pairs.jsonl:2: preferred_output must be a list with one"):
        data.load_preferences(path, tokenizer, 200)
