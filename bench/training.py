"""Training alone beside the PEFT loop, its memory, and what having it costs serving: the figures that need turns.

    python bench/training.py against-peft --model DIR --peft-python VENV/bin/python --rounds 3
    python bench/training.py memory --model DIR --batch 2 --length 1024 --tandem-args "--train-memory-bytes 100M"
    python bench/training.py memory --model DIR --batch 1 --length 8192
    python bench/training.py idle --model DIR --other CHECKOUT --rounds 10

against-peft: training tokens/s in turns, the ratio of medians. memory: peak PSS of this process and the engine's while
it trains, KV pool included, less one copy of the weights; given --peft-python also the PEFT loop's, plain and with
checkpointing. idle: serving without a job, in turns with another checkout of this project; the median of the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil

from tandem.cli import coserve_cells, coserve_peers, options
from tandem.cli.coserve_cells import Job
from tandem.cli.coserve_report import machine
from tandem.config import EngineConfig
from tandem.engine.client import EngineClient

SAMPLE_S = 0.25


def main(argv: list[str] | None = None) -> int:
    """Measure what the command line asks for; one JSON object on standard output."""
    args = _parser().parse_args(argv)
    if Path(args.model).is_dir():
        args.model = str(Path(args.model).resolve())  # measured from other directories too
    figures = {"against-peft": against_peft, "memory": memory, "idle": idle}[args.what](args)
    asked = {k: v for k, v in vars(args).items() if v is not None and not k.endswith("python") and k != "json"}
    found = {"asked": asked, "machine": machine(), **figures}
    print(json.dumps(found, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Training alone, its memory, and what it costs serving.")
    verbs = parser.add_subparsers(dest="what", required=True)
    for name in ("against-peft", "memory", "idle"):
        verb = verbs.add_parser(name)
        verb.add_argument("--model", required=True, metavar="DIR")
        verb.add_argument("--dtype", default="bfloat16")
        verb.add_argument("--tandem-args", default="", help="more flags of the engine, as one string")
        verb.add_argument("--json", metavar="FILE")
        if name == "idle":
            verb.add_argument("--other", required=True, metavar="CHECKOUT")
            verb.add_argument("--workloads", default="1x16x64,4x16x64,16x16x64,16x256x64")
            verb.add_argument("--rounds", type=int, default=10)
            continue
        verb.add_argument("--peft-python", required=name == "against-peft", metavar="PATH")
        verb.add_argument("--batch", type=int, default=4 if name == "against-peft" else 2)
        verb.add_argument("--length", type=int, default=512 if name == "against-peft" else 1024)
        verb.add_argument("--rank", type=int, default=16)
        verb.add_argument("--seconds", type=float, default=90.0, help="of each measurement, at least")
        if name == "against-peft":
            verb.add_argument("--rounds", type=int, default=3)
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------ training


def against_peft(args: argparse.Namespace) -> dict:
    """Training tokens/s of each in turns, and the ratio of their medians."""
    job, ours, theirs = Job(args.batch, args.length, args.rank), [], []
    command = coserve_peers.peft_command(args.peft_python, args.model, args.dtype, job)
    for turn in range(args.rounds):
        # Who goes first changes: a machine that warms up or slows down favours nobody.
        for is_ours in (True, False) if turn % 2 == 0 else (False, True):
            if is_ours:
                ours.append(asyncio.run(_train(args, job))["tokens_per_s"])
                _say(f"round {turn + 1}: tandem {ours[-1]:.1f} tokens/s")
            else:
                theirs.append(asyncio.run(coserve_peers.train_alone(command, args.seconds))[0])
                _say(f"round {turn + 1}: PEFT {theirs[-1]:.1f} tokens/s")
    ratio = statistics.median(ours) / statistics.median(theirs)
    return {"tandem_tokens_per_s": ours, "peft_tokens_per_s": theirs, "ratio": round(ratio, 3)}


def memory(args: argparse.Namespace) -> dict:
    """Our peak while training and our speed; the PEFT loop's peaks where there is one."""
    job = Job(args.batch, args.length, args.rank)
    found = {"tandem": asyncio.run(_train(args, job))}
    if args.peft_python:
        for name, checkpointing in (("peft", False), ("peft_checkpointing", True)):
            command = coserve_peers.peft_command(
                args.peft_python, args.model, args.dtype, job, whole_batch=True, checkpointing=checkpointing
            )
            rate, peak = asyncio.run(coserve_peers.train_alone(command, args.seconds))
            share = found["tandem"]["peak_beyond_weights_bytes"] / peak
            found[name] = {"tokens_per_s": rate, "peak_resident_bytes": peak, "tandem_share": round(share, 3)}
            _say(f"{name}: {rate:.1f} tokens/s, {peak / 1e9:.2f} GB at most")
    return found


