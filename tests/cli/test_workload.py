"""Traces, arrival processes and prompts of the benchmarks."""

import json
import math
import random
import statistics

import pytest

from tandem.cli import workload
from tandem.errors import ConfigError

CSV = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:50.0000000,1,1
"""


def test_csv_trace(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(CSV)
    first, second, third = workload.read_trace(str(path), 10, scale=2)
    assert (first.at_s, first.prompt_len, first.output_len) == (0.0, 187, 22)
    assert second.at_s == pytest.approx(4.314579) and second.output_len == 54
    assert third.at_s == pytest.approx(63.31941) and (third.prompt_len, third.output_len) == (1, 1)
    assert len(workload.read_trace(str(path), 2, 1)) == 2


def test_json_lines_trace(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [{"timestamp": 500 + 1000 * i, "input_length": 100, "output_length": 10, "hash_ids": []} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    shapes = workload.read_trace(str(path), 10, 1)
    assert [(s.at_s, s.prompt_len, s.output_len) for s in shapes] == [(0, 100, 10), (1, 100, 10), (2, 100, 10)]


@pytest.mark.parametrize("text", ["", "TIMESTAMP,Other\n2023-11-16 18:15:46.1,4\n", CSV + "yesterday,1,1\n"])
def test_broken_traces_are_refused(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match="t.csv"):
        workload.read_trace(str(path), 10, 1)


def test_poisson_gaps_have_the_mean_and_spread_of_an_exponential():
    times = workload.poisson(20001, 4.0, random.Random(0))
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert times[0] == 0.0
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05)
    assert workload.poisson(3, math.inf, random.Random(0)) == [0.0, 0.0, 0.0]


def test_sharegpt(tmp_path):
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "more"}]
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{"conversations": talk}, {"conversations": talk[:1]}]))
    assert workload.read_sharegpt(str(path), 3, random.Random(0)) == [("q", "a")] * 3
    path.write_text("[]")
    with pytest.raises(ConfigError, match="no conversation"):
        workload.read_sharegpt(str(path), 3, random.Random(0))


def test_offline_prompts_are_those_every_engine_gets():
    # The first ids of random.Random(1) over 10..31999, written down once: a change breaks comparability.
    rng = random.Random(1)
    assert workload.prompts(2, 3, 32000) == [[rng.randrange(10, 32000) for _ in range(3)] for _ in range(2)]
    assert workload.prompts(1, 4, 32000)[0] == [4412, 18661, 27778, 26298]


def test_offline_workloads_parse():
    text = ",".join("x".join(map(str, w)) for w in workload.OFFLINE)
    assert tuple(workload.parse_offline(text)) == workload.OFFLINE
    for bad in ("", "1x2", "0x1x1", "1x-1x1", "axbxc", "1x2x3,"):
        with pytest.raises(ConfigError, match="BATCHxPROMPTxGENERATED"):
            workload.parse_offline(bad)


def test_varied_lengths_stay_in_range():
    rng = random.Random(0)
    lengths = [workload.varied(100, 0.3, rng) for _ in range(500)]
    assert min(lengths) >= 70 and max(lengths) <= 130 and len(set(lengths)) > 30
    assert workload.varied(100, 0.0, rng) == 100
