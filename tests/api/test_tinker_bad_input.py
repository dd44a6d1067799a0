"""What clients of Tinker's routes do wrong, over plain HTTP: clear errors, nothing left behind, others unharmed."""

import re
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import zstandard

from tandem.api import tinker_pb2 as pb
from tandem.api.tinker_sessions import Patience

sys.path.insert(0, str(Path(__file__).parent))
from tinker_server import TinkerServer  # noqa: E402

TOKENS, TARGETS = [5, 6, 7, 8], [6, 7, 8, 9]


class Client:
    """One tenant's session; every call is a plain request."""

    def __init__(self, url, model, key="tml-one"):
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers={"x-api-key": key}, timeout=60)
        self.model = model
        self.session_id = self.post("create_session", tags=[], sdk_version="0.38.0")["session_id"]

    def raw(self, verb, /, **body):
        return self.http.post(verb, json=body)

    def post(self, verb, /, **body):
        reply = self.raw(verb, **body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def result(self, promise):
        """What a future comes to; polls as the SDK does."""
        while True:
            reply = self.raw("retrieve_future", request_id=promise["request_id"])
            if reply.status_code != 408:
                assert reply.status_code == 200, reply.text
                return reply.json()

    def create(self, seq=0, **lora):
        body = {"base_model": self.model, "lora_config": {"rank": 4} | lora}
        made = self.result(self.post("create_model", session_id=self.session_id, model_seq_id=seq, **body))
        return made["model_id"]

    def passes(self, model_id, seq_id, path="forward_backward", tokens=TOKENS, targets=TARGETS):
        tensor = {"data": targets, "dtype": "int64", "shape": [len(targets)]}
        data = [{"model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
                 "loss_fn_inputs": {"target_tokens": tensor}}]  # fmt: skip
        name = "forward_input" if path == "forward" else "forward_backward_input"
        body = {name: {"data": data, "loss_fn": "cross_entropy"}}
        return self.raw(path, model_id=model_id, seq_id=seq_id, **body)

    def step(self, model_id, seq_id, **adam):
        return self.raw("optim_step", model_id=model_id, seq_id=seq_id, adam_params={"learning_rate": 1e-3} | adam)

    def sampler(self, seq=0):
        body = {"session_id": self.session_id, "sampling_session_seq_id": seq, "base_model": self.model}
        return self.post("create_sampling_session", **body)["sampling_session_id"]

    def sample(self, sampler_id, seq_id, num_samples=1, max_tokens=2, **more):
        params = {"max_tokens": max_tokens, "temperature": 0.0} | more.pop("params", {})
        prompt = {"chunks": [{"type": "encoded_text", "tokens": more.pop("prompt", [5, 6, 7])}]}
        return self.raw("asample", sampling_session_id=sampler_id, seq_id=seq_id, num_samples=num_samples,
                        prompt=prompt, sampling_params=params, **more)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with TinkerServer(tmp_path_factory.mktemp("tinker")) as running:
        running.url = running.start()
        running.hasty = running.start(Patience(session_s=1.5, order_s=0.5, future_s=1.0))
        yield running


@pytest.fixture
def client(server):
    made = Client(server.url, server.model)
    yield made
    made.post(f"sessions/{made.session_id}/finish", reason={"type": "success"})


def eventually(holds, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---------------------------------------------------------------- order


def test_operations_out_of_order_run_in_order(client):
    """seq 3 and 2 come before 1: the losses are those of training between them."""
    model_id = client.create(seed=1)
    late = [client.passes(model_id, 3).json(), client.step(model_id, 2, learning_rate=1e-2).json()]
    first = client.passes(model_id, 1).json()
    losses = [client.result(p)["metrics"]["loss:sum"] for p in (first, late[0])]
    assert client.result(late[1])["metrics"]["step:max"] == 1
    assert losses[1] < losses[0]


def test_a_repeated_operation_is_done_once(client):
    model_id = client.create(seed=1)
    client.result(client.passes(model_id, 1).json())
    steps = [client.step(model_id, 2).json() for _ in range(3)]
    assert len({p["request_id"] for p in steps}) == 1
    assert client.result(steps[0])["metrics"]["step:max"] == 1
    assert client.result(client.step(model_id, 3).json())["metrics"]["step:max"] == 2
    other = client.passes(model_id, 2)
    assert other.status_code == 400 and "was a optim_step" in other.text.replace("an optim", "a optim")


def test_creating_a_model_twice_creates_one(client):
    body = {"session_id": client.session_id, "model_seq_id": 9, "base_model": client.model, "lora_config": {"rank": 4}}
    assert client.post("create_model", **body) == client.post("create_model", **body)


def test_a_lost_number_fails_what_waits_for_it_and_no_more(server):
    client = Client(server.hasty, server.model)
    model_id = client.create()
    client.result(client.passes(model_id, 1).json())
    waiting = client.passes(model_id, 3).json()
    failed = client.result(waiting)
    assert failed["category"] == "user" and "seq_id 2, which never came" in failed["error"]
    found = client.result(client.passes(model_id, 2).json())
    assert "loss:sum" in found["metrics"]
    assert "loss:sum" in client.result(client.passes(model_id, 4).json())["metrics"]


@pytest.mark.parametrize("seq_id", [0, -5])
def test_numbers_begin_at_one(client, seq_id):
    reply = client.passes(client.create(), seq_id)
    assert reply.status_code == 400 and "seq_id must be at least 1" in reply.text


# ---------------------------------------------------------------- data


def test_bad_data_fails_in_its_turn_and_training_goes_on(client):
    model_id = client.create()
    bad = [
        client.passes(model_id, 1, targets=[1, 2]),
        client.passes(model_id, 2, tokens=[5, 6, 7, 99999]),
        client.passes(model_id, 3, tokens=[5] * 300, targets=[6] * 300),
        client.raw("forward_backward", model_id=model_id, seq_id=4, forward_backward_input={"data": "?"}),
        client.raw("forward_backward", model_id=model_id, seq_id=5),
        client.raw("forward_backward", model_id=model_id, seq_id=6,
                   forward_backward_input={"data": [], "loss_fn": "cross_entropy"}),
        client.step(model_id, 7, beta1=2.0),
    ]  # fmt: skip
    errors = [client.result(reply.json()) for reply in bad]
    assert [e["category"] for e in errors] == ["user"] * 7
    for error, words in zip(
        errors, ("shape [2]", "vocabulary", "context", "not what", "missing", "no examples", "beta1"), strict=True
    ):
        assert words in error["error"]
    assert "loss:sum" in client.result(client.passes(model_id, 8).json())["metrics"]


def test_a_body_that_nobody_can_read(client):
    for body, kind in ((b"\xff\xff\xff", "application/x-protobuf"), (b"{", "application/json")):
        reply = client.http.post("forward_backward", content=body, headers={"content-type": kind})
        assert reply.status_code == 400, reply.text
    plain = client.http.post("create_session", content=b"{}", headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    unknown = client.raw("optim_step", model_id=client.create(), seq_id=1, adam_params={"learning_speed": 1})
    assert unknown.status_code == 400 and "learning_speed" in unknown.text


def test_zstd_bodies(client):
    model_id = client.create()
    message = pb.ForwardBackwardRequest(model_id=model_id, seq_id=1, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.asarray(TOKENS, "<i4").tobytes()
    tensor = datum.loss_fn_inputs["target_tokens"]
    tensor.dense, tensor.dtype = np.asarray(TARGETS, "<i8").tobytes(), pb.DTYPE_INT64
    headers = {"content-type": "application/x-protobuf", "content-encoding": "zstd"}
    packed = zstandard.ZstdCompressor().compress(message.SerializeToString())
    assert client.http.post("forward_backward", content=packed[:-4], headers=headers).status_code == 400
    promise = client.http.post("forward_backward", content=packed, headers=headers).json()
    assert len(client.result(promise)["loss_fn_outputs"][0]["logprobs"]["data"]) == 4


@pytest.mark.parametrize(
    "change, words",
    [
        ({"base_model": "org/other"}, "is not served here"),
        ({"lora_config": None}, "only LoRA"),
        ({"lora_config": {"rank": 4, "train_attn": False, "train_mlp": False}}, "output head"),
        ({"lora_config": {"rank": 4, "speed": 1}}, "speed"),
        ({"optimizer_config": {"type": "dimuon", "version": 1}}, "dimuon"),
    ],
)
def test_models_that_cannot_be_made(client, change, words):
    body = {"session_id": client.session_id, "model_seq_id": 5, "base_model": client.model, "lora_config": {"rank": 4}}
    reply = client.raw("create_model", **(body | change))
    assert reply.status_code in (400, 404) and words in reply.text


def test_a_rank_too_large_fails_and_leaves_nothing(client):
    promise = client.post("create_model", session_id=client.session_id, model_seq_id=6, base_model=client.model,
                          lora_config={"rank": 100_000})  # fmt: skip
    assert "rank must be 1 to" in client.result(promise)["error"]
    reply = client.passes(f"{client.session_id}:train:6", 1)
    assert reply.status_code == 404


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_samples": 10_000}, "num_samples must be 1 to"),
        ({"num_samples": 0}, "num_samples must be 1 to"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1000}, "context"),
        ({"prompt": []}, "empty"),
        ({"prompt": [-1]}, "vocabulary"),
        ({"params": {"temperature": -1}}, "temperature"),
        ({"params": {"top_p": 0}}, "top_p"),
        ({"params": {"best_of": 3}}, "best_of"),
        ({"params": {"stop": [""]}}, "stop"),
        ({"topk_sample_logprobs": 10_000}, "topk_sample_logprobs"),
        ({"prompt_alt_tokens_k": 2}, "not available"),
        ({"record_stability_info": True}, "not available"),
    ],
)
def test_samples_that_cannot_be_taken(client, change, words):
    reply = client.sample(client.sampler(), 0, **change)
    assert reply.status_code == 400 and words in reply.text, reply.text


# ---------------------------------------------------------------- tenants


def test_other_tenants_ids_are_not_there(client, server):
    model_id = client.create()
    promise = client.passes(model_id, 1).json()
    saved = client.result(client.raw("save_weights", model_id=model_id, seq_id=2, path="mine").json())
    sampler_id = client.sampler()
    other = Client(server.url, server.model, key="tml-two")
    attempts = [
        other.passes(model_id, 3), other.step(model_id, 3), other.raw("get_info", model_id=model_id),
        other.raw("retrieve_future", request_id=promise["request_id"]), other.sample(sampler_id, 0),
        other.raw("session_heartbeat", session_id=client.session_id),
        other.raw("create_model", session_id=client.session_id, model_seq_id=3, base_model=server.model,
                  lora_config={"rank": 4}),
        other.raw("create_sampling_session", session_id=other.session_id, sampling_session_seq_id=0,
                  model_path=saved["path"]),
        other.raw("load_weights", session_id=other.session_id, model_seq_id=0, path=saved["path"], optimizer=False),
        other.raw("weights_info", tinker_path=saved["path"]),
        other.http.get(f"training_runs/{model_id}"), other.http.get(f"training_runs/{model_id}/checkpoints"),
        other.http.delete(f"training_runs/{model_id}/checkpoints/weights/mine"),
        other.http.get(f"sessions/{client.session_id}"), other.http.get(f"samplers/{sampler_id}"),
        other.raw(f"sessions/{client.session_id}/finish", reason={"type": "success"}),
    ]  # fmt: skip
    assert [reply.status_code for reply in attempts] == [404] * len(attempts)
    assert other.http.get("checkpoints").json()["checkpoints"] == []
    assert "loss:sum" in client.result(promise)["metrics"]


def test_a_published_checkpoint_is_everybodys_to_read(client, server):
    model_id = client.create()
    path = client.result(client.raw("save_weights", model_id=model_id, seq_id=1, path="shared").json())["path"]
    one = f"training_runs/{model_id}/checkpoints/weights/shared"
    other = Client(server.url, server.model, key="tml-two")
    assert client.http.post(f"{one}/publish").status_code == 200
    assert other.post("weights_info", tinker_path=path)["lora_rank"] == 4
    assert other.http.delete(one).status_code == 404
    assert client.http.delete(f"{one}/publish").status_code == 200
    assert other.raw("weights_info", tinker_path=path).status_code == 404


def test_with_a_key_only_that_key(server):
    url = server.start(api_key="secret")
    assert httpx.post(f"{url}/api/v1/client/config", json={}, headers={"x-api-key": "tml-other"}).status_code == 401
    for headers in ({"x-api-key": "tml-secret"}, {"x-api-key": "secret"}, {"authorization": "Bearer tml-secret"}):
        assert httpx.post(f"{url}/api/v1/client/config", json={}, headers=headers).status_code == 200


# ---------------------------------------------------------------- endings


def held(server):
    return server.engine.stats.num_runs, len([n for n in server.engine.adapters if n.startswith("tinker:")])


def test_a_client_that_dies_leaves_nothing(server):
    before = (0, 0)
    eventually(lambda: held(server) == before)  # what earlier tests left to expire
    client = Client(server.hasty, server.model)
    model_id = client.create()

    def is_held():
        client.raw("session_heartbeat", session_id=client.session_id)  # a slow machine must not end it yet
        return held(server)[0] == 1

    client.result(client.passes(model_id, 1).json())
    eventually(is_held)
    promise = client.raw("save_weights_for_sampler", model_id=model_id, seq_id=2, sampling_session_seq_id=0).json()
    sampler_id = client.result(promise)["sampling_session_id"]
    client.sample(sampler_id, 0, num_samples=8, max_tokens=200)
    client.passes(model_id, 5)  # waits for 3 and 4
    # No sign of life from here on.
    eventually(lambda: held(server) == before)
    eventually(lambda: server.engine.stats.num_running + server.engine.stats.num_waiting == 0)
    reply = client.raw("session_heartbeat", session_id=client.session_id)
    assert reply.status_code == 410 and "create another" in reply.text
    assert client.passes(model_id, 3).status_code == 410


def test_finishing_a_session_frees_it(server):
    before = held(server)
    client = Client(server.url, server.model)
    client.create()
    client.post(f"sessions/{client.session_id}/finish", reason={"type": "success"})
    eventually(lambda: held(server) == before)
    assert client.raw("session_heartbeat", session_id=client.session_id).status_code == 410


def test_a_result_that_nobody_collects_is_dropped(server):
    client = Client(server.hasty, server.model)
    promise = client.sample(client.sampler(), 0).json()

    def alive():
        client.post("session_heartbeat", session_id=client.session_id)
        return client.raw("retrieve_future", request_id=promise["request_id"]).status_code == 410

    for _ in range(7):  # the client lives, and does not ask
        client.post("session_heartbeat", session_id=client.session_id)
        time.sleep(0.4)
    assert alive()


def test_snapshots_without_end(client, server):
    """Every step of a loop makes one; the engine keeps the newest, and says so of the others."""
    model_id = client.create()
    samplers = []
    for i in range(20):
        promise = client.raw("save_weights_for_sampler", model_id=model_id, seq_id=i + 1, sampling_session_seq_id=i)
        samplers.append(client.result(promise.json())["sampling_session_id"])
    assert held(server)[1] <= 17
    assert "sequences" in client.result(client.sample(samplers[-1], 0).json())
    gone = client.result(client.sample(samplers[0], 0).json())
    assert gone["category"] == "user" and "newer snapshots" in gone["error"]


def test_a_flood_of_samples_is_bounded_and_harms_nobody(client, server):
    """10,000 samples at once: so many are taken, the rest told to wait; somebody else is served meanwhile."""
    sampler_id = client.sampler()
    taken, refused = [], []
    for i in range(20):
        reply = client.sample(sampler_id, i, num_samples=500, max_tokens=200)
        (taken if reply.status_code == 200 else refused).append(reply)
    assert taken and refused
    assert {r.status_code for r in refused} == {429} and all("retry-after" in r.headers for r in refused)
    other = Client(server.url, server.model, key="tml-two")
    assert len(other.result(other.sample(other.sampler(), 0).json())["sequences"]) == 1
    body = {"prompt": [5, 6, 7], "max_tokens": 2, "model": server.model}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    done = client.post("retrieve_futures", target={"sampling_session_id": sampler_id}, timeout=0)["completions"]
    assert len(done) < len(taken), "they waited for the whole flood"
    for reply in taken:
        client.post("cancel_future", request_id=reply.json()["request_id"])
    eventually(lambda: server.engine.stats.num_running + server.engine.stats.num_waiting == 0)
    assert "sequences" in client.result(client.sample(sampler_id, 100).json())


def test_a_deleted_checkpoint_is_not_sampled_from(client):
    model_id = client.create()
    promise = client.raw("save_weights_for_sampler", model_id=model_id, seq_id=1, path="short")
    path = client.result(promise.json())["path"]
    sampler_id = client.post("create_sampling_session", session_id=client.session_id, sampling_session_seq_id=1,
                             model_path=path)["sampling_session_id"]  # fmt: skip
    assert client.http.delete(f"training_runs/{model_id}/checkpoints/sampler_weights/short").status_code == 200
    assert "no checkpoint" in client.result(client.sample(sampler_id, 0).json())["error"]
    again = client.raw("create_sampling_session", session_id=client.session_id, sampling_session_seq_id=2,
                       model_path=path)  # fmt: skip
    assert again.status_code == 404


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "x" * 200, "a\x00b"])
def test_names_that_cannot_be_a_checkpoints(client, name):
    model_id = client.create()
    failed = client.result(client.raw("save_weights", model_id=model_id, seq_id=1, path=name).json())
    if name:
        assert "a checkpoint's name has" in failed["error"]
    else:
        assert failed["path"].endswith("/weights/seq-1")


