"""Serving and training on a quantised KV cache: the embedded model's texts, the blocks that fit, nothing rides."""

from __future__ import annotations

import msgspec
import pytest

from tandem.config import CacheConfig, EngineConfig, ModelConfig
from tandem.engine.engine import Engine
from tandem.work import Example, LoraConfig, Request, SamplingParams

PROMPTS = [list(range(30 + i, 90 + 3 * i)) for i in range(6)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def engine(kv_cache_dtype: str, **cache: int) -> Engine:
    config = CacheConfig(kv_cache_dtype=kv_cache_dtype, **({"num_blocks": 128} | cache))
    return Engine(EngineConfig(model=ModelConfig(model="demo", num_threads=1), cache=config))


@pytest.fixture(scope="module")
def plain_texts() -> list[list[int]]:
    return engine("auto").generate(PROMPTS, GREEDY)


def agreement(texts: list[list[int]], expected: list[list[int]]) -> float:
    """Share of tokens before the first that differs."""
    agreed = 0
    for mine, theirs in zip(texts, expected, strict=True):
        agreed += next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(mine))
    return agreed / sum(map(len, expected))


@pytest.mark.parametrize(("kv_cache_dtype", "least"), [("int8", 0.7), ("int4", 0.2)])
def test_texts_stay_close(plain_texts: list[list[int]], kv_cache_dtype: str, least: float) -> None:
    assert agreement(engine(kv_cache_dtype).generate(PROMPTS, GREEDY), plain_texts) >= least


def test_prefix_hits_and_forks_read_the_same_bytes() -> None:
    """A prompt found in the cache and a copied partial block give the text that computing anew gives."""
    made = engine("int4")
    first = made.generate(PROMPTS[:1], GREEDY)
    assert made.generate(PROMPTS[:1], GREEDY) == first
    assert made.refresh_stats().prefix_hits > 0
    made.submit(Request(request_id="fork", prompt=PROMPTS[0], sampling=msgspec.structs.replace(GREEDY, n=3)))
    choices: dict[int, list[int]] = {}
    for events in made.run():
        for event in events:
            if event.token_id is not None:
                choices.setdefault(event.index, []).append(event.token_id)
    assert list(choices.values()) == first * 3


def test_more_blocks_fit() -> None:
    sizes = {
        name: engine(name, num_blocks=None, kv_cache_memory_bytes=2 * 2**20).worker.num_blocks
        for name in ("auto", "int8", "int4")
    }
    assert sizes["int8"] > 1.6 * sizes["auto"]
    assert sizes["int4"] > 2.5 * sizes["auto"]


def test_training_does_not_ride() -> None:
    made = engine("int8")
    assert not made.training.limits.share_forward
    assert engine("auto").training.limits.share_forward
    made.open_run("run", LoraConfig(rank=2))
    example = Example(tokens=PROMPTS[0][:-1], targets=PROMPTS[0][1:], weights=[1.0] * (len(PROMPTS[0]) - 1))
    plain = engine("auto")
    plain.open_run("run", LoraConfig(rank=2))
    assert made.forward_backward("run", [example]).loss == plain.forward_backward("run", [example]).loss


