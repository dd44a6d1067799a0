"""`make soak`: the ordeal of `durability.py` at length, from the command line; leaves a record of every kill."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

from durability import Kill, endure


def main() -> int:
    """0 when nothing was lost; 1 otherwise, with the state directory and the logs left where they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    folder, began, kills = Path(tempfile.mkdtemp(prefix="tandem-soak-")), datetime.datetime.now(datetime.UTC), []

    def on_kill(kill: Kill) -> None:
        kills.append(kill)
        print(kill, flush=True)

    num_jobs, failure = 0, None
    try:
        num_jobs = endure(folder, options.seed, options.kills, on_kill)
    except AssertionError as error:
        failure = f"{error}" or repr(error)
    seconds = (datetime.datetime.now(datetime.UTC) - began).total_seconds()
    record = {
        "date": began.isoformat(timespec="seconds"),
        "seed": options.seed,
        "outcome": "passed" if failure is None else f"failed: {failure}",
        "summary": _summary(kills, num_jobs, seconds),
        "kills": [dataclasses.asdict(kill) for kill in kills],
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['outcome']}: {record['summary']}")
    if failure is None:
        shutil.rmtree(folder)
        return 0
    print(f"state and logs are in {folder}", file=sys.stderr)
    return 1


def _summary(kills: list[Kill], num_jobs: int, seconds: float) -> str:
    victims = collections.Counter(kill.victim for kill in kills)
    starting = sum(kill.phase == "starting" for kill in kills)
    slowest = max((kill.survivor_s for kill in kills if kill.survivor_s is not None), default=0.0)
    return (
        f"{len(kills)} kills in {seconds:.0f} s ({', '.join(f'{n} of {victim}' for victim, n in victims.items())}; "
        f"{starting} while starting), {num_jobs} jobs with the same bits, other process gone within {slowest:.2f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
