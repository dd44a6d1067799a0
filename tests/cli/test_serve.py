"""`tandem serve` as a user runs it: a process with the embedded model, the real SDK, signals, exit codes."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import httpx
import openai
import psutil
import pytest

READY_S = 90  # an idle machine needs a tenth of it


class Server:
    """A `tandem serve` process; its output is collected as it comes."""

    def __init__(self, *argv, port=0):
        self.lines = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tandem", "serve", "--port", str(port), *argv],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean_environment(),
        )  # fmt: skip
        self.reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stdout.readline, "")))
        self.reader.start()

    def wait_ready(self):
        deadline = time.monotonic() + READY_S
        while not any("curl" in line for line in self.lines):
            assert self.process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.02)
        self.url = re.search(r"(http://127\.0\.0\.1:\d+)/v1", self.output).group(1)
        self.sdk = openai.OpenAI(base_url=self.url + "/v1", api_key="any", max_retries=0)
        return self

    @property
    def output(self):
        return "".join(self.lines)

    def wait(self, seconds):
        """The exit code, which has to come within `seconds`."""
        code = self.process.wait(seconds)
        self.reader.join(5)
        return code

    def train(self):
        """A job that goes on for longer than any test; returns once it has made some steps."""
        rows = [json.dumps({"prompt": f"Fact {i}?", "completion": f" It is {i * 7}."}) for i in range(64)]
        file = self.sdk.files.create(file=("facts.jsonl", "\n".join(rows).encode()), purpose="fine-tune")
        job = self.sdk.fine_tuning.jobs.create(
            model="demo", training_file=file.id, hyperparameters={"n_epochs": 1000, "batch_size": 2},
            extra_body={"tandem": {"rank": 4}},
        )  # fmt: skip
        self.wait_for_step(job.id, 3)
        return job.id

    def wait_for_step(self, job_id, step):
        deadline = time.monotonic() + READY_S
        while (job := self.sdk.fine_tuning.jobs.retrieve(job_id)).tandem["step"] < step:
            assert time.monotonic() < deadline and job.status != "failed", job
            time.sleep(0.05)

    def stream(self, max_tokens):
        return self.sdk.completions.create(
            model="demo", prompt="Once", max_tokens=max_tokens, stream=True, extra_body={"ignore_eos": True}
        )


def clean_environment():
    """Less what steers Tandem, and with a state directory of its own. Threads wait passively, so that other work on the
    machine fails no test."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TANDEM_", "OPENAI_"))}
    state_dir = tempfile.mkdtemp(dir=os.environ["TANDEM_STATE_DIR"])
    return {**kept, "OMP_WAIT_POLICY": "passive", "TANDEM_STATE_DIR": state_dir}


@contextlib.contextmanager
def serving(*argv, port=0):
    server = Server(*argv, port=port)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        server.reader.join(5)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_serves_the_sdk_then_drains_on_sigterm():
    port = free_port()
    with serving(port=port) as server:
        url = f"http://127.0.0.1:{port}"
        while not server.lines:
            time.sleep(0.01)
        probes = [httpx.get(url + path, timeout=30).status_code for path in ("/health", "/ready")]
        # Only a machine that loads faster than it prints would be ready already.
        assert probes == [200, 503] or any("Ready" in line for line in server.lines)
        # A request that comes too early waits instead of failing.
        sdk = openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0)
        messages = [{"role": "user", "content": "Hello!"}]
        early = sdk.chat.completions.create(model="demo", messages=messages, max_tokens=8)
        assert early.choices[0].message.content and early.usage.completion_tokens <= 8
        server.wait_ready()
        assert len(server.lines) <= 15, server.output
        assert f"export OPENAI_BASE_URL={url}/v1\n" in server.lines
        assert f"State    {os.environ['TANDEM_STATE_DIR']}" in server.output and "SQLite" in server.output
        assert httpx.get(url + "/ready").status_code == 200

        stream = iter(server.stream(max_tokens=120))
        pieces = [next(stream)]
        server.process.send_signal(signal.SIGTERM)
        while "Stopping" not in server.output:
            time.sleep(0.01)
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")
        pieces += stream
        assert pieces[-1].choices[0].finish_reason == "length"
        assert server.wait(15) == 0
        assert "Traceback" not in server.output


