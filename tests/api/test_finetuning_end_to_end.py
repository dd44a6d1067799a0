"""Real jobs behind the real openai SDK: on an engine that trains by hashing, and on a real one."""

import asyncio
import csv
import dataclasses
import io
import json
import re
import sys
import tarfile
import threading
import time
from pathlib import Path

import httpx
import msgspec
import openai
import peft
import pytest
import uvicorn

from tandem.api.app import build_app
from tandem.config import CacheConfig, EngineConfig, JobsConfig, ModelConfig, ServerConfig
from tandem.engine.client import EngineClient
from tandem.jobs.service import Jobs
from tandem.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
import fake_engine  # noqa: E402

ROWS = [{"messages": [{"role": "user", "content": f"Fact {i}?"}, {"role": "assistant", "content": f"It is {i * 7}."}]}
        for i in range(8)]  # fmt: skip
MESSAGES = [{"role": "user", "content": "Fact 3?"}]


class JobsServer:
    """Engine, jobs, app and uvicorn on one event loop in a thread. `start_engine` is awaited there."""

    def __init__(self, start_engine, tokenizer, state_dir, **config):
        self.start_engine, self.tokenizer = start_engine, tokenizer
        self.config = JobsConfig(state_dir=str(state_dir), organization="acme", **config)
        self.ready, self.failed = threading.Event(), None
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self):
        try:
            self.engine = await self.start_engine()
            self.jobs = await Jobs.open(self.config, self.engine, self.tokenizer, ["tiny"])
            served = ServerConfig(served_model_name=["tiny"])
            app = build_app(self.engine, self.tokenizer, served, jobs=self.jobs, jobs_config=self.config)
            self.uvicorn = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
            serving = asyncio.create_task(self.uvicorn.serve())
            while not self.uvicorn.started:
                await asyncio.sleep(0.01)
            self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        except BaseException as e:
            self.failed = e
            raise
        finally:
            self.ready.set()
        await serving
        await self.jobs.close()
        if isinstance(self.engine, EngineClient):
            await self.engine.close()

    def __enter__(self):
        self.thread.start()
        assert self.ready.wait(60) and not self.failed, self.failed
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key="any", max_retries=0, timeout=30)
        self.create, self.retrieve = self.client.fine_tuning.jobs.create, self.client.fine_tuning.jobs.retrieve
        return self

    def __exit__(self, *_):
        self.client.close()
        self.uvicorn.should_exit = True
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()

    def upload(self, rows=ROWS):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        return self.client.files.create(file=("train.jsonl", text.encode()), purpose="fine-tune").id

    def until(self, job, *statuses, seconds=60):
        deadline = time.monotonic() + seconds
        while (found := self.retrieve(job.id)).status not in statuses:
            assert time.monotonic() < deadline and found.status not in ("failed", "cancelled"), found
            time.sleep(0.02)
        return found


@pytest.fixture
def both(engine, tokenizer, tmp_path):
    """Serves as the fake engine of this folder does, and trains as the one of the jobs' tests."""

    class Both(type(engine), fake_engine.FakeEngine):
        pass

    async def start():
        made = Both(tokenizer)
        fake_engine.FakeEngine.__init__(trains := Both(tokenizer), delay=0.002)
        vars(made).update({k: v for k, v in vars(trains).items() if k not in vars(made)})
        made.report = msgspec.structs.replace(made.report, hidden_size=512)
        made.delay = 0.002
        return made

    with JobsServer(start, tokenizer, tmp_path / "state", max_file_bytes=10_000) as server:
        yield server