def test_loading_what_does_not_fit(client):
    small, large = client.create(0), client.create(1, rank=8)
    path = client.result(client.raw("save_weights", model_id=small, seq_id=1, path="small").json())["path"]
    for seq_id, optimizer in ((1, True), (2, False)):
        promise = client.raw("load_weights", model_id=large, seq_id=seq_id, path=path, optimizer=optimizer)
        failed = client.result(promise.json())
        assert "rank" in failed["error"] and failed["category"] == "user"
    missing = client.raw("load_weights", model_id=large, seq_id=3, path=path + "x", optimizer=False)
    assert "no checkpoint" in client.result(missing.json())["error"]
    assert "loss:sum" in client.result(client.passes(large, 4).json())["metrics"]


def test_retrieve_futures_and_joining(client):
    sampler_id = client.sampler()
    joined = [client.post("join_sampling_session", sampling_session_id=sampler_id) for _ in range(2)]
    assert [each["client_counter"] for each in joined] == [1, 2]
    target = {"target": {"sampling_session_id": sampler_id}}
    promises = [client.sample(sampler_id, i).json()["request_id"] for i in range(3)]
    found, cursor = [], 0
    while len(found) < 3:
        reply = client.post("retrieve_futures", prev_cursor=cursor, **target)
        found += [c["request_id"] for c in reply["completions"]]
        cursor = reply["cursor"]
    assert sorted(found) == sorted(promises)
    assert client.post("retrieve_futures", prev_cursor=cursor, timeout=0, **target)["completions"] == []