def test_ctrl_c_drains_and_the_second_one_kills():
    with serving() as server:
        server.wait_ready()
        (engine,) = psutil.Process(server.process.pid).children()
        stream = iter(server.stream(max_tokens=1500))
        next(stream)
        server.process.send_signal(signal.SIGINT)
        while "Stopping" not in server.output:
            time.sleep(0.01)
        assert next(stream).choices
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.wait(8) == 130
        assert time.monotonic() - began < 6
        assert is_gone(engine.pid)


def test_the_engines_death_ends_the_server_with_an_error():
    with serving() as server:
        server.wait_ready().train()
        (engine,) = psutil.Process(server.process.pid).children()
        stream = iter(server.stream(max_tokens=1500))
        next(stream)
        engine.kill()
        began = time.monotonic()
        with pytest.raises(openai.APIError):
            list(stream)
        assert server.wait(10) == 1
        assert time.monotonic() - began < 2.5
        assert "The engine is gone" in server.output and "Traceback" not in server.output, server.output


def test_a_job_goes_on_where_sigterm_found_it(tmp_path):
    with serving("--state-dir", str(tmp_path)) as server:
        job_id = server.wait_ready().train()
        with serving("--state-dir", str(tmp_path)) as second:
            assert second.wait(READY_S) == 3, second.output
            assert "another Tandem server uses the state directory" in second.output
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(15) == 0 and "Traceback" not in server.output, server.output
    with serving("--state-dir", str(tmp_path)) as server:
        jobs = server.wait_ready().sdk.fine_tuning.jobs
        stopped = jobs.retrieve(job_id).tandem["step"]
        server.wait_for_step(job_id, stopped + 2)
        events = list(jobs.list_events(job_id, limit=100))
        found = [m for event in events if (m := re.search(r"(Stopped at|resumed from) step (\d+)", event.message))]
        assert [m[1] for m in found] == ["resumed from", "Stopped at"] and found[0][2] == found[1][2]
        # Nothing was done twice, and nothing left out.
        steps = [event.data["step"] for event in events if event.type == "metrics"]
        assert steps == list(range(steps[0], 0, -1))
        jobs.cancel(job_id)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(15) == 0 and "Traceback" not in server.output, server.output


def test_a_server_killed_outright_takes_its_engine_along():
    with serving() as server:
        server.wait_ready()
        (engine,) = psutil.Process(server.process.pid).children()
        server.process.kill()
        deadline = time.monotonic() + 3
        while not is_gone(engine.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert is_gone(engine.pid)


def test_a_signal_while_loading_ends_it_at_once():
    with serving() as server:
        while not server.lines:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGINT)
        assert server.wait(15) == 130
        assert "Traceback" not in server.output, server.output


def test_a_taken_port_is_said_before_anything_loads():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with serving(port=other.getsockname()[1]) as server:
            assert server.wait(10) == 3
    assert "cannot listen on 127.0.0.1" in server.output and "--port" in server.output
    assert "loading" not in server.output and "Traceback" not in server.output


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["/no/such/model"], 4, "/no/such/model"),
        (["--tokenizer", "/no/such/tokenizer"], 4, "/no/such/tokenizer"),
        (["--lora-modules", "nonsense"], 3, "name=path"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(argv, code, words):
    with serving(*argv) as server:
        assert server.wait(60) == code, server.output
    assert words in server.output and "Traceback" not in server.output, server.output


def test_open_to_the_network_without_a_key_is_warned_of():
    with serving("--host", "0.0.0.0") as server:
        while len(server.lines) < 2 and server.process.poll() is None:
            time.sleep(0.01)
        assert "anybody may use it" in server.output