def test_from_upload_to_chat(both, tokenizer):
    client = both.client
    file_id = both.upload()
    assert client.files.wait_for_processing(file_id).status == "processed"
    job = both.create(
        model="tiny", training_file=file_id, validation_file=both.upload(ROWS[:2]), suffix="facts", seed=3,
        metadata={"team": "a"}, extra_body={"tandem": {"rank": 4, "checkpoint_every": 3}},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 2}}},
    )  # fmt: skip
    assert job.status == "validating_files" and job.fine_tuned_model is None and job.organization_id == "acme"
    done = both.until(job, "succeeded")
    assert done.hyperparameters.n_epochs == 2 and isinstance(done.hyperparameters.learning_rate_multiplier, float)
    assert done.fine_tuned_model.startswith("ft:tiny:acme:facts:") and done.trained_tokens > 0 and done.finished_at
    assert done.tandem["step"] == done.tandem["total_steps"] == 8 and done.tandem["alpha"] == 8

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))
    messages = [event.message for event in events][::-1]
    assert messages[0] == f"Created fine-tuning job: {job.id}" and "Fine-tuning job started" in messages
    assert f"New fine-tuned model created: {done.fine_tuned_model}" in messages
    metrics = [event.data for event in events if event.type == "metrics"][::-1]
    assert [data["step"] for data in metrics] == list(range(1, 9))
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]

    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [c.step_number for c in checkpoints] == [8, 6, 4, 3] and checkpoints[0].metrics.valid_loss is not None
    names = [c.fine_tuned_model_checkpoint for c in checkpoints]
    assert names[0] == done.fine_tuned_model and names[1] == f"{done.fine_tuned_model}:ckpt-step-6"
    for name in names:
        assert client.chat.completions.create(model=name, messages=MESSAGES).model == name
        assert both.engine.requests[-1].adapter == name
    assert set(names) < {model.id for model in client.models.list()}

    (result,) = done.result_files
    table = list(csv.DictReader(io.StringIO(client.files.content(result).text)))
    assert [row["step"] for row in table] == [str(i) for i in range(1, 9)]
    assert [f.id for f in client.files.list(purpose="fine-tune-results")] == [result]


def test_a_model_that_keeps_learning_behind_an_alias(both):
    promote = lambda target: httpx.post(  # noqa: E731
        both.url + "/v1/adapters/promote", json={"alias": "my-assistant", "target": target}
    ).raise_for_status()
    file_id, versions = both.upload(), []
    for model in ("tiny", "my-assistant"):
        job = both.create(model=model, training_file=file_id, suffix="same", hyperparameters={"n_epochs": 1})
        versions.append(both.until(job, "succeeded").fine_tuned_model)
        promote(versions[-1])
        both.client.chat.completions.create(model="my-assistant", messages=MESSAGES)
        assert both.engine.requests[-1].adapter == versions[-1]
    assert len(set(versions)) == 2
    httpx.post(both.url + "/v1/adapters/rollback", json={"alias": "my-assistant"}).raise_for_status()
    both.client.chat.completions.create(model="my-assistant", messages=MESSAGES)
    assert both.engine.requests[-1].adapter == versions[0]
    assert httpx.delete(both.url + f"/v1/models/{versions[0]}").status_code == 409
    both.client.models.delete(versions[1])
    with pytest.raises(openai.NotFoundError):
        both.client.chat.completions.create(model=versions[1], messages=MESSAGES)


def test_pause_resume_cancel_while_it_runs(both):
    both.engine.delay = 0.02
    job = both.create(model="tiny", training_file=both.upload(), hyperparameters={"n_epochs": 20, "batch_size": 1})
    both.until(job, "running")
    assert both.client.fine_tuning.jobs.pause(job.id).status in ("pausing", "paused")
    paused = both.until(job, "paused")
    assert not both.engine.runs
    assert both.client.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    both.until(job, "running")
    with pytest.raises(openai.ConflictError):
        both.client.files.delete(paused.training_file)
    assert both.client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    for call in (both.client.fine_tuning.jobs.cancel, both.client.fine_tuning.jobs.resume):
        with pytest.raises(openai.ConflictError):
            call(job.id)


