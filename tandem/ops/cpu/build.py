"""Compiles `csrc/*.cpp` into one shared library per instruction set: `lib/kernels_{amx,avx512,avx2}.so`.

By hand: `python tandem/ops/cpu/build.py`; at install `hatch_build.py` does the same. Only the standard library is
needed and nothing of this package, because both run this file by its path. Not here: which one to load (`library.py`).

Objects are kept in `obj/` under the hash of all that went into them, so that what did not change is not compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "csrc"
LIBRARIES = HERE / "lib"
OBJECTS = HERE / "obj"

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "bf16", "vbmi")))
# Best first, each with its compiler flags.
ISAS = {
    "amx": ("-DTANDEM_AMX", *_AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512": ("-DTANDEM_AVX512", *_AVX512),
    "avx2": ("-DTANDEM_AVX2", *_AVX2),
}
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra",
         # gcc 12 takes its own AVX512 headers for using what is not set.
         "-Wno-uninitialized", "-Wno-maybe-uninitialized")  # fmt: skip
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1")
MAX_PROCESSES = 2  # one heavily inlined source takes about a gigabyte of the compiler's memory


@dataclass(frozen=True)
class Outcome:
    """The libraries that now stand in the folder, by instruction set, and what there is to say about the others."""

    built: dict[str, Path]
    notes: list[str]
    failed: bool = False


@dataclass(frozen=True)
class _Job:
    source: Path
    flags: tuple[str, ...]
    target: Path


def build(
    libraries: Path = LIBRARIES,
    objects: Path = OBJECTS,
    sources: Path = SOURCES,
    *,
    sanitize: bool = False,
    keep_going: bool = False,
) -> Outcome:
    """Compile and link what changed. No compiler, or flags that it rejects, is a note; an error in a source sets
    `failed` and leaves that library as it was (`keep_going`: links it from the sources that compiled)."""
    compiler = _compiler()
    if platform.machine() not in ("x86_64", "AMD64"):
        return Outcome({}, [f"no compiled kernels for {platform.machine()}: torch does the work"])
    if compiler is None:
        return Outcome({}, ["no C++ compiler found (c++, g++ or clang++; CXX names another): torch does the work"])
    objects.mkdir(parents=True, exist_ok=True)
    libraries.mkdir(parents=True, exist_ok=True)
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    # clang's OpenMP needs a runtime of its own, which torch may not have loaded; without the flag its pragmas are
    # ignored, and `parallel_ranges` of common.h still runs in parallel.
    own = ("-Wno-unknown-warning-option",) if "clang" in version else ("-fopenmp",)
    common = (*FLAGS, *own, *(SANITIZE if sanitize else ()))
    notes, built, failed = [], {}, False
    accepted = {isa: (*common, *flags) for isa, flags in ISAS.items() if _accepts(compiler, flags)}
    notes += [f"{isa} left out: {compiler[0]} does not know its flags" for isa in ISAS if isa not in accepted]
    text = " ".join(f"{name}:{declared}" for name, declared in sorted(interface(sources).items()))
    mark = objects / f"interface-{_hash(text)}.cpp"
    mark.write_text(f'extern "C" __attribute__((visibility("default"))) const char* const tandem_interface =\n'
                    f'    "{text}";\n')  # fmt: skip
    files = [mark, *sorted(sources.glob("*.cpp"))]
    jobs = {isa: [_job(compiler, version, f, flags, objects) for f in files] for isa, flags in accepted.items()}
    flat = [job for by_isa in jobs.values() for job in by_isa]
    with ThreadPoolExecutor(MAX_PROCESSES) as pool:
        errors = dict(zip([job.target for job in flat], pool.map(lambda job: _compile(compiler, job), flat)))
    for isa, by_isa in jobs.items():
        wrong = [errors[job.target] for job in by_isa if errors[job.target]]
        notes += wrong
        failed |= bool(wrong)
        if not wrong or keep_going:
            library = libraries / f"kernels_{isa}.so"
            good = [job.target for job in by_isa if not errors[job.target]]
            if problem := _link(compiler, accepted[isa], good, library, objects):
                notes, failed = [*notes, problem], True
            else:
                built[isa] = library
    return Outcome(built, notes, failed)


def interface(sources: Path = SOURCES) -> dict[str, str]:
    """By name, a hash of each exported function's declaration: one that was built with another must not be called."""
    found = {}
    for path in sorted(sources.glob("*.cpp")):
        for declared in re.findall(r"^TANDEM_EXPORT\b([^{;]*)", path.read_text(), re.M):
            words = " ".join(declared.split())
            found[words.partition("(")[0].split()[-1]] = _hash(words)
    return found


