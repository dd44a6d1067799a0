"""What users may ask, and what they hear when it cannot be: creation, files, lists, the queue."""

import asyncio
import math
import time

import pytest
from places import facts

from tandem.errors import BudgetError, ConfigError, Conflict, InvalidRequest, NotFound, TandemError
from tandem.jobs import files
from tandem.jobs.records import JobRequest, TandemExtras


@pytest.mark.parametrize(
    "param, more",
    [
        ("suffix", {"suffix": "No Spaces"}), ("suffix", {"suffix": "a" * 65}), ("suffix", {"suffix": ""}),
        ("method.reinforcement.grader", {"method": "reinforcement"}), ("method.type", {"method": "magic"}),
        ("beta", {"method": "dpo", "beta": 0.0}), ("beta", {"method": "dpo", "beta": math.nan}),
        ("tandem.format", {"method": "dpo", "tandem": {"format": "chat"}}),
        ("tandem.optimizer", {"method": "dpo", "tandem": {"optimizer": "mezo", "learning_rate": 1e-3}}),
        ("tandem.optimizer", {"tandem": {"optimizer": "adam"}}),
        ("tandem.learning_rate", {"tandem": {"optimizer": "sgd"}}),
        ("n_epochs", {"n_epochs": 0}), ("batch_size", {"batch_size": -1}), ("batch_size", {"batch_size": "many"}),
        ("learning_rate_multiplier", {"learning_rate_multiplier": math.nan}),
        ("learning_rate_multiplier", {"learning_rate_multiplier": math.inf}),
        ("seed", {"seed": -1}), ("seed", {"seed": 2**40}),
        ("metadata", {"metadata": {str(i): "" for i in range(17)}}), ("metadata", {"metadata": {"k": "v" * 513}}),
        ("metadata", {"metadata": {"k": "nul\0"}}), ("metadata", {"metadata": {"k\ud800": "v"}}),
        ("tandem.rank", {"tandem": {"rank": 0}}), ("tandem.dropout", {"tandem": {"dropout": 1.0}}),
        ("tandem.learning_rate", {"tandem": {"learning_rate": math.nan}}),
        ("tandem.schedule", {"tandem": {"schedule": "wild"}}), ("tandem.format", {"tandem": {"format": "wild"}}),
        ("tandem.target_modules", {"tandem": {"target_modules": ()}}),
        ("tandem.max_seq_len", {"tandem": {"max_seq_len": 257}}),
        ("tandem.max_seq_len", {"tandem": {"max_seq_len": 1}}),
        ("tandem.checkpoint_every", {"tandem": {"checkpoint_every": 0}}),
    ],
)  # fmt: skip
async def test_creation_refuses_by_the_fields_name(place, param, more):
    await place.open()
    with pytest.raises(InvalidRequest) as caught:
        await place.create(**more)
    assert caught.value.param == param
    assert (await place.jobs.jobs())[0] == []


async def test_creation_refuses_what_is_not_there(place):
    await place.open()
    other = await place.upload("whatever", purpose="assistants")
    for settings, param, kind in (
        ({"model": "gpt-5"}, "model", NotFound),
        ({"file_id": "file-none"}, "training_file", NotFound),
        ({"validation_file": "file-none"}, "validation_file", NotFound),
        ({"file_id": other}, "training_file", InvalidRequest),
    ):
        with pytest.raises(kind) as caught:
            await place.create(**settings)
        assert caught.value.param == param


async def test_creation_refuses_what_cannot_fit_with_the_numbers(place):
    place.engine.longest = 100
    await place.open()
    with pytest.raises(BudgetError, match="256 tokens needs 9 GB"):
        await place.create(tandem={"max_seq_len": 256})
    long = await place.upload([{"prompt": "Say it.", "completion": " word" * 180}])
    with pytest.raises(BudgetError):  # its longest line says so, without being asked
        await place.create(file_id=long)
    await place.until((await place.create()).job_id, "succeeded")  # short rows fit


async def test_rows_longer_than_their_line_suggests_fail_at_the_check(place):
    await place.open()
    file_id = await place.upload(facts(4))
    real = place.engine.check_run
    sizes = []

    async def check_run(lora, longest):
        sizes.append(longest)
        if len(sizes) > 1:
            raise BudgetError("needs 9 GB")
        return await real(lora, longest)

    place.engine.check_run = check_run
    job = await place.until((await place.create(file_id=file_id)).job_id, "failed")
    assert job.error["code"] == "insufficient_memory"
    # The raw line of JSON has more tokens than what is made of it.
    assert sizes[1] <= sizes[0] < 256


