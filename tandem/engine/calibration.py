"""The start-up calibration: how many threads, and how long steps take, kept in the user's cache directory for the next
start of the same model on the same machine.

Here: when to measure, which number of threads is the faster, the files. Not here: how a step is timed (`worker.py`),
the cost model made of it (`scheduler/budget.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

log = logging.getLogger("tandem.engine")
# A kept calibration holds as long as a decode step takes what it took, within this factor.
STILL_TRUE = 1.5
# Fewer threads must be so much faster: they decode as fast where memory is the limit, but compute prompts slower.
WORTH_IT = 1.1
# Ever fewer threads are tried until a step takes so much longer than the best.
HOPELESS = 1.25
ROUNDS = 2

Key = dict[str, str | int]
Step = tuple[int, int, int, int, float]


class Device(Protocol):
    """What is calibrated; times are seconds."""

    def calibration_key(self) -> Key:
        """What the measurements depend on, but for the machine."""

    def use_threads(self, num_threads: int) -> None: ...

    def decode_s(self) -> float:
        """A step of one token, the best of a few."""

    def measure(self) -> list[Step]:
        """Steps of several kinds: (tokens, context read, query x key pairs, sampled rows, seconds)."""


class Calibration(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file. `decode_s`: what `Device.decode_s` was. `seconds`: what measuring took."""

    model: str
    key: Key
    num_threads: int
    decode_s: float
    steps: list[Step]
    seconds: float
    is_cached: bool = False

    @property
    def origin(self) -> str:
        """For the start-up line."""
        return "cached" if self.is_cached else f"measured in {self.seconds:.1f} s"


def calibrate(
    device: Device, model: str, mode: str, folder: Path, threads: int, may_choose: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:  # fmt: skip
    """Find or make the calibration of `device`, which has the chosen number of threads afterwards.

    `mode`: auto reads and writes `folder`, again only writes, off does neither. `threads`: how many the device uses
    now; with `may_choose` it may get fewer, unless nothing is to be kept. A file that is damaged, of other software or
    no longer true is one log line.
    """
    key = machine() | device.calibration_key() | {"threads": threads, "chooses threads": int(may_choose)}
    path = folder / f"{_name(key)}.json"
    if mode == "auto" and (kept := _load(path, key, threads)) is not None:
        device.use_threads(kept.num_threads)
        decode_s = device.decode_s()
        if 1 / STILL_TRUE < decode_s / kept.decode_s < STILL_TRUE:
            return msgspec.structs.replace(kept, is_cached=True)
        log.info("calibrating again: a decode step takes %.1f ms, not %.1f", 1e3 * decode_s, 1e3 * kept.decode_s)
    start = clock()
    candidates = thread_counts(threads) if may_choose and mode != "off" else [threads]
    num_threads, decode_s = fastest(device, candidates)
    device.use_threads(num_threads)
    steps = device.measure()
    made = Calibration(
        model=model, key=key, num_threads=num_threads, decode_s=decode_s, steps=steps, seconds=clock() - start
    )
    if mode != "off":
        _save(path, made)
    return made


def thread_counts(most: int) -> list[int]:
    """Numbers of threads to try: all up to four, else halves."""
    return list(range(most, 0, -1)) if most <= 4 else [most, *thread_counts(most // 2)]


def fastest(device: Device, candidates: list[int]) -> tuple[int, float]:
    """The best of descending numbers of threads, and the seconds of its decode step."""
    times: dict[int, float] = {}
    device.use_threads(candidates[0])
    device.decode_s()  # the first steps touch memory that nobody has touched yet
    for _ in range(ROUNDS if len(candidates) > 1 else 1):
        for count in list(times) or candidates:
            device.use_threads(count)
            times[count] = min(device.decode_s(), times.get(count, math.inf))
            if times[count] > HOPELESS * min(times.values()):
                break
    best = candidates[0]
    for count, seconds in times.items():
        if seconds * WORTH_IT < times[best]:
            best = count
    return best, times[best]


def machine() -> Key:
    """What the processor is, and how much of it is ours."""
    cpuinfo = _read("/proc/cpuinfo")
    name, flags = (
        (re.findall(rf"^{field}\s*:\s*(.*)$", cpuinfo, re.M) or [""])[0] for field in ("model name", "flags")
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = (re.findall(r"^MemTotal:\s*(\d+)", _read("/proc/meminfo"), re.M) or ["0"])[0]
    return {
        "cpu": name or platform.processor() or platform.machine(),
        "cpu flags": _hash(flags),
        "cores": cores,
        "memory": f"{int(memory) / 2**20:.0f} GiB",
    }


def kept(folder: Path) -> list[tuple[Path, Calibration | None]]:
    """The files in the cache, newest first; None for one that cannot be read."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [(path, _decode(path)) for path in paths]


# What a newer Tandem replaces is not part of a file's name, so that it takes the old one's place.
SOFTWARE = ("tandem", "torch", "kernels")


def _name(key: Key) -> str:
    return _hash(json.dumps([[k, v] for k, v in sorted(key.items()) if k not in SOFTWARE]))


def _load(path: Path, key: Key, threads: int) -> Calibration | None:
    """What is kept under this key, if it is."""
    if not path.exists():
        return None
    found = _decode(path)
    if found is None or not 1 <= found.num_threads <= threads:
        log.warning("the calibration in %s is damaged: measuring again", path)
        return None
    if found.key != key:
        changed = ", ".join(sorted(k for k in key.keys() | found.key.keys() if key.get(k) != found.key.get(k)))
        log.info("the calibration in %s is of another version (%s): measuring again", path, changed)
        return None
    return found


def _decode(path: Path) -> Calibration | None:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Calibration)
    except (OSError, ValueError):  # msgspec's errors are ValueErrors
        return None
    times = [found.decode_s, *(step[-1] for step in found.steps)]
    return found if found.steps and all(math.isfinite(t) and t > 0 for t in times) else None


def _save(path: Path, made: Calibration) -> None:
    """Whole or not at all, whoever else is writing."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n")
        os.replace(part, path)
    except OSError as error:
        log.warning("the calibration is not kept for the next start: %s", error)


def _read(path: str) -> str:
    """A system file's text; empty where the system has no such file."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
