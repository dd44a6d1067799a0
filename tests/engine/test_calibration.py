"""The kept calibration: when it is used, when it is made again, which number of threads it chooses. No real clock."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem import config
from tandem.engine import calibration
from tandem.engine.calibration import calibrate, fastest, kept, thread_counts
from tandem.engine.engine import Engine
from tandem.work import SamplingParams

STEPS = [(1, 16, 0, 1, 0.05), (16, 256, 0, 16, 0.08)]


class FakeDevice:
    """A decode step takes `seconds[threads]`."""

    def __init__(self, seconds: dict[int, float] | None = None) -> None:
        self.seconds = seconds or {1: 0.08, 2: 0.05}
        self.key: dict[str, str | int] = {"tandem": "1", "model": "m"}
        self.threads, self.num_measured, self.timed = max(self.seconds), 0, list[int]()

    def calibration_key(self) -> dict[str, str | int]:
        return dict(self.key)

    def use_threads(self, num_threads: int) -> None:
        self.threads = num_threads

    def decode_s(self) -> float:
        self.timed.append(self.threads)
        return self.seconds[self.threads]

    def measure(self) -> list[tuple[int, int, int, int, float]]:
        self.num_measured += 1
        return STEPS


def start(device: FakeDevice, folder: Path, mode: str = "auto", may_choose: bool = True) -> calibration.Calibration:
    ticks = iter(range(100))
    return calibrate(device, "m", mode, folder, 2, may_choose, clock=lambda: float(next(ticks)))


def test_a_second_start_uses_what_the_first_measured(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    first, device = start(FakeDevice(), folder), FakeDevice()
    second = start(device, folder)
    assert (first.origin, second.origin) == ("measured in 1.0 s", "cached")
    assert second.steps == first.steps == STEPS and device.num_measured == 0
    assert [found for _, found in kept(folder)] == [first]


@pytest.mark.parametrize(("mode", "measured", "files"), [("auto", 1, 1), ("again", 2, 1), ("off", 2, 0)])
def test_modes(tmp_path: Path, mode: str, measured: int, files: int) -> None:
    device = FakeDevice({1: 0.01, 2: 0.05})
    for _ in range(2):
        found = start(device, tmp_path, mode)
    assert device.num_measured == measured and len(list(tmp_path.iterdir())) == files
    assert found.num_threads == device.threads == (2 if mode == "off" else 1)


@pytest.mark.parametrize("name", ["tandem", "model", "dtype"])
def test_another_key_is_measured(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    start(FakeDevice(), tmp_path)
    device = FakeDevice()
    device.key[name] = "other"
    with caplog.at_level(logging.INFO, "tandem.engine"):
        assert start(device, tmp_path).origin != "cached"
    # New software takes the old one's place, another model has a file of its own.
    assert len(kept(tmp_path)) == (1 if name == "tandem" else 2)
    assert ("another version (tandem)" in caplog.text) == (name == "tandem")
    assert start(device, tmp_path).origin == "cached"


def test_another_machine_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(FakeDevice(), tmp_path)
    here = calibration.machine()
    assert here == calibration.machine()
    for name in here:
        monkeypatch.setattr(calibration, "machine", lambda name=name: here | {name: "other"})
        assert start(FakeDevice(), tmp_path).origin != "cached", name


def damaged(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b"\xff\x00" * 50),
        lambda path: damaged(path, lambda c: c.update(num_threads=64)),
        lambda path: damaged(path, lambda c: c.update(num_threads="2")),
        lambda path: damaged(path, lambda c: c.update(steps=[])),
        lambda path: damaged(path, lambda c: c.update(decode_s=0.0)),
        lambda path: damaged(path, lambda c: c["steps"].append([1, 1, 1, 1, -1.0])),
        lambda path: damaged(path, lambda c: c.pop("steps")),
    ],
)
def test_a_damaged_file_is_one_log_line(
    tmp_path: Path, change: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    start(FakeDevice(), tmp_path)
    (path,) = tmp_path.iterdir()
    change(path)
    assert start(FakeDevice(), tmp_path).origin != "cached"
    (record,) = caplog.records
    assert "is damaged: measuring again" in record.getMessage() and str(path) in record.getMessage()
    assert start(FakeDevice(), tmp_path).origin == "cached"


@pytest.mark.parametrize(("factor", "is_cached"), [(0.5, False), (0.7, True), (1.4, True), (1.6, False)])
def test_what_is_no_longer_true_is_measured_again(tmp_path: Path, factor: float, is_cached: bool) -> None:
    start(FakeDevice(), tmp_path)
    slower = FakeDevice({1: 0.08 * factor, 2: 0.05 * factor})
    assert start(slower, tmp_path).is_cached == is_cached
    assert start(slower, tmp_path).is_cached


def test_a_folder_that_cannot_be_written_is_one_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert start(FakeDevice(), tmp_path / "file").steps == STEPS
    (record,) = caplog.records
    assert "not kept for the next start" in record.getMessage()


def _start_often(folder: Path) -> None:
    for _ in range(50):
        start(FakeDevice(), folder, "again")


def test_engines_that_start_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    start(FakeDevice(), tmp_path)
    (path,) = tmp_path.iterdir()
    running = [multiprocessing.get_context("fork").Process(target=_start_often, args=(tmp_path,)) for _ in range(3)]
    for process in running:
        process.start()
    while any(process.is_alive() for process in running):
        assert calibration._decode(path) is not None
    assert all(process.exitcode == 0 for process in running)
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({2: 0.05, 1: 0.08}, 2),
        ({2: 0.05, 1: 0.03}, 1),
        ({2: 0.05, 1: 0.048}, 2),  # not worth the slower prompts
        ({2: 0.05, 1: 0.05}, 2),
        ({4: 0.05, 3: 0.04, 2: 0.045, 1: 0.09}, 3),
    ],
)
def test_fewer_threads_must_be_clearly_faster(seconds: dict[int, float], best: int) -> None:
    assert fastest(FakeDevice(seconds), thread_counts(max(seconds))) == (best, seconds[best])


def test_hopeless_numbers_of_threads_are_not_tried() -> None:
    assert thread_counts(64) == [64, 32, 16, 8, 4, 3, 2, 1]
    assert thread_counts(6) == [6, 3, 2, 1] and thread_counts(1) == [1]
    device = FakeDevice({count: 64 / count for count in thread_counts(64)})
    assert fastest(device, thread_counts(64))[0] == 64
    assert set(device.timed) == {64, 32}


def test_threads_that_somebody_chose_stay(tmp_path: Path) -> None:
    device = FakeDevice({1: 0.01, 2: 0.05})
    assert start(device, tmp_path, may_choose=False).num_threads == device.threads == 2
    # And what was chosen is not mistaken for it.
    assert start(device, tmp_path).num_threads == 1
    assert start(device, tmp_path, may_choose=False).is_cached and device.threads == 2


# ---------------------------------------------------------------- the real device


def test_an_engine_with_a_kept_calibration_serves_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "STILL_TRUE", math.inf)
    engines = [Engine(config.EngineConfig()) for _ in range(2)]
    assert [engine.calibration.is_cached for engine in engines] == [False, True]
    assert engines[1].report.calibration == "cached"
    assert engines[1].limits.cost == engines[0].limits.cost
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    first, second = (engine.generate([[1, 2, 3], [4]], sampling) for engine in engines)
    assert first == second
    ((path, found),) = kept(config.cache_dir() / "calibration")
    assert path.is_relative_to(tmp_path / "tandem") and found is not None and found.model == "demo"
    assert {"cpu", "cpu flags", "cores", "memory", "isa", "tandem", "torch", "kernels", "model", "dtype",
            "quantization", "kv cache", "threads"} <= found.key.keys()  # fmt: skip


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert config.cache_dir() == Path("/somewhere/tandem")
    for wrong in ("", "relative/path"):  # which the specification says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", wrong)
        assert config.cache_dir() == Path.home() / ".cache" / "tandem"
