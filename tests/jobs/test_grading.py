"""Grading by URLs that answer rightly, wrongly, late or not at all, and by models that may or may not say a number."""

import asyncio
import json
import math
from contextlib import asynccontextmanager

import pytest

from tandem.errors import InvalidRequest
from tandem.finetune import graders
from tandem.finetune.templates import NoSuchField
from tandem.jobs import grading
from tandem.jobs.grading import GraderFailed

ITEM = {"answer": "x", "n": 1.5}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(grading, "RETRY_S", 0.001)


@asynccontextmanager
async def callback(*replies):
    """A grader's server. Each reply is (status, body) or seconds to be silent; the last stays. Yields (url, asked)."""
    script, asked = list(replies), []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length:")[2].split()[0])
        asked.append((head.decode(), json.loads(await reader.readexactly(size))))
        reply = script.pop(0) if len(script) > 1 else script[0]
        if isinstance(reply, tuple):
            status, body = reply
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            extra = "location: http://127.0.0.1:1/\r\n" if status == 302 else ""
            writer.write(f"HTTP/1.1 {status} x\r\n{extra}content-length: {len(body)}\r\n\r\n".encode() + body)
        else:
            await asyncio.sleep(reply)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/score", asked


@pytest.fixture
async def graded(place):
    """graded(raw grader, answer) -> Grade, where 127.0.0.1 may be asked."""
    jobs = await place.open(grader_hosts=["127.0.0.1", "Grader.test:8443"])
    return lambda raw, text="an answer", item=ITEM: jobs.grade(jobs.grader(raw), item, text)


def endpoint(url, **more):
    return {"type": "endpoint", "url": url, "timeout_s": 0.2, "max_retries": 2, **more}


async def test_what_is_sent_and_what_is_taken(graded):
    async with callback((200, {"score": -2.5, "more": 1}), (200, {"score": 3})) as (url, asked):
        assert (await graded(endpoint(url))).reward == -2.5
        assert (await graded(endpoint(url), '{"a": 1}')).reward == 3.0
    assert "POST /score" in asked[0][0] and "application/json" in asked[0][0]
    assert asked[0][1] == {"sample": {"output_text": "an answer", "output_json": None}, "item": ITEM}
    assert asked[1][1]["sample"] == {"output_text": '{"a": 1}', "output_json": {"a": 1}}


RUBBISH = [
    ((200, b"hello"), "not"), ((200, b""), "not"), ((200, [1]), "not"), ((200, {"reward": 1}), "not"),
    ((200, {"score": "1"}), "finite"), ((200, {"score": True}), "finite"), ((200, {"score": None}), "finite"),
    ((200, b'{"score": NaN}'), "finite"), ((200, b'{"score": 1e999}'), "finite"),
    ((200, b'{"score": ' + b"9" * 400 + b"}"), "finite"), ((200, b"[" * 60_000), "not"),
    ((500, {"score": 1}), "status 500"), ((503, b"busy"), "busy"), ((429, b"later"), "status 429"), (0.5, "within"),
    (0.0, "Error"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "words"), RUBBISH)
async def test_what_may_get_better_is_tried_again(graded, reply, words):
    async with callback(reply, reply, (200, {"score": 0.25})) as (url, asked):
        assert (await graded(endpoint(url))).reward == 0.25 and len(asked) == 3
    async with callback(reply) as (url, asked):
        with pytest.raises(GraderFailed, match=words) as caught:
            await graded(endpoint(url))
        assert len(asked) == 3 and f"{url} failed 3 times" in str(caught.value)


@pytest.mark.parametrize("reply", [(404, b"where?"), (302, b""), (401, b"no"), (204, b""), (200, b" " * 70_000)])
async def test_what_stays_as_it_is_fails_at_once(graded, reply):
    async with callback(reply) as (url, asked):
        with pytest.raises(GraderFailed):
            await graded(endpoint(url))
        assert len(asked) == 1


async def test_nobody_there(graded):
    with pytest.raises(GraderFailed, match="ConnectError"):
        await graded(endpoint("http://127.0.0.1:9/"))


async def test_hosts_that_may_not_be_asked(place):
    jobs = await place.open(grader_hosts=["127.0.0.1", "Grader.test:8443"])
    for url in ("http://127.0.0.1/", "https://127.0.0.1:81/x", "https://GRADER.test:8443/"):
        jobs.grader(endpoint(url))
    for url in (
        "http://localhost/", "https://grader.test/", "http://grader.test:8080/", "http://[::1]/", "http://2130706433/",
        "http://127.0.0.1.evil.test/", "http://evil.test/@127.0.0.1", "http://evil.test#127.0.0.1",
    ):  # fmt: skip
        with pytest.raises(InvalidRequest, match="--grader-hosts") as caught:
            jobs.grader(endpoint(url))
        assert caught.value.param == "grader.url"
    part = {"type": "multi", "name": "m", "graders": {"e": endpoint("http://evil.test/")}, "calculate_output": "e"}
    with pytest.raises(InvalidRequest) as caught:
        jobs.grader(part)
    assert caught.value.param == "grader.graders.e.url"


