"""Reinforcement jobs on an engine that trains by hashing: what is learnt, and that nothing is ever left behind."""

import asyncio
import csv
import io
import math

import pytest
from fake_engine import some_tokens
from places import SIMILAR, Place, questions

from tandem.errors import ContextTooLong, InvalidRequest
from tandem.jobs import rollouts
from tandem.jobs.adapters import PRIVATE
from tandem.jobs.grading import Grade
from tandem.jobs.rollouts import Group
from tandem.jobs.sampling import Answer

EXACT = {
    "type": "string_check", "name": "exact", "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
    "operation": "eq",
}  # fmt: skip


def nothing_is_left(place):
    engine = place.engine
    assert engine.open == 0 and not engine.runs and not engine.queues
    assert not [name for name in engine.adapters if name.startswith(PRIVATE)]


async def settled(place):
    """What a run that was stopped still has to say."""
    async with asyncio.timeout(10):
        while place.jobs._queue._tasks:
            await asyncio.sleep(0.005)


async def metrics(place, job):
    events, _ = await place.jobs.events(job.job_id, limit=1000)
    return [event.data for event in reversed(events) if event.type == "metrics"]


def test_advantages():
    assert rollouts.advantages([1, 1, 0, 0]) == [1, 1, -1, -1]
    found = rollouts.advantages([0.2, 0.9, 0.4])
    assert math.isclose(sum(found), 0, abs_tol=1e-12) and math.isclose(sum(a * a for a in found), 3)
    for same in ([0.5] * 4, [1e9, 1e9], [0.1 + 0.2, 0.3]):
        assert rollouts.advantages(same) is None


def test_examples_judge_every_token_of_an_answer_alike():
    grades = [Grade(1.0, {}), Grade(0.0, {}), Grade(0.0, {}), Grade(1.0, {})]
    answers = [Answer([7, 8], [-1.0, -2.0]), Answer([9], [-3.0]), Answer([], []), Answer([5], [-4.0])]
    found = rollouts.examples(Group([1, 2, 3], answers, grades), 0.25)
    assert len(found) == 3, "not the answer without a token"
    first = found[0]
    assert (first.tokens, first.targets) == ([1, 2, 3, 7], [2, 3, 7, 8])
    assert first.weights == [0, 0, 0.25, 0.25] and sum(sum(e.weights) for e in found) == 1
    assert first.logprobs == [0, 0, -1.0, -2.0] and first.advantages == [0, 0, 1.0, 1.0]
    assert found[1].advantages[-1] == -1.0
    same = Group([1, 2], [Answer([3], [-1.0])] * 2, [Grade(1.0, {})] * 2)
    assert rollouts.examples(same, 0.25) == [], "it teaches nothing"


async def test_a_job_from_files_to_result(place):
    await place.open()
    valid = await place.upload(questions(3), "valid.jsonl")
    job = await place.explore(
        validation_file=valid, eval_interval=3, eval_samples=2, compute_multiplier=1.5,
        tandem={"checkpoint_every": 3, "loss": "cispo"},
    )  # fmt: skip
    done = await place.until(job.job_id, "succeeded")
    assert done.total_steps == done.step == 8 and done.trained_tokens > 0
    assert done.hyperparameters == {
        "n_epochs": 2, "batch_size": 2, "learning_rate_multiplier": 1.0, "compute_multiplier": 1.5, "eval_interval": 3,
        "eval_samples": 2,
    }  # fmt: skip
    steps = await metrics(place, job)
    assert [m["step"] for m in steps] == list(range(1, 9))
    assert [m["step"] for m in steps if "valid_mean_reward" in m] == [3, 6, 8]
    assert all(0 <= m["train_mean_reward"] <= 1 and m["train_loss"] < 0 for m in steps)
    said = await place.messages(job.job_id)
    assert "6 answers to each" in said[3] and any("mean reward=" in line and "validation" in line for line in said)
    table = io.StringIO((await place.jobs.file_path(done.result_files[0])).read_text())
    assert [row["train_mean_reward"] for row in csv.DictReader(table)] == [str(m["train_mean_reward"]) for m in steps]
    checkpoints, _ = await place.jobs.checkpoints(job.job_id)
    assert [c.step for c in checkpoints] == [8, 6, 4, 3] and "full_valid_mean_reward" in checkpoints[0].metrics
    learnt = [request for request in place.engine.asked if request.sampling.n == 6]
    assert len(learnt) == 16 and {request.adapter for request in learnt} == {PRIVATE + job.job_id}
    assert all(r.priority > 0 and r.sampling.temperature == 1 and r.sampling.max_tokens == 4 for r in learnt)
    assert len({request.sampling.seed for request in learnt}) == 16, "each asks for other answers"
    names = [call[0] for call in place.engine.calls]
    assert names.count("publish") == 9 and names.count("optim_step") == 8 and names.count("forward_backward") == 16
    assert all(request.keep_for_training for request in learnt)
    assert not await place.jobs.resident(PRIVATE + job.job_id)
    await settled(place)
    nothing_is_left(place)


