"""`tandem bench serve` against a stand-in server: what is sent, what is counted, what is written."""

import json

import pytest

from tandem.__main__ import main


def bench(fake_server, *argv):
    return main(["bench", "serve", "--base-url", fake_server.url, *argv])


def test_random_prompts_come_from_the_servers_vocabulary(fake_server, capsys):
    assert bench(fake_server, "--num-prompts", "6", "--random-input-len", "9", "--random-output-len", "3",
                 "--ignore-eos", "--goodput", "ttft:60000") == 0  # fmt: skip
    said = capsys.readouterr().out
    warm_up, *bodies = fake_server.bodies
    assert len(bodies) == 6 and warm_up["max_tokens"] == 4
    assert all(len(body["prompt"]) == 9 and min(body["prompt"]) >= 100 for body in bodies)
    assert all(body["max_tokens"] == 3 and body["ignore_eos"] is True for body in bodies)
    assert len({tuple(body["prompt"]) for body in bodies}) == 6
    assert "Successful requests:     6" in said and "Request goodput" in said and "(ttft)" in said


def test_the_same_seed_sends_the_same_prompts(fake_server):
    for seed in ("1", "1", "2"):
        bench(fake_server, "--num-prompts", "1", "--random-input-len", "8", "--seed", seed)
    first, second, third = (body["prompt"] for body in fake_server.bodies[1::2])
    assert first == second != third


def test_result_file_counts_rejections_and_failures(fake_server, tmp_path):
    fake_server.refuse = {2: 429, 3: 500}
    path = tmp_path / "result.json"
    assert bench(fake_server, "--num-prompts", "5", "--vocab-size", "50", "--save-result",
                 "--result-filename", str(path)) == 0  # fmt: skip
    figures = json.loads(path.read_text())
    assert (figures["completed"], figures["rejected"], figures["failed"]) == (3, 1, 1)
    assert figures["total_output_tokens"] == 9 and len(figures["trials"]) == 5
    assert {"mean_ttft_ms", "p99_itl_ms", "median_tpot_ms", "p95_e2el_ms"} <= figures.keys()
    assert max(max(body["prompt"]) for body in fake_server.bodies) < 50


def test_a_trace_keeps_its_times_and_lengths(fake_server, tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [{"timestamp": 300 * i, "input_length": 40, "output_length": 20 + i} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    result = tmp_path / "r.json"
    assert bench(fake_server, "--dataset-name", "trace", "--dataset-path", str(path), "--trace-scale", "4",
                 "--save-result", "--result-filename", str(result)) == 0  # fmt: skip
    assert [(len(b["prompt"]), b["max_tokens"]) for b in fake_server.bodies[1:]] == [(10, 5), (10, 5), (10, 6)]
    sent = [trial["sent"] for trial in json.loads(result.read_text())["trials"]]
    assert sent[1] - sent[0] == pytest.approx(0.3, abs=0.1) and sent[2] - sent[0] == pytest.approx(0.6, abs=0.1)


def test_open_loop_does_not_wait_and_max_concurrency_does(fake_server, tmp_path):
    fake_server.pause_s = 0.1
    spread = {}
    for limit in ("1", "4"):
        path = tmp_path / f"{limit}.json"
        bench(fake_server, "--num-prompts", "4", "--max-concurrency", limit, "--save-result",
              "--result-filename", str(path))  # fmt: skip
        sent = [trial["sent"] for trial in json.loads(path.read_text())["trials"]]
        spread[limit] = max(sent) - min(sent)
    assert spread["4"] < 0.25 and spread["1"] > 0.8


def test_a_long_prompt_beside_streams(fake_server, capsys):
    fake_server.pause_s, fake_server.words = 0.05, ["x"] * 10
    assert bench(fake_server, "--num-prompts", "2", "--long-prompt-at", "0.2", "--long-prompt-len", "700") == 0
    assert [len(body["prompt"]) for body in fake_server.bodies].count(700) == 1
    said = capsys.readouterr().out
    assert "Long prompt: 700 tokens" in said and said.count("gaps of the streams") == 2


def test_plot(fake_server, tmp_path):
    pytest.importorskip("matplotlib")
    fake_server.refuse = {2: 429}
    assert bench(fake_server, "--num-prompts", "3", "--plot", str(tmp_path / "p.png")) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_sharegpt_lengths_are_counted_by_the_server(fake_server, tmp_path):
    path = tmp_path / "s.json"
    turns = [{"value": "a question"}, {"value": "an answer of six words here"}]
    path.write_text(json.dumps([{"conversations": turns}]))
    assert bench(fake_server, "--dataset-name", "sharegpt", "--dataset-path", str(path), "--num-prompts", "1") == 0
    assert (fake_server.bodies[1]["prompt"], fake_server.bodies[1]["max_tokens"]) == ("a question", 6)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--goodput", "ttft"], 2, "METRIC:MILLISECONDS"),
        (["--goodput", "speed:1"], 2, "ttft, tpot and e2el"),
        (["--percentile-metrics", "xyz"], 2, "--percentile-metrics knows"),
        (["--dataset-name", "trace"], 2, "needs --dataset-path"),
        (["--dataset-name", "trace", "--dataset-path", "/none.csv"], 3, "cannot read the trace"),
        (["--request-rate", "0"], 2, "--request-rate must be at least"),
    ],
)
def test_bad_options(fake_server, capsys, argv, code, words):
    assert bench(fake_server, *argv) == code
    assert words in capsys.readouterr().err


def test_a_server_that_refuses_the_test_request_ends_the_run(fake_server, capsys):
    fake_server.refuse = {1: 404}
    assert bench(fake_server) == 1
    assert "the test request failed: the server answered 404: no, thank you" in capsys.readouterr().err
    assert len(fake_server.bodies) == 1
