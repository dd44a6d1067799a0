"""`tandem bench throughput`: the roofline's arithmetic by hand, and one run of the real engine."""

import json
from types import SimpleNamespace

import pytest
import torch

from tandem.__main__ import main
from tandem.cli.bench_throughput import Limits, _limits, row
from tandem.ops import roofline

LIMITS = Limits(
    bandwidth=100.0, matmul_rate=1000.0, weight_bytes=200, kv_bytes_per_token=1.0, flops_per_token=100.0,
    flops_per_sample=50.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "seconds"),
    [
        # The prompt is bound by arithmetic: (30 x 100 + 50) / 1000, against 200 / 100 for reading the weights.
        ((1, 30, 1), 3.05),
        # A short prompt is bound by reading the weights once.
        ((1, 2, 1), 2.0),
        # Two further tokens: weights again, and the keys and values of 10 and 11 tokens.
        ((1, 10, 3), 2.0 + 2.1 + 2.11),
        # Enough requests make decoding bound by arithmetic too: 20 x 150 / 1000 beats (200 + 20 x 2) / 100.
        ((20, 2, 2), 20 * (2 * 100 + 50) / 1000 + 3.0),
    ],
)
def test_the_limit_by_hand(shape, seconds):
    assert LIMITS.seconds(*shape) == pytest.approx(seconds)


def test_a_row_has_the_keys_of_every_engines_benchmark():
    plain = row(4, 16, 64, 2.0, None)
    assert plain == {
        "engine": "tandem", "batch": 4, "prompt": 16, "generated": 64, "seconds": 2.0,
        "generated_tokens_per_s": 128.0, "total_tokens_per_s": 160.0,
    }  # fmt: skip
    assert row(1, 30, 1, 6.1, LIMITS)["roofline_share"] == 0.5


def test_the_bound_reads_the_bytes_there_are(monkeypatch):
    """Quantised weights are fewer; an embedding table of its own is looked up, not read."""
    monkeypatch.setattr(roofline, "read_bandwidth", lambda *_: 1.0)
    monkeypatch.setattr(roofline, "matmul_rate", lambda *_: 1.0)
    report = SimpleNamespace(weight_bytes=1000, kv_bytes=64, num_blocks=4, block_size=16)
    for tied, expected in ((True, 1000), (False, 1000 - 2 * 8 * 5)):
        spec = SimpleNamespace(hidden_size=8, vocab_size=5, num_parameters=600, tie_embeddings=tied)
        worker = SimpleNamespace(spec=spec, dtype=torch.bfloat16, device=torch.device("cpu"))
        assert _limits(SimpleNamespace(report=report, worker=worker)).weight_bytes == expected


def test_the_real_engine(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    argv = ["bench", "throughput", "--demo", "--dtype", "float32", "--workloads", "2x8x4,1x40x1", "--repeat", "2"]
    assert main([*argv, "--max-num-seqs", "4", "--num-blocks", "64", "--json", str(path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["batch"], r["prompt"], r["generated"]) for r in rows] == [(2, 8, 4), (1, 40, 1)]
    assert all(r["seconds"] > 0 and r["roofline_seconds"] > 0 for r in rows)
    assert path.read_text().splitlines() == [json.dumps(r) for r in rows]