@pytest.mark.parametrize(
    "content, name, wanted",
    [
        ("not json\n", "bad.jsonl", "bad.jsonl:1:"),
        ("".join(f'{{"prompt": "a", "completion": "b{i}"}}\n' for i in range(5000)) + "{broken\n", "t.jsonl", "5001"),
        ('{"messages": [{"role": "user", "content": "hi"}]}\n', "t.jsonl", "t.jsonl:1:"),
        ("\n\n", "t.jsonl", "t.jsonl"),
    ],
)
async def test_a_bad_training_file_fails_the_job_and_says_where(place, content, name, wanted):
    await place.open()
    job = await place.until((await place.create(file_id=await place.upload(content, name))).job_id, "failed")
    assert job.error["code"] == "invalid_training_file" and job.error["param"] == "training_file"
    assert wanted in job.error["message"]
    await place.until((await place.create()).job_id, "succeeded")


async def test_a_bad_validation_file_is_named_as_such(place):
    await place.open()
    job = await place.create(validation_file=await place.upload("not json\n", "valid.jsonl"))
    job = await place.until(job.job_id, "failed")
    assert job.error["code"] == "invalid_validation_file" and "valid.jsonl:1:" in job.error["message"]


async def test_uploads_that_cannot_be_trained_on_are_refused_at_once(place):
    await place.open(max_file_bytes=5000)
    for content in (
        b"",
        b"PK\x03\x04\0\0binary",
        b'{"prompt": "\xff\xfe"}\n',
        '{"a": "b"}'.encode("utf-16"),
        b"\xe6\x97",
    ):
        with pytest.raises(InvalidRequest) as caught:
            await place.upload(content)
        assert caught.value.param == "file"
    with pytest.raises(InvalidRequest, match="5000 bytes"):
        await place.upload("x" * 5001)
    with pytest.raises(InvalidRequest, match="purpose"):
        await place.upload("x", purpose="fun")
    with pytest.raises(InvalidRequest):
        await place.upload("x", name="nul\0.jsonl")
    split = "é" * 1500  # two bytes each, cut in the middle by chunks of 1000 behind one byte
    assert await place.upload("x" + split)
    assert len(list((place.root / "files").iterdir())) == 1


async def test_an_interrupted_upload_leaves_nothing(place):
    await place.open()

    async def chunks():
        yield b"some"
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        await place.jobs.save_file("a.jsonl", "fine-tune", chunks())
    assert list((place.root / "files").iterdir()) == [] and (await place.jobs.files())[0] == []


