"""Engines on tiny models. Every engine is checked for leaks when its test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.config import AdapterConfig, CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, TrainingConfig
from tandem.engine.engine import Engine


@pytest.fixture
def make_engine(tiny_model: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    """make_engine("llama", num_blocks=40, max_num_seqs=4, ...) in float32; options go to the config that has them."""
    engines: list[Engine] = []

    def make(family: str = "llama", dtype: str = "float32", **options: Any) -> Engine:
        configs: dict[str, Any] = {}
        kinds = dict(cache=CacheConfig, scheduler=SchedulerConfig, adapters=AdapterConfig, training=TrainingConfig)
        for name, kind in kinds.items():
            own = {key: options.pop(key) for key in list(options) if key in kind.__dataclass_fields__}
            configs[name] = kind(**({"num_blocks": 200} if name == "cache" else {}) | own)
        model = ModelConfig(model=str(tiny_model(family)), dtype=dtype, **options)
        engines.append(Engine(EngineConfig(model=model, **configs)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.check()
