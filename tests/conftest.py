"""Fixtures for every test: tiny models, built once per session; one torch thread, as tests share few cores."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No test may touch the state of the person who runs it; removed when Python ends.
_STATE = tempfile.TemporaryDirectory(prefix="tandem-tests-")
os.environ["TANDEM_STATE_DIR"] = _STATE.name
os.environ["XDG_CACHE_HOME"] = f"{_STATE.name}/cache"


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_model("gemma2") -> directory of a tiny random model with a tokenizer; names in tiny_models.FAMILIES."""
    import tiny_models

    built: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in built:
            built[family] = tiny_models.build(family, tmp_path_factory.mktemp(family))
        return built[family]

    return get
