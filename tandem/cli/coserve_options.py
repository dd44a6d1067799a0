"""The options of `tandem bench coserve`: which loads, which modes, for how long, and in which order they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.cli import options
from tandem.cli.coserve_figures import MODES
from tandem.config import option

# The default target of the time per output token: so many times that of one stream alone.
SINGLE_STREAM_FACTOR = 2.0


@dataclass(frozen=True)
class CoserveOptions:
    """The measurement."""

    trace: str | None = option(None, "where lengths come from: CSV or JSON lines", metavar="FILE")
    trace_scale: float = option(8.0, "divide the trace's lengths by this", low=1e-9)
    loads: str = option("0,25,50,75,100", "per cent of the highest rate at which serving alone keeps its targets")
    modes: str = option("", f"of {','.join(MODES)} (default: all, two-processes if both --*-python are given)")
    seconds: float = option(180.0, "measured time of each run", low=0.1)
    warm_up_seconds: float = option(15.0, "time before it (and as much after it) that does not count", low=0.0)
    capacity: float | None = option(None, "requests per second that are 100 % (default: found by search)", low=1e-9)
    search_seconds: float = option(60.0, "measured time of each run of that search", low=0.1)
    search_steps: int = option(4, "its bisections", low=0)
    target_ttft_ms: float = option(3000.0, "time to first token that requests must keep", low=0.0)
    target_tpot_ms: float | None = option(
        None, f"time per output token (default: {SINGLE_STREAM_FACTOR:g}x that of one stream alone)", low=0.0
    )
    train_batch: int = option(4, "training sequences per optimiser step", low=1)
    train_length: int = option(512, "their tokens", low=1)
    train_rank: int = option(16, "rank of the adapter, on all linears", low=1)
    closed_streams: int = option(4, "streams of the closed loop that two processes are measured with", low=1)
    json: str | None = option(None, "write the rows here as a JSON list, and what they stand on to FILE.run.json")
    plot: str | None = option(None, "draw one curve per mode into this PNG (needs matplotlib)")


@dataclass(frozen=True)
class PeerOptions:
    """What it is compared with."""

    vllm_python: str | None = option(None, "Python of an environment with vLLM's CPU build", metavar="PATH")
    peft_python: str | None = option(None, "Python of an environment with transformers and PEFT", metavar="PATH")
    peft_tokens_per_s: float | None = option(
        None, "training tokens/s of the PEFT loop alone (default: measured, if there is --peft-python)", low=0.0
    )


def parse_loads(text: str) -> list[float]:
    """'0,25,100' -> [0.0, 25.0, 100.0], ascending. UsageError for anything else."""
    try:
        loads = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise options.UsageError(f"--loads wants numbers such as 0,25,50, not {text!r}") from None
    if loads[0] < 0 or not all(load < float("inf") for load in loads):
        raise options.UsageError(f"--loads are per cent of the highest rate, 0 or more, not {text!r}")
    return loads


def parse_modes(text: str, peers: PeerOptions) -> tuple[str, ...]:
    """'serve,coserve' -> those modes in the usual order; all that are possible for ''. UsageError for anything else."""
    has_peers = bool(peers.vllm_python and peers.peft_python)
    if not text:
        return MODES if has_peers else MODES[:-1]
    named = {part.strip() for part in text.split(",")}
    if unknown := named - set(MODES):
        raise options.UsageError(f"--modes knows {', '.join(MODES)}, not {', '.join(sorted(unknown))}")
    if "two-processes" in named and not has_peers:
        raise options.UsageError("--modes two-processes needs --vllm-python and --peft-python")
    return tuple(mode for mode in MODES if mode in named)


def order(loads: Sequence[float], modes: Sequence[str]) -> list[tuple[float, str]]:
    """The runs on our engine: training alone first, then load by load, so that what is compared is measured close
    together. Temporal sharing needs an engine of its own; which of the two goes first changes from load to load, so
    that one start serves two loads."""
    found = [(0.0, "train")] if "train" in modes else []
    for i, load in enumerate(loads):
        shared = [(load, mode) for mode in ("serve", "coserve") if mode in modes and (load or mode != "serve")]
        turns = [(load, "temporal")] if "temporal" in modes else []
        found += shared + turns if i % 2 == 0 else turns + shared
    return found
