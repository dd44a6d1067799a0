"""Taking files apart: every kind of file, every way one is wrong, with its line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.errors import DataError
from tandem.finetune import files
from tandem.finetune.files import Document


def saved(tmp_path, content, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(tmp_path, content, name="rows.jsonl"):
    return list(files.read(saved(tmp_path, content, name), name))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "a"}\n{"text": "b"}\n', [(1, "a"), (2, "b")]),
        ('{"text": "a"}\r\n{"text": "b"}', [(1, "a"), (2, "b")]),
        ('{"text": "a"}\n\n  \n\n', [(1, "a")]),
        ('\ufeff{"text": "\u2028é"}\n', [(1, "\u2028é")]),
    ],
)
def test_lines(tmp_path, content, expected):
    assert [(line, row["text"]) for line, row in rows(tmp_path, content)] == expected


def test_json_arrays_know_the_line_of_each_element(tmp_path):
    text = '\n[\n {"text": "a"}, {"text":\n  "b"}\n\n,{"text": "]"}\n]\n'
    assert [(line, row["text"]) for line, row in rows(tmp_path, text, "rows.json")] == [(3, "a"), (3, "b"), (6, "]")]
    pretty = json.dumps([{"text": "a"}, {"text": "b"}], indent=1)
    assert [line for line, _ in rows(tmp_path, pretty, "rows.json")] == [2, 5]
    assert rows(tmp_path, '{"text": "a"}\n', "rows.json") == [(1, {"text": "a"})]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(), st.one_of(st.text(), st.integers(-9, 9), st.none())), min_size=1),
    st.sampled_from([None, 0, 2]),
)
def test_arrays_and_lines_hold_the_same(tmp_path_factory, values, indent):
    where = tmp_path_factory.mktemp("rows")
    array = rows(where, json.dumps(values, indent=indent, ensure_ascii=False), "a.json")
    lines = rows(where, "\n".join(json.dumps(value) for value in values), "a.jsonl")
    assert [row for _, row in array] == [row for _, row in lines] == values
    assert [line for line, _ in lines] == list(range(1, len(values) + 1))


def test_plain_text_is_one_document(tmp_path):
    assert rows(tmp_path, "one\ntwo\n", "book.txt") == [(1, Document("one\ntwo\n"))]
    assert rows(tmp_path, '{"text": "a"}\n', "rows.txt") == [(1, {"text": "a"})]


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("", "a.jsonl", "a.jsonl: is empty"),
        ("\n \n", "a.jsonl", "a.jsonl: is empty"),
        ("\ufeff", "a.jsonl", "a.jsonl: is empty"),
        ("[]", "a.json", "a.json: is empty"),
        ('{"text": "a"}\n{"text": }\n', "a.jsonl", "a.jsonl:2: is not valid JSON"),
        ('{\n "text": "a"\n}\n', "a.jsonl", "a.jsonl:1: is not valid JSON .*one line"),
        ("[" * 100_000, "a.jsonl", "a.jsonl:1: is not valid JSON"),
        ("[" * 100_000, "a.json", "a.json:1: is not valid JSON"),
        ('{"text": "a"}\n\n{"text": "b"}\n', "a.jsonl", "a.jsonl:2: is blank"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl", "a.jsonl:2: is not UTF-8 text .byte 0xff."),
        (b'{"text": "a"}\n{"text": "\0"}\n', "a.jsonl", "a.jsonl:2: is binary"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', "a.json", "a.json:2: is not UTF-8 text"),
        ('[{"text": "a"}\n\n{"text": "b"}]', "a.json", "a.json:3: .*comma"),
        ('[{"text": "a"},\n{"text": }]', "a.json", "a.json:2: is not valid JSON"),
        ('[{"text": "a"}]\n[]', "a.json", "a.json:1: has more after the end"),
        ('[{"text": "a"},\n', "a.json", "a.json:2: is not valid JSON"),
        ("a\0b", "a.txt", "a.txt:1: is binary"),
        (b"one\ntwo\xff", "a.txt", "a.txt:2: is not UTF-8"),
        (b"\x1f\x8b\x08\0", "a.jsonl.gz", "is a gzip file: unpack it"),
        (b"PK\x03\x04", "a.jsonl", "is a zip or Excel file"),
        (b"PAR1", "a.jsonl", "is a Parquet file"),
        ('{"text": "a"}'.encode("utf-16"), "a.jsonl", "is UTF-16 text: save it as UTF-8"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, name, words):
    with pytest.raises(DataError, match=f"^{words}|^{name}: {words}"):
        rows(tmp_path, content, name)


def test_paths_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(DataError, match="cannot be read"):
            list(files.read(path, path.name))
