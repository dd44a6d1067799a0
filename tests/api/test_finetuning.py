"""The real openai SDK on the files and fine-tuning routes, around jobs that only exist in memory."""

import time

import httpx
import msgspec
import openai
import pytest
from fake_jobs import FakeJobs

from tandem.api.app import build_app
from tandem.config import ServerConfig
from tandem.jobs.records import Checkpoint, TandemExtras

LINE = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def jobs(tmp_path, engine):
    return FakeJobs(tmp_path, engine, max_file_bytes=3_000_000)


@pytest.fixture
async def http(engine, tokenizer, jobs):
    """Without a socket, for what fails before it matters how the bytes came."""
    transport = httpx.ASGITransport(build_app(engine, tokenizer, ServerConfig(), jobs=jobs, jobs_config=jobs.config))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def url(engine, tokenizer, jobs, serve):
    config = ServerConfig(max_body_bytes=100_000)
    return serve(build_app(engine, tokenizer, config, jobs=jobs, jobs_config=jobs.config)).url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0, timeout=20) as made:
        yield made


@pytest.fixture
def training_file(client):
    return client.files.create(file=("train.jsonl", LINE), purpose="fine-tune").id


def error_of(response):
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


# ---- files


def test_a_file_from_upload_to_deletion(client):
    made = client.files.create(file=("train.jsonl", LINE * 3), purpose="fine-tune")
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", 3 * len(LINE), "train.jsonl", "fine-tune")
    assert client.files.wait_for_processing(made.id).status == "processed"
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == LINE * 3
    deleted = client.files.delete(made.id)
    assert deleted.deleted and deleted.id == made.id and deleted.object == "file"
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            call(made.id)
        assert caught.value.code == "not_found"


def test_a_file_larger_than_other_bodies_may_be(client, url):
    data = bytes(range(256)) * 8000
    made = client.files.create(file=("big.bin", data), purpose="batch")
    assert client.files.content(made.id).read() == data
    for size in (3_000_001, 9_000_000):
        with pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=("bigger.bin", bytes(size)), purpose="batch")
        assert caught.value.status_code == 413 and "--max-file-bytes" in caught.value.message
    assert len(client.files.list().data) == 1
    assert httpx.post(url + "/v1/completions", json={"prompt": "x" * 200_000}).status_code == 413


def test_what_the_sdk_sends_beside_the_file(client, jobs, tmp_path):
    path = tmp_path / "naïve ünï.jsonl"
    path.write_bytes(LINE)
    made = client.files.create(file=path, purpose="user_data", expires_after={"anchor": "created_at", "seconds": 7200})
    assert made.filename == path.name and made.expires_at == 7300 and jobs.lives == [7200]
    content = client.files.content(made.id)
    assert "utf-8''na%C3%AFve" in content.response.headers["content-disposition"]


