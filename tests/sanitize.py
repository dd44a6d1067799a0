"""The kernels' tests under the address and undefined-behaviour sanitizers: `make sanitize`, or by hand with arguments
for pytest. Builds into a folder of its own; needs gcc, whose sanitizer libraries can be loaded before Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.ops.cpu import build

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "sanitize"
TESTS = (
    "test_cpu_attention",
    "test_cpu_linear",
    "test_cpu_pointwise",
    "test_cpu_sampling",
    "test_kv_cache",
    "test_quant",
)
# Python's and torch's own memory is none of our business.
ASAN = "detect_leaks=0:alloc_dealloc_mismatch=0:halt_on_error=1:detect_odr_violation=0"


def main(argv: list[str]) -> int:
    """Run in this process if the sanitizers are loaded, else build and start one in which they are."""
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        build.LIBRARIES = FOLDER
        chosen = argv or [str(ROOT / "tests" / "ops" / f"{name}.py") for name in TESTS]
        return pytest.main(["-q", "-x", "-o", "timeout=600", *chosen])
    outcome = build.build(FOLDER, FOLDER / "obj", sanitize=True)
    print("\n".join(outcome.notes))
    if outcome.failed or not outcome.built:
        return 1
    environment = {**os.environ, "LD_PRELOAD": " ".join(map(_runtime, ("libasan.so", "libubsan.so")))}
    environment |= {"ASAN_OPTIONS": ASAN, "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"}
    return subprocess.run([sys.executable, __file__, *argv], env=environment).returncode


def _runtime(name: str) -> str:
    compiler = build._compiler()
    assert compiler is not None
    found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    if not Path(found.strip()).is_absolute():
        sys.exit(f"{compiler[0]} has no {name}: the sanitizers need gcc and its libraries")
    return found.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
