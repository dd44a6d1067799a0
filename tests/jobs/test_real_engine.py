"""Jobs on the real engine process, in its deterministic mode: a server that stops in the middle changes no bit."""

from pathlib import Path

import pytest
from places import Place

from tandem.config import CacheConfig, EngineConfig, ModelConfig, TrainingConfig
from tandem.engine.client import EngineClient
from tandem.tokenizer import Tokenizer
from tandem.work import Request, SamplingParams


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


async def start(model):
    return await EngineClient.start(
        EngineConfig(
            model=ModelConfig(model=str(model), dtype="float32", num_threads=1, max_model_len=128),
            cache=CacheConfig(num_blocks=64),
            training=TrainingConfig(deterministic=True),
        )
    )


async def weights(place, name):
    return Path((await place.jobs.adapter(name)).path, "adapter_model.safetensors").read_bytes()


async def test_a_job_stopped_and_gone_on_with_ends_with_the_same_bits(tmp_path, model):
    tokenizer = Tokenizer.load(str(model))
    found = []
    for name in ("whole", "stopped"):
        place = Place(tmp_path / name, tokenizer)
        place.engine = await start(model)
        try:
            await place.open()
            job_id = (await place.create(rows=12, tandem={"rank": 4, "dropout": 0.1, "max_seq_len": 64})).job_id
            if name == "stopped":
                await place.until_step(job_id, 3)
                await place.jobs.pause(job_id)
                paused = await place.until(job_id, "paused")
                assert paused.step < paused.total_steps
                await place.jobs.close()
                await place.engine.close()
                place.engine = await start(model)
                await place.open()
                await place.jobs.resume(job_id)
            job = await place.until(job_id, "succeeded", timeout=60)
            found.append(await weights(place, job.fine_tuned_model))
            losses = [e.data["train_loss"] for e in (await place.jobs.events(job_id, limit=100))[0] if e.data]
            assert losses[0] < losses[-1]  # newest first
            for checkpoint in (await place.jobs.checkpoints(job_id))[0]:
                adapter = await place.jobs.resident(checkpoint.name)
                sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
                request = Request(request_id=checkpoint.name, prompt=[5, 6, 7], sampling=sampling, adapter=adapter)
                tokens = [event.token_id async for news in place.engine.submit(request) for event in news]
                assert len(tokens) == 2
        finally:
            await place.jobs.close()
            await place.engine.close()
    assert found[0] == found[1]
