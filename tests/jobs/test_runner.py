"""A job from its creation to its model: steps, events, checkpoints, endings."""

import csv
import errno
from pathlib import Path

import pytest

from tandem.errors import NotFound
from tandem.finetune import data
from tandem.jobs import queries
from tandem.jobs.recipe import recipe
from tandem.jobs.runner import DEPTH


async def test_a_job_trains_publishes_and_succeeds(any_place):
    place = any_place
    await place.open()
    created = await place.create(suffix="my-model", metadata={"team": "a"}, n_epochs=2)
    assert created.status == "validating_files" and created.job_id.startswith("ftjob-")
    job = await place.until(created.job_id, "succeeded")
    assert job.fine_tuned_model == f"ft:demo:acme:my-model:{job.job_id[6:14]}"
    assert job.hyperparameters == {"n_epochs": 2, "batch_size": 2, "learning_rate_multiplier": 1.0}
    assert job.tandem.learning_rate == 4e-4 and job.tandem.alpha == 32.0  # hidden size 512
    assert (job.step, job.total_steps, job.error) == (8, 8, None) and job.finished_at >= job.created_at
    messages = await place.messages(job.job_id)
    for line in (
        f"Created fine-tuning job: {job.job_id}", f"Validating training file: {job.training_file}",
        "Fine-tuning job started", "Step 1/8: training loss=3.00", "Checkpoint created at step 4",
        f"New fine-tuned model created: {job.fine_tuned_model}", "The job has successfully completed",
    ):  # fmt: skip
        assert messages.count(line) == 1, messages
    checkpoints, _ = await place.jobs.checkpoints(job.job_id)
    assert [c.name for c in checkpoints] == [job.fine_tuned_model, f"{job.fine_tuned_model}:ckpt-step-4"]
    assert [await place.jobs.resident(c.name) for c in checkpoints] == [c.name for c in checkpoints]
    assert {c.name for c in checkpoints} == place.engine.adapters.keys()
    assert place.engine.runs == {} and list((place.root / "resume").iterdir()) == []


async def test_metrics_and_the_result_file(place):
    await place.open()
    valid = await place.upload([{"prompt": "Fact 1?", "completion": " It is 7."}] * 40)
    job = await place.create(validation_file=valid, tandem={"validate_every": 3})
    job = await place.until(job.job_id, "succeeded")
    events = [e for e in (await place.jobs.events(job.job_id, limit=100))[0] if e.type == "metrics"]
    first, third = events[-1].data, events[-3].data
    assert first["step"] == 1 and first["total_steps"] == 8 and first["train_loss"] == 3.0
    assert first["serving_tpot_p95_ms"] == 25.0 and first["tokens_per_s"] > 0 and "valid_loss" not in first
    assert third["valid_loss"] == pytest.approx(3.0 / 1.3, abs=1e-5)
    losses = [event.data["train_loss"] for event in reversed(events)]
    assert losses == sorted(losses, reverse=True) and len(losses) == 8
    (result,) = job.result_files
    assert (await place.jobs.file(result)).purpose == "fine-tune-results"
    rows = list(csv.DictReader((await place.jobs.file_path(result)).open()))
    assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert [row["step"] for row in rows] == [str(n) for n in range(1, 9)] and rows[0]["valid_loss"] == ""
    last = (await place.jobs.checkpoints(job.job_id))[0][0].metrics
    assert last["full_valid_loss"] == last["valid_loss"] == float(rows[-1]["valid_loss"])


async def test_each_batch_is_one_call_whose_weights_sum_to_one(place):
    await place.open()
    sent = []
    real = place.engine.forward_backward
    place.engine.forward_backward = lambda run, examples: sent.append(examples) or real(run, examples)
    job = await place.until((await place.create(rows=5)).job_id, "succeeded")
    assert [len(examples) for examples in sent] == [2, 2, 1] * 2
    assert all(sum(w for e in examples for w in e.weights) == pytest.approx(1) for examples in sent)
    loaded = data.load(await place.jobs.file_path(job.training_file), place.tokenizer, 256, name="train.jsonl")
    plan = recipe(job, 5)
    wanted = [[loaded.rows[n].tokens[:-1] for n in plan.batch(step)] for step in range(6)]
    assert [[e.tokens for e in examples] for examples in sent] == wanted


async def test_two_steps_are_always_under_way(place):
    place.engine.delay = 0.01
    await place.open()
    depths = []
    real = place.engine.optim_step

    def optim_step(run_id, params):
        depths.append(place.engine.calls.count(("optim_step", run_id)) - place.engine.runs[run_id]["step"])
        return real(run_id, params)

    place.engine.optim_step = optim_step
    await place.until((await place.create(rows=20)).job_id, "succeeded")
    assert max(depths) == DEPTH - 1 and depths.count(DEPTH - 1) > 0.5 * len(depths)


async def test_divergence_fails_the_job_and_keeps_the_last_good_checkpoint(place):
    place.engine.diverge_at = 6
    await place.open()
    job = await place.until((await place.create()).job_id, "failed")
    assert job.error["code"] == "diverged" and "step 6" in job.error["message"] and job.fine_tuned_model is None
    ((checkpoint,), _) = await place.jobs.checkpoints(job.job_id)
    assert checkpoint.step == 4 and await place.jobs.resident(checkpoint.name) == checkpoint.name
    assert (await place.jobs.events(job.job_id, limit=1))[0][0].level == "error"
    assert place.engine.runs == {} and len(list((place.root / "adapters").iterdir())) == 1


