"""`tandem bench memory`: its table, and one run on a tiny model."""

import json

from tandem.__main__ import main


def test_the_command(tiny_model, tmp_path, capsys):
    out = tmp_path / "held.json"
    argv = ["bench", "memory", "--model", str(tiny_model("llama")), "--length", "48", "--window", "16"]
    assert main([*argv, "--rank", "2", "--json", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["plain", "pruned", "recomputed", "windowed"]
    assert "100.0%" in lines[2]
    saved = json.loads(out.read_text())
    assert saved["dtype"] == "float32" and saved["length"] == 48
    ways = saved["ways"]
    assert all(w["per_token"] == w["total"] / 48 == (w["layers"] + max(w["in_flight"], w["head"])) / 48 for w in ways)
