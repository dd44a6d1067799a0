"""Whole files to rows: errors with their place, truncation, order, and what the engine is given."""

import json
import re
import subprocess
import sys

import chat_templates
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.config import DEMO_MODEL
from tandem.errors import DataError, InvalidRequest
from tandem.finetune import data
from tandem.tokenizer import Tokenizer

STYLED = [
    Tokenizer(chat_templates.byte_level(), template)
    for template in (chat_templates.plain(chat_templates.QWEN), chat_templates.QWEN)
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(str(DEMO_MODEL))


@pytest.fixture
def load(tmp_path, tokenizer):
    """load(rows or text, ...) -> Dataset of a file with them."""

    def run(rows, max_seq_len=512, name="facts.jsonl", using=None, **how):
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        path = tmp_path / name
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        return data.load(path, using or tokenizer, max_seq_len, **how)

    return run


def chat(i, answer=None, **more):
    answer = {"role": "assistant", "content": answer or f"The code is {i}."}
    return {"messages": [{"role": "user", "content": f"What is the code of the North depot {i}?"}, answer], **more}


def test_a_row_is_what_the_engine_learns_from(load, tokenizer):
    dataset = load([chat(7), chat(8)])
    first, _ = dataset.rows
    assert tokenizer.decode(first.tokens, False) == (
        "<|bos|><|im_start|>user\nWhat is the code of the North depot 7?<|im_end|>\n"
        "<|im_start|>assistant\nThe code is 7.<|im_end|>\n"
    )
    example = data.example(first, 0.25)
    assert example.tokens == first.tokens[:-1] and example.targets == first.tokens[1:]
    assert set(example.weights) == {0.0, 0.25}
    learnt = [target for target, weight in zip(example.targets, example.weights, strict=True) if weight]
    assert tokenizer.decode(learnt, False) == "The code is 7.<|im_end|>"
    assert [row.line for row in dataset.rows] == [1, 2]
    assert dataset.format == "chat" and dataset.num_truncated == 0
    assert dataset.num_tokens == sum(len(row.tokens) for row in dataset.rows)
    assert dataset.num_trained_tokens == 2 * len(learnt)


def test_prompt_and_completion(load, tokenizer):
    (row,) = load([{"prompt": "The sky is", "completion": " blue."}]).rows
    assert row.tokens == [*tokenizer.encode("The sky is blue."), tokenizer.eos_id]
    learnt = [token for token, weight in zip(row.tokens, row.mask, strict=True) if weight]
    assert tokenizer.decode(learnt, False) == " blue.<|im_end|>"
    (given,) = load([{"prompt": "The sky is", "completion": " blue.<|im_end|>"}]).rows
    assert given == row
    (empty,) = load([{"prompt": "", "completion": "The sky is blue."}]).rows
    assert empty.tokens == row.tokens and empty.mask == [0.0] + [1.0] * (len(row.tokens) - 1)


def test_text_is_learnt_but_for_its_first_token(load, tokenizer):
    (row,) = load([{"text": "The sky is blue."}]).rows
    assert row.tokens == [*tokenizer.encode("The sky is blue."), tokenizer.eos_id]
    assert row.mask == [0.0] + [1.0] * (len(row.tokens) - 1)


def test_alpaca_and_sharegpt_become_the_chats_they_stand_for(load):
    question, answer = "What is the code of the North depot 1?", "The code is 1."
    expected = load([chat(1)]).rows
    assert load([{"instruction": question, "output": answer}]).rows == expected
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    assert load([{"id": "x", "conversations": turns}]).rows == expected
    assert load(json.dumps([chat(1)], indent=1), name="facts.json").rows[0].tokens == expected[0].tokens


def test_a_document_is_cut_into_rows_that_learn_every_token(load, tokenizer):
    text = "".join(f"Line {i}: the harbor is quiet.\n" for i in range(1, 40))
    dataset = load(text, max_seq_len=50, name="book.txt")
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    learnt = [t for row in dataset.rows for t, weight in zip(row.tokens, row.mask, strict=True) if weight]
    assert learnt == ids[1:]
    assert all(len(row.tokens) <= 50 for row in dataset.rows) and dataset.num_truncated == 0
    lines = [row.line for row in dataset.rows]
    assert lines[0] == 1 and lines == sorted(lines) and lines[-1] in (38, 39)


def test_long_rows_are_cut_and_counted(load):
    whole = load([chat(1, "one two three four five")])
    length = len(whole.rows[0].tokens)
    cut = load([chat(1), chat(1, "one two three four five")], max_seq_len=length - 2)
    assert [row.is_truncated for row in cut.rows] == [False, True] and cut.num_truncated == 1
    assert cut.rows[1].tokens == whole.rows[0].tokens[:-2] and cut.rows[1].mask == whole.rows[0].mask[:-2]
    assert load([chat(1, "one two three four five")], max_seq_len=length).num_truncated == 0
    start = whole.rows[0].mask.index(1.0)
    with pytest.raises(DataError, match=rf"facts.jsonl:1: has no token to learn in its first {start} .*max_seq_len"):
        load([chat(1, "one two three four five")], max_seq_len=start)


@pytest.mark.parametrize("bad", [0, 4_321, 9_999])
def test_one_bad_row_in_ten_thousand_is_named(load, bad):
    lines = [json.dumps({"text": f"row {i}"}) for i in range(10_000)]
    lines[bad] = '{"text": "broken'
    with pytest.raises(DataError, match=f"^facts.jsonl:{bad + 1}: is not valid JSON"):
        load("\n".join(lines))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([chat(1), {"text": "a"}], "facts.jsonl:2: is text, but the file's first row is chat"),
        ([chat(1), {**chat(2), "text": "a"}], "facts.jsonl:2: has the keys of several formats"),
        ([{**chat(1), "prompt": "a"}], "facts.jsonl:1: has the keys of several formats"),
        ([chat(1), 5], "facts.jsonl:2: must be a JSON object"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "facts.jsonl:1: the last message must be"),
        ('{"text": "\\ud83d"}', "facts.jsonl:1: is not valid"),
        ('{"text": "fine"}\n{"text": "\ud83d"}', "facts.jsonl:2: is not UTF-8"),
    ],
)
def test_bad_rows(load, rows, words):
    with pytest.raises(DataError, match=words):
        load(rows)