async def _train(args: argparse.Namespace, job: Job) -> dict:
    """A fresh engine that only trains, for at least `seconds` and two optimiser steps after a first one."""
    async with _peak_pss() as whole, _engine(args) as engine:
        started = _pss()
        async with coserve_cells.training(engine, job, 0) as counter, _peak_pss() as peak:
            step_tokens = job.batch * job.length
            start, first = await _reading(counter, step_tokens)
            await asyncio.sleep(args.seconds)
            stop, last = await _reading(counter, first + 2 * step_tokens)
        weights = engine.report.weight_bytes
        return {
            "tokens_per_s": (last - first) / (stop - start),
            "peak_pss_bytes": max(peak[0], whole[0]),
            "peak_pss_while_training_bytes": peak[0],
            "pss_before_training_bytes": started,
            "weight_bytes": weights,
            "kv_bytes": engine.report.kv_bytes,
            # Loading maps the checkpoint's file for a moment; what training takes is what comes afterwards.
            "peak_beyond_weights_bytes": peak[0] - weights,
        }


async def _reading(counter: coserve_cells.Counter, tokens: int) -> tuple[float, int]:
    """The newest reading, once it has so many tokens."""
    while counter.readings[-1][1] < tokens:
        await asyncio.sleep(coserve_cells.GLANCE_S)
    return counter.readings[-1]


@contextlib.asynccontextmanager
async def _engine(args: argparse.Namespace) -> AsyncIterator[EngineClient]:
    parser = options.Parser(prog="training")
    options.add(parser, EngineConfig)
    flags = ["--model", args.model, "--dtype", args.dtype, *shlex.split(args.tandem_args)]
    (config,) = options.resolve(parser.parse(flags, options.note), EngineConfig)
    client = await EngineClient.start(config)
    try:
        yield client
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def _peak_pss() -> AsyncIterator[list[int]]:
    """The most bytes that this process and its children had while the block lasted, in a list of one."""
    peak = [_pss()]

    async def watch() -> None:
        while True:
            peak[0] = max(peak[0], await asyncio.to_thread(_pss))
            await asyncio.sleep(SAMPLE_S)

    task = asyncio.create_task(watch())
    try:
        yield peak
        peak[0] = max(peak[0], _pss())
    finally:
        task.cancel()


def _pss() -> int:
    """Proportional set size of this process and all below it, in bytes."""
    total, me = 0, psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


# ------------------------------------------------------------ serving without a job


def idle(args: argparse.Namespace) -> dict:
    """Offline throughput of this checkout by another one's, in turns: per workload the median of the ratios."""
    here = str(Path(__file__).resolve().parents[1])
    ratios: dict[str, list[float]] = {}
    for turn in range(args.rounds):
        found = {}
        for checkout in (here, args.other) if turn % 2 == 0 else (args.other, here):
            found[checkout] = _throughput(checkout, args)
        for shape, rate in found[here].items():
            ratios.setdefault(shape, []).append(rate / found[args.other][shape])
        _say(f"round {turn + 1}: " + ", ".join(f"{shape} {values[-1]:.3f}" for shape, values in ratios.items()))
    every = [value for values in ratios.values() for value in values]
    medians = {shape: round(statistics.median(values), 3) for shape, values in ratios.items()}
    return {"ratios": ratios, "medians": medians, "median": round(statistics.median(every), 3)}


def _throughput(checkout: str, args: argparse.Namespace) -> dict[str, float]:
    """Tokens/s by workload. Python finds the package in the directory it is started in."""
    command = [sys.executable, "-m", "tandem", "bench", "throughput", "--model", args.model, "--dtype", args.dtype]
    command += ["--workloads", args.workloads, "--no-roofline", *shlex.split(args.tandem_args)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"training: {checkout} failed with code {done.returncode}:\n{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {f"{r['batch']}x{r['prompt']}x{r['generated']}": r["total_tokens_per_s"] for r in rows}


if __name__ == "__main__":
    sys.exit(main())
