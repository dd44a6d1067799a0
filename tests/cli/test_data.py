"""`tandem data check`: its report, its marks, its exit codes."""

import json
import re
import subprocess
import sys

import pytest

from tandem.__main__ import main
from tandem.cli import data as verb
from tandem.config import DEMO_MODEL
from tandem.finetune.data import Dataset, Row


def chat(i, answer="yes", **weight):
    return {
        "messages": [
            {"role": "user", "content": f"Is it {i}?"},
            {"role": "assistant", "content": "Perhaps.", **weight},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture
def file(tmp_path):
    """file(rows) -> path of a JSONL file with them."""

    def write(rows, name="facts.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def test_a_good_file(file, capsys):
    assert main(["data", "check", file([chat(i, "yes " * i) for i in range(1, 30)])]) == 0
    said = capsys.readouterr().out
    assert "format     chat\n" in said and "rows       29\n" in said and "truncated  none (limit 2048 tokens)" in said
    total, learnt, share = re.search(r"tokens     ([\d,]+), of which ([\d,]+) are learnt \(([\d.]+)%\)", said).groups()
    total, learnt = (int(text.replace(",", "")) for text in (total, learnt))
    assert float(share) == pytest.approx(100 * learnt / total, abs=0.06)
    counts = [int(line.split()[-1]) for line in re.findall(r"^ +\d+(?:-\d+)? .*$", said, re.M)]
    assert sum(counts) == 29
    assert said.endswith(
        "line 1, what is learnt in [brackets]:\n<|bos|><|im_start|>user\nIs it 1?<|im_end|>\n"
        "<|im_start|>assistant\n[Perhaps.<|im_end|>]\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n[yes <|im_end|>]\n\n"
    )


def test_weights_cuts_and_keys_are_shown(file, capsys):
    rows = [chat(1, weight=0), chat(2), {**chat(3, "yes " * 40), "id": 3}]
    assert main(["data", "check", file(rows), "--max-seq-len", "60", "--model", str(DEMO_MODEL)]) == 0
    said = capsys.readouterr().out
    assert "assistant\nPerhaps.<|im_end|>" in said and "[yes<|im_end|>]" in said
    assert "1 of 3 rows, cut at 60 tokens (lines 3): raise --max-seq-len" in said
    assert "not used   'id', in 1 rows" in said


def test_a_template_and_a_format_of_ones_own(file, capsys):
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    row = {**chat(1), "text": "a note"}
    assert main(["data", "check", file([row]), "--format", "chat", "--chat-template", template]) == 0
    assert "[<|im_start|>yes<|im_end|>]" in capsys.readouterr().out
    assert main(["data", "check", file([row]), "--format", "text"]) == 0
    assert "a[ note<|im_end|>]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["{bad}"], 1, "bad.jsonl:2: is text, but the file's first row is chat"),
        (["none.jsonl"], 1, "none.jsonl: cannot be read"),
        ([], 2, "required: FILE"),
        (["{bad}", "--format", "csv"], 2, "--format must be one of"),
        (["{bad}", "--max-seq-len", "1"], 2, "--max-seq-len"),
        (["{bad}", "--maxlen", "1"], 2, "unknown flag --maxlen"),
        (["{bad}", "--model", "./nowhere"], 4, "not a directory"),
        (["{bad}", "--chat-template", "nowhere.jinja"], 3, "there is no file"),
    ],
)
def test_exit_codes(file, capsys, argv, code, words):
    bad = file([chat(1), {"text": "a"}], "bad.jsonl")
    assert main(["data", "check", *(arg.format(bad=bad) for arg in argv)]) == code
    said = capsys.readouterr().err
    assert words in said and said.startswith("tandem: ") and said.count("\n") == 1


def test_a_model_that_does_not_say_its_context(file, tmp_path, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((DEMO_MODEL / name).read_bytes())
    good = file([chat(1)])
    assert main(["data", "check", good, "--model", str(tmp_path)]) == 3
    assert "give --max-seq-len N" in capsys.readouterr().err
    assert main(["data", "check", good, "--model", str(tmp_path), "--max-seq-len", "99"]) == 0
    (tmp_path / "config.json").write_text('{"text_config": {"max_position_embeddings": 77}}')
    assert verb.context_of(str(tmp_path)) == 77


def test_the_context_of_a_gguf_file(tiny_model, tmp_path):
    import gguf_files

    assert verb.context_of(str(gguf_files.convert(tiny_model("qwen3"), tmp_path))) == 256


@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [1, 100], list(range(1, 1000)), [3] * 500 + [4096]])
def test_histograms_hold_every_row(lengths):
    lines = list(verb.histogram(sorted(lengths)))
    assert len(lines) <= verb.MAX_BINS
    counts = [int(line.split()[-1].replace(",", "")) for line in lines if not re.fullmatch(r"\s*[\d-]+\s*", line)]
    assert sum(counts) == len(lengths)
    assert max(line.count("#") for line in lines) == verb.BAR


def test_percentiles():
    rows = [Row([0] * n, [0.0] + [1.0] * (n - 1), n) for n in range(1, 101)]
    assert "per row    min 1, median 50.5, p95 95, max 100" in list(verb.report(Dataset("text", rows), 100))


def test_colour_on_a_terminal(file, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["data", "check", file([chat(1)])]) == 0
    assert f"assistant\n{verb.GREEN}yes<|im_end|>{verb.PLAIN}\n" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["data", "check", file([chat(1)])]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_what_steers_a_terminal_is_spelled_out(file, capsys):
    assert main(["data", "check", file([chat(1, "\x1b[2J\u202e東京🙂")])]) == 0
    assert "[\\x1b[2J\\u202e東京🙂<|im_end|>]" in capsys.readouterr().out


def test_long_examples_are_cut_short(file, capsys):
    assert main(["data", "check", file([chat(1, "yes " * 1500)])]) == 0
    assert re.search(r"\]\n\.\.\. and \d+ more tokens\n$", capsys.readouterr().out)


def test_it_needs_neither_torch_nor_a_network(file):
    code = (
        "import sys, socket\nsocket.socket.connect = None\n"
        "from tandem.__main__ import main\n"
        f"code = main(['data', 'check', {file([chat(1)])!r}])\n"
        "print('torch' in sys.modules, code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False 0\n") and done.stderr == ""
