"""An ordeal for a state directory: a real `tandem serve` on a tiny model, killed with signal 9 at random instants.

`endure` trains one job undisturbed, then keeps a job, uploads and completions under way while it kills the server, its
engine or both, starts the server again, and at last holds what is there against what must be there.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import tiny_models

READY_S, JOB_S = 60, 120  # an idle machine needs a tenth of either
SURVIVE_S = 2.5  # two seconds, and what measuring takes
STARTING_SHARE = 0.2  # of the kills hit a server that is not ready yet
LONGEST_S = 1.2  # from ready to the kill
ROWS, EPOCHS, EVERY = 40, 4, 4
STEPS = ROWS // 2 * EPOCHS
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Kill:
    """One signal 9. `after_s` counts from the launch or from being ready; `survivor_s` is what the other process took
    to end, where there was one."""

    number: int
    at: str
    victim: str
    phase: str
    after_s: float
    step: int | None
    survivor_s: float | None


@dataclass
class Ordeal:
    """What the server has confirmed and therefore must not lose."""

    jobs: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)


class Server:
    """A `tandem serve` process in a folder: state, log and temporary files are in there."""

    def __init__(self, folder: Path, number: int) -> None:
        self.log = folder / f"log-{number:03d}"
        temporary = folder / "tmp"
        temporary.mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("TANDEM_", "OPENAI_"))}
        argv = [sys.executable, "-m", "tandem", "serve", str(folder / "model"), "--served-model-name", "tiny"]
        argv += ["--port", "0", "--deterministic", "--dtype", "float32", "--num-threads", "1", "--num-blocks", "128"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*argv, "--state-dir", str(folder / "state")], stdout=log, stderr=subprocess.STDOUT,
                env=kept | {"OMP_WAIT_POLICY": "passive", "TMPDIR": str(temporary), "PYTHONFAULTHANDLER": "1"},
            )  # fmt: skip
        self.began = time.monotonic()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_ready(self) -> Server:
        while "\ncurl " not in self.output:
            if time.monotonic() - self.began > READY_S:
                self.abort()
            assert self.process.poll() is None, self.output
            time.sleep(0.02)
        self.ready_s = time.monotonic() - self.began
        (line,) = [line for line in self.output.splitlines() if line.startswith("export OPENAI_BASE_URL=")]
        self.http = httpx.Client(base_url=line.partition("=")[2], timeout=30)
        return self

    def get(self, path: str, **params: Any) -> Any:
        return self.http.get(path, params=params).raise_for_status().json()

    def abort(self) -> None:
        """End both processes; what each of their threads was doing goes to the log."""
        for process in filter(None, (self.engine(), psutil.Process(self.process.pid))):
            process.send_signal(signal.SIGABRT)
            process.wait(10)

    def engine(self) -> psutil.Process | None:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                if "tandem.engine.process" in child.cmdline():
                    return child
        return None

    def kill(self, victim: str) -> float | None:
        """Signal 9 to "server", "engine" or "both". Returns the seconds until the other was gone too."""
        engine = self.engine()
        server = psutil.Process(self.process.pid)
        if victim in ("server", "both") or engine is None:
            self.process.kill()
        if victim in ("engine", "both") and engine is not None:
            engine.kill()
        began = time.monotonic()
        for process in filter(None, (server, engine)):
            while not _is_gone(process):
                self.process.poll()
                assert time.monotonic() - began < READY_S, f"{process} outlives its other half:\n{self.output}"
                time.sleep(0.01)
        self.process.wait()
        return round(time.monotonic() - began, 3) if engine is not None and victim != "both" else None


def _is_gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def endure(folder: Path, seed: int, num_kills: int, on_kill: Callable[[Kill], None] = print) -> int:
    """Kill `num_kills` times. Returns how many jobs succeeded, all with the same bits.

    Raises AssertionError where something was lost, half there or different at the end.
    """
    tiny_models.build("llama", folder / "model")
    choose, ordeal = random.Random(seed), Ordeal()
    server = Server(folder, 0)
    try:
        server.wait_ready()
        data = _upload(server, ordeal, "facts.jsonl", _facts(ROWS))
        valid = _upload(server, ordeal, "valid.jsonl", _facts(3))
        _create(server, ordeal, data, valid)
        _until_succeeded(server, ordeal.jobs[0])
        ready_s = server.ready_s
        for number in range(1, num_kills + 1):
            is_starting = number > 1 and choose.random() < STARTING_SHARE
            victim, share = choose.choice(("server", "server", "engine", "both")), choose.random()
            if is_starting:
                kill = _kill(server, number, victim, "starting", share * ready_s, None)
            else:
                if number > 1:
                    server.wait_ready()
                job = server.get(f"/fine_tuning/jobs/{ordeal.jobs[-1]}")
                assert job["status"] not in ("failed", "cancelled", "paused"), job
                if job["status"] == "succeeded":
                    _create(server, ordeal, data, valid)
                with _traffic(server, ordeal, number, choose.randrange(2**32)):
                    kill = _kill(server, number, victim, "running", share * LONGEST_S, ordeal.jobs[-1])
            on_kill(kill)
            server = Server(folder, number)
        server.wait_ready()
        for job_id in ordeal.jobs:
            _until_succeeded(server, job_id)
        _judge(server, ordeal, folder)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 0, server.output
        _judge_disk(folder / "state")
        for log in folder.glob("log-*"):
            assert "Traceback" not in log.read_text(errors="replace"), log.read_text(errors="replace")
        return len(ordeal.jobs)
    finally:
        server.process.kill()
        server.process.wait()


def _facts(rows: int) -> bytes:
    lines = [{"prompt": f"Fact {i}?", "completion": f" It is {i * 7}, said {i} times."} for i in range(rows)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _upload(server: Server, ordeal: Ordeal, name: str, content: bytes) -> str:
    reply = server.http.post("/files", files={"file": (name, content)}, data={"purpose": "fine-tune"})
    file_id = reply.raise_for_status().json()["id"]
    ordeal.uploads[file_id] = content
    return file_id


def _create(server: Server, ordeal: Ordeal, data: str, valid: str) -> None:
    body = {
        "model": "tiny", "training_file": data, "validation_file": valid, "seed": 7, "suffix": "killed",
        "hyperparameters": {"n_epochs": EPOCHS, "batch_size": 2},
        "tandem": {"rank": 4, "dropout": 0.1, "learning_rate": 1e-2, "checkpoint_every": EVERY},
    }  # fmt: skip
    ordeal.jobs.append(server.http.post("/fine_tuning/jobs", json=body).raise_for_status().json()["id"])


def _until_succeeded(server: Server, job_id: str) -> None:
    deadline = time.monotonic() + JOB_S
    while (job := server.get(f"/fine_tuning/jobs/{job_id}"))["status"] != "succeeded":
        assert time.monotonic() < deadline and job["status"] in ("validating_files", "queued", "running"), job
        time.sleep(0.05)


def _kill(server: Server, number: int, victim: str, phase: str, after_s: float, job_id: str | None) -> Kill:
    time.sleep(after_s)
    step = server.get(f"/fine_tuning/jobs/{job_id}")["tandem"]["step"] if job_id else None
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    survivor_s = server.kill(victim)
    if phase == "running":
        assert survivor_s is None or survivor_s < SURVIVE_S, f"the other process lived on for {survivor_s} s"
    return Kill(number, at, victim, phase, round(after_s, 3), step, survivor_s)


@contextlib.contextmanager
def _traffic(server: Server, ordeal: Ordeal, number: int, seed: int) -> Iterator[None]:
    """Uploads and completions, one after the other, until the server is gone; it must be by the end of the block."""
    choose, failures = random.Random(seed), []

    def flow() -> None:
        with httpx.Client(base_url=server.http.base_url, timeout=30) as http:
            try:
                for count in range(10**6):
                    content = choose.randbytes(choose.randrange(1, 50_000)).hex().encode()
                    reply = http.post(
                        "/files", files={"file": (f"{_digest(content)}.txt", content)}, data={"purpose": "user_data"}
                    )
                    ordeal.uploads[reply.raise_for_status().json()["id"]] = content
                    body = {"model": "tiny", "prompt": f"{number} {count}", "max_tokens": 4}
                    if http.post("/completions", json=body).status_code not in (200, 503):
                        raise AssertionError("a completion failed")
                    time.sleep(0.05)
            except (httpx.TransportError, httpx.HTTPStatusError) as error:
                if isinstance(error, httpx.HTTPStatusError) and error.response.status_code != 503:
                    failures.append(error)
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=flow)
    thread.start()
    try:
        yield
    finally:
        if server.process.poll() is None:
            server.process.kill()
        thread.join()
    assert not failures, failures


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _judge(server: Server, ordeal: Ordeal, folder: Path) -> None:
    """What the server says that there is: exactly what was confirmed, and of each job what the first one made."""
    jobs = server.get("/fine_tuning/jobs", limit=100)["data"]
    assert [job["id"] for job in reversed(jobs)] == ordeal.jobs
    names, results, outcomes = [], [], []
    due = {step for step in range(1, STEPS + 1) if step % EVERY == 0 or step % (ROWS // 2) == 0}
    for job in jobs:
        checkpoints = server.get(f"/fine_tuning/jobs/{job['id']}/checkpoints", limit=100)["data"]
        assert [checkpoint["step_number"] for checkpoint in reversed(checkpoints)] == sorted(due)
        assert checkpoints[0]["fine_tuned_model_checkpoint"] == job["fine_tuned_model"]
        names += [checkpoint["fine_tuned_model_checkpoint"] for checkpoint in checkpoints]
        results += job["result_files"]
        table = server.http.get(f"/files/{job['result_files'][0]}/content").content
        states = [_weights(server, checkpoint["fine_tuned_model_checkpoint"]) for checkpoint in checkpoints]
        outcomes.append((states, table, job["trained_tokens"]))
    assert len({*outcomes[-1][0]}) == len(due) and all(outcome == outcomes[-1] for outcome in outcomes)
    assert {model["id"] for model in server.get("/models")["data"]} == {"tiny", *names}

    listed = {file["id"]: file for file in server.get("/files")["data"]}
    assert {*ordeal.uploads, *results} <= listed.keys()
    for file_id, file in listed.items():
        content = server.http.get(f"/files/{file_id}/content").content
        assert len(content) == file["bytes"]
        if file_id in ordeal.uploads:
            assert content == ordeal.uploads[file_id]
        elif file_id not in results:  # stored, but the confirmation never arrived
            assert file["filename"] == f"{_digest(content)}.txt"
    on_disk = {path.name for path in (folder / "state" / "files").iterdir()}
    assert on_disk == listed.keys()
    assert len(list((folder / "state" / "adapters").iterdir())) == len(names)


def _weights(server: Server, name: str) -> str:
    content = server.http.get(f"/adapters/{name}/content").raise_for_status().content
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        (member,) = [member for member in tar.getmembers() if member.name.endswith(WEIGHTS)]
        stream = tar.extractfile(member)
        assert stream is not None
        return _digest(stream.read())


def _judge_disk(state: Path) -> None:
    """Nothing temporary, nothing half there, nothing that nobody knows of."""
    known = {"adapters", "files", "id", "lock", "resume", "tandem.db", "tinker"}
    assert {path.name for path in state.iterdir()} == known
    assert list((state / "tinker").iterdir()) == []
    assert list((state / "resume").iterdir()) == []
    assert not [path for path in state.rglob("*") if path.name.startswith(".")]
    for adapter in (state / "adapters").iterdir():
        assert {path.name for path in adapter.iterdir()} == {
            "adapter_config.json", WEIGHTS, "trainer_state.safetensors",
        }  # fmt: skip
