"""What a server finds after it, or the one before it, stopped: jobs go on, nothing is lost or half there."""

import asyncio
import errno
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from tandem.errors import Conflict
from tandem.finetune import data
from tandem.jobs import queries

ROWS, STEPS = 24, 24


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tokenizer):
    """The weights of an uninterrupted job, and the steps' losses."""
    from places import Place

    async def train():
        place = Place(tmp_path_factory.mktemp("reference"), tokenizer)
        await place.open()
        job = await place.until((await place.create(rows=ROWS)).job_id, "succeeded")
        found = await place.weights(job.fine_tuned_model), await table(place, job)
        await place.jobs.close()
        return found

    return asyncio.run(train())


async def table(place, job):
    return (await place.jobs.file_path(job.result_files[0])).read_text()


async def outcome(place, job_id):
    job = await place.until(job_id, "succeeded")
    return await place.weights(job.fine_tuned_model), await table(place, job)


def leftovers(place):
    return [p.name for p in place.root.rglob("*") if p.name.endswith((".tmp", ".part"))]


@pytest.mark.parametrize("seed", range(3))
async def test_a_killed_server_goes_on_to_the_same_weights(any_place, reference, seed):
    place, choose = any_place, random.Random(seed)
    place.engine.delay = 0.001
    await place.open(resume_every_s=0.01)
    job_id = (await place.create(rows=ROWS)).job_id
    for _ in range(3):
        await asyncio.sleep(choose.uniform(0.01, 0.15))
        await place.kill()
        place.engine.delay = 0.001
        await place.open(resume_every_s=0.01)
    assert await outcome(place, job_id) == reference
    assert leftovers(place) == [] and list((place.root / "resume").iterdir()) == []
    names = [c.name for c in (await place.jobs.checkpoints(job_id))[0]]
    assert len(names) == 2 and sorted(names) == sorted(a.name for a in await place.jobs.adapters())