async def test_a_full_disk_refuses_the_upload(place, monkeypatch):
    await place.open()

    def fsync(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(TandemError, match="no space is left"):
        await place.upload(facts(3))
    assert list((place.root / "files").iterdir()) == []


async def test_files_lists_contents_and_deletion(any_place):
    place = any_place
    await place.open()
    ids = [await place.upload(facts(n + 1), name=f"{n}.jsonl") for n in range(5)]
    ids.append(await place.upload("x", purpose="batch", name="ünïcode.jsonl"))
    page, more = await place.jobs.files(limit=2)
    assert [f.file_id for f in page] == ids[:3:-1] and more
    page, more = await place.jobs.files(purpose="fine-tune", after=page[-1].file_id, limit=10)
    assert [f.file_id for f in page] == ids[3::-1] and not more
    assert [f.file_id for f in (await place.jobs.files(order="asc"))[0]] == ids
    with pytest.raises(InvalidRequest, match="after"):
        await place.jobs.files(after="file-none")
    path = await place.jobs.file_path(ids[0])
    assert (await place.jobs.file(ids[0])).bytes == len(path.read_bytes())
    await place.jobs.delete_file(ids[0])
    assert not path.exists()
    for call in (place.jobs.file, place.jobs.file_path, place.jobs.delete_file):
        with pytest.raises(NotFound):
            await call(ids[0])


async def test_a_file_past_its_time_is_gone(any_place):
    place = any_place
    await place.open()
    file_id = await place.upload(facts(2), expires_after_s=0)
    with pytest.raises(NotFound):
        await place.jobs.file(file_id)
    assert (await place.jobs.files())[0] == []
    await place.jobs.close()
    await place.open()
    async with asyncio.timeout(5):
        while list((place.root / "files").iterdir()):
            await asyncio.sleep(0.01)


async def test_a_file_in_use_stays_until_the_job_has_ended(place):
    place.engine.delay = 0.01
    await place.open()
    job = await place.create()
    with pytest.raises(Conflict, match=job.job_id):
        await place.jobs.delete_file(job.training_file)
    await place.jobs.cancel(job.job_id)
    await place.jobs.delete_file(job.training_file)


async def test_a_file_that_vanishes_from_the_disk_fails_the_job_clearly(place):
    await place.open()
    place.jobs._queue._is_closing = True
    job = await place.create()
    (place.root / "files" / job.training_file).unlink()
    await place.jobs.close()
    await place.open()
    job = await place.until(job.job_id, "failed")
    assert job.error["code"] == "invalid_training_file" and job.training_file in job.error["message"]


async def test_lists_of_jobs_and_events(any_place):
    place = any_place
    await place.open()
    place.jobs._queue._is_closing = True
    file_id = await place.upload(facts(2))
    odd = {"it's": 'a "quoted" $.key'}
    ids = [(await place.create(file_id=file_id, metadata={"n": str(n % 2)} | odd)).job_id for n in range(5)]
    page, more = await place.jobs.jobs(limit=3)
    assert [j.job_id for j in page] == ids[:1:-1] and more
    page, more = await place.jobs.jobs(after=page[-1].job_id, limit=3)
    assert [j.job_id for j in page] == ids[1::-1] and not more
    assert [j.job_id for j in (await place.jobs.jobs(metadata={"n": "0"} | odd))[0]] == ids[::-2]
    page, more = await place.jobs.jobs(metadata={"n": "0"}, limit=2, after=ids[4])
    assert [j.job_id for j in page] == [ids[2], ids[0]] and not more
    assert (await place.jobs.jobs(metadata={"other": "0"}))[0] == []
    for call in (place.jobs.job, place.jobs.events, place.jobs.checkpoints, place.jobs.cancel, place.jobs.pause,
                 place.jobs.resume):  # fmt: skip
        with pytest.raises(NotFound):
            await call("ftjob-none")


# The queue


async def test_priority_goes_before_age_and_only_so_many_run(any_place):
    place = any_place
    place.engine.delay = 0.002
    await place.open(max_running_jobs=2)
    most = 0
    real = place.engine.open_run

    def open_run(*args, **kwargs):
        nonlocal most
        most = max(most, len(place.engine.queues) + 1)
        return real(*args, **kwargs)

    place.engine.open_run = open_run
    place.jobs._queue._is_closing = True
    file_id = await place.upload(facts(4))
    jobs = [await place.create(file_id=file_id, tandem={"priority": p}) for p in (0, 0, 5, -1, 5)]
    await place.jobs.close()
    await place.open(max_running_jobs=1)
    for job in jobs:
        await place.until(job.job_id, "succeeded")
    opened = [run_id for name, run_id, *_ in place.engine.calls if name == "open_run"]
    wanted = [jobs[n].job_id for n in (2, 4, 0, 1, 3)]
    # The first may start before the others' files are checked, but that too goes by priority.
    assert opened == wanted and most == 1


async def test_cancel_before_start_and_while_running(place):
    place.engine.delay = 0.005
    await place.open(max_running_jobs=1)
    first, second = [await place.create(rows=20) for _ in range(2)]
    assert (await place.jobs.cancel(second.job_id)).status == "cancelled"
    await place.until_step(first.job_id, 2)
    cancelled = await place.jobs.cancel(first.job_id)
    assert cancelled.status == "cancelled" and cancelled.finished_at and cancelled.fine_tuned_model is None
    third = await place.until((await place.create()).job_id, "succeeded")
    assert third.job_id in {run for name, run, *_ in place.engine.calls if name == "open_run"}
    assert second.job_id not in {run for name, run, *_ in place.engine.calls if name == "open_run"}
    assert place.engine.runs == {} and list((place.root / "resume").iterdir()) == []
    for call in (place.jobs.cancel, place.jobs.pause, place.jobs.resume):
        with pytest.raises(Conflict):
            await call(first.job_id)
    last = (await place.messages(first.job_id))[-1]
    assert last == "The job was cancelled"


async def test_pause_during_the_check_of_the_files(place, monkeypatch):
    from tandem.finetune import data

    real, started = data.load, []

    def slow(*args):
        started.append(args)
        time.sleep(0.1)
        return real(*args)

    monkeypatch.setattr(data, "load", slow)
    await place.open()
    job = await place.create()
    while not started:
        await asyncio.sleep(0.005)
    assert (await place.jobs.pause(job.job_id)).status == "paused"
    await asyncio.sleep(0.2)
    paused = await place.jobs.job(job.job_id)
    assert paused.status == "paused" and paused.hyperparameters["n_epochs"] == 2 and paused.total_steps == 0
    assert (await place.jobs.resume(job.job_id)).status == "validating_files"
    await place.until(job.job_id, "succeeded")


@pytest.mark.parametrize("verb, status", [("cancel", "cancelled"), ("pause", "paused")])
async def test_stops_while_the_files_are_loaded_to_run(place, monkeypatch, verb, status):
    from tandem.finetune import data

    await place.open(max_running_jobs=1)
    job = await place.create()
    real, calls = data.load, []

    def slow(*args):
        calls.append(args)
        time.sleep(0.1)
        return real(*args)

    monkeypatch.setattr(data, "load", slow)
    place.jobs._queue._load, load = None, place.jobs._queue._load

    async def loading(job):
        place.jobs._queue._checked = None
        return await load(job)

    place.jobs._queue._load = loading
    while (await place.jobs.job(job.job_id)).status != "running":
        await asyncio.sleep(0.005)
    await getattr(place.jobs, verb)(job.job_id)
    await place.until(job.job_id, status)
    assert place.engine.calls.count(("open_run", job.job_id)) == 0
    if verb == "pause":
        await place.jobs.resume(job.job_id)
        await place.until(job.job_id, "succeeded")


async def test_a_thousand_queued_jobs(place):
    await place.open(max_running_jobs=1)
    place.engine.delay = 1.0
    file_id = await place.upload(facts(2))
    request = JobRequest(model="demo", training_file=file_id, tandem=TandemExtras(max_seq_len=64), n_epochs=1)
    began = time.monotonic()
    jobs = await asyncio.gather(*(place.jobs.create(request) for _ in range(1000)))
    assert time.monotonic() - began < 20
    pages, after = [], None
    while True:
        page, more = await place.jobs.jobs(after=after, limit=100)
        pages += page
        if not more:
            break
        after = page[-1].job_id
    assert {j.job_id for j in pages} == {j.job_id for j in jobs} and len(pages) == 1000
    await asyncio.gather(*(place.jobs.cancel(job.job_id) for job in jobs[:990]))
    place.engine.delay = 0.0
    for job in jobs[990:]:
        await place.until(job.job_id, "succeeded")


async def test_one_server_per_state_directory(any_place, tokenizer, tmp_path):
    from places import Place

    place = any_place
    await place.open()
    second = Place(place.root, tokenizer, place.url)
    with pytest.raises(ConfigError, match="another Tandem server uses the state directory"):
        await second.open()
    if place.url:
        with pytest.raises(ConfigError, match="another Tandem server uses this database"):
            await Place(tmp_path / "other", tokenizer, place.url).open()
    await place.jobs.close()
    if place.url:
        with pytest.raises(ConfigError, match="do not belong together"):
            await Place(tmp_path / "other", tokenizer, place.url).open()
    await place.open()


async def test_a_state_directory_with_files_refuses_a_fresh_database(place):
    await place.open()
    await place.upload(facts(2))
    await place.jobs.close()
    place.jobs = None
    for path in place.root.glob("tandem.db*"):
        path.unlink()
    with pytest.raises(ConfigError, match="do not belong together"):
        await place.open()
    assert len(list((place.root / "files").iterdir())) == 1


@pytest.mark.parametrize(
    "url, wanted",
    [("nonsense", "no URL"), ("mysql://x/y", "not supported"), ("postgresql://nobody@127.0.0.1:1/x", "cannot use"),
     ("sqlite:////proc/no/such.db", "cannot use")],
)  # fmt: skip
async def test_database_urls_that_cannot_be_used(place, url, wanted):
    place.url = url
    with pytest.raises(ConfigError, match=wanted):
        await place.open()


async def test_a_state_directory_that_cannot_be_written(place):
    place.root = place.root.parent / "file" / "below"
    (place.root.parent).write_text("")
    with pytest.raises(ConfigError, match="cannot use the state directory"):
        await place.open()


async def test_auto_is_resolved_and_shown(place):
    await place.open()
    place.engine.delay = 0.0
    job = await place.create(rows=10, n_epochs="auto", batch_size="auto", learning_rate_multiplier="auto", seed=None)
    assert set(job.hyperparameters.values()) == {"auto"} and 0 <= job.seed < 2**31
    done = await place.until(job.job_id, "succeeded")
    assert done.hyperparameters == {"n_epochs": 25, "batch_size": 4, "learning_rate_multiplier": 1.0}
    assert done.seed == job.seed and done.total_steps == 75 and done.trained_tokens > 0
