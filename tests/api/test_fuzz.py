"""Any JSON, and any body that the OpenAPI description allows, gets an answer: never a 500, never a hang."""

import asyncio
from urllib.parse import quote

import httpx
import pytest
import schemathesis
from fake_jobs import FakeJobs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.api.app import build_app
from tandem.api.finetuning_schemas import Hyperparameters, JobBody, Tandem
from tandem.api.schemas import ChatRequest, CompletionRequest
from tandem.config import ServerConfig
from tandem.jobs.records import AdapterRecord, File

QUIET = dict(deadline=None, suppress_health_check=list(HealthCheck))
NUMBERS = st.one_of(
    st.integers(-3, 5), st.integers(-(2**70), 2**70), st.floats(width=64, allow_nan=False, allow_infinity=False),
    st.sampled_from([1e308, -1e308, 2**31, 2**63, 2**64]),
)  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
PLAUSIBLE = st.one_of(JSON, NUMBERS, st.lists(st.integers(-1, 600), max_size=4), TEXT, st.just({"type": "text"}))
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "developer"])},
    optional={"tool_calls": PLAUSIBLE, "content": st.one_of(TEXT, PLAUSIBLE), "name": PLAUSIBLE},
)
NAMES = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "suffix", "guided_json", "bad_words"})


def bodies(required: dict) -> st.SearchStrategy:
    """A body with the right required fields and up to four fields of any value."""
    extra = st.dictionaries(st.sampled_from([n for n in NAMES if n != "model"]), PLAUSIBLE, max_size=4)
    return st.builds(lambda base, more: {**base, **more}, st.fixed_dictionaries(required), extra)


CHAT = bodies({"messages": st.lists(MESSAGE, min_size=1, max_size=3)})
COMPLETION = bodies({"prompt": st.one_of(TEXT, st.lists(st.integers(0, 499), max_size=5), st.lists(TEXT, max_size=3))})
ADAPTER = st.fixed_dictionaries({"lora_name": PLAUSIBLE, "lora_path": st.one_of(PLAUSIBLE, st.just("."))})


JOB_FIELDS = sorted({*JobBody.model_fields, "n_epochs", "rank"} - {"model", "training_file"})
HYPERPARAMETERS = st.dictionaries(st.sampled_from([*Hyperparameters.model_fields, "beta"]), PLAUSIBLE, max_size=3)
JOB_VALUES = {
    "tandem": st.dictionaries(st.sampled_from([*Tandem.model_fields, "lr"]), PLAUSIBLE, max_size=4),
    "hyperparameters": HYPERPARAMETERS,
    "method": st.fixed_dictionaries(
        {"type": st.sampled_from(["supervised", "dpo", ""])},
        optional={"supervised": st.one_of(st.fixed_dictionaries({"hyperparameters": HYPERPARAMETERS}), PLAUSIBLE)},
    ),
    "metadata": st.dictionaries(TEXT, st.one_of(TEXT, PLAUSIBLE), max_size=3),
    "suffix": st.one_of(st.just("mine"), TEXT),
    "seed": NUMBERS,
}
JOB = st.fixed_dictionaries(
    {"model": st.one_of(st.just("demo"), TEXT), "training_file": st.one_of(st.just("file-known"), PLAUSIBLE)},
    optional={name: st.one_of(JOB_VALUES.get(name, PLAUSIBLE), PLAUSIBLE) for name in JOB_FIELDS},
)
NAME = st.one_of(st.just("known"), TEXT, PLAUSIBLE)
ADAPTERS = {
    "/v1/adapters": st.fixed_dictionaries({"name": NAME, "path": st.one_of(PLAUSIBLE, st.just("."))}),
    "/v1/adapters/export": st.fixed_dictionaries({"name": NAME, "path": st.one_of(TEXT, PLAUSIBLE)}),
    "/v1/adapters/promote": st.fixed_dictionaries({"alias": NAME, "target": NAME}),
    "/v1/adapters/rollback": st.fixed_dictionaries({"alias": NAME}, optional={"steps": PLAUSIBLE}),
}
HEADER = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
QUERY = st.dictionaries(
    st.one_of(st.sampled_from(["after", "limit", "order", "purpose", "metadata[a]", "metadata"]), TEXT),
    st.one_of(TEXT, st.integers(-3, 2**70).map(str)), max_size=3,
)  # fmt: skip


def send(app, method: str, path: str, **content) -> httpx.Response:
    async def send_it():
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await asyncio.wait_for(http.request(method, path, **content), 10)

    return asyncio.run(send_it())


