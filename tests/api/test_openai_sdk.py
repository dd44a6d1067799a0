"""The real openai SDK against a real server around a fake engine: replies, streams, and the SDK's own exceptions."""

import asyncio

import openai
import pytest

from tandem.api.app import build_app
from tandem.config import ServerConfig
from tandem.errors import InvalidRequest, Overloaded

TEXT = "Hello there, naïve 🙂 world. The end."
MESSAGES = [{"role": "user", "content": "Say hello"}]


@pytest.fixture
def server(app, serve):
    return serve(app)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0, timeout=20) as made:
        yield made


def test_chat(client, engine):
    reply = client.chat.completions.create(model="org/tiny:1", messages=MESSAGES, temperature=0, seed=7)
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert reply.object == "chat.completion" and reply.model == "org/tiny:1" and reply.id.startswith("chatcmpl-")
    assert reply.usage.completion_tokens == len(engine.reply) and reply._request_id
    assert reply.usage.prompt_tokens == len(engine.requests[0].prompt)
    assert reply.usage.prompt_tokens_details.cached_tokens == 1
    params = engine.requests[0].sampling
    assert params.seed == 7 and params.temperature == 0 and params.max_tokens == 256 - reply.usage.prompt_tokens


def test_chat_stream(client, engine):
    chunks = list(client.chat.completions.create(model="org/tiny:1", messages=MESSAGES, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == TEXT
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    assert len({c.id for c in chunks}) == 1 and {c.object for c in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize("endpoint", ["chat", "text"])
def test_stream_usage_and_n(client, engine, endpoint):
    common = dict(model="org/tiny:1", n=2, stream=True, stream_options={"include_usage": True}, max_tokens=9)
    if endpoint == "chat":
        chunks = list(client.chat.completions.create(messages=MESSAGES, **common))
    else:
        chunks = list(client.completions.create(prompt="Hello", **common))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 18
    assert chunks[-1].usage.prompt_tokens == len(engine.requests[0].prompt)
    assert all(c.usage is None for c in chunks[:-1])
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        choice = chunk.choices[0]
        texts[choice.index] += (choice.delta.content if endpoint == "chat" else choice.text) or ""
    whole = client.completions.create(model="org/tiny:1", prompt="Hello", n=2, max_tokens=9)
    assert list(texts.values()) == [c.text for c in whole.choices] and texts[0] != texts[1]


def test_continuous_usage(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.completions.create(model="org/tiny:1", prompt="x", stream=True, stream_options=options))
    counts = [c.usage.completion_tokens for c in chunks]
    assert counts == sorted(counts) and counts[0] == 1


async def test_async_client_and_concurrent_streams(server):
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as client:

        async def one():
            stream = await client.chat.completions.create(model="org/tiny:1", messages=MESSAGES, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert await asyncio.gather(*(one() for _ in range(8))) == [TEXT] * 8
        assert (await client.chat.completions.create(model="org/tiny:1", messages=MESSAGES)).choices[0].message.content


def test_the_sdk_stream_helper(client):
    with client.chat.completions.stream(model="org/tiny:1", messages=MESSAGES) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == TEXT


def test_chat_logprobs(client, tokenizer):
    for stream in (False, True):
        got = client.chat.completions.create(
            model="org/tiny:1", messages=MESSAGES, logprobs=True, top_logprobs=2, stream=stream
        )
        if stream:
            content = [item for c in got if c.choices[0].logprobs for item in c.choices[0].logprobs.content]
        else:
            content = got.choices[0].logprobs.content
        assert b"".join(bytes(item.bytes) for item in content).decode() == TEXT
        assert [len(item.top_logprobs) for item in content] == [2] * len(content)
        assert content[0].top_logprobs[0].token == content[0].token and content[0].logprob == -0.5


def test_completion_logprobs_and_echo_scoring(client, tokenizer):
    prompt = "Hello world."
    got = client.completions.create(model="org/tiny:1", prompt=prompt, max_tokens=0, echo=True, logprobs=1)
    choice, ids = got.choices[0], tokenizer.encode(prompt)
    assert choice.text == prompt and got.usage.completion_tokens == 0
    assert choice.logprobs.tokens == [tokenizer.token_text(i) for i in ids]
    assert choice.logprobs.token_logprobs == [None] + [-0.5] * (len(ids) - 1)
    assert choice.logprobs.top_logprobs[0] is None
    assert all(max(top.values()) == -0.5 for top in choice.logprobs.top_logprobs[1:])
    assert choice.logprobs.text_offset[:2] == [0, len(choice.logprobs.tokens[0])]
    again = client.completions.create(model="org/tiny:1", prompt=[ids, ids], max_tokens=1, echo=True, logprobs=1)
    assert [len(c.logprobs.tokens) for c in again.choices] == [len(ids) + 1] * 2
    assert again.choices[1].text.startswith(prompt)
    streamed = list(client.completions.create(
        model="org/tiny:1", prompt=prompt, max_tokens=2, echo=True, logprobs=1, stream=True
    ))  # fmt: skip
    assert "".join(c.choices[0].text for c in streamed).startswith(prompt)
    assert sum(len(c.choices[0].logprobs.tokens) for c in streamed) == len(ids) + 2
    offsets = [o for c in streamed for o in c.choices[0].logprobs.text_offset]
    assert offsets == sorted(offsets)


def test_prompt_forms(client, engine, tokenizer):
    ids = tokenizer.encode("Hello")
    for prompt, count in (("Hello", 1), (["Hello", "there"], 2), (ids, 1), ([ids, ids, ids], 3)):
        got = client.completions.create(model="org/tiny:1", prompt=prompt, max_tokens=3, n=2)
        assert [c.index for c in got.choices] == list(range(2 * count))
    assert engine.requests[0].prompt == ids and engine.requests[0].sampling.max_tokens == 3


def test_stop_strings_cut_the_text_and_cancel_the_choice(client, engine):
    for stream in (False, True):
        got = client.chat.completions.create(model="org/tiny:1", messages=MESSAGES, stop=[" wor", "zzz"], stream=stream)
        if stream:
            chunks = list(got)
            text, why = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
        else:
            text, why = got.choices[0].message.content, got.choices[0].finish_reason
        assert (text, why) == ("Hello there, naïve 🙂", "stop")
        assert (engine.requests[-1].request_id, 0) in engine.cancelled
    kept = client.completions.create(
        model="org/tiny:1", prompt="x", stop=" wor", max_tokens=64, extra_body={"include_stop_str_in_output": True}
    )
    assert kept.choices[0].text == "Hello there, naïve 🙂 wor" and kept.choices[0].stop_reason == " wor"


def test_vllm_fields_reach_the_engine(client, engine):
    extra = dict(top_k=5, min_p=0.1, repetition_penalty=1.1, min_tokens=2, ignore_eos=True, stop_token_ids=[7],
                 return_token_ids=True, prompt_logprobs=1, priority=3, request_id="mine")  # fmt: skip
    got = client.chat.completions.create(
        model="org/tiny:1", messages=MESSAGES, max_completion_tokens=4, logit_bias={"5": -100}, extra_body=extra
    )
    params = engine.requests[0].sampling
    assert (params.top_k, params.min_p, params.repetition_penalty, params.min_tokens) == (5, 0.1, 1.1, 2)
    assert params.ignore_eos and params.stop_token_ids == (7,) and params.logit_bias == {5: -100.0}
    assert params.prompt_logprobs == 1 and engine.requests[0].priority == 3
    assert got.id == "chatcmpl-mine" and got.choices[0].token_ids == engine.reply[:4]
    assert got.prompt_token_ids == engine.requests[0].prompt
    assert got.prompt_logprobs[0] is None and len(got.prompt_logprobs) == len(engine.requests[0].prompt)


def test_models_with_slashes_and_colons(client, engine, tmp_path):
    assert [m.id for m in client.models.list()] == ["org/tiny:1"]
    assert client.models.retrieve("org/tiny:1").id == "org/tiny:1"
    (tmp_path / "a").mkdir()
    for name in ("ft:tiny:org:s:ab12", "org/adapter"):
        client.post("/load_lora_adapter", body={"lora_name": name, "lora_path": "a"}, cast_to=str)
        assert client.models.retrieve(name).parent == "org/tiny:1"
        client.chat.completions.create(model=name, messages=MESSAGES)
        assert engine.requests[-1].adapter == name
    assert client.models.delete("org/adapter").deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/adapter")


# ---- the SDK's own exceptions


@pytest.fixture(scope="module")
def steady_client(steady_url):
    with openai.OpenAI(base_url=steady_url + "/v1", api_key="any", max_retries=0, timeout=20) as made:
        yield made


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"temperature": -1}, None, "temperature"),
        ({"temperature": 1e300}, None, "temperature"),
        ({"top_p": 1.5}, None, "top_p"),
        ({"n": 0}, None, "n"),
        ({"messages": []}, None, "messages"),
        ({"messages": [{"role": "alien", "content": "x"}]}, None, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, None, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None,
         "messages.0.content.0"),
        ({"max_tokens": 1000}, "context_length_exceeded", "messages"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "context_length_exceeded", "messages"),
        ({"logit_bias": {"9999": 1}}, None, "logit_bias"),
        ({"stop": ""}, None, "stop"),
        ({"top_logprobs": 2}, None, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, None, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}, None, "tool_choice"),
        ({"extra_body": {"guided_json": {}}}, None, "guided_json"),
        ({"extra_body": {"min_tokens": 9, "max_tokens": 4}}, None, "min_tokens"),
        ({"extra_body": {"chat_template": "x"}}, None, "chat_template"),
    ],
)  # fmt: skip
def test_bad_requests(steady_client, body, code, param):
    with pytest.raises(openai.BadRequestError) as caught:
        steady_client.chat.completions.create(**{"model": "org/tiny:1", "messages": MESSAGES, **body})
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.type == "invalid_request_error" and caught.value.body["message"]