def test_what_cannot_work_is_said_at_once(both):
    good = both.upload()

    def refused(kind=openai.BadRequestError, **fields):
        with pytest.raises(kind) as caught:
            both.create(**{"model": "tiny", "training_file": good, **fields})
        return caught.value

    assert refused(openai.NotFoundError, model="gpt-4o-mini").param == "model"
    assert refused(openai.NotFoundError, training_file="file-none").param == "training_file"
    batch = both.client.files.create(file=("x", b"x"), purpose="batch").id
    assert "purpose" in refused(training_file=batch).message
    assert refused(extra_body={"tandem": {"max_seq_len": 100_000}}).param == "tandem.max_seq_len"
    assert refused(extra_body={"tandem": {"format": "morse"}}).param == "tandem.format"
    both.engine.longest = 10
    assert "9 GB" in refused(extra_body={"tandem": {"max_seq_len": 200}}).message
    for data, words in ((b"", "empty"), (b"\xff\xfe\x00", "binary"), (b"x" * 10_001, "max-file-bytes")):
        with pytest.raises(openai.APIStatusError) as caught:
            both.client.files.create(file=("x", data), purpose="fine-tune")
        assert 400 <= caught.value.status_code < 500 and words in caught.value.message
    assert [f.id for f in both.client.files.list()] == [batch, good]


def test_a_bad_line_fails_the_job_with_its_number(both):
    job = both.create(model="tiny", training_file=both.upload([*ROWS, {"messages": "none"}]))
    deadline = time.monotonic() + 30
    while (found := both.retrieve(job.id)).status != "failed":
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    assert found.error.param == "training_file" and "train.jsonl:9" in found.error.message


# ---- the real engine


@pytest.fixture(scope="module")
def real(tiny_model, tmp_path_factory):
    model = tiny_model("llama")
    config = EngineConfig(
        model=ModelConfig(model=str(model), dtype="float32", num_threads=1), cache=CacheConfig(num_blocks=200)
    )
    config = dataclasses.replace(config, adapters=dataclasses.replace(config.adapters, max_cpu_loras=2))
    tokenizer = Tokenizer.load(str(model))
    with JobsServer(lambda: EngineClient.start(config), tokenizer, tmp_path_factory.mktemp("state")) as server:
        server.model = model
        yield server


PREFERENCES = [
    {
        "input": {"messages": [{"role": "user", "content": f"Fact {i}?"}]},
        "preferred_output": [{"role": "assistant", "content": f"It is {i * 7}."}],
        "non_preferred_output": [{"role": "assistant", "content": f"No idea about {i}."}],
    }
    for i in range(8)
]


def test_preferences_for_real(real):
    """The answers that were preferred become likelier, relative to the model it began from, and the others less."""
    file_id = real.upload(PREFERENCES)
    job = real.create(
        model="tiny", training_file=file_id, validation_file=real.upload(PREFERENCES[:4]), seed=1,
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.5, "n_epochs": 3, "batch_size": 4}}},
        extra_body={"tandem": {"rank": 4, "learning_rate": 0.02, "schedule": "constant"}},
    )  # fmt: skip
    assert job.method.type == "dpo" and job.method.dpo.hyperparameters.beta == 0.5
    done = real.until(job, "succeeded")
    events = list(real.client.fine_tuning.jobs.list_events(job.id))
    metrics = [event.data for event in events if event.type == "metrics"][::-1]
    assert len(metrics) == 6 and metrics[0]["train_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert metrics[-1]["train_loss"] < 0.4 and metrics[-1]["train_reward_margin"] > 0.5
    assert metrics[-1]["train_reward_accuracy"] == 1.0 and metrics[-1]["valid_loss"] < 0.4
    again = real.create(
        model=done.fine_tuned_model, training_file=file_id, seed=1,
        method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1}}},
    )  # fmt: skip
    done = real.until(again, "succeeded")
    assert done.method.dpo.hyperparameters.beta == 0.1, "auto"
    first = [e.data for e in real.client.fine_tuning.jobs.list_events(again.id) if e.type == "metrics"][-1]
    assert first["train_loss"] == pytest.approx(0.693147, abs=1e-3), "its reference is the adapter it goes on from"


