"""The HTTP side with a real engine process on a tiny random model, through the openai SDK. Oracle: transformers."""

import asyncio
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import tiny_adapters
import tiny_models
import torch
import uvicorn

from tandem.api.app import build_app
from tandem.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, ServerConfig
from tandem.engine.client import EngineClient
from tandem.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "Say hello"}]


class RealServer:
    """Engine process, app and uvicorn in one thread with its own event loop."""

    def __init__(self, model, lora_root, **scheduler):
        self.config = EngineConfig(
            model=ModelConfig(model=str(model), dtype="float32", num_threads=1),
            cache=CacheConfig(num_blocks=200),
            scheduler=SchedulerConfig(**scheduler),
        )
        self.model, self.lora_root = model, lora_root
        self.ready, self.failed = threading.Event(), None
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self):
        try:
            self.engine = await EngineClient.start(self.config)
            app = build_app(self.engine, Tokenizer.load(str(self.model)), ServerConfig(served_model_name=["tiny"]),
                            lora_root=str(self.lora_root))  # fmt: skip
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
        await self.engine.close()

    def __enter__(self):
        self.thread.start()
        assert self.ready.wait(60) and not self.failed, self.failed
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key="any", max_retries=0, timeout=30)
        return self

    def __exit__(self, *_):
        self.client.close()
        self.uvicorn.should_exit = True
        self.thread.join(timeout=20)

    def is_idle(self, seconds=5.0):
        deadline = time.monotonic() + seconds
        stats = self.engine.stats
        while time.monotonic() < deadline:
            stats = self.engine.stats
            if stats.num_running + stats.num_waiting + stats.blocks_used == 0:
                return True
            time.sleep(0.01)
        raise AssertionError(f"not idle: {stats}")


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with RealServer(model, tmp_path_factory.mktemp("adapters")) as made:
        yield made


@pytest.fixture
def client(server):
    yield server.client
    server.is_idle()


def test_greedy_text_is_the_oracles(client, model):
    tokenizer = Tokenizer.load(str(model))
    got = client.completions.create(
        model="tiny", prompt="The cat", max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
    )
    ids = tokenizer.encode("The cat")
    with torch.inference_mode():
        want = tiny_models.oracle(model).generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(ids) :]
    assert got.choices[0].text == tokenizer.decode(want.tolist())
    assert got.usage.completion_tokens == 24 and got.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(
        model="tiny", prompt="The cat", max_tokens=24, temperature=0, stream=True, extra_body={"ignore_eos": True}
    ))  # fmt: skip
    assert "".join(c.choices[0].text for c in chunks) == got.choices[0].text


def test_echo_scores_the_prompt_as_the_oracle_does(client, model):
    ids = Tokenizer.load(str(model)).encode("Scoring text, with more than one block of 16 tokens.")
    with torch.inference_mode():
        logprobs = tiny_models.oracle(model)(torch.tensor([ids])).logits[0].log_softmax(-1)
    want = [logprobs[i, token].item() for i, token in enumerate(ids[1:])]
    best = [row.max().item() for row in logprobs[:-1]]
    for max_tokens in (0, 1):
        got = client.completions.create(model="tiny", prompt=ids, max_tokens=max_tokens, echo=True, logprobs=1)
        scores = got.choices[0].logprobs
        assert len(scores.tokens) == len(ids) + max_tokens and scores.token_logprobs[0] is None
        assert scores.token_logprobs[1 : len(ids)] == pytest.approx(want, abs=1e-3)
        assert [max(top.values()) for top in scores.top_logprobs[1 : len(ids)]] == pytest.approx(best, abs=1e-3)
        greedy = [token == max(top.values()) for token, top in zip(scores.token_logprobs[1:], scores.top_logprobs[1:])]
        assert greedy[: len(ids) - 1] == [abs(a - b) < 1e-6 for a, b in zip(want, best)]


