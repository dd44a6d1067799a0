"""What `tandem bench coserve` has found so far: printed as it comes, written after every run. Figures are computed in
`coserve_figures`, pictures drawn in `plot`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.cli import coserve_figures
from tandem.cli.coserve_figures import MODES, Cell, Row, Targets


@dataclass
class Report:
    """What has been found so far; `ground` is what it stands on."""

    ground: dict[str, Any]
    targets: Targets
    peft_tokens_per_s: float | None
    cells: list[Cell] = field(default_factory=list)

    @property
    def alone_tokens_per_s(self) -> float | None:
        """The better of training alone here and the PEFT loop."""
        known = [c.train_tokens_per_s for c in self.cells if c.mode == "train"]
        return max([*known, *([self.peft_tokens_per_s] if self.peft_tokens_per_s else [])], default=None)

    @property
    def rows(self) -> list[Row]:
        """Of the open loops, by load, then by mode."""
        cells = sorted((c for c in self.cells if not c.is_closed), key=lambda c: (c.load, MODES.index(c.mode)))
        return [coserve_figures.row(c, self.targets, self.alone_tokens_per_s) for c in cells]

    @property
    def closed_rows(self) -> list[Row]:
        """Of the closed loops, whose loads are their own."""
        return [coserve_figures.row(c, self.targets, self.alone_tokens_per_s) for c in self.cells if c.is_closed]

    def add(self, cell: Cell, path: str | None) -> None:
        """Print it, and write all there is: an interrupted benchmark leaves what it has measured."""
        self.cells.append(cell)
        found = coserve_figures.row(cell, self.targets, self.alone_tokens_per_s)
        print(coserve_figures.line(cell.label, found), flush=True)
        if path:
            self.write(path)

    def print_ground(self) -> None:
        """What everything stands on, and the head of the table."""
        print(json.dumps(self.ground, indent=1))
        print(coserve_figures.HEADER, flush=True)

    def write(self, path: str) -> None:
        """The rows, and beside them what they stand on."""
        _write_json(Path(path), coserve_figures.as_json([*self.rows, *self.closed_rows]))
        ground = self.ground | {
            "training_alone_tokens_per_s": self.alone_tokens_per_s,
            "peft_tokens_per_s": self.peft_tokens_per_s,
            "runs": [c.counts | {"mode": c.mode, "load": c.load} for c in self.cells],
        }
        _write_json(Path(f"{path}.run.json"), ground)


def _write_json(path: Path, value: Any) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def machine() -> dict[str, Any]:
    """What this is measured on."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        cpuinfo = ""
    names = re.findall(r"^model name\s*:\s*(.*)$", cpuinfo, re.M)
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }
