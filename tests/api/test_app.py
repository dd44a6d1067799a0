"""The app around the routes: the frozen list of them, health, metrics, adapters, limits, and broken requests."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import httpx
import msgspec
import pytest
from fake_jobs import FakeJobs
from prometheus_client.parser import text_string_to_metric_families

from tandem.api.app import build_app
from tandem.config import ServerConfig

CHAT = {"model": "org/tiny:1", "messages": [{"role": "user", "content": "Say hello"}]}
ROUTES = """
DELETE /v1/models/{model:path}
GET /docs
GET /health
GET /load
GET /metrics
GET /openapi.json
GET /ping
GET /ready
GET /v1/models
GET /v1/models/{model:path}
GET /version
POST /detokenize
POST /ping
POST /tokenize
POST /v1/chat/completions
POST /v1/completions
POST /v1/load_lora_adapter
POST /v1/unload_lora_adapter
""".split("\n")[1:-1]

JOBS_ROUTES = """
DELETE /v1/adapters/{name:path}
DELETE /v1/files/{file_id}
GET /v1/adapters
GET /v1/adapters/{name:path}/content
GET /v1/files
GET /v1/files/{file_id}
GET /v1/files/{file_id}/content
GET /v1/fine_tuning/jobs
GET /v1/fine_tuning/jobs/{job_id}
GET /v1/fine_tuning/jobs/{job_id}/checkpoints
GET /v1/fine_tuning/jobs/{job_id}/events
POST /v1/adapters
POST /v1/adapters/export
POST /v1/adapters/promote
POST /v1/adapters/rollback
POST /v1/files
POST /v1/fine_tuning/alpha/graders/run
POST /v1/fine_tuning/alpha/graders/validate
POST /v1/fine_tuning/jobs
POST /v1/fine_tuning/jobs/{job_id}/cancel
POST /v1/fine_tuning/jobs/{job_id}/pause
POST /v1/fine_tuning/jobs/{job_id}/resume
""".split("\n")[1:-1]

TINKER_ROUTES = """
DELETE /api/v1/training_runs/{run_id}/checkpoints/{segment}/{name}
DELETE /api/v1/training_runs/{run_id}/checkpoints/{segment}/{name}/publish
GET /api/v1/audit
GET /api/v1/billing/usage/checkpoints/current
GET /api/v1/billing/usage/events
GET /api/v1/checkpoints
GET /api/v1/downloads/{token}/{name}
GET /api/v1/get_server_capabilities
GET /api/v1/healthz
GET /api/v1/samplers/{sampler_id}
GET /api/v1/sessions
GET /api/v1/sessions/{session_id}
GET /api/v1/sessions/{session_id}/trace_export
GET /api/v1/training_runs
GET /api/v1/training_runs/{run_id}
GET /api/v1/training_runs/{run_id}/checkpoints
GET /api/v1/training_runs/{run_id}/checkpoints/{segment}/{name}/archive
GET /api/v1/training_runs/{run_id}/checkpoints/{segment}/{name}/external_weights_urls
POST /api/v1/asample
POST /api/v1/cancel_future
POST /api/v1/client/config
POST /api/v1/client/dynamic_config
POST /api/v1/copy_weights
POST /api/v1/create_model
POST /api/v1/create_sampling_session
POST /api/v1/create_session
POST /api/v1/forward
POST /api/v1/forward_backward
POST /api/v1/get_info
POST /api/v1/join_sampling_session
POST /api/v1/load_weights
POST /api/v1/optim_step
POST /api/v1/retrieve_future
POST /api/v1/retrieve_futures
POST /api/v1/save_weights
POST /api/v1/save_weights_external
POST /api/v1/save_weights_for_sampler
POST /api/v1/session_heartbeat
POST /api/v1/sessions/search
POST /api/v1/sessions/{session_id}/finish
POST /api/v1/telemetry
POST /api/v1/training_runs/{run_id}/checkpoints/{segment}/{name}/publish
POST /api/v1/unload_model
POST /api/v1/weights_info
PUT /api/v1/sessions/{session_id}/project
PUT /api/v1/training_runs/{run_id}/checkpoints/{segment}/{name}/ttl
""".split("\n")[1:-1]


@pytest.fixture
async def http(app):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def error_of(response: httpx.Response) -> dict:
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"] and "Traceback" not in body["error"]["message"]
    assert body["error"]["code"] is None or isinstance(body["error"]["code"], str)
    return body["error"]


def test_the_list_of_routes(app, engine, tokenizer, tmp_path):
    def walk(routes):
        for route in routes:
            if hasattr(route, "path") and getattr(route, "methods", None):
                yield from (f"{method} {route.path}" for method in route.methods if method != "HEAD")
            yield from walk(getattr(getattr(route, "original_router", None), "routes", ()))

    assert sorted(set(walk(app.routes))) == ROUTES
    with_jobs = build_app(engine, tokenizer, ServerConfig(), jobs=FakeJobs(tmp_path, engine))
    assert sorted(set(walk(with_jobs.routes))) == sorted([*ROUTES, *JOBS_ROUTES, *TINKER_ROUTES])


def test_the_api_imports_no_torch():
    code = "import sys, tandem.api.app; assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def test_health_ready_version_load_docs(http, engine):
    assert (await http.get("/health")).content == b"" and (await http.get("/ready")).status_code == 200
    assert (await http.get("/version")).json()["version"] and (await http.get("/load")).json() == {"server_load": 1}
    page = (await http.get("/docs")).text
    assert "/v1/chat/completions" in page and "src=" not in page and "https://" not in page
    schema = (await http.get("/openapi.json")).json()
    assert "messages" in schema["components"]["schemas"]["ChatRequest"]["properties"]
    engine.dead = "killed"
    for path in ("/health", "/ping", "/ready"):
        response = await http.get(path)
        assert response.status_code == 503 and error_of(response)["type"] == "server_error"


async def test_request_ids(http):
    assert (await http.get("/version", headers={"x-request-id": "mine-1"})).headers["x-request-id"] == "mine-1"
    made = (await http.get("/nowhere", headers={"x-request-id": "not valid\t"})).headers["x-request-id"]
    assert made.startswith("req_")


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"", {}, 400),
        (b"[]", {}, 400),
        (b'"text"', {}, 400),
        (b"\xff\xfe", {}, 400),
        (b'{"messages": "\xc3"}', {}, 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', {}, 400),
        (b'{"temperature": NaN, "messages": []}', {}, 400),
        (b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}', {}, 400),
        (b'{"max_tokens": 1e30, "messages": [{"role": "user", "content": "x"}]}', {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"a":' * 100_000, {}, 400),
        (json.dumps(CHAT).encode(), {"content-type": "text/plain"}, 415),
        (json.dumps(CHAT).encode(), {"content-type": "application/x-www-form-urlencoded"}, 415),
        (json.dumps(CHAT).encode(), {"content-type": ""}, 415),
        (json.dumps(CHAT).encode(), {"content-type": "application/json; charset=utf-8"}, 200),
    ],
)
async def test_broken_bodies(http, content, headers, status):
    headers = {"content-type": "application/json", **headers}
    response = await http.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == status
    if status != 200:
        error_of(response)


async def test_unknown_urls_and_methods(http):
    response = await http.get("/v1/nothing")
    assert response.status_code == 404 and "/docs" in error_of(response)["message"]
    response = await http.get("/v1/chat/completions")
    assert response.status_code == 405 and error_of(response) and response.headers["allow"] == "POST"


async def test_a_bug_is_a_500_without_traceback(http, engine):
    engine.submit = None
    response = await http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500 and error_of(response)["code"] == "internal_error"
    assert response.headers["x-request-id"].startswith("req_")


async def test_unknown_fields_are_ignored_and_logged_once(http, caplog):
    for _ in range(2):
        assert (await http.post("/v1/chat/completions", json={**CHAT, "brand_new": 1, "user": "u"})).status_code == 200
    assert caplog.text.count("brand_new") == 1 and "'user'" not in caplog.text


async def test_null_means_default(http):
    body = {**CHAT, "stop": None, "temperature": None, "stream": None, "tools": None, "guided_json": None}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200


@pytest.mark.parametrize("name", ["suffix", "bad_words", "structured_outputs", "guided_regex", "best_of"])
async def test_what_cannot_be_honoured_is_refused_by_name(http, name):
    value = {"suffix": "x", "bad_words": ["x"], "structured_outputs": {"regex": "x"}, "guided_regex": "x", "best_of": 3}
    response = await http.post("/v1/completions", json={"model": "org/tiny:1", "prompt": "x", name: value[name]})
    assert response.status_code == 400 and error_of(response)["param"] == name


async def test_a_mid_stream_error_is_an_event(http, engine):
    engine.step_s = 0.01

    async def kill():
        await asyncio.sleep(0.05)
        engine.dead = "killed"

    killer = asyncio.create_task(kill())
    text = (await http.post("/v1/chat/completions", json={**CHAT, "stream": True})).text
    await killer
    events = [line[6:] for line in text.split("\n\n") if line]
    assert "choices" in json.loads(events[0]) and json.loads(events[-2])["error"]["code"] == "engine_dead"
    assert events[-1] == "[DONE]"


async def test_tool_calls_and_parts_are_rendered(http, engine, tokenizer):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function",
                                              "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert (await http.post("/v1/chat/completions", json={"messages": messages, "tools": tools})).status_code == 200
    text = tokenizer.decode(engine.requests[0].prompt, False)
    assert "<|im_start|>system\nBe\nbrief<|im_end|>" in text and '"name": "f"' in text
    messages[2]["tool_calls"][0]["function"]["arguments"] = "{broken"
    response = await http.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400 and error_of(response)["param"] == "messages.2.tool_calls"


# ---- tokenizing


async def test_tokenize_and_detokenize(http, tokenizer):
    got = (await http.post("/tokenize", json={"prompt": "Hello 🙂", "return_token_strs": True})).json()
    assert got["tokens"] == tokenizer.encode("Hello 🙂") and got["count"] == len(got["tokens"])
    assert got["max_model_len"] == 256 and got["token_strs"][0] == tokenizer.token_text(got["tokens"][0])
    assert (await http.post("/detokenize", json={"tokens": got["tokens"]})).json() == {"prompt": "Hello 🙂"}
    chat = (await http.post("/tokenize", json={"messages": CHAT["messages"]})).json()
    assert chat["tokens"] == tokenizer.render(CHAT["messages"])
    for body in ({}, {"prompt": "x", "messages": CHAT["messages"]}, {"prompt": "x", "model": "?"}):
        assert (await http.post("/tokenize", json=body)).status_code in (400, 404)
    assert (await http.post("/detokenize", json={"tokens": [500]})).status_code == 400


# ---- adapters


async def test_adapters_stay_inside_the_root(http, tmp_path, engine, app):
    (tmp_path / "inside").mkdir()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    os.symlink(outside, tmp_path / "link")
    load = "/v1/load_lora_adapter"
    for path in ("..", str(outside), "link", "inside/../../" + outside.name, "/etc", "missing", "a\u0000b", "x" * 4000):
        response = await http.post(load, json={"lora_name": "a", "lora_path": path})
        assert response.status_code == 400 and error_of(response)["param"] == "lora_path", path
    assert (await http.post(load, json={"lora_name": "a", "lora_path": str(tmp_path / "inside")})).status_code == 200
    assert engine.adapters["a"].path == str(tmp_path / "inside")
    for name in ("a", "org/tiny:1"):
        response = await http.post(load, json={"lora_name": name, "lora_path": "inside"})
        assert response.status_code == 409 and error_of(response)["param"] == "lora_name"
    again = await http.post(load, json={"lora_name": "a", "lora_path": "inside", "load_inplace": True})
    assert again.status_code == 200 and "Success" in again.text
    assert (await http.post("/v1/unload_lora_adapter", json={"lora_name": "a"})).status_code == 200
    assert (await http.post("/v1/unload_lora_adapter", json={"lora_name": "a"})).status_code == 404
    assert (await http.delete("/v1/models/org/tiny:1")).status_code == 400


async def test_two_loads_of_one_name_cannot_both_succeed(http, tmp_path, engine):
    (tmp_path / "x").mkdir()
    real, active = engine.load_adapter, []

    async def slow(name, path):
        active.append(name)
        assert active.count(name) == 1, "two loads of one name at once"
        await asyncio.sleep(0.02)
        active.remove(name)
        return await real(name, path)

    engine.load_adapter = slow
    load = lambda name: http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "x"})  # noqa: E731
    replies = await asyncio.gather(load("a"), load("a"), load("b"))
    assert [reply.status_code for reply in replies] == [200, 409, 200]
    unload = lambda: http.post("/v1/unload_lora_adapter", json={"lora_name": "a"})  # noqa: E731
    assert [reply.status_code for reply in await asyncio.gather(unload(), unload())] == [200, 404]


async def test_names_are_locked_apart_and_no_lock_is_kept(app):
    serving = app.state.serving
    async with serving.adapter_lock("a"):
        assert serving.adapter_lock("a").locked() and not serving.adapter_lock("b").locked()
    assert not list(serving.adapter_locks)


# ---- more than the engine can ever take, and long bodies


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {**CHAT, "n": 6}, "n"),
        ("/v1/completions", {"prompt": "x", "n": 6}, "n"),
        ("/v1/completions", {"prompt": ["x"] * 3, "n": 2}, "prompt"),
    ],
)
async def test_more_choices_than_queue_and_seats_are_refused_before_any_starts(engine, tokenizer, path, body, param):
    engine.max_num_queued_reqs, engine.report = 3, msgspec.structs.replace(engine.report, max_num_seqs=2)
    app = build_app(engine, tokenizer, ServerConfig())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        response = await http.post(path, json={**body, "max_tokens": 2})
        error = error_of(response)
        assert response.status_code == 400 and error["param"] == param and " 5 choices" in error["message"]
        assert "--max-num-queued-reqs 3" in error["message"] and not engine.requests
        fits = await http.post("/v1/completions", json={"prompt": ["x"] * 5, "max_tokens": 2})
        assert fits.status_code == 200 and len(fits.json()["choices"]) == 5


async def test_long_bodies_leave_the_event_loop_wherever_their_text_is(http, tokenizer, monkeypatch):
    threads = []
    real = tokenizer.render
    monkeypatch.setattr(
        tokenizer, "render", lambda *args: (threads.append(threading.current_thread()), real(*args)[:100])[1]
    )
    tool = {"type": "function", "function": {"name": "f", "description": "word " * 4000}}
    for tools in ([], [tool]):
        for path in ("/v1/chat/completions", "/tokenize"):
            assert (await http.post(path, json={**CHAT, "tools": tools})).status_code == 200
    assert [thread is threading.main_thread() for thread in threads] == [True, True, False, False]


@pytest.mark.parametrize(
    "body", [{"prompt": "word " * 100_000}, {"messages": [{"role": "user", "content": "x" * 99_999}]}]
)
async def test_tokenize_refuses_what_is_longer_than_any_context(http, tokenizer, monkeypatch, body):
    monkeypatch.setattr(tokenizer, "encode", None)
    response = await http.post("/tokenize", json=body)
    assert response.status_code == 400 and error_of(response)["code"] == "context_length_exceeded"


async def test_sampling_limits(http, engine):
    for penalty, status in ((0.01, 200), (100, 200), (0.001, 400), (101, 400)):
        response = await http.post("/v1/chat/completions", json={**CHAT, "repetition_penalty": penalty})
        assert response.status_code == status, penalty
    for temperature in (1e-6, 1e-5):
        await http.post("/v1/chat/completions", json={**CHAT, "temperature": temperature})
    assert [request.sampling.temperature for request in engine.requests[-2:]] == [0, 1e-5]


# ---- names, keys, metrics


async def test_served_names_and_open_paths(engine, tokenizer):
    app = build_app(engine, tokenizer, ServerConfig(served_model_name=["one", "two"], api_key="k"))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for path in ("/health", "/metrics", "/docs", "/openapi.json", "/version", "/ready", "/ping", "/load"):
            assert (await http.get(path)).status_code == 200
        for path in ("/v1/models", "/health/", "/nothing", "//health"):
            assert (await http.get(path)).status_code == 401
        assert (await http.post("/tokenize", json={"prompt": "x"})).status_code == 401
        http.headers["x-api-key"] = "k"
        assert [m["id"] for m in (await http.get("/v1/models")).json()["data"]] == ["one", "two"]
        for name in ("one", "two", "org/tiny:1"):
            assert (await http.post("/v1/chat/completions", json={**CHAT, "model": name})).json()["model"] == name


async def test_metrics(http, engine, app):
    engine.stats.num_running, engine.stats.blocks_used, engine.stats.generation_tokens = 3, 16, 99
    await http.post("/v1/chat/completions", json=CHAT)
    await http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2, "n": 2})
    samples = {}
    for family in text_string_to_metric_families((await http.get("/metrics")).text):
        for sample in family.samples:
            samples[sample.name, sample.labels.get("finished_reason") or sample.labels.get("le")] = sample
    for prefix in ("tandem:", "vllm:"):
        assert samples[f"{prefix}num_requests_running", None].value == 3
        assert samples[f"{prefix}kv_cache_usage_perc", None].value == 0.25
        assert samples[f"{prefix}generation_tokens_total", None].value == 99
        assert samples[f"{prefix}request_success_total", "length"].value == 2
        assert samples[f"{prefix}request_success_total", "stop"].value == 1
        assert samples[f"{prefix}e2e_request_latency_seconds_count", None].value == 3
        assert samples[f"{prefix}time_to_first_token_seconds_bucket", "+Inf"].value == 3
        assert samples[f"{prefix}prompt_tokens_cached_total", None].value == 2
    labels = samples["vllm:num_requests_waiting", None].labels
    assert labels == {"model_name": "org/tiny:1", "engine": "0"}
    quiet = build_app(engine, app.state.serving.tokenizer, ServerConfig(vllm_metrics=False))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(quiet), base_url="http://test") as http:
        assert "vllm:" not in (await http.get("/metrics")).text


# ---- what needs a socket


def raw(port: int, request: bytes, timeout_s: float = 10) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as s:
        s.sendall(request)
        answer = b""
        while b"\r\n\r\n" not in answer and (got := s.recv(65536)):
            answer += got
        return answer


def test_huge_bodies_are_refused_unread(engine, tokenizer, serve):
    server = serve(build_app(engine, tokenizer, ServerConfig(max_body_bytes=10_000)))
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    assert b" 413 " in raw(server.port, head + b"content-length: 99999999999\r\n\r\n{")
    chunk = b"2000\r\n" + b"x" * 0x2000 + b"\r\n"
    assert b" 413 " in raw(server.port, head + b"transfer-encoding: chunked\r\n\r\n" + chunk * 2)
    response = httpx.post(server.url + "/v1/completions", json={"prompt": "x" * 1_000_000})
    assert response.status_code == 413 and error_of(response)["code"] == "request_too_large"
    assert httpx.post(server.url + "/v1/completions", json={"prompt": "x"}).status_code == 200


def wait_until(holds, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)
    return holds()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels(engine, app, serve, stream):
    engine.step_s = 0.01
    server = serve(app)
    body = json.dumps({**CHAT, "stream": stream, "max_tokens": 200, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as s:
        s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                  b"content-length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
        if stream:
            assert re.search(rb"HTTP/1.1 200", s.recv(4096))
        assert wait_until(lambda: engine.open == 1, 10)
    # The fake would go on for two seconds.
    assert wait_until(lambda: engine.open == 0, 1.5) and (engine.requests[0].request_id, None) in engine.cancelled
    assert app.state.serving.telemetry.finished["abort"] == 1 and app.state.serving.telemetry.in_flight == 0


def test_many_prompts_overloaded_halfway_leave_nothing_running(engine, app, serve):
    from tandem.errors import Overloaded

    real, engine.step_s = engine.submit, 0.01

    def submit(request):
        if len(engine.requests) == 2:
            raise Overloaded("full")
        return real(request)

    engine.submit = submit
    response = httpx.post(serve(app).url + "/v1/completions", json={"prompt": ["a", "b", "c"]})
    assert response.status_code == 429 and len(engine.cancelled) == 2


HOSTILE = {
    "many wrong ids": ("/v1/completions", b'{"prompt": [' + b'"x", ' * 200_000 + b"1]}"),
    "many lists": ("/v1/completions", b'{"prompt": [' + b"[1], " * 200_000 + b"1]}"),
    "many prompts": ("/v1/completions", b'{"n": 128, "prompt": [' + b"[1], " * 200_000 + b"[1]]}"),
    "many bad messages": ("/v1/chat/completions", b'{"messages": [' + b"1, " * 200_000 + b"1]}"),
    "many bad parts": ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": [' + b"1, " * 200_000
                            + b"1]}]}"),
    "many biases": ("/v1/completions", b'{"prompt": "x", "logit_bias": {'
                         + b",".join(b'"x%d": 1' % i for i in range(200_000)) + b"}}"),
    "many stops": ("/v1/completions", b'{"prompt": "x", "stop": [' + b"1, " * 200_000 + b"1]}"),
    "many tokens": ("/detokenize", b'{"tokens": [' + b'"x", ' * 200_000 + b"1]}"),
    "many tools": ("/tokenize", b'{"prompt": "x", "tools": [' + b"1, " * 200_000 + b"1]}"),
    "a long text": ("/v1/completions", b'{"prompt": "' + b"word " * 200_000 + b'"}'),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_bodies_are_refused_quickly(http, name):
    path, content = HOSTILE[name]
    began = time.perf_counter()
    response = await http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400 and len(response.content) < 2000, response.text[:300]
    assert time.perf_counter() - began < 15