def test_many_clients_at_once(server):
    """Models of several clients train side by side, each as if alone."""
    alone = Client(server.url, server.model)
    wanted = []
    model_id = alone.create(seed=5)
    for i in range(3):
        wanted.append(alone.result(alone.passes(model_id, 2 * i + 1).json())["metrics"]["loss:sum"])
        alone.result(alone.step(model_id, 2 * i + 2).json())
    found = {}

    def loop(n):
        mine = Client(server.url, server.model, key=f"tml-{n}")
        model = mine.create(seed=5)
        found[n] = []
        for i in range(3):
            found[n].append(mine.result(mine.passes(model, 2 * i + 1).json())["metrics"]["loss:sum"])
            mine.result(mine.step(model, 2 * i + 2).json())
        mine.post(f"sessions/{mine.session_id}/finish", reason={"type": "success"})

    threads = [threading.Thread(target=loop, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for losses in found.values():
        assert losses == pytest.approx(wanted, rel=1e-4)


JUNK = (
    b"", b"{}", b"[]", b"null", b"\xff", b"[" * 5000, b'{"session_id": 1}', b'{"model_id": "x"}',
    b'{"path": "tinker://", "optimizer": true}', b'{"model_id": "x:train:0", "path": 5}',
    b'{"tinker_path": "tinker://a/weights/b"}', b'{"request_id": "req_x"}',
)  # fmt: skip
# These take any object: there is nothing in it that they need.
TAKE_ANYTHING = ("/config", "/dynamic_config", "/telemetry", "/create_session", "/search")


def test_junk_on_every_route_is_the_clients_fault(server):
    """Whatever is sent to whichever route, the server answers for the client's mistake and not for one of its own."""
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    routes = [(m, p) for p, methods in paths.items() for m in methods if p.startswith("/api/v1")]
    assert len(routes) > 40
    with httpx.Client(base_url=server.url, headers={"x-api-key": "tml-junk"}, timeout=60) as http:
        for method, path in routes:
            path = re.sub(r"\{\w+\}", "no:such", path)
            for body in JUNK if method in ("post", "put") else (None,):
                for kind in ("application/json", "application/x-protobuf"):
                    reply = http.request(method, path, content=body, headers={"content-type": kind})
                    assert reply.status_code < 500, (method, path, body, reply.text)
                    assert reply.status_code != 200 or path.endswith(TAKE_ANYTHING) or method == "get", (path, body)
