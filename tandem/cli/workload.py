"""What a benchmark asks of an engine: prompts, lengths and arrival times from a seed or a file. Pure; no HTTP.

Lengths are tokens, times are seconds from the start of the run.
"""

from __future__ import annotations

import csv
import json
import math
import random
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tandem.errors import ConfigError

# The offline workloads: (batch, prompt tokens, generated tokens).
OFFLINE = ((1, 16, 64), (1, 512, 1), (4, 16, 64), (16, 16, 64), (32, 16, 64), (16, 256, 64))


@dataclass(frozen=True)
class Arrival:
    """One request of an open-loop run: when it comes, its prompt (token ids or text) and how much it wants."""

    at_s: float
    prompt: list[int] | str
    output_len: int


@dataclass(frozen=True)
class Shape:
    """A line of a trace: `at_s` seconds after the first one."""

    at_s: float
    prompt_len: int
    output_len: int


def parse_offline(text: str) -> list[tuple[int, int, int]]:
    """'1x16x64,4x16x64' -> [(1, 16, 64), (4, 16, 64)]. ConfigError for anything else."""
    found = []
    for part in text.split(","):
        numbers = part.strip().split("x")
        if len(numbers) != 3 or not all(n.isdigit() and int(n) > 0 for n in numbers):
            raise ConfigError(f"--workloads wants BATCHxPROMPTxGENERATED such as 4x16x64, not {part!r}")
        found.append((int(numbers[0]), int(numbers[1]), int(numbers[2])))
    return found


def prompts(batch: int, length: int, vocabulary: int, seed: int = 1) -> list[list[int]]:
    """`batch` prompts of `length` random token ids; the same for every engine that is given the same numbers."""
    rng = random.Random(seed)
    return [[rng.randrange(10, vocabulary) for _ in range(length)] for _ in range(batch)]


def poisson(num: int, rate: float, rng: random.Random) -> list[float]:
    """`num` arrival times of a Poisson process of `rate` per second; infinite rate: all at once."""
    times, now = [], 0.0
    for _ in range(num):
        times.append(now)
        now += 0.0 if math.isinf(rate) else rng.expovariate(rate)
    return times


def read_trace(path: str, num: int, scale: float) -> list[Shape]:
    """The first `num` lines of a trace, lengths divided by `scale` (at least 1 token).

    CSV with TIMESTAMP, ContextTokens, GeneratedTokens, or JSON lines with timestamp (ms), input_length, output_length.
    """
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            raw: list[tuple[float, int, int]] = []
            rows = csv.DictReader(stream) if path.endswith(".csv") else map(json.loads, filter(str.strip, stream))
            for row in rows:
                if len(raw) == num:
                    break
                raw.append(_trace_row(row))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {type(error).__name__}: {error}") from error
    if not raw:
        raise ConfigError(f"the trace {path} has no requests")
    start = raw[0][0]
    return [Shape(at - start, max(1, round(a / scale)), max(1, round(b / scale))) for at, a, b in raw]


def _trace_row(row: dict[str, Any]) -> tuple[float, int, int]:
    if "TIMESTAMP" in row:
        # Seven digits after the point are one more than datetime reads.
        seconds, _, fraction = row["TIMESTAMP"].strip().partition(".")
        at = datetime.fromisoformat(seconds).timestamp() + float(f"0.{fraction or 0}")
        return at, int(row["ContextTokens"]), int(row["GeneratedTokens"])
    return float(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"])


def read_sharegpt(path: str, num: int, rng: random.Random) -> list[tuple[str, str]]:
    """`num` pairs of first question and first answer from a ShareGPT JSON file, shuffled, repeated if need be."""
    try:
        with open(path, encoding="utf-8") as stream:
            talks = [entry["conversations"] for entry in json.load(stream)]
        pairs = [(talk[0]["value"], talk[1]["value"]) for talk in talks if len(talk) >= 2]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read the ShareGPT file {path}: {type(error).__name__}: {error}") from error
    if not pairs:
        raise ConfigError(f"{path} has no conversation of two turns")
    rng.shuffle(pairs)
    return [pairs[i % len(pairs)] for i in range(num)]


def random_prompt(length: int, vocabulary: list[int], rng: random.Random) -> list[int]:
    """Token ids that share no prefix with another prompt but by accident."""
    return rng.choices(vocabulary, k=length)


def varied(length: int, ratio: float, rng: random.Random) -> int:
    """A length between (1 - ratio) and (1 + ratio) times `length`, at least 1."""
    return max(1, rng.randint(math.floor(length * (1 - ratio)), math.ceil(length * (1 + ratio)))) if ratio else length