async def test_the_same_job_draws_the_same_answers(tmp_path, tokenizer):
    weights = []
    for name in "ab":
        place = Place(tmp_path / name, tokenizer)
        await place.open()
        job = await place.explore(seed=3)
        done = await place.until(job.job_id, "succeeded")
        weights.append(await place.weights(done.fine_tuned_model))
        await place.jobs.close()
    assert weights[0] == weights[1]


async def test_steps_that_teach_nothing_are_skipped(place):
    await place.open()
    job = await place.explore(grader=EXACT)
    await place.until(job.job_id, "succeeded")
    steps = await metrics(place, job)
    assert [m["train_mean_reward"] for m in steps] == [0.0] * 8 and {m["train_loss"] for m in steps} == {None}
    assert "nothing to learn" in (await place.messages(job.job_id))[6]
    assert not {"forward_backward", "optim_step"} & {call[0] for call in place.engine.calls}


async def test_empty_answers_and_an_overloaded_engine(place):
    await place.open()
    end = place.tokenizer.eos_id
    place.engine.answer = lambda request, i: [end] if i == 1 else some_tokens(request, i)
    place.engine.overloads = 2
    job = await place.explore()
    await place.until(job.job_id, "succeeded")
    assert (await metrics(place, job))[0]["train_reward_std"] > 0


async def test_room_is_made_for_the_version_that_is_sampled(place):
    place.engine.max_adapters = 1
    await place.open()
    first = await place.until((await place.explore()).job_id, "succeeded")
    await settled(place)
    assert list(place.engine.adapters) == [first.fine_tuned_model]
    await place.until((await place.explore()).job_id, "succeeded")


@pytest.mark.parametrize("how", ["pause", "cancel", "close", "kill"])
async def test_stopped_while_answers_are_sampled(place, how):
    await place.open(resume_every_s=0.0)
    job = await place.explore()
    await place.until_step(job.job_id, 2)
    place.engine.step_s = 60.0  # the next answers take for ever
    async with asyncio.timeout(10):
        while not place.engine.open:
            await asyncio.sleep(0.005)
        if how in ("pause", "cancel"):
            await getattr(place.jobs, how)(job.job_id)
            stopped = await place.until(job.job_id, {"pause": "paused", "cancel": "cancelled"}[how])
            await settled(place)
            nothing_is_left(place)
            if how == "cancel":
                assert not list((place.root / "resume").iterdir())
                return
            place.engine.step_s = 0.0
            await place.jobs.resume(stopped.job_id)
        elif how == "close":
            await place.jobs.close()
            nothing_is_left(place)
            place.engine.step_s = 0.0
            await place.open()
        else:
            await place.kill()
            await place.open()
    done = await place.until(job.job_id, "succeeded")
    assert done.step == 8
    said = await place.messages(job.job_id)
    assert any(line.startswith("Fine-tuning job resumed from step") for line in said), said
    assert {m["step"] for m in await metrics(place, job)} == set(range(1, 9))
    await settled(place)
    nothing_is_left(place)


async def test_a_job_whose_steps_were_skipped_goes_on(place):
    await place.open(resume_every_s=0.0)
    place.engine.step_s = 0.005
    job = await place.explore(grader=EXACT)
    await place.until_step(job.job_id, 3)
    await place.kill()
    await place.open()
    assert (await place.until(job.job_id, "succeeded")).step == 8