async def test_a_formula_over_all_kinds(graded):
    exact = {"type": "string_check", "name": "x", "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
             "operation": "eq"}  # fmt: skip
    async with callback((200, {"score": 4})) as (url, _):
        multi = {"type": "multi", "name": "m", "graders": {"exact": exact, "rated": endpoint(url)},
                 "calculate_output": "exact + rated / 8"}  # fmt: skip
        grade = await graded(multi, "x")
        assert grade.reward == 1.5 and grade.scores == {"exact": 1.0, "rated": 4.0} and not grade.faults
        with pytest.raises(GraderFailed, match="calculate_output cannot be computed"):
            await graded(multi | {"calculate_output": "1 / exact"}, "y")
        with pytest.raises(GraderFailed, match="beyond"):
            await graded(multi | {"calculate_output": "rated ^ 99"}, "y")


async def test_answers_that_a_grader_cannot_read_score_lowest(graded):
    json_only = {"type": "string_check", "name": "x", "input": "{{sample.output_json.a}}", "reference": "1",
                 "operation": "eq"}  # fmt: skip
    assert (await graded(json_only, '{"a": 1}')).reward == 1
    for text in ("no", '{"b": 1}', ""):
        grade = await graded(json_only, text)
        assert grade.reward == 0 and grade.faults == {"x": "sample"}
    with pytest.raises(NoSuchField):
        await graded(json_only | {"reference": "{{item.none}}"}, "{}")


# ---- a model of this server


def judge(model="demo", **more):
    return {"type": "score_model", "name": "judge", "model": model, "range": [1, 5],
            "input": [{"role": "developer", "content": "Rate."}, {"role": "user", "content": "{{sample.output_text}}"}],
            "sampling_params": {"max_completions_tokens": 9, "seed": 4}, **more}  # fmt: skip


def says(place, text):
    place.engine.answer = lambda request, i: [*place.tokenizer.encode(text, False), place.tokenizer.eos_id]


async def test_a_model_of_this_server_judges(place, graded):
    says(place, "I say 3.5")
    grade = await graded(judge())
    assert grade.reward == 3.5 and grade.tokens > 2 and not grade.faults
    (asked,) = place.engine.asked
    text = place.tokenizer.decode(asked.prompt, skip_special_tokens=False)
    assert "Rate." in text and "an answer" in text and asked.adapter is None and asked.priority > 0
    assert (asked.sampling.temperature, asked.sampling.seed, asked.sampling.max_tokens) == (0.0, 4, 9)
    for said in ("none", "7", "0.99"):
        says(place, said)
        grade = await graded(judge())
        assert grade.reward == 1 and grade.faults == {"judge": "model"}
    with pytest.raises(InvalidRequest, match="gpt-5.*not served here") as caught:
        await graded(judge("gpt-5"))
    assert caught.value.param == "grader.model"
    assert (await graded(judge(), "word " * 300)).faults == {"judge": "model"}, "too long for the judge"
    assert place.engine.open == 0


async def test_an_adapter_judges_and_is_loaded_for_it(place, graded):
    model = (await place.until((await place.create()).job_id, "succeeded")).fine_tuned_model
    await place.engine.unload_adapter(model)
    says(place, "4")
    grader = place.jobs.grader(judge(model))
    assert (await place.jobs.grade(grader, ITEM, "x")).reward == 4 and place.engine.asked[-1].adapter == model
    await place.jobs.delete_adapter(model)
    with pytest.raises(GraderFailed, match="no model"):
        await place.jobs.grade(grader, ITEM, "x")


# ---- in a job


async def test_a_grader_that_keeps_failing_fails_the_job(place):
    await place.open(grader_hosts=["127.0.0.1"])
    good = (200, {"score": 1})
    async with callback(*[good] * 12, (500, b"out of order")) as (url, _):
        job = await place.explore(grader=endpoint(url))
        error = (await place.until(job.job_id, "failed")).error
    assert error["code"] == "grader_failed" and "failed 3 times: status 500" in error["message"], error
    assert error["param"] == graders.PARAM
    async with asyncio.timeout(10):
        while place.engine.open or place.engine.runs or place.engine.adapters:
            await asyncio.sleep(0.005)


async def test_a_judge_that_never_gives_a_number_fails_the_job(place):
    await place.open()
    place.engine.answer = lambda request, i: [300 + i, place.tokenizer.eos_id]
    error = (await place.until((await place.explore(grader=judge())).job_id, "failed")).error
    assert error["code"] == "grader_failed" and "no number within its range" in error["message"]


async def test_a_judge_that_sometimes_gives_no_number_is_warned_of(place):
    await place.open()
    three = [*place.tokenizer.encode("3", False), place.tokenizer.eos_id]
    turns = iter(range(10**9))

    def answer(request, i):
        return [300 + i, 301] if request.sampling.n > 1 or next(turns) % 2 else three

    place.engine.answer = answer
    job = await place.explore(grader=judge())
    await place.until(job.job_id, "succeeded")
    events, _ = await place.jobs.events(job.job_id, limit=1000)
    assert len([e for e in events if e.level == "warn" and "no number" in e.message]) == 1
    steps = [e.data for e in events if e.type == "metrics"]
    assert all(m["train_grader_faults"] == 0.5 and math.isclose(m["train_mean_reward"], 2) for m in steps)


async def test_a_host_that_was_allowed_once(place):
    await place.open(grader_hosts=["127.0.0.1"], max_running_jobs=1)
    place.engine.delay = 0.2
    await place.create()
    async with callback((200, {"score": 1})) as (url, _):
        job = await place.explore(grader=endpoint(url))
        await place.until(job.job_id, "queued")
        await place.jobs.close()
        place.engine.delay = 0.0
        await place.open()
        error = (await place.until(job.job_id, "failed")).error
    assert error["code"] == "invalid_grader" and "--grader-hosts" in error["message"]