def sources_hash(sources: Path = SOURCES) -> str:
    """A hash of all kernels' sources: what was measured with others need not hold."""
    return _hash(*(path.read_text() for path in sorted(sources.glob("*"))))


def cpu_isas() -> list[str]:
    """Instruction sets this CPU and its operating system offer, best first. Linux only: elsewhere none is known."""
    try:
        flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[0].split())
    except (OSError, IndexError):
        return []
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {f"avx512{part}" for part in ("f", "bw", "vl", "dq", "_vnni", "_bf16", "vbmi")}
    needed = {"amx": avx512 | {"amx_tile", "amx_bf16", "amx_int8"}, "avx512": avx512, "avx2": avx2}
    return [isa for isa, names in needed.items() if names <= flags | _spelled(flags)]


def _spelled(flags: set[str]) -> set[str]:
    """Linux writes avx512_vbmi on some versions and avx512vbmi on others."""
    return {flag.replace("avx512_", "avx512") for flag in flags}


def _compiler() -> list[str] | None:
    if os.environ.get("CXX"):
        named = shlex.split(os.environ["CXX"])
        return named if shutil.which(named[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def _accepts(compiler: list[str], flags: tuple[str, ...]) -> bool:
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input="", text=True, capture_output=True).returncode == 0


def _job(compiler: list[str], version: str, source: Path, flags: tuple[str, ...], objects: Path) -> _Job:
    texts = [path.read_text() for path in _with_headers(source)]
    return _Job(source, flags, objects / f"{source.stem}-{_hash(*compiler, version, *flags, *texts)}.o")


def _with_headers(source: Path) -> list[Path]:
    """A source and all headers beside it that it includes, directly or not."""
    found, waiting = [], [source]
    while waiting:
        path = waiting.pop()
        if path in found or not path.exists():
            continue
        found.append(path)
        waiting += [path.parent / name for name in re.findall(r'^\s*#\s*include\s*"(.+?)"', path.read_text(), re.M)]
    return [found[0], *sorted(found[1:])]


def _compile(compiler: list[str], job: _Job) -> str:
    """Empty, or what the compiler said."""
    if job.target.exists():
        return ""
    part = job.target.with_suffix(f".{os.getpid()}.part")
    done = _run([*compiler, *job.flags, "-c", str(job.source), "-o", str(part)])
    if not done:
        os.replace(part, job.target)
    return done


def _link(compiler: list[str], flags: tuple[str, ...], parts: list[Path], library: Path, objects: Path) -> str:
    """Empty, or what the linker said. The OpenMP library is not linked to: `library.py` loads torch's."""
    key = _hash(*map(str, parts))
    mark = objects / f"{library.stem}.{_hash(str(library))}.linked"
    if library.exists() and mark.exists() and mark.read_text() == key:
        return ""
    part = library.with_suffix(f".{os.getpid()}.part")
    link = [flag for flag in flags if flag != "-fopenmp"]
    done = _run([*compiler, *link, "-shared", *map(str, parts), "-o", str(part)])
    if not done:
        os.replace(part, library)  # a process that runs the old one keeps its file
        mark.write_text(key)
    return done


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr if done.returncode == 0 else "")
    return f"{shlex.join(command)}\n{done.stderr}" if done.returncode else ""


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def main() -> int:
    """The command line: 1 if a source does not compile."""
    parser = argparse.ArgumentParser(description="Build the CPU kernels that this machine's compiler can build.")
    parser.add_argument("--keep-going", action="store_true", help="leave sources out that do not compile")
    parser.add_argument("--sanitize", action="store_true", help="with the address and undefined-behaviour sanitizers")
    parser.add_argument("--out", type=Path, default=LIBRARIES, help="folder for the libraries")
    args = parser.parse_args()
    outcome = build(args.out, sanitize=args.sanitize, keep_going=args.keep_going)
    for note in outcome.notes:
        print(f"kernels: {note}", file=sys.stderr)
    print(f"kernels: {', '.join(outcome.built) or 'none built'}")
    return int(outcome.failed)


if __name__ == "__main__":
    sys.exit(main())