def test_pages_of_files(client):
    ids = [client.files.create(file=(f"{i}", LINE), purpose="fine-tune").id for i in range(5)]
    client.files.create(file=("other", LINE), purpose="batch")
    assert [f.id for f in client.files.list(purpose="fine-tune", limit=2)] == ids[::-1]
    assert [f.id for f in client.files.list(purpose="fine-tune", limit=3, order="asc")] == ids
    page = client.files.list(purpose="fine-tune", limit=2)
    assert page.has_more and [f.id for f in page.data] == ids[:2:-1]
    assert client.files.list(after=ids[0]).data == []
    for query in ({"limit": 0}, {"limit": 20_000}, {"order": "up"}, {"after": "nothing"}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.files.list(**query)
        assert caught.value.param == next(iter(query))


def form(*parts, boundary="xyz", end=True):
    """A multipart body; each part is (disposition, bytes)."""
    body = b"".join(
        b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (boundary.encode(), disposition.encode(), content)
        for disposition, content in parts
    )
    return body + (b"--%s--\r\n" % boundary.encode() if end else b"")


FILE = ('name="file"; filename="f.jsonl"', LINE)
PURPOSE = ('name="purpose"', b"fine-tune")
LIFE = [('name="expires_after[anchor]"', b"created_at"), ('name="expires_after[seconds]"', b"3600")]


async def upload(http, *parts, content_type="multipart/form-data; boundary=xyz", headers=(), **how):
    headers = {"content-type": content_type, **dict(headers)}
    return await http.post("/v1/files", content=form(*parts, **how), headers=headers, timeout=20)


@pytest.mark.parametrize("parts", [[PURPOSE, FILE], [FILE, PURPOSE], [FILE, *LIFE, PURPOSE], [PURPOSE, *LIFE, FILE]])
async def test_the_order_of_fields_is_free_where_it_can_be(http, jobs, parts):
    response = await upload(http, *parts)
    assert response.status_code == 200 and response.json()["bytes"] == len(LINE), response.text
    assert jobs.lives == [3600 if len(parts) > 2 else None]


async def test_a_large_file_before_its_purpose(http, jobs):
    data = bytes(range(256)) * 11_000
    response = await upload(http, ('name="file"; filename="big"', data), PURPOSE)
    assert (await http.get(f"/v1/files/{response.json()['id']}/content")).content == data


async def test_file_names_lose_their_directories_and_control_characters(http):
    long = "n" * 999
    names = {"../../etc/passwd": "passwd", "C:\\a\\b.jsonl": "b.jsonl", "a\x01b": "ab", "/": "file", long: long[:255]}
    for name, kept in names.items():
        response = await upload(http, PURPOSE, (f'name="file"; filename="{name}"', b"x"))
        assert response.json()["filename"] == kept


@pytest.mark.parametrize(
    ("parts", "param", "words"),
    [
        ([FILE], "purpose", "fine-tune"),
        ([PURPOSE], "file", "no file"),
        ([], "file", "no file"),
        ([PURPOSE, ('name="file"', b"text")], "file", "filename"),
        ([PURPOSE, FILE, FILE], "file", "one file"),
        ([PURPOSE, ('name="other"; filename="f"', b"x")], "other", "called 'file'"),
        ([('name="purpose"', b"training"), FILE], "purpose", "not 'training'"),
        ([('name="purpose"', b"fine-tune-results"), FILE], "purpose", "must be one of"),
        ([PURPOSE, PURPOSE, FILE], "purpose", "twice"),
        ([FILE, PURPOSE, PURPOSE], "purpose", "twice"),
        ([PURPOSE, ('name="colour"', b"red"), FILE], "colour", "unknown field"),
        ([FILE, PURPOSE, ('name="colour"', b"red")], "colour", "unknown field"),
        ([PURPOSE, FILE, LIFE[1]], "expires_after[seconds]", "before the file"),
        ([PURPOSE, LIFE[0], FILE], "expires_after[seconds]", "3600"),
        ([PURPOSE, LIFE[1], FILE], "expires_after[anchor]", "created_at"),
        ([PURPOSE, LIFE[0], ('name="expires_after[seconds]"', b"10"), FILE], "expires_after[seconds]", "3600"),
        ([('name="purpose"', b"\xff"), FILE], "purpose", "UTF-8"),
        ([('name="purpose"', b"x" * 9999), FILE], "purpose", "longer"),
        ([("nothing", b"x")], None, "no name"),
        ([PURPOSE] + [('name="a"', b"")] * 20, None, "more than 16"),
    ],
)
async def test_forms_that_are_refused(http, jobs, parts, param, words):
    response = await upload(http, *parts)
    error = error_of(response)
    assert response.status_code == 400 and error["param"] == param and words in error["message"], error
    assert jobs.kept["file"] == {}


@pytest.mark.parametrize("parts", [[PURPOSE, FILE], [FILE, PURPOSE], [PURPOSE]])
async def test_forms_that_were_cut_off_leave_nothing(http, jobs, parts):
    response = await upload(http, *parts, end=False)
    assert response.status_code == 400 and "cut off" in error_of(response)["message"]
    assert jobs.kept["file"] == {}


@pytest.mark.parametrize(
    ("content_type", "status"),
    [("application/json", 415), ("multipart/form-data", 415), ("", 415), ("multipart/form-data; boundary=other", 400)],
)
async def test_bodies_that_are_no_forms(http, content_type, status):
    response = await upload(http, PURPOSE, FILE, content_type=content_type)
    assert response.status_code == status and error_of(response)["message"]


async def test_foreign_pages_cannot_upload(engine, tokenizer, jobs):
    app = build_app(engine, tokenizer, ServerConfig(allowed_origins=["https://mine.test"]), jobs=jobs)
    origins = {"https://evil.test": 403, "null": 403, "https://mine.test": 200, "http://here:8000": 200}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here:8000") as http:
        for origin, status in origins.items():
            assert (await upload(http, PURPOSE, FILE, headers={"origin": origin})).status_code == status, origin


# ---- jobs


def test_a_job_from_creation_to_its_result(client, jobs, training_file):
    job = client.fine_tuning.jobs.create(
        model="org/tiny:1", training_file=training_file, suffix="my-model", seed=42, metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": "auto"}}},
        extra_body={"tandem": {"rank": 4, "target_modules": ["q_proj"], "learning_rate": 1e-3, "schedule": "cosine"}},
    )  # fmt: skip
    assert (job.object, job.status, job.seed, job.training_file) == ("fine_tuning.job", "queued", 42, training_file)
    assert job.organization_id == "tandem" and job.result_files == [] and job.fine_tuned_model is None
    assert job.metadata == {"team": "a"} and job.error is None and job.integrations == []
    assert job.method.type == "supervised" and job.method.supervised.hyperparameters.n_epochs == "auto"
    (request,) = jobs.requests
    assert (request.suffix, request.n_epochs, request.batch_size) == ("my-model", 3, "auto")
    assert request.tandem == TandemExtras(
        rank=4, target_modules=("q_proj",), learning_rate=1e-3, schedule="cosine", max_grad_norm=1.0
    )
    assert job.tandem["rank"] == 4 and job.tandem["step"] == 0

    jobs.kept["job"][job.id] = msgspec.structs.replace(
        jobs.kept["job"][job.id], status="failed", error={"code": "diverged", "message": "m", "param": None},
        hyperparameters={"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 0.5}, finished_at=9, step=7,
    )  # fmt: skip
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.error.code == "diverged" and job.hyperparameters.batch_size == 8 and job.finished_at == 9
    assert job.method.supervised.hyperparameters.learning_rate_multiplier == 0.5 and job.tandem["step"] == 7


def test_deprecated_hyperparameters(client, jobs, training_file):
    create = client.fine_tuning.jobs.create
    create(model="org/tiny:1", training_file=training_file, hyperparameters={"n_epochs": 2, "batch_size": 4})
    create(model="org/tiny:1", training_file=training_file, hyperparameters={"learning_rate_multiplier": 2},
           method={"type": "supervised"})  # fmt: skip
    same = {"n_epochs": 2}
    create(model="org/tiny:1", training_file=training_file, hyperparameters=same,
           method={"type": "supervised", "supervised": {"hyperparameters": same}})  # fmt: skip
    assert [(r.n_epochs, r.batch_size, r.learning_rate_multiplier) for r in jobs.requests] == [
        (2, 4, "auto"), ("auto", "auto", 2), (2, "auto", "auto"),
    ]  # fmt: skip
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="org/tiny:1", training_file=training_file, hyperparameters=same,
               method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}})  # fmt: skip
    assert caught.value.param == "hyperparameters"