@pytest.mark.parametrize("prompt", ["", [], [[]], [10**6], [-1], ["a", 1], [["a"]], "word " * 3000, [7] * 300])
def test_bad_prompts(steady_client, prompt):
    with pytest.raises(openai.BadRequestError) as caught:
        steady_client.completions.create(model="org/tiny:1", prompt=prompt)
    assert caught.value.param == "prompt"


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert caught.value.code == "model_not_found"


def test_api_key(engine, tokenizer, serve):
    url = serve(build_app(engine, tokenizer, ServerConfig(api_key="tnd-secret"))).url
    with pytest.raises(openai.AuthenticationError) as caught:
        openai.OpenAI(base_url=url + "/v1", api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    assert openai.OpenAI(base_url=url + "/v1", api_key="tnd-secret").models.list().data
    assert openai.OpenAI(base_url=url + "/v1", api_key="x", default_headers={"Authorization": "", "x-api-key":
                         "tnd-secret"}).models.list().data  # fmt: skip


def test_overload_is_429_with_retry_after(client, engine):
    engine.error = Overloaded("the queue is full: try again later", retry_after=6.2)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="org/tiny:1", messages=MESSAGES)
    assert caught.value.code == "rate_limit_exceeded" and caught.value.response.headers["retry-after"] == "7"


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_before_the_first_token_keeps_its_status(client, engine, stream):
    engine.error = InvalidRequest("does not fit the cache")
    with pytest.raises(openai.BadRequestError, match="does not fit"):
        client.chat.completions.create(model="org/tiny:1", messages=MESSAGES, stream=stream)