@pytest.mark.parametrize("resume_every_s", [0.0, 1000.0])
async def test_a_full_disk_fails_the_job_and_nothing_else(place, resume_every_s):
    place.engine.save_error = OSError(errno.ENOSPC, "No space left on device")
    await place.open(resume_every_s)
    job = await place.until((await place.create()).job_id, "failed")
    assert job.error["code"] == "save_failed" and "no space is left" in job.error["message"]
    place.engine.save_error = None
    await place.until((await place.create()).job_id, "succeeded")


@pytest.mark.parametrize("resume_every_s", [0.0, 1000.0])
async def test_an_interrupted_job_goes_on_from_its_newest_checkpoint(any_place, resume_every_s):
    """With the time between resume points endless, checkpoints alone save progress; with none, both do in turn."""
    place = any_place
    await place.open(resume_every_s)
    settings = {"rows": 24, "tandem": {"checkpoint_every": 5}}
    quiet = await place.until((await place.create(**settings)).job_id, "succeeded")
    place.engine.delay = 0.005
    job_id = (await place.create(**settings)).job_id
    await place.until_step(job_id, 8)
    (newest, *_), _ = await place.jobs.checkpoints(job_id)
    point = await place.jobs._db.run(queries.resume_point, job_id)
    if resume_every_s:
        assert newest.step == 5 and newest.path == str(place.root / point.path) and point.step == 5
        assert list((place.root / "resume").iterdir()) == []
    else:
        assert point.step > 5 and point.path.startswith("resume/")
    await place.kill()
    await place.open(resume_every_s)
    job = await place.until(job_id, "succeeded")
    assert any(message.startswith("Fine-tuning job resumed from step ") for message in await place.messages(job_id))
    assert await place.weights(job.fine_tuned_model) == await place.weights(quiet.fine_tuned_model)
    # Going on from a checkpoint takes nothing away from it.
    checkpoints, _ = await place.jobs.checkpoints(job_id)
    assert [c.step for c in checkpoints] == [24, 20, 15, 12, 10, 5]
    assert all(Path(c.path, "adapter_model.safetensors").is_file() for c in checkpoints)
    assert list((place.root / "resume").iterdir()) == []


async def test_a_job_goes_on_from_a_checkpoint_that_was_deleted_as_an_adapter(place):
    place.engine.delay = 0.005
    await place.open()
    job_id = (await place.create(rows=24, tandem={"checkpoint_every": 5})).job_id
    await place.until_step(job_id, 6)
    place.engine.delay = 0.05
    ((checkpoint,), _) = await place.jobs.checkpoints(job_id)
    await place.jobs.delete_adapter(checkpoint.name)
    with pytest.raises(NotFound):
        await place.jobs.adapter(checkpoint.name)
    await place.kill()
    place.engine.delay = 0.005
    await place.open()
    await place.until_step(job_id, 12)
    assert "Fine-tuning job resumed from step 5" in await place.messages(job_id)
    assert not Path(checkpoint.path).exists()  # a newer state has taken its place
    await place.until(job_id, "succeeded")
    assert {c.step for c in (await place.jobs.checkpoints(job_id))[0]} == {10, 12, 15, 20, 24}


async def test_continuing_an_adapter_starts_from_its_weights_under_the_base_models_name(place):
    await place.open()
    first = await place.until((await place.create(suffix="a", tandem={"rank": 8})).job_id, "succeeded")
    await place.jobs.promote("assistant", first.fine_tuned_model)
    opened = []
    real = place.engine.open_run
    place.engine.open_run = lambda *a, **k: opened.append((a, k)) or real(*a, **k)
    second = await place.until((await place.create(model="assistant", suffix="b")).job_id, "succeeded")
    assert second.fine_tuned_model.startswith("ft:demo:acme:b:")
    (((_, lora), keywords),) = opened
    assert keywords["init_from"] == (await place.jobs.adapter(first.fine_tuned_model)).path
    assert (lora.rank, lora.alpha, lora.target_modules, lora.seed) == (8, 32.0, ("q_proj",), 7)
    assert await place.weights(second.fine_tuned_model) != await place.weights(first.fine_tuned_model)


async def test_a_run_without_room_waits_for_the_others(place):
    place.engine.max_runs, place.engine.delay = 1, 0.002
    await place.open()
    jobs = [await place.create(suffix="same") for _ in range(3)]
    done = [await place.until(job.job_id, "succeeded") for job in jobs]
    assert len({job.fine_tuned_model for job in done}) == 3
    messages = [m for job in jobs for m in await place.messages(job.job_id)]
    assert any(m.startswith("Waiting for the memory") for m in messages)


async def test_a_run_that_never_fits_fails(place):
    place.engine.max_runs = 0
    await place.open()
    job = await place.until((await place.create()).job_id, "failed")
    assert job.error["code"] == "insufficient_memory"
