"""bench/training.py: taking turns with another checkout and with a peer, and memory of a real engine."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "bench" / "training.py"
spec = importlib.util.spec_from_file_location("bench_training", PATH)
training = importlib.util.module_from_spec(spec)
sys.modules["bench_training"] = training
spec.loader.exec_module(training)


def test_serving_without_a_job_is_compared_in_turns(monkeypatch, capsys):
    asked = []

    def throughput(checkout, args):
        asked.append(checkout)
        ours = checkout != "/other"
        return {"1x16x64": 99.0 if ours else 100.0, "4x16x64": 51.0 if ours else 50.0}

    monkeypatch.setattr(training, "_throughput", throughput)
    assert training.main(["idle", "--model", "m", "--other", "/other", "--rounds", "2"]) == 0
    here = str(PATH.parents[1])
    assert asked == [here, "/other", "/other", here]
    found = json.loads(capsys.readouterr().out)
    assert found["medians"] == {"1x16x64": 0.99, "4x16x64": 1.02} and found["median"] == pytest.approx(1.005)


def test_throughput_is_that_of_the_checkout(tmp_path):
    (tmp_path / "tandem").mkdir()
    (tmp_path / "tandem" / "__init__.py").touch()
    row = {"batch": 4, "prompt": 16, "generated": 8, "total_tokens_per_s": 7.5}
    (tmp_path / "tandem" / "__main__.py").write_text(f"print('loading')\nprint({json.dumps(json.dumps(row))})\n")
    args = argparse.Namespace(model="m", dtype="float32", workloads="4x16x8", tandem_args="")
    assert training._throughput(str(tmp_path), args) == {"4x16x8": 7.5}
    (tmp_path / "tandem" / "__main__.py").write_text("raise SystemExit('no such model')\n")
    with pytest.raises(SystemExit, match="no such model"):
        training._throughput(str(tmp_path), args)


def test_turns_with_a_peer(monkeypatch, capsys):
    order = []

    async def train(args, job):
        order.append("tandem")
        return {"tokens_per_s": 120.0}

    async def alone(command, seconds):
        order.append("peft")
        return 100.0, 10**9

    monkeypatch.setattr(training, "_train", train)
    monkeypatch.setattr(training.coserve_peers, "train_alone", alone)
    assert training.main(["against-peft", "--model", "m", "--peft-python", "p", "--rounds", "2"]) == 0
    assert order == ["tandem", "peft", "peft", "tandem"]
    assert json.loads(capsys.readouterr().out)["ratio"] == 1.2


def test_memory_of_a_real_engine(tiny_model, capsys):
    argv = ["memory", "--model", str(tiny_model("llama")), "--dtype", "float32", "--length", "32", "--rank", "2"]
    assert training.main([*argv, "--seconds", "0.3", "--tandem-args", "--num-blocks 40 --max-num-seqs 2"]) == 0
    found = json.loads(capsys.readouterr().out)["tandem"]
    assert found["tokens_per_s"] > 0 and found["weight_bytes"] > 0
    assert found["peak_pss_bytes"] >= found["peak_pss_while_training_bytes"] >= found["pss_before_training_bytes"]
    # Two Python processes, one of them with torch.
    assert 50e6 < found["peak_beyond_weights_bytes"] < 2e9