def test_a_dead_engine(client, engine):
    engine.step_s = 0.02
    stream = client.chat.completions.create(model="org/tiny:1", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="killed"):
        for _ in stream:
            engine.dead = "the engine process was killed"
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="org/tiny:1", messages=MESSAGES)
    assert caught.value.status_code == 503


# ---- vLLM's ways of asking


def test_token_ids_as_names_and_echo_of_several_choices(client, tokenizer):
    ids = tokenizer.encode("Hello")
    got = client.completions.create(
        model="org/tiny:1", prompt=[ids, ids], n=2, max_tokens=2, echo=True, logprobs=2,
        extra_body={"return_tokens_as_token_ids": True, "return_token_ids": True, "prompt_logprobs": 1},
    )  # fmt: skip
    assert len(got.choices) == 4
    for choice in got.choices:
        assert choice.text.startswith("Hello") and choice.prompt_token_ids == ids and len(choice.token_ids) == 2
        assert choice.logprobs.tokens == [f"token_id:{i}" for i in [*ids, *choice.token_ids]]
        assert len(choice.prompt_logprobs) == len(ids) and choice.prompt_logprobs[0] is None
        assert str(ids[1]) in choice.prompt_logprobs[1] if len(ids) > 1 else True


def test_streamed_token_ids(client, engine):
    for endpoint in ("chat", "text"):
        body = {"model": "org/tiny:1", "stream": True, "max_tokens": 8, "extra_body": {"return_token_ids": True}}
        if endpoint == "chat":
            chunks = list(client.chat.completions.create(messages=MESSAGES, **body))
        else:
            chunks = list(client.completions.create(prompt="Hello", **body))
        choices = [chunk.choices[0] for chunk in chunks]
        assert choices[0].prompt_token_ids == engine.requests[-1].prompt
        assert [i for c in choices for i in getattr(c, "token_ids", None) or []] == engine.reply[:8]