WRONG = [
    ({"colour": 1}, "colour", "unknown field"),
    ({"sufix": "x"}, "sufix", "'suffix'"),
    ({"rank": 8}, "rank", "tandem"),
    ({"n_epochs": 8}, "n_epochs", "hyperparameters"),
    ({"tandem": {"rnk": 8}}, "tandem.rnk", "'rank'"),
    ({"tandem": {"max_serving_slowdown": 2}}, "tandem.max_serving_slowdown", "unknown field"),
    ({"tandem": {"rank": 0}}, "tandem.rank", "greater"),
    ({"tandem": {"rank": 8.5}}, "tandem.rank", "integer"),
    ({"tandem": {"rank": True}}, "tandem.rank", "integer"),
    ({"tandem": {"rank": "8"}}, "tandem.rank", "integer"),
    ({"tandem": {"dropout": 1}}, "tandem.dropout", "less"),
    ({"tandem": {"learning_rate": 0}}, "tandem.learning_rate", "greater"),
    ({"tandem": {"learning_rate": "auto"}}, "tandem.learning_rate", "number"),
    ({"tandem": {"schedule": "step"}}, "tandem.schedule", "cosine"),
    ({"tandem": {"target_modules": []}}, "tandem.target_modules", "at least 1"),
    ({"tandem": {"target_modules": ["q_proj", 3]}}, "tandem.target_modules.1", "string"),
    ({"tandem": {"use_rslora": 1}}, "tandem.use_rslora", "boolean"),
    ({"tandem": {"checkpoint_every": 0}}, "tandem.checkpoint_every", "greater"),
    ({"tandem": {"priority": 99}}, "tandem.priority", "less"),
    ({"tandem": [1]}, "tandem", "object"),
    ({"hyperparameters": {"n_epoch": 1}}, "hyperparameters.n_epoch", "'n_epochs'"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "greater"),
    ({"hyperparameters": {"n_epochs": "3"}}, "hyperparameters.n_epochs", "'auto'"),
    ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta", "unknown field"),
    ({"hyperparameters": {"learning_rate_multiplier": -1}}, "hyperparameters.learning_rate_multiplier", "greater"),
    ({"method": {"type": "reinforcement", "supervised": {}}}, "method.supervised", "remove method.supervised"),
    ({"method": {"type": "reinforcement", "reinforcement": {"grader": "x"}}}, "method.reinforcement.grader", "dict"),
    ({"method": {"type": "reinforcement", "reinforcement": {"graders": 1}}},
     "method.reinforcement.graders", "'grader'"),
    ({"method": {"type": "reinforcement", "reinforcement": {"hyperparameters": {"reasoning_effort": "high"}}}},
     "method.reinforcement.hyperparameters.reasoning_effort", "no reasoning effort"),
    ({"method": {"type": "reinforcement", "reinforcement": {"hyperparameters": {"eval_interval": 0}}}},
     "method.reinforcement.hyperparameters.eval_interval", "greater"),
    ({"grader": {}}, "grader", "put it into method.reinforcement"),
    ({"eval_samples": 1}, "eval_samples", "put it into method.reinforcement.hyperparameters"),
    ({"tandem": {"group_size": 1}}, "tandem.group_size", "greater"),
    ({"tandem": {"loss": "dpo"}}, "tandem.loss", "ppo"),
    ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised", "remove method.supervised"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}}, "method.dpo.hyperparameters.beta", "2"),
    ({"tandem": {"optimizer": "adam"}}, "tandem.optimizer", "adamw"),
    ({"beta": 0.1}, "beta", "put it into method.dpo.hyperparameters"),
    ({"method": {"type": "magic"}}, "method.type", "supervised"),
    ({"method": {}}, "method.type", "required"),
    ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo", "method.type is supervised: remove method.dpo"),
    ({"method": {"type": "supervised", "reinforcement": {}}}, "method.reinforcement", "method.type is supervised"),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"epochs": 1}}}},
     "method.supervised.hyperparameters.epochs", "'n_epochs'"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "not supported yet"),
    ({"seed": -1}, "seed", "greater"),
    ({"seed": 2**40}, "seed", "less"),
    ({"suffix": "Upper Case"}, "suffix", "pattern"),
    ({"suffix": "x" * 65}, "suffix", "pattern"),
    ({"metadata": {"k": 1}}, "metadata", "string"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "16"),
    ({"metadata": {"k": "x" * 513}}, "metadata", "512"),
    ({"model": ""}, "model", "at least 1"),
    ({"model": "a\0b"}, "model", "NUL"),
    ({"training_file": 3}, "training_file", "string"),
    ({"training_file": None}, "training_file", "required"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), WRONG)
async def test_what_a_job_may_not_say(http, jobs, fields, param, words):
    body = {"model": "org/tiny:1", "training_file": "file-x", **fields}
    response = await http.post("/v1/fine_tuning/jobs", json=body)
    error = error_of(response)
    assert response.status_code == 400 and error["param"] == param and words in error["message"], error
    assert not jobs.requests


def test_nulls_and_auto_mean_the_defaults(url, jobs, training_file):
    nothing = ["validation_file", "suffix", "seed", "metadata", "method", "hyperparameters", "integrations", "tandem"]
    body = {"model": "org/tiny:1", "training_file": training_file, **dict.fromkeys(nothing)}
    assert httpx.post(url + "/v1/fine_tuning/jobs", json=body).status_code == 200
    body["tandem"] = dict.fromkeys(["rank", "alpha", "target_modules", "format"])
    body["hyperparameters"] = {"n_epochs": "auto", "batch_size": None}
    assert httpx.post(url + "/v1/fine_tuning/jobs", json=body).status_code == 200
    assert jobs.requests[0] == jobs.requests[1]


def test_one_target_may_be_a_string(url, jobs, training_file):
    body = {"model": "m", "training_file": training_file, "tandem": {"target_modules": "all-linear"}}
    assert httpx.post(url + "/v1/fine_tuning/jobs", json=body).json()["tandem"]["target_modules"] == ["all-linear"]


