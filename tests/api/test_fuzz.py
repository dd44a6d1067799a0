"""Any JSON, and any body that the OpenAPI description allows, gets an answer: never a 500, never a hang."""

import asyncio

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.api.app import build_app
from tandem.api.schemas import ChatRequest, CompletionRequest
from tandem.config import ServerConfig

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


def post(app, path: str, body) -> httpx.Response:
    async def send():
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await asyncio.wait_for(http.post(path, json=body), 10)

    return asyncio.run(send())


def check(response: httpx.Response) -> None:
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error["message"] and error["type"] and "Traceback" not in error["message"]


@pytest.fixture
def fuzzed(engine, tokenizer, tmp_path):
    return build_app(engine, tokenizer, ServerConfig(trust_request_chat_template=True), lora_root=str(tmp_path))


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
    ],
)
def test_any_json_gets_an_answer(fuzzed, path, strategy, examples):
    seen = set()

    @settings(max_examples=examples, **QUIET)
    @given(strategy)
    def run(body):
        response = post(fuzzed, path, body)
        check(response)
        seen.add(response.status_code)

    run()
    assert 400 in seen


def test_bodies_made_from_the_openapi_description(fuzzed):
    schema = schemathesis.openapi.from_asgi("/openapi.json", fuzzed)
    operations = [op for result in schema.get_all_operations() if (op := result.ok()).method in ("post", "delete")]
    assert len(operations) > 6
    for operation in operations:

        @settings(max_examples=5, **QUIET)
        @given(operation.as_strategy())
        def run(case):
            response = case.call()
            assert response.status_code < 500, (case.body, response.text)

        run()