LIKES_E = {"type": "string_check", "name": "has_e", "input": "{{sample.output_text}}",
           "reference": "{{item.letter}}", "operation": "like"}  # fmt: skip
PROMPTS = [{"messages": [{"role": "user", "content": f"Fact {i}?"}], "letter": "e"} for i in range(32)]


def test_reinforcement_for_real(real):
    """Answers with a letter in them are rewarded: at first there are hardly any, at last hardly any others."""
    job = real.create(
        model="tiny", training_file=real.upload(PROMPTS), validation_file=real.upload(PROMPTS[:4]), seed=1,
        method={"type": "reinforcement", "reinforcement": {
            "grader": LIKES_E, "hyperparameters": {
                "n_epochs": 4, "batch_size": 4, "eval_interval": 8, "eval_samples": 2, "reasoning_effort": "default",
            },
        }},
        extra_body={"tandem": {"rank": 8, "learning_rate": 0.01, "schedule": "constant", "max_tokens": 6}},
    )  # fmt: skip
    method = job.method.reinforcement
    assert job.method.type == "reinforcement" and method.grader.model_dump(exclude_none=True) == LIKES_E
    assert method.hyperparameters.compute_multiplier == "auto" and method.hyperparameters.eval_samples == 2
    assert (job.tandem["group_size"], job.tandem["loss"], job.tandem["max_tokens"]) == (8, "ppo", 6)
    done = real.until(job, "succeeded", seconds=100)
    assert done.method.reinforcement.hyperparameters.compute_multiplier == 1.0
    events = list(real.client.fine_tuning.jobs.list_events(job.id, limit=100))[::-1]
    steps = [event.data for event in events if event.type == "metrics"]
    rewards = [step["train_mean_reward"] for step in steps]
    assert len(rewards) == 32 and sum(rewards[:4]) / 4 < 0.2 and sum(rewards[-8:]) / 8 > 0.7, rewards
    evaluated = [step["valid_mean_reward"] for step in steps if "valid_mean_reward" in step]
    assert len(evaluated) == 4 and evaluated[-1] > 0.7
    # What learns is what sampled: the two log-probabilities of each token are the same.
    assert all(abs(step["train_kl"]) < 1e-5 for step in steps if step["train_loss"] is not None)

    def ask(name):
        asked = {"messages": PROMPTS[0]["messages"], "max_tokens": 6, "n": 8, "seed": 1}
        return real.client.chat.completions.create(model=name, **asked).choices

    assert sum("e" in choice.message.content for choice in ask(done.fine_tuned_model)) >= 6
    assert sum("e" in choice.message.content for choice in ask("tiny")) <= 3
    checkpoints = [c.fine_tuned_model_checkpoint for c in real.client.fine_tuning.jobs.checkpoints.list(job.id)]
    assert len(checkpoints) == 4 and ask(checkpoints[1])
    again = real.create(model=done.fine_tuned_model, training_file=real.upload(PROMPTS[:8]), seed=1,
                        method={"type": "reinforcement", "reinforcement": {
                            "grader": LIKES_E, "hyperparameters": {"n_epochs": 1, "batch_size": 4}}},
                        extra_body={"tandem": {"max_tokens": 6}})  # fmt: skip
    real.until(again, "succeeded")
    first = [e.data for e in real.client.fine_tuning.jobs.list_events(again.id) if e.type == "metrics"][-1]
    assert first["train_mean_reward"] > 0.7, "it goes on from what was learnt"


