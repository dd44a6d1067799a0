"""Tandem beside another engine, each in its own environment, taking turns in one sitting.

    python bench/compare.py --model DIR --peer "vllm=VENV/bin/python vllm_bench.py DIR" --rounds 3 --json out.json

A peer is any command that prints one JSON line per workload with the keys engine, batch, prompt, generated, seconds,
generated_tokens_per_s and total_tokens_per_s. Absolute figures drift with the machine and its neighbours; the ratio of
medians taken in turns is what counts. Needs nothing but the standard library (and Tandem, for its own side).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

OURS = "tandem"
KEYS = {"batch", "prompt", "generated", "seconds", "generated_tokens_per_s", "total_tokens_per_s"}
Workload = tuple[int, int, int]


@dataclass(frozen=True)
class Contender:
    """A name and the command that measures it."""

    name: str
    command: list[str]


def main(argv: list[str] | None = None) -> int:
    """Run the rounds, print medians and ratios, write the JSON."""
    args = _parser().parse_args(argv)
    contenders = [ours(args.model, args.dtype, args.tandem_args), *map(parse_peer, args.peer)]
    if len({c.name for c in contenders}) < len(contenders):
        raise SystemExit("compare: every peer needs a name of its own")
    ground = machine()
    print(json.dumps(ground, indent=1))
    samples: dict[str, dict[Workload, list[dict]]] = {c.name: {} for c in contenders}
    loads = []
    for turn in range(args.rounds):
        # Who goes first changes from round to round: a machine that warms up or slows down favours nobody.
        for contender in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
            loads.append(os.getloadavg()[0])
            _say(f"round {turn + 1}/{args.rounds}: {contender.name} (load {loads[-1]:.1f})")
            for row in measure(contender):
                samples[contender.name].setdefault(workload(row), []).append(row)
    table = summarise(samples)
    print("\n".join(render(table, [c.name for c in contenders])))
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": ground, "load": loads, "workloads": table}, indent=1) + "\n")
    if args.plot:
        plot(table, [c.name for c in contenders], args.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Tandem and other engines in turns.")
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tandem-args", default="", help="more flags for tandem bench throughput")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE", help="draw the table into this PNG")
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def ours(model: str, dtype: str, more: str) -> Contender:
    """Tandem in the environment that runs this script."""
    command = [sys.executable, "-m", "tandem", "bench", "throughput", "--model", model, "--dtype", dtype]
    return Contender(OURS, [*command, *shlex.split(more)])


def parse_peer(text: str) -> Contender:
    """'vllm=/venv/bin/python vllm_bench.py DIR' -> its name and command."""
    name, _, command = text.partition("=")
    if not name or not command.strip():
        raise SystemExit(f"compare: --peer wants NAME=COMMAND, not {text!r}")
    return Contender(name, shlex.split(command))


def measure(contender: Contender) -> list[dict]:
    """The JSON lines one run prints; whatever else it prints is passed over. A failed run ends the comparison."""
    # The other environment must not find this one's packages.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    if contender.name == OURS:
        env = dict(os.environ)
    done = subprocess.run(contender.command, capture_output=True, text=True, env=env)
    rows = parse_rows(done.stdout)
    if done.returncode or not rows:
        tail = "\n".join(done.stderr.splitlines()[-15:])
        raise SystemExit(f"compare: {contender.name} failed with code {done.returncode} and {len(rows)} rows:\n{tail}")
    return rows


def parse_rows(text: str) -> list[dict]:
    """The lines that are JSON objects with a measurement's keys."""
    rows = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row.keys() >= KEYS:
                rows.append(row)
    return rows


def workload(row: dict) -> Workload:
    """(batch, prompt tokens, generated tokens) of a row."""
    return row["batch"], row["prompt"], row["generated"]


def summarise(samples: dict[str, dict[Workload, list[dict]]]) -> list[dict]:
    """Per workload: median seconds and tokens/s of each contender, and how much faster Tandem is than each peer."""
    table = []
    for shape in samples[OURS]:
        entry: dict = {"workload": list(shape), "engines": {}, "ratios": {}}
        for name, rows in samples.items():
            if shape in rows:
                seconds = [row["seconds"] for row in rows[shape]]
                batch, prompt, generated = shape
                median = statistics.median(seconds)
                entry["engines"][name] = {
                    "median_seconds": round(median, 4),
                    "seconds": seconds,
                    "generated_tokens_per_s": round(batch * generated / median, 1),
                    "total_tokens_per_s": round(batch * (prompt + generated) / median, 1),
                }
                shares = [row["roofline_share"] for row in rows[shape] if "roofline_share" in row]
                if shares:
                    entry["engines"][name]["roofline_share"] = round(statistics.median(shares), 3)
        mine = entry["engines"][OURS]["median_seconds"]
        for name, figures in entry["engines"].items():
            if name != OURS:
                entry["ratios"][name] = round(figures["median_seconds"] / mine, 2)
        table.append(entry)
    return table


def render(table: list[dict], names: list[str]) -> list[str]:
    """The summary as a Markdown table: tokens/s that matter for the workload, then ratios to each peer."""
    peers = names[1:]
    header = ["batch, prompt, generated", "tokens/s of", *names, *(f"vs {p}" for p in peers), "roofline"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for entry in table:
        # Prompt-heavy workloads are judged by all tokens, the others by those generated.
        prompt_heavy = entry["workload"][1] > entry["workload"][2]
        key = "total_tokens_per_s" if prompt_heavy else "generated_tokens_per_s"
        cells = [", ".join(map(str, entry["workload"])), "total" if prompt_heavy else "generated"]
        cells += [str(entry["engines"][n][key]) if n in entry["engines"] else "" for n in names]
        cells += [f"{entry['ratios'][p]:.2f}x" if p in entry["ratios"] else "" for p in peers]
        share = entry["engines"][OURS].get("roofline_share")
        cells.append(f"{100 * share:.0f} %" if share else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot(table: list[dict], names: list[str], path: str) -> None:
    """Bars: each contender's speed by that of the slowest, one group for each workload. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 4), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places, heights = [], []
        for group, entry in enumerate(table):
            seconds = {n: figures["median_seconds"] for n, figures in entry["engines"].items()}
            if name in seconds:
                places.append(group + (i - (len(names) - 1) / 2) * width)
                heights.append(max(seconds.values()) / seconds[name])
        axes.bar(places, heights, width, label=name)
    axes.set_xticks(range(len(table)), [", ".join(map(str, entry["workload"])) for entry in table])
    axes.set(xlabel="batch, prompt, generated", ylabel="times the slowest")
    axes.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def machine() -> dict:
    """What this was measured on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    names, flags = re.findall(r"^model name\s*:\s*(.*)$", text, re.M), re.findall(r"^flags\s*:\s*(.*)$", text, re.M)
    wanted = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"}
    return {
        "cpu": names[0] if names else "unknown",
        "flags": sorted(wanted & set(flags[0].split())) if flags else [],
        "cores": len(os.sched_getaffinity(0)),
        "torch": importlib.metadata.version("torch"),
        "python": sys.version.split()[0],
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


if __name__ == "__main__":
    sys.exit(main())
