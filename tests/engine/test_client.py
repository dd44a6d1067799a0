"""The process border with a real engine process: streams, refusals, adapters, and either side's death."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import tiny_adapters

from tandem.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from tandem.engine.client import EngineClient
from tandem.engine.engine import Engine
from tandem.errors import ConfigError, ContextTooLong, EngineDead, ModelError, NotFound, Overloaded
from tandem.work import Request, SamplingParams

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


def config(path: Path, blocks: int = 100, **model: object) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model=str(path), dtype="float32", num_threads=1, **model),
        cache=CacheConfig(num_blocks=blocks),
        scheduler=SchedulerConfig(max_num_queued_reqs=6),
    )


@pytest_asyncio.fixture
async def client(tiny_model: Callable[[str], Path]) -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(config(tiny_model("llama")))
    yield client
    await client.close()


async def text(client: EngineClient, name: str, **fields: object) -> list[int]:
    request = Request(request_id=name, **{"prompt": [5, 6, 7], "sampling": GREEDY} | fields)
    return [e.token_id async for events in client.submit(request) for e in events if e.token_id is not None]


async def idle(client: EngineClient) -> None:
    """Wait until the engine says that nothing runs and every block is free."""
    for _ in range(200):
        if client.stats.num_running + client.stats.num_waiting + client.stats.blocks_used == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"not idle: {client.stats}")


async def test_streams_are_the_engines_text(client: EngineClient, tiny_model) -> None:
    expected = Engine(config(tiny_model("llama"))).generate([[5, 6, 7], [9, 9]], GREEDY)
    found = await asyncio.gather(text(client, "a"), text(client, "b", prompt=[9, 9]))
    assert list(found) == expected
    assert client.report.vocab_size == 264 and client.stats.generation_tokens == 40
    await idle(client)


async def test_refusals_reach_their_stream_only(client: EngineClient) -> None:
    good = asyncio.create_task(text(client, "good"))
    with pytest.raises(ContextTooLong, match="context of 256"):
        await text(client, "long", prompt=[5] * 300)
    with pytest.raises(NotFound, match="nobody"):
        await text(client, "stranger", adapter="nobody")
    assert len(await good) == 20


async def test_a_full_queue_is_refused_with_a_time_to_come_back(client: EngineClient) -> None:
    long = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True, n=6)
    with pytest.raises(Overloaded) as refusal:
        for i in range(40):
            client.submit(Request(request_id=str(i), prompt=[5] * 150, sampling=long))
    assert refusal.value.retry_after >= 1
    for i in range(40):
        client.cancel(str(i))


async def test_closing_a_stream_cancels_its_request(client: EngineClient) -> None:
    endless = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    stream = client.submit(Request(request_id="r", prompt=[5], sampling=endless))
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    await idle(client)
    assert client.stats.generation_tokens < 200


async def test_adapters_come_and_go(client: EngineClient, tiny_model, tmp_path: Path) -> None:
    path = tiny_adapters.build(tiny_model("llama"), tmp_path / "a")
    adapter = await client.load_adapter("mine", str(path))
    assert adapter.name == "mine" and adapter.rank == 8 and list(client.adapters) == ["mine"]
    found = await text(client, "r", adapter="mine")
    assert found == tiny_adapters.generate(tiny_model("llama"), path, [5, 6, 7], 20)
    with pytest.raises(ModelError, match="adapter_config.json"):
        await client.load_adapter("other", str(tmp_path))
    await client.unload_adapter("mine")
    assert not client.adapters
    with pytest.raises(NotFound):
        await client.unload_adapter("mine")


async def test_a_killed_engine_reaches_every_stream(tiny_model) -> None:
    client = await EngineClient.start(config(tiny_model("llama")))
    endless = SamplingParams(max_tokens=200, ignore_eos=True)
    stream = client.submit(Request(request_id="r", prompt=[5], sampling=endless))
    await anext(stream)
    client.process.kill()
    with pytest.raises(EngineDead):
        async for _ in stream:
            pass
    assert "code -9" in await asyncio.wait_for(client.wait_dead(), 2)
    with pytest.raises(EngineDead):
        client.submit(Request(request_id="s", prompt=[5]))
    with pytest.raises(EngineDead):
        await client.load_adapter("a", "b")
    await client.close()


async def test_a_directory_made_by_a_stranger_does_not_end_the_engine(
    client: EngineClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="not valid JSON"):
        await client.load_adapter("a", str(tmp_path))
    (tmp_path / "adapter_config.json").write_bytes(b'{"peft_type": "LORA", "r": 8, "\xff": 1}')
    with pytest.raises(ModelError):
        await client.load_adapter("a", str(tmp_path))
    assert len(await text(client, "still here")) == 20


async def test_the_engine_leaves_signals_to_its_parent(client: EngineClient) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        client.process.send_signal(number)
    assert len(await text(client, "r")) == 20


async def test_start_up_failures_come_back_as_their_own_errors(tiny_model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a directory"):
        await EngineClient.start(config(tmp_path / "nothing here"))
    with pytest.raises(ConfigError, match="--max-model-len"):
        await EngineClient.start(config(tiny_model("llama"), blocks=9, max_model_len=256))


def test_the_engine_ends_when_its_parent_is_killed(tiny_model) -> None:
    script = (
        "import asyncio, sys\n"
        "from tandem.engine.client import EngineClient\n"
        "from tandem.config import EngineConfig, ModelConfig\n"
        "async def main():\n"
        "    client = await EngineClient.start(EngineConfig(model=ModelConfig(model=sys.argv[1], num_threads=1)))\n"
        "    print(client.process.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tiny_model("llama"))], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    engine = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 5
    while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