def test_reinforcement_paused_and_cancelled_for_real(real):
    """Nothing stays in the engine: no request, no block, no version."""

    def quiet():
        deadline = time.monotonic() + 20
        while real.engine.stats.num_running + real.engine.stats.blocks_used or [
            name for name in real.engine.adapters if name.startswith("rollouts:")
        ]:
            assert time.monotonic() < deadline, (real.engine.stats, real.engine.adapters)
            time.sleep(0.05)

    job = real.create(
        model="tiny", training_file=real.upload(PROMPTS), seed=1,
        method={"type": "reinforcement", "reinforcement": {
            "grader": LIKES_E, "hyperparameters": {"n_epochs": 50, "batch_size": 8},
        }},
        extra_body={"tandem": {"rank": 4, "max_tokens": 40}},
    )  # fmt: skip
    real.until(job, "running")
    while not real.engine.stats.num_running:
        time.sleep(0.01)
    assert not [model.id for model in real.client.models.list() if model.id.startswith("rollouts:")]
    with pytest.raises(openai.NotFoundError):
        real.client.chat.completions.create(model=f"rollouts:{job.id}", messages=MESSAGES)
    real.client.fine_tuning.jobs.pause(job.id)
    real.until(job, "paused")
    quiet()
    real.client.fine_tuning.jobs.resume(job.id)
    real.until(job, "running")
    while not real.engine.stats.num_running:
        time.sleep(0.01)
    real.client.fine_tuning.jobs.cancel(job.id)
    quiet()


def test_graders_are_tried_out(both):
    alpha = both.client.fine_tuning.alpha.graders
    assert alpha.validate(grader=LIKES_E).grader.operation == "like"
    found = alpha.run(grader=LIKES_E, model_sample="yes", item={"letter": "e"})
    assert found.reward == 1.0 and found.metadata.type == "string_check" and found.metadata.name == "has_e"
    assert found.metadata.scores == {"has_e": 1.0} and found.sub_rewards == {} and found.metadata.execution_time >= 0
    assert not any(v for k, v in found.metadata.errors.model_dump().items() if k.endswith("_error"))
    alike = {"type": "text_similarity", "name": "a", "input": "{{sample.output_json.say}}", "reference": "yes",
             "evaluation_metric": "fuzzy_match"}  # fmt: skip
    multi = {"type": "multi", "name": "m", "graders": {"a": alike, "e": LIKES_E}, "calculate_output": "(a + e) / 2"}
    assert alpha.validate(grader=multi).grader.calculate_output == "(a + e) / 2"
    found = alpha.run(grader=multi, model_sample='{"say": "yes"}', item={"letter": "z"})
    assert found.reward == 0.5 and found.sub_rewards == {"a": 1.0, "e": 0.0}
    found = alpha.run(grader=multi, model_sample="yes", item={"letter": "e"})
    assert found.reward == 0.5 and found.metadata.errors.sample_parse_error
    found = alpha.run(grader=multi, model_sample="yes", item={})
    assert found.metadata.errors.invalid_variable_error and found.reward == 0
    assert "item.letter" in found.metadata.errors.other_error_details
    found = alpha.run(grader=multi | {"calculate_output": "1 / a"}, model_sample='{"say": "q"}', item={"letter": "z"})
    assert found.metadata.errors.other_error and "cannot be computed" in found.metadata.errors.other_error_details
    judge = {"type": "score_model", "name": "j", "model": "tiny", "input": [{"role": "user", "content": "Rate it"}]}
    found = alpha.run(grader=judge, model_sample="yes")
    assert found.metadata.sampled_model_name == "tiny" and found.metadata.token_usage > 0
    assert found.metadata.errors.api_model_grader_parse_error and found.reward == 0
    for call in (alpha.validate, lambda grader: alpha.run(grader=grader, model_sample="x")):
        for grader, param in (
            ({"type": "python", "name": "p", "source": "x"}, "grader.type"),
            (LIKES_E | {"input": "{{x}}"}, "grader.input"),
            (judge | {"model": "gpt-5"}, "grader.model"),
            ({"type": "endpoint", "url": "http://127.0.0.1:1/"}, "grader.url"),
        ):  # fmt: skip
            with pytest.raises(openai.BadRequestError) as caught:
                call(grader=grader)
            assert caught.value.param == param