def test_pages_of_jobs_and_filters(client, training_file):
    create = client.fine_tuning.jobs.create
    ids = [
        create(model="org/tiny:1", training_file=training_file, metadata={"n": str(i % 2), "all": "a b&c"}).id
        for i in range(25)
    ]
    listed = client.fine_tuning.jobs.list
    assert [job.id for job in listed()] == ids[::-1] and len(listed().data) == 20
    assert [job.id for job in listed(limit=3, metadata={"n": "1"})] == ids[1::2][::-1]
    assert len(list(listed(metadata={"n": "1", "all": "a b&c"}))) == 12 and not listed(metadata={"n": "2"}).data
    for query in ({"limit": 0}, {"limit": "x"}, {"metadata": "null"}, {"metadata[]": "x"}, {"after": "ftjob-none"}):
        with pytest.raises(openai.BadRequestError):
            listed(extra_query=query)


def test_cancel_pause_resume(client, training_file):
    jobs = client.fine_tuning.jobs
    job = jobs.create(model="org/tiny:1", training_file=training_file)
    assert jobs.pause(job.id).status == "paused" and jobs.resume(job.id).status == "queued"
    assert jobs.cancel(job.id).status == "cancelled" and jobs.retrieve(job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        jobs.cancel(job.id)
    for call in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
        with pytest.raises(openai.NotFoundError):
            call("ftjob-none")
    with pytest.raises(openai.NotFoundError):
        jobs.create(model="org/tiny:1", training_file="file-none")


def test_events_and_checkpoints(client, jobs, training_file):
    job = client.fine_tuning.jobs.create(model="org/tiny:1", training_file=training_file)
    for i in range(45):
        data = {"step": i, "train_loss": float("nan")} if i % 2 else None
        jobs.say(job.id, f"Step {i}", type="metrics" if i % 2 else "message", data=data)
    jobs.checkpoints_of[job.id] = [
        Checkpoint(checkpoint_id=f"ftckpt_{i}", job_id=job.id, created_at=5, step=i, name=f"ft:x:ckpt-step-{i}",
                   path="/tmp/x", metrics={"step": i, "train_loss": 1.5, "valid_loss": None})
        for i in range(12)
    ]  # fmt: skip
    events = list(client.fine_tuning.jobs.list_events(job.id))
    assert [event.message for event in events] == [f"Step {i}" for i in range(44, -1, -1)]
    assert events[0].object == "fine_tuning.job.event" and events[0].data is None and events[1].data["step"] == 43
    assert events[1].type == "metrics" and events[1].data["train_loss"] is None
    assert len(client.fine_tuning.jobs.list_events(job.id).data) == 20
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [c.step_number for c in checkpoints] == list(range(12))
    assert len(client.fine_tuning.jobs.checkpoints.list(job.id).data) == 10
    assert checkpoints[3].fine_tuned_model_checkpoint == "ft:x:ckpt-step-3"
    assert checkpoints[3].fine_tuning_job_id == job.id and checkpoints[3].metrics.train_loss == 1.5
    assert checkpoints[3].object == "fine_tuning.job.checkpoint"


def test_without_jobs_the_routes_are_absent(app, serve):
    url = serve(app).url
    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/adapters"):
        assert httpx.get(url + path).status_code == 404


def test_urls_with_nul_are_refused_before_they_reach_a_database(url):
    for path in ("/v1/files/%00", "/v1/fine_tuning/jobs?after=%00", "/v1/fine_tuning/jobs?metadata[a]=%00"):
        response = httpx.get(url + path)
        assert response.status_code == 400 and "NUL" in error_of(response)["message"]


def test_a_client_that_goes_away_while_uploading_leaves_nothing(url, jobs):
    import socket

    port = int(url.rpartition(":")[2])
    head = b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=xyz\r\n"
    with socket.create_connection(("127.0.0.1", port)) as s:
        s.sendall(head + b"content-length: 900000\r\n\r\n" + form(PURPOSE, FILE, end=False)[:-2] + b"x" * 1000)
        time.sleep(0.2)
    time.sleep(0.2)
    assert jobs.kept["file"] == {} and httpx.get(url + "/health").status_code == 200
