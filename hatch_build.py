"""Builds the CPU kernels when the package is built: in place for `pip install -e`, into the wheel otherwise.

A machine without a compiler gets a package without kernels; the sources are in it, and the server says at start what
is missing.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = "tandem/ops/cpu"


class CustomBuildHook(BuildHookInterface):
    """hatchling finds it by this name."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build what the compiler can build. Libraries make the wheel one of this platform, for any Python."""
        if self.target_name != "wheel":
            return
        outcome = _by_path(Path(self.root) / KERNELS / "build.py").build()
        for note in outcome.notes:
            self.app.display_warning(f"kernels: {note}")
        if outcome.built and version != "editable":
            build_data["artifacts"] += [f"{KERNELS}/lib/{path.name}" for path in outcome.built.values()]
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"


def _by_path(path: Path) -> ModuleType:
    """The build needs nothing of the package, whose own imports need torch."""
    spec = importlib.util.spec_from_file_location("tandem_kernel_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