def test_reinforcement_that_cannot_work_is_said_at_once(both):
    good = both.upload(PROMPTS)

    def refused(**reinforcement):
        with pytest.raises(openai.BadRequestError) as caught:
            both.create(model="tiny", training_file=good,
                        method={"type": "reinforcement", "reinforcement": reinforcement})  # fmt: skip
        return caught.value

    assert refused().param == "method.reinforcement.grader"
    assert refused(grader={"type": "python", "name": "p", "source": ""}).param == "method.reinforcement.grader.type"
    error = refused(grader={"type": "endpoint", "url": "http://127.0.0.1:1/"})
    assert error.param == "method.reinforcement.grader.url" and "--grader-hosts 127.0.0.1" in error.message
    job = both.create(model="tiny", training_file=both.upload([*PROMPTS, ROWS[0]]),
                      method={"type": "reinforcement", "reinforcement": {"grader": LIKES_E}},
                      extra_body={"tandem": {"max_tokens": 4}})  # fmt: skip
    deadline = time.monotonic() + 30
    while (found := both.retrieve(job.id)).status != "failed":
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    assert found.error.param == "training_file" and "train.jsonl:33" in found.error.message


@pytest.mark.parametrize("optimizer", ["muon", "adamw8bit", "mezo"])
def test_other_optimizers_for_real(real, optimizer):
    job = real.create(model="tiny", training_file=real.upload(), hyperparameters={"n_epochs": 1, "batch_size": 4},
                      extra_body={"tandem": {"rank": 4, "learning_rate": 1e-3, "optimizer": optimizer}})  # fmt: skip
    assert real.until(job, "succeeded").tandem["optimizer"] == optimizer


def test_a_bad_preference_fails_the_job_with_its_line(both):
    wrong = {**PREFERENCES[0], "preferred_output": PREFERENCES[0]["non_preferred_output"]}
    for rows, words in (([*PREFERENCES, wrong], "train.jsonl:9.*the same"), (ROWS, "train.jsonl:1.*has no 'input'")):
        job = both.create(model="tiny", training_file=both.upload(rows), method={"type": "dpo"})
        deadline = time.monotonic() + 30
        while (found := both.retrieve(job.id)).status != "failed":
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        assert found.error.param == "training_file" and re.search(words, found.error.message)


def test_training_and_serving_for_real(real, tmp_path):
    ask = lambda name: real.client.chat.completions.create(  # noqa: E731
        model=name, messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=1
    ).choices[0]
    before = ask("tiny").logprobs
    job = real.create(model="tiny", training_file=real.upload(), seed=1,
                      hyperparameters={"n_epochs": 3, "batch_size": 4},
                      extra_body={"tandem": {"rank": 4, "learning_rate": 0.02, "schedule": "constant"}})  # fmt: skip
    done = real.until(job, "succeeded")
    losses = [event.data["train_loss"] for event in real.client.fine_tuning.jobs.list_events(job.id)
              if event.type == "metrics"][::-1]  # fmt: skip
    assert len(losses) == 6 and losses[-1] < losses[0]
    checkpoints = [c.fine_tuned_model_checkpoint for c in real.client.fine_tuning.jobs.checkpoints.list(job.id)]
    assert len(checkpoints) == 3  # more than the engine holds at once
    answers = {name: ask(name).logprobs for name in checkpoints * 2}
    assert len({answer.content[0].logprob for answer in answers.values()} | {before.content[0].logprob}) == 4

    response = httpx.get(f"{real.url}/v1/adapters/{done.fine_tuned_model}/content")
    with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
        tar.extractall(tmp_path, filter="data")
    assert peft.PeftConfig.from_pretrained(tmp_path).r == 4