def test_continuing_the_last_message(client, engine, tokenizer):
    said = [*MESSAGES, {"role": "assistant", "content": "Well, I"}]
    client.chat.completions.create(model="org/tiny:1", messages=said, extra_body={"continue_final_message": True})
    assert tokenizer.decode(engine.requests[0].prompt, False).endswith("assistant\nWell, I")
    client.chat.completions.create(model="org/tiny:1", messages=said, extra_body={"add_generation_prompt": False})
    assert tokenizer.decode(engine.requests[1].prompt, False).endswith("Well, I<|im_end|>\n")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="org/tiny:1", messages=said,
            extra_body={"continue_final_message": True, "add_generation_prompt": True},
        )  # fmt: skip


def test_a_chat_template_of_the_request_needs_trust(engine, tokenizer, serve):
    app = build_app(engine, tokenizer, ServerConfig(trust_request_chat_template=True))
    client = openai.OpenAI(base_url=serve(app).url + "/v1", api_key="any", max_retries=0)
    body = {"chat_template": "{{ greeting }}: {{ messages[0].content }}", "chat_template_kwargs": {"greeting": "Hi"}}
    client.chat.completions.create(model="org/tiny:1", messages=MESSAGES, extra_body=body)
    assert tokenizer.decode(engine.requests[0].prompt) == "Hi: Say hello"


def test_truncated_prompts(client, engine, tokenizer):
    ids = tokenizer.encode("word " * 200)
    for keep, kept in ((10, 10), (-1, 256 - 16)):
        extra = {"truncate_prompt_tokens": keep}
        client.completions.create(model="org/tiny:1", prompt="word " * 200, max_tokens=16, extra_body=extra)
        assert engine.requests[-1].prompt == ids[-kept:]


def test_min_tokens_delays_stop_strings(client, engine):
    got = client.completions.create(
        model="org/tiny:1", prompt="x", max_tokens=64, stop="e", extra_body={"min_tokens": len(engine.reply) - 4}
    )
    assert got.choices[0].text.startswith("Hello there, naïve") and got.usage.completion_tokens > len(engine.reply) - 4