def check(response: httpx.Response) -> None:
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error["message"] and error["type"] and "Traceback" not in error["message"]


@pytest.fixture
def fuzzed(engine, tokenizer, tmp_path):
    jobs = FakeJobs(tmp_path, engine)
    jobs.kept["file"]["file-known"] = File(file_id="file-known", filename="f", purpose="batch", bytes=1, created_at=1)
    (tmp_path / "file-known").write_text("x")
    jobs.kept["adapter"]["known"] = AdapterRecord(
        name="known", path=str(tmp_path / "root"), base_model="b", created_at=1, rank=1, kind="imported"
    )
    (tmp_path / "root").mkdir()
    return build_app(
        engine, tokenizer, ServerConfig(trust_request_chat_template=True), lora_root=str(tmp_path / "root"), jobs=jobs,
        jobs_config=jobs.config,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("path", "strategy", "examples"),
    [
        ("/v1/chat/completions", CHAT, 150),
        ("/v1/completions", COMPLETION, 150),
        ("/v1/completions", JSON, 30),
        ("/tokenize", bodies({"prompt": TEXT}), 40),
        ("/detokenize", st.fixed_dictionaries({"tokens": PLAUSIBLE}), 30),
        ("/v1/load_lora_adapter", ADAPTER, 60),
        ("/v1/unload_lora_adapter", ADAPTER, 20),
        ("/v1/fine_tuning/jobs", JOB, 150),
        ("/v1/fine_tuning/jobs", JSON, 30),
        *((path, strategy, 30) for path, strategy in ADAPTERS.items()),
    ],
)
def test_any_json_gets_an_answer(fuzzed, path, strategy, examples):
    seen = set()

    @settings(max_examples=examples, **QUIET)
    @given(strategy)
    def run(body):
        response = send(fuzzed, "POST", path, json=body)
        check(response)
        seen.add(response.status_code)

    run()
    assert 400 in seen


def form_of(parts: list[tuple[str, bytes]]) -> bytes:
    return b"".join(
        b"--x\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (disposition.encode(), content)
        for disposition, content in parts
    )


def test_any_form_gets_an_answer(fuzzed):
    named = st.sampled_from(['name="purpose"', 'name="file"; filename="f"', 'name="expires_after[seconds]"'])
    parts = st.lists(
        st.tuples(st.one_of(named, HEADER), st.one_of(st.just(b"batch"), st.binary(max_size=30))), max_size=4
    )
    whole = st.builds(lambda parts, end: form_of(parts) + end, parts, st.sampled_from([b"--x--", b"", b"--x", b"\r\n"]))
    good = st.just(form_of([('name="purpose"', b"batch"), ('name="file"; filename="f"', b"x")]) + b"--x--\r\n")
    seen = set()

    @settings(max_examples=200, **QUIET)
    @given(
        st.one_of(whole, good, st.binary(max_size=60)), st.one_of(st.just("multipart/form-data; boundary=x"), HEADER)
    )
    def run(content, content_type):
        response = send(fuzzed, "POST", "/v1/files", content=content, headers={"content-type": content_type})
        check(response)
        seen.add(response.status_code)

    run()
    assert {200, 400, 415} <= seen


@pytest.mark.parametrize(
    "path",
    ["/v1/files", "/v1/files/{}", "/v1/files/{}/content", "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/{}",
     "/v1/fine_tuning/jobs/{}/events", "/v1/fine_tuning/jobs/{}/checkpoints", "/v1/models/{}",
     "/v1/adapters/{}/content"],
)  # fmt: skip
def test_any_query_gets_an_answer(fuzzed, path):
    @settings(max_examples=25, **QUIET)
    @given(st.one_of(st.sampled_from(["file-known", "known"]), TEXT), QUERY)
    def run(name, query):
        check(send(fuzzed, "GET", path.format(quote(name, safe="")), params=query))

    run()


def test_bodies_made_from_the_openapi_description(fuzzed):
    schema = schemathesis.openapi.from_asgi("/openapi.json", fuzzed)
    operations = [
        op for result in schema.get_all_operations() if (op := result.ok()).method in ("post", "delete", "get")
    ]
    assert len(operations) > 30
    for operation in operations:

        @settings(max_examples=5, **QUIET)
        @given(operation.as_strategy())
        def run(case):
            response = case.call()
            assert response.status_code < 500, (case.body, response.text)

        run()
