"""Which compiled kernels this process calls: chosen once at start by what the CPU offers and what was built.

Not here: building them (`build.py`), and what each function means (the wrappers beside this file).
"""

from __future__ import annotations

import ctypes
import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tandem.errors import ConfigError
from tandem.ops.cpu import build

log = logging.getLogger("tandem.ops")
BUILD = f"python {Path(build.__file__)}"
# Letters of a signature.
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "f": ctypes.c_float}
# Linux hands out the tile registers on request: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@dataclass(frozen=True)
class Library:
    """One instruction set's kernels, loaded. `isa` is amx, avx512 or avx2; `stale` are functions whose declarations in
    the sources are not those that were built."""

    isa: str
    handle: ctypes.CDLL
    stale: frozenset[str] = frozenset()

    def bind(self, name: str, signature: str) -> Callable[..., None]:
        """The function `name`, which returns nothing; one letter per argument: p pointer, l int64, f float. Raises
        ConfigError where the library is older than the sources."""
        if name in self.stale:
            raise ConfigError(f"the CPU kernels were built from other sources: run {BUILD}, or use --cpu-isa torch")
        function = getattr(self.handle, name)
        function.argtypes, function.restype = [_TYPES[letter] for letter in signature], None
        return function


def load(isa: str = "auto", folder: Path | None = None) -> Library | None:
    """The kernels for this CPU: the best built ones ("auto"), those named, or None ("torch").

    Where nothing fits, "auto" is None and one log line says why; a named one that does not run here is a ConfigError.
    """
    if isa == "torch":
        return None
    folder = build.LIBRARIES if folder is None else folder
    usable, reasons = available(folder)
    if isa != "auto":
        if isa not in usable:
            raise ConfigError(
                f"--cpu-isa {isa} does not run here: {reasons[isa]}; what does: {', '.join([*usable, 'torch'])}"
            )
        return open_library(isa, folder)
    if not usable:
        log.warning("no compiled CPU kernels, torch does their work: %s", why_none(reasons))
        return None
    return open_library(usable[0], folder)


def available(folder: Path | None = None) -> tuple[list[str], dict[str, str]]:
    """The instruction sets that this CPU offers and that are built, best first; why not, for each of the others."""
    folder = build.LIBRARIES if folder is None else folder
    offered, usable, reasons = build.cpu_isas(), [], {}
    if "amx" in offered and not _tiles_granted():
        offered.remove("amx")
        reasons["amx"] = "the operating system does not grant the AMX tiles"
    for isa in build.ISAS:
        if isa not in offered:
            reasons.setdefault(isa, "this CPU does not have its instructions")
        elif not _path(isa, folder).exists():
            reasons[isa] = f"it was not built (run {BUILD})"
        elif (fault := _fault(isa, folder)) is not None:
            reasons[isa] = fault
        else:
            usable.append(isa)
    return usable, reasons


def why_none(reasons: dict[str, str]) -> str:
    """One reason for all: that of the best instruction set whose library could exist."""
    lacking = "this CPU does not have its instructions"
    found = next((reason for reason in reasons.values() if reason != lacking), None)
    return found or f"this CPU ({platform.machine()}) has neither AVX2 nor AVX512"


def _path(isa: str, folder: Path) -> Path:
    return folder / f"kernels_{isa}.so"


def open_library(isa: str, folder: Path | None = None) -> Library:
    """One of the `available` ones. Raises OSError or ValueError for what is no library of ours."""
    _share_threads()
    handle = ctypes.CDLL(str(_path(isa, build.LIBRARIES if folder is None else folder)))
    text = ctypes.c_char_p.in_dll(handle, "tandem_interface").value or b""
    built = dict(entry.split(":") for entry in text.decode().split())
    declared = build.interface(build.SOURCES)
    return Library(isa, handle, frozenset(name for name, mark in declared.items() if built.get(name) != mark))


def _fault(isa: str, folder: Path) -> str | None:
    """Why a library that exists cannot be loaded; None if it can."""
    try:
        open_library(isa, folder)
    except (OSError, ValueError) as error:
        return f"it does not load ({error})"
    return None


def _share_threads() -> None:
    """Make the OpenMP runtime that torch loaded visible: the kernels' own references to one are left open."""
    with open("/proc/self/maps") as maps:
        loaded = {line.split(maxsplit=5)[-1].strip() for line in maps if "omp" in line}
    for path in sorted(loaded):
        if Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return
    raise OSError(f"torch {torch.__version__} has loaded no OpenMP runtime")


def _tiles_granted() -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0
