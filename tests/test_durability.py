"""kill -9 at random instants, for real: what was confirmed is there, and the job's bits are those of a quiet run."""

import os
import random
import subprocess
import sys

import pytest
from durability import endure


@pytest.mark.timeout(300)
def test_five_kills_lose_nothing_and_change_nothing(tmp_path):
    seed = int(os.environ.get("TANDEM_TEST_SEED", random.randrange(2**32)))
    print(f"TANDEM_TEST_SEED={seed} repeats it")
    kills = []
    assert endure(tmp_path, seed, num_kills=5, on_kill=kills.append) >= 2, kills
    assert len(kills) == 5


def test_an_engine_whose_server_died_before_it_could_look_ends_too(tmp_path):
    folder = tmp_path / "sockets"
    folder.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    addresses = [f"ipc://{folder}/{name}" for name in ("to-engine", "from-engine")]
    command = [sys.executable, "-m", "tandem.engine.process", *addresses, str(dead.pid)]
    assert subprocess.run(command, timeout=20).returncode == 1
    assert not folder.exists()