def test_seeds_choices_and_concurrency(client):
    def ask(seed):
        return [c.message.content for c in client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=12, n=2, seed=seed).choices]  # fmt: skip

    alone = [ask(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == alone
    assert len({text for pair in alone for text in pair}) > 4


def test_stop_strings_and_token_ids(client):
    whole = client.completions.create(model="tiny", prompt="abc", max_tokens=40, temperature=0, logprobs=0,
                                      extra_body={"ignore_eos": True, "return_token_ids": True})  # fmt: skip
    text, ids = whole.choices[0].text, whole.choices[0].token_ids
    stop = text[10:13]
    cut = client.completions.create(model="tiny", prompt="abc", max_tokens=40, temperature=0, stop=stop,
                                    extra_body={"ignore_eos": True})  # fmt: skip
    assert cut.choices[0].text == text[: text.index(stop)] and cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 40
    by_id = client.completions.create(model="tiny", prompt="abc", max_tokens=40, temperature=0,
                                      extra_body={"stop_token_ids": [ids[7]], "ignore_eos": True})  # fmt: skip
    assert by_id.choices[0].finish_reason == "stop" and by_id.choices[0].stop_reason == ids[7]
    assert by_id.usage.completion_tokens == ids.index(ids[7]) + 1


def test_prefix_cache_shows_in_usage(client):
    prompt = "A prompt that is longer than two blocks of sixteen tokens, for sure."
    for _ in range(2):
        usage = client.completions.create(model="tiny", prompt=prompt, max_tokens=2).usage
    assert usage.prompt_tokens_details.cached_tokens >= 32


def test_adapters_over_http(client, server, model):
    tiny_adapters.build(model, server.lora_root / "a", seed=3)
    load = {"lora_name": "org/a", "lora_path": "a"}
    assert httpx.post(server.url + "/v1/load_lora_adapter", json=load, timeout=30).status_code == 200
    ids = Tokenizer.load(str(model)).encode("The cat")
    body = {"ignore_eos": True, "return_token_ids": True}
    got = client.completions.create(model="org/a", prompt=ids, max_tokens=12, temperature=0, extra_body=body)
    assert got.choices[0].token_ids == tiny_adapters.generate(model, server.lora_root / "a", ids, 12)
    assert client.models.retrieve("org/a").root.endswith("/a")
    broken = server.lora_root / "broken"
    broken.mkdir()
    response = httpx.post(server.url + "/v1/load_lora_adapter", json={"lora_name": "b", "lora_path": "broken"})
    assert response.status_code == 400 and response.json()["error"]["message"]
    assert client.models.delete("org/a").deleted
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="org/a", prompt="x")


def test_leaving_clients_leave_no_block(client, server):
    for _ in range(5):
        stream = client.completions.create(model="tiny", prompt="go", max_tokens=200, stream=True,
                                           extra_body={"ignore_eos": True}, n=2)  # fmt: skip
        next(iter(stream))
        stream.close()
    assert server.is_idle(3.0)


def test_metrics_of_a_real_engine(client, server):
    client.completions.create(model="tiny", prompt="go", max_tokens=4, extra_body={"ignore_eos": True})
    text = httpx.get(server.url + "/metrics").text
    labels = '{engine="0",model_name="tiny"}'
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    values = {k.replace('{model_name="tiny",engine="0"}', labels): v for k, v in values.items()}
    assert values[f"vllm:generation_tokens_total{labels}"] >= 4
    assert values[f"tandem:kv_cache_usage_perc{labels}"] == 0 and values[f"tandem:steps_total{labels}"] > 0


def test_overload(model, tmp_path):
    with RealServer(model, tmp_path, max_num_seqs=1, max_num_queued_reqs=1) as server:

        def ask(_):
            try:
                extra = {"ignore_eos": True}
                server.client.completions.create(model="tiny", prompt="x", max_tokens=100, extra_body=extra)
                return "served"
            except openai.RateLimitError as e:
                assert int(e.response.headers["retry-after"]) >= 1
                return "refused"

        with ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(ask, range(8)))
        assert {"served", "refused"} == set(outcomes)
        server.is_idle()


def test_the_death_of_the_engine_reaches_the_clients(model, tmp_path):
    with RealServer(model, tmp_path) as server:
        stream = server.client.completions.create(
            model="tiny", prompt="x", max_tokens=240, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        os.kill(server.engine.process.pid, signal.SIGKILL)
        with pytest.raises(openai.APIError):
            list(stream)
        with pytest.raises(openai.InternalServerError) as caught:
            server.client.completions.create(model="tiny", prompt="x")
        assert caught.value.status_code == 503
        assert httpx.get(server.url + "/health").status_code == 503
