"""A log of plans with what they were made from: written by the engine, planned again offline.

The policy is a pure function, so a bad minute can be looked at, and lived through again with another policy.
`python -m tandem.scheduler.replay FILE` prints the steps and says where today's policy would decide otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from tandem.scheduler import policy
from tandem.scheduler.policy import Limits, Snapshot
from tandem.work import StepPlan


class PlanRecord(NamedTuple):
    """One step: its plan, the seconds its forward took, and what the policy saw."""

    plan: StepPlan
    seconds: float
    snapshot: Snapshot
    limits: Limits


def save(records: Iterable[PlanRecord], path: Path) -> None:
    """Write records as MessagePack."""
    path.write_bytes(msgspec.msgpack.encode(list(records)))


def load(path: Path) -> list[PlanRecord]:
    """Read what `save` wrote. Raises OSError, msgspec.DecodeError."""
    return msgspec.msgpack.decode(path.read_bytes(), type=list[PlanRecord])


def differences(records: Iterable[PlanRecord]) -> list[int]:
    """Numbers of the records whose plan today's policy would not make."""
    return [i for i, r in enumerate(records) if policy.plan(r.snapshot, r.limits) != r.plan]


def main(path: str) -> int:
    records = load(Path(path))
    print("step  rows  waiting  tokens  riding  slices  predicted ms  took ms  slices ms  slack ms")
    for i, record in enumerate(records):
        plan, riding = record.plan, sum(s.length for s in record.plan.segments if s.row < 0)
        print(
            f"{i:4d}  {len(plan.requests):4d}  {len(record.snapshot.waiting):7d}  {plan.num_tokens - riding:6d}  "
            f"{riding:6d}  {len(plan.slices):6d}  {1e3 * plan.predicted_s:12.1f}  {1e3 * record.seconds:7.1f}  "
            f"{1e3 * plan.slices_s:9.1f}  {1e3 * record.snapshot.slack_s:8.1f}"
        )
    other = differences(records)
    print(f"{len(records)} steps; the policy would decide otherwise in {len(other)}: {other[:20]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