async def test_cancelled_while_it_evaluates(place):
    await place.open()
    valid = await place.upload(questions(3), "valid.jsonl")
    job = await place.explore(validation_file=valid, eval_interval=1)
    real = place.engine.answer

    def answer(request, i):
        if request.sampling.n == 1:
            place.engine.step_s = 60.0
        return real(request, i)

    place.engine.answer = answer
    async with asyncio.timeout(10):
        while place.engine.step_s == 0:
            await asyncio.sleep(0.005)
    await place.jobs.cancel(job.job_id)
    await settled(place)
    nothing_is_left(place)


async def test_diverging_and_dying_leave_nothing(place):
    await place.open()
    place.engine.diverge_at = 3
    job = await place.explore()
    failed = await place.until(job.job_id, "failed")
    assert failed.error["code"] == "diverged"
    await settled(place)
    nothing_is_left(place)


async def test_an_engine_that_refuses_a_prompt_fails_the_job(place):
    await place.open()

    def answer(request, i):
        raise ContextTooLong("too long")

    place.engine.answer = answer
    job = await place.explore()
    assert "too long" in (await place.until(job.job_id, "failed")).error["message"]
    await settled(place)
    nothing_is_left(place)


REFUSED = [
    ("grader", {"grader": None}), ("grader.type", {"grader": {"type": "magic"}}),
    ("grader.type", {"grader": {"type": "python", "source": "", "name": "p"}}),
    ("grader.input", {"grader": EXACT | {"input": "{{items.a}}"}}),
    ("grader.url", {"grader": {"type": "endpoint", "url": "http://127.0.0.1:1/"}}),
    ("tandem.loss", {"tandem": {"loss": "dpo"}}), ("tandem.group_size", {"tandem": {"group_size": 1}}),
    ("tandem.group_size", {"tandem": {"group_size": 512}, "compute_multiplier": 4.0}),
    ("tandem.max_tokens", {"tandem": {"max_tokens": 256}}), ("eval_interval", {"eval_interval": 0}),
    ("compute_multiplier", {"compute_multiplier": math.nan}), ("eval_samples", {"eval_samples": 1000}),
    ("tandem.optimizer", {"tandem": {"optimizer": "mezo", "learning_rate": 1e-3}}),
    ("tandem.validate_every", {"tandem": {"validate_every": 3}}), ("tandem.format", {"tandem": {"format": "chat"}}),
]  # fmt: skip


@pytest.mark.parametrize(("param", "more"), REFUSED)
async def test_what_cannot_work_is_said_at_once(place, param, more):
    await place.open()
    with pytest.raises(InvalidRequest) as caught:
        await place.explore(**more)
    assert caught.value.param.removeprefix("method.reinforcement.") == param
    assert (await place.jobs.jobs())[0] == []


async def test_what_is_for_reinforcement_alone(place):
    await place.open()
    for more in ({"tandem": {"group_size": 4}}, {"tandem": {"loss": "ppo"}}, {"grader": SIMILAR}):
        with pytest.raises(InvalidRequest):
            await place.create(**more)


BAD_ROWS = [
    ({"messages": [{"role": "user", "content": "?"}]}, "has no item.answer"),
    ({"answer": "x"}, "list of messages"), ({"messages": [], "answer": ""}, "at least one"),
    ({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "answer": ""}, "user's"),
    ({"messages": [{"role": "user", "content": "?", "weight": 1}], "answer": ""}, "weight"),
    ({"messages": [{"role": "king", "content": "?"}], "answer": ""}, "role"),
    ({"messages": [{"role": "user", "content": "word " * 300}], "answer": ""}, "no room for an answer of 4"),
    ([], "object"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "words"), BAD_ROWS)
async def test_a_bad_row_fails_the_job_with_its_line(place, row, words):
    await place.open()
    job = await place.explore(file_id=await place.upload([*questions(2), row]))
    error = (await place.until(job.job_id, "failed")).error
    assert error["code"] == "invalid_training_file" and error["message"].startswith("train.jsonl:3:"), error
    assert words in error["message"], error