def test_errors_use_the_name_they_are_given(tmp_path, tokenizer):
    (tmp_path / "stored").write_text("{")
    with pytest.raises(DataError, match=r"^mine.jsonl:1: "):
        data.load(tmp_path / "stored", tokenizer, 512, name="mine.jsonl")


def test_a_template_that_refuses_the_order_of_roles(load):
    gemma = Tokenizer(chat_templates.byte_level(), chat_templates.GEMMA)
    twice = {"messages": [{"role": "user", "content": "a"}, *chat(1)["messages"]]}
    with pytest.raises(DataError, match="facts.jsonl:2: the chat template refuses .* roles must alternate"):
        load([chat(1), twice], using=gemma)


def test_a_tokenizer_without_an_end_of_text(load):
    hf = chat_templates.byte_level()
    hf.eos_token = None
    with pytest.raises(DataError, match="names no end-of-text token"):
        load([{"text": "a b"}], using=Tokenizer(hf))


def test_format_given(load):
    rows = [{**chat(1), "text": "a note", "id": 4}]
    dataset = load(rows, format="chat")
    assert dataset.rows == load([chat(1)]).rows
    assert dataset.unused_keys == {"text": 1, "id": 1}
    with pytest.raises(DataError, match="facts.jsonl:1: has no 'prompt', which completion rows need"):
        load([chat(1)], format="completion")
    with pytest.raises(InvalidRequest, match="unknown data format 'csv': use one of auto, chat"):
        load([chat(1)], format="csv")
    with pytest.raises(InvalidRequest, match="at least 2"):
        load([chat(1)], max_seq_len=1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=False) | st.sampled_from(["", "a", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "weight", "tool_calls", "function", "type", "text"]), inner
        )
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "?"]) | JSON, "content": JSON | st.text()},
    optional={"weight": JSON, "tool_calls": JSON, "name": JSON, "reasoning_content": JSON, "function_call": JSON},
)
TURN = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "?"]) | JSON, "value": JSON | st.text()})
ANY_ROW = st.one_of(
    JSON,
    st.fixed_dictionaries({"messages": st.lists(MESSAGE) | JSON}, optional={"tools": JSON, "x": JSON}),
    st.fixed_dictionaries({"conversations": st.lists(TURN) | JSON}, optional={"system": JSON, "tools": JSON}),
    st.fixed_dictionaries({"prompt": JSON | st.text(), "completion": JSON | st.text()}),
    st.fixed_dictionaries({"instruction": JSON, "output": JSON | st.text()}, optional={"input": JSON}),
    st.fixed_dictionaries({"text": JSON | st.text()}),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ANY_ROW, min_size=1, max_size=3), st.integers(2, 40), st.booleans())
def test_any_rows_are_learnt_from_or_refused_with_their_line(tmp_path_factory, rows, max_seq_len, has_marks):
    path = tmp_path_factory.mktemp("any") / "any.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    tokenizer = STYLED[has_marks]
    try:
        dataset = data.load(path, tokenizer, max_seq_len)
    except DataError as error:
        assert re.match(r"any.jsonl:\d: ", str(error))
        return
    assert [row.line for row in dataset.rows] == list(range(1, len(rows) + 1))
    for row in dataset.rows:
        assert len(row.tokens) == len(row.mask) <= max_seq_len
        assert row.mask[0] == 0 and 1.0 in row.mask and set(row.mask) <= {0.0, 1.0}


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([".jsonl", ".json", ".txt", ""]), st.sampled_from([b"", b"{", b"["]))
def test_any_bytes_are_learnt_from_or_refused(tmp_path_factory, raw, suffix, head):
    path = tmp_path_factory.mktemp("any") / f"any{suffix}"
    path.write_bytes(head + raw)
    try:
        assert data.load(path, STYLED[0], 16).rows
    except DataError as error:
        assert re.match(rf"any{suffix}:", str(error))


def test_order_is_a_permutation_of_its_own_for_each_epoch_and_seed():
    orders = {(epoch, seed): tuple(data.order(50, epoch, seed)) for epoch in range(3) for seed in (0, 1, -1, 12)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len(set(orders.values())) == len(orders)
    # Fixed for ever: a resumed job must see the rows in the order that it began with.
    assert data.order(10, 0, 0) == [1, 0, 2, 4, 9, 3, 8, 6, 7, 5]
    assert data.order(0, 0, 0) == []


def test_ten_thousand_rows_are_quick_and_need_no_torch(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(chat(i)) + "\n" for i in range(10_000)))
    code = (
        "import sys, time; from pathlib import Path\n"
        "from tandem.tokenizer import Tokenizer; from tandem.finetune import data\n"
        f"tokenizer = Tokenizer.load({str(DEMO_MODEL)!r}); began = time.process_time()\n"
        f"rows = data.load(Path({str(path)!r}), tokenizer, 512).rows\n"
        "print(len(rows), time.process_time() - began, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, seconds, has_torch = done.stdout.split()
    assert (count, has_torch) == ("10000", "False")
    assert float(seconds) < 15