async def test_a_process_killed_by_sigkill_goes_on_to_the_same_weights(place, reference):
    """The real thing, several times: a process with a server in it, and signal 9 at a random instant."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    choose = random.Random(1)
    job_id = None
    for _ in range(3):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "served", str(place.root), str(ROWS), stdout=asyncio.subprocess.PIPE, env=env
        )
        job_id = (await process.stdout.readline()).decode().strip()
        await asyncio.sleep(choose.uniform(0.0, 0.12))
        process.send_signal(signal.SIGKILL)
        await process.wait()
    await place.open()
    assert await outcome(place, job_id) == reference
    assert leftovers(place) == []


async def test_close_saves_where_a_job_stands_and_the_next_server_goes_on_from_there(any_place, reference):
    place = any_place
    place.engine.delay = 0.002
    await place.open()
    job_id = (await place.create(rows=ROWS)).job_id
    await place.until_step(job_id, 5)
    await place.jobs.close()
    assert place.engine.runs == {}
    done = place.engine.calls.count(("optim_step", job_id))
    await place.open()
    assert await outcome(place, job_id) == reference
    messages = await place.messages(job_id)
    assert f"The server stopped; the job goes on from step {done}" in messages
    assert f"Fine-tuning job resumed from step {done}" in messages
    assert place.engine.calls.count(("optim_step", job_id)) == STEPS  # none was done twice


async def test_pause_frees_the_run_and_resume_goes_on(place, reference):
    place.engine.delay = 0.002
    await place.open()
    job_id = (await place.create(rows=ROWS)).job_id
    await place.until_step(job_id, 3)
    assert (await place.jobs.pause(job_id)).status == "pausing"
    with pytest.raises(Conflict):
        await place.jobs.pause(job_id)
    paused = await place.until(job_id, "paused")
    assert place.engine.runs == {} and paused.estimated_finish is None and 3 <= paused.step < STEPS
    await place.jobs.close()
    await place.open()
    assert (await place.jobs.job(job_id)).status == "paused"
    assert (await place.jobs.resume(job_id)).status == "queued"
    assert await outcome(place, job_id) == reference
    assert place.engine.calls.count(("optim_step", job_id)) == STEPS


@pytest.mark.parametrize(
    "status, after",
    [("validating_files", "succeeded"), ("queued", "succeeded"), ("running", "succeeded"), ("pausing", "paused"),
     ("paused", "paused"), ("succeeded", "succeeded"), ("failed", "failed"), ("cancelled", "cancelled")],
)  # fmt: skip
async def test_a_restart_with_a_job_in_each_status(any_place, status, after):
    place = any_place
    await place.open()
    place.jobs._queue._is_closing = True  # the queue stands still
    job_id = (await place.create()).job_id
    way = {"validating_files": (), "cancelled": ("cancelled",), "failed": ("failed",), "queued": ("queued",)}
    way |= {"paused": ("queued", "paused"), "running": ("queued", "running")}
    way |= {"pausing": (*way["running"], "pausing"), "succeeded": (*way["running"], "succeeded")}
    if status in ("validating_files", "cancelled", "failed"):
        changes = {}
    else:
        numbers = {"n_epochs": 2, "batch_size": 2, "learning_rate_multiplier": 1.0}
        tandem = (await place.jobs.job(job_id)).tandem
        tandem = type(tandem)(max_seq_len=256, alpha=32.0, learning_rate=1e-4)
        changes = {"total_steps": 8, "hyperparameters": numbers, "tandem": tandem}
    for following in way[status]:
        await place.jobs._db.run(queries.move, job_id, following, **changes)
    await place.kill()
    await place.open()
    assert (await place.until(job_id, after)).status == after
    if after == "paused":
        await place.jobs.resume(job_id)
        await place.until(job_id, "succeeded")


async def test_saved_progress_that_vanished_starts_over(place, reference):
    place.engine.delay = 0.002
    await place.open()
    job_id = (await place.create(rows=ROWS)).job_id
    await place.until_step(job_id, 3)
    await place.jobs.close()
    for path in (place.root / "resume").iterdir():
        shutil.rmtree(path)
    await place.open()
    assert await outcome(place, job_id) == reference
    assert "The saved progress is gone from the disk; training starts over" in await place.messages(job_id)


async def test_a_full_disk_at_the_end_does_not_end_the_job(place, reference):
    place.engine.delay = 0.002
    await place.open()
    job_id = (await place.create(rows=ROWS)).job_id
    await place.until_step(job_id, 3)
    place.engine.save_error = OSError(errno.ENOSPC, "No space left on device")
    await place.jobs.close()
    place.engine.save_error = None
    await place.open()
    assert await outcome(place, job_id) == reference


async def test_orphans_are_swept_and_the_rest_stays(place):
    await place.open()
    job = await place.until((await place.create()).job_id, "succeeded")
    kept = {p for p in place.root.rglob("*") if p.is_file() and p.suffix not in (".db-wal", ".db-shm")}
    await place.kill()
    (place.root / "files" / ".file-x.part").write_text("half")
    (place.root / "files" / "file-nobody").write_text("whole")
    for name in ("adapters/step-lost", "adapters/.step-lost.part", "resume/ftjob-x.1"):
        (place.root / name).mkdir()
        (place.root / name / "f").write_text("")
    await place.open()
    assert {p for p in place.root.rglob("*") if p.is_file() and p.suffix not in (".db-wal", ".db-shm")} == kept
    assert await place.jobs.resident(job.fine_tuned_model) == job.fine_tuned_model


async def test_a_dead_engine_leaves_the_job_for_the_next_server(place, reference):
    from tandem.errors import EngineDead

    await place.open()

    def dead(*_):
        raise EngineDead("the engine process ended with code -9")

    place.engine.delay = 0.002
    job_id = (await place.create(rows=ROWS)).job_id
    await place.until_step(job_id, 3)
    place.engine.forward_backward = dead
    other = (await place.create(rows=ROWS)).job_id
    await asyncio.sleep(0.1)
    assert (await place.jobs.job(job_id)).status == "running"
    await place.kill()
    await place.open()
    assert await outcome(place, job_id) == reference == await outcome(place, other)


async def test_a_server_that_stops_does_not_wait_for_a_large_file_to_be_read(place, monkeypatch):
    release, started = threading.Event(), threading.Event()

    def slow(*_):
        started.set()
        release.wait(30)

    monkeypatch.setattr(data, "load", slow)
    await place.open()
    job_id = (await place.create()).job_id
    await asyncio.to_thread(started.wait, 5)
    began = time.monotonic()
    await place.jobs.close()
    assert time.monotonic() - began < 3
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "tandem-data"]
    assert thread.daemon  # so the process may end
    release.set()
    monkeypatch.undo()
    await place.open()
    await place.until(job_id, "succeeded")
