"""bench/compare.py: taking turns, reading what peers print, medians and ratios. Peers here are one-line scripts."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "bench" / "compare.py"
spec = importlib.util.spec_from_file_location("compare", PATH)
compare = importlib.util.module_from_spec(spec)
sys.modules["compare"] = compare
spec.loader.exec_module(compare)


def row(seconds, batch=4, prompt=16, generated=64, **more):
    return dict(
        engine="x", batch=batch, prompt=prompt, generated=generated, seconds=seconds,
        generated_tokens_per_s=1.0, total_tokens_per_s=1.0, **more,
    )  # fmt: skip


def script(tmp_path, name, *rows, tail=""):
    path = tmp_path / f"{name}.py"
    log = tmp_path / "order"
    lines = [f"print({json.dumps(json.dumps(r))})" for r in rows]
    path.write_text(f"open({str(log)!r}, 'a').write({name!r} + ' ')\nprint('noise')\n" + "\n".join(lines) + "\n" + tail)
    return [sys.executable, str(path)]


@pytest.fixture
def fake_tandem(tmp_path, monkeypatch):
    command = script(tmp_path, "tandem", row(1.0, roofline_share=0.8), row(0.5, 1, 512, 1))
    monkeypatch.setattr(compare, "ours", lambda *_: compare.Contender("tandem", command))


def test_rounds_alternate_and_ratios_are_of_medians(tmp_path, fake_tandem, capsys):
    peer = " ".join(script(tmp_path, "peer", row(2.0), row(0.25, 1, 512, 1), row(9.0, 7, 7, 7)))
    out = tmp_path / "out.json"
    picture = tmp_path / "out.png"
    asked = ["--model", "m", "--peer", f"slow={peer}", "--rounds", "3", "--json", str(out), "--plot", str(picture)]
    assert compare.main(asked) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "order").read_text().split() == ["tandem", "peer", "peer", "tandem", "tandem", "peer"]
    decode, prompt = json.loads(out.read_text())["workloads"]
    assert decode["ratios"] == {"slow": 2.0} and prompt["ratios"] == {"slow": 0.5}
    assert decode["engines"]["slow"]["seconds"] == [2.0, 2.0, 2.0]
    assert decode["engines"]["tandem"]["generated_tokens_per_s"] == 256.0
    said = capsys.readouterr().out
    assert "| 4, 16, 64 | generated | 256.0 | 128.0 | 2.00x | 80 % |" in said
    assert "| 1, 512, 1 | total | 1026.0 | 2052.0 | 0.50x |  |" in said
    assert '"cores"' in said and '"torch"' in said


def test_medians():
    samples = {"tandem": {(4, 16, 64): [row(s) for s in (1.0, 5.0, 2.0)]}, "p": {(4, 16, 64): [row(s) for s in (3, 4)]}}
    (entry,) = compare.summarise(samples)
    assert entry["engines"]["tandem"]["median_seconds"] == 2.0 and entry["ratios"] == {"p": 1.75}


def test_only_measurements_are_read():
    text = "\n".join(["{not json", '{"batch": 1}', json.dumps(row(1.0)), " " + json.dumps(row(2.0)), "[]"])
    assert [r["seconds"] for r in compare.parse_rows(text)] == [1.0]


def test_a_failing_peer_ends_the_comparison(tmp_path, fake_tandem):
    peer = " ".join(script(tmp_path, "peer", row(2.0), tail="raise SystemExit('out of luck')"))
    with pytest.raises(SystemExit, match="(?s)peer failed with code 1 .*out of luck"):
        compare.main(["--model", "m", "--peer", f"peer={peer}", "--rounds", "1"])


@pytest.mark.parametrize("peer", ["nameless", "=x", "x= "])
def test_bad_peers(peer):
    with pytest.raises(SystemExit, match="NAME=COMMAND"):
        compare.parse_peer(peer)


def test_our_command_is_one_tandem_knows():
    from tandem.cli import bench_throughput

    contender = compare.ours("some/model", "bfloat16", "--repeat 3")
    verb = contender.command.index("throughput")
    namespace = bench_throughput.parser("x").parse(contender.command[verb + 1 :], print)
    assert (namespace.model_flag, namespace.dtype, namespace.repeat) == ("some/model", "bfloat16", "3")
