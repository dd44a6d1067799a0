"""An engine that answers at once with canned text, behind `EngineClient`'s surface, and a real server around it."""

import asyncio
import socket
import threading
import time

import pytest
import uvicorn
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tandem.api.app import build_app
from tandem.config import ServerConfig
from tandem.errors import EngineDead, NotFound, Overloaded
from tandem.tokenizer import Tokenizer
from tandem.work import Adapter, EngineReport, EngineStats, TokenEvent, TopLogprobs

REPORT = EngineReport(
    model="org/tiny:1", architecture="llama", num_parameters=1, weight_bytes=1, load_s=0, device="cpu", isa="",
    num_threads=1, dtype="float32", block_size=16, num_blocks=64, kv_bytes=1, max_model_len=256, vocab_size=500,
)  # fmt: skip


class FakeEngine:
    """Writes `text` (choice i: without its first i tokens, below 9), one token a step and `step_s` between steps."""

    def __init__(self, tokenizer, text="Hello there, naïve 🙂 world. The end."):
        self.report, self.stats, self.adapters, self.dead = REPORT, EngineStats(blocks_total=64), {}, None
        self.max_num_queued_reqs = 4096
        self.reply, self.step_s = tokenizer.encode(text, False), 0.0
        self.error, self.requests, self.cancelled, self.open = None, [], [], 0

    def submit(self, request):
        if self.dead:
            raise EngineDead(self.dead)
        if isinstance(self.error, Overloaded):
            raise self.error
        self.requests.append(request)
        return FakeStream(self, request)

    def cancel(self, request_id, index=None):
        self.cancelled.append((request_id, index))

    async def load_adapter(self, name, path):
        self.adapters[name] = Adapter(name=name, version=len(self.adapters) + 1, rank=8, path=path)
        return self.adapters[name]

    async def unload_adapter(self, name):
        if self.adapters.pop(name, None) is None:
            raise NotFound(f"no adapter {name}")


class FakeStream:
    def __init__(self, engine, request):
        self.engine, self.request, self.steps = engine, request, self._steps()
        engine.open += 1

    def __aiter__(self):
        return self.steps

    async def _steps(self):
        engine, p = self.engine, self.request.sampling
        for step in range(max(p.max_tokens, 1)):
            await asyncio.sleep(engine.step_s)
            if engine.error or engine.dead:
                raise engine.error or EngineDead(engine.dead)
            yield [event for i in range(p.n) if (event := self._event(i, step))]

    def _event(self, i, step):
        p, reply = self.request.sampling, self.engine.reply[i % 9 :]
        top = lambda t: TopLogprobs(-0.5, 1, [t, t + 1][: p.logprobs or 0], [-0.5, -1.5][: p.logprobs or 0])  # noqa: E731
        prompt = [top(t) for t in self.request.prompt[1:]] if p.prompt_logprobs is not None and step == 0 else None
        is_last = step + 1 >= min(p.max_tokens, len(reply)) and not (p.ignore_eos and step + 1 < p.max_tokens)
        if p.max_tokens == 0:
            return TokenEvent(request_id="", index=i, finish_reason="length", prompt_logprobs=prompt)
        if step and (step >= p.max_tokens or (step >= len(reply) and not p.ignore_eos)):
            return None
        token = reply[step % len(reply)]
        why = ("length" if step + 1 == p.max_tokens else "stop") if is_last else None
        return TokenEvent(request_id="", index=i, token_id=token, finish_reason=why, prompt_logprobs=prompt,
                          logprob=top(token) if p.logprobs is not None else None, cached_tokens=step == 0)  # fmt: skip

    async def aclose(self):
        self.engine.open -= 1
        self.engine.cancelled.append((self.request.request_id, None))


class Server:
    """A uvicorn server in a thread on a free port of 127.0.0.1."""

    def __init__(self, app):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="error", loop="uvloop", http="httptools"))
        self.thread = threading.Thread(target=self.uvicorn.run, args=([self.socket],), daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *_):
        self.uvicorn.should_exit = True
        self.thread.join(timeout=10)
        self.socket.close()


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["Hello there, world. The end. user assistant system"] * 2, trainer)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE))


@pytest.fixture
def engine(tokenizer):
    made = FakeEngine(tokenizer)
    yield made
    assert made.open == 0, "a stream was left open"


@pytest.fixture(scope="session")
def steady_url(tokenizer):
    """A server for requests that never reach its engine."""
    with Server(build_app(FakeEngine(tokenizer), tokenizer, ServerConfig())) as server:
        yield server.url


@pytest.fixture
def app(engine, tokenizer, tmp_path):
    return build_app(engine, tokenizer, ServerConfig(), lora_root=str(tmp_path))


@pytest.fixture
def serve():
    """serve(app) -> a running Server, stopped after the test."""
    running = []

    def start(app):
        running.append(Server(app).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__()
