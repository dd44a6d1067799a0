"""`tandem doctor`: what this machine and this installation are, what is wrong with them, and what to do about it.

Facts come from the operating system and package metadata; only the last checks, kernels and model, load torch.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tandem import __version__
from tandem.cli import options, serve
from tandem.config import EngineConfig, ServerConfig, cache_dir
from tandem.errors import ConfigError, TandemError

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "fastapi", "uvicorn", "pydantic", "msgspec", "pyzmq")
ISA = {"avx2": "AVX2", "avx512f": "AVX512", "avx512_bf16": "BF16", "avx512_vnni": "VNNI", "amx_bf16": "AMX-BF16",
       "amx_int8": "AMX-INT8", "asimd": "NEON", "bf16": "BF16", "i8mm": "I8MM"}  # fmt: skip
CPU_TORCH = "pip install --force-reinstall torch=={version} --index-url URL"
CPU_INDEX = "URL is the index of CPU builds that pytorch.org names"
GIB = 2**30
SHOWN = 5  # calibrations
UNSAID = ("cpu flags", "model", "kernels", "chooses threads")  # of their keys: hashes, and what is seen anyway


@dataclass(frozen=True)
class Finding:
    """One line of the report. `level` is ok, warn or FAIL; only FAIL counts for the exit code."""

    level: str
    topic: str
    text: str


def parser(prog: str) -> options.Parser:
    """The address to check, and whether to run the model."""
    made = options.Parser(prog=prog, description="Check this machine and this installation.")
    made.add_argument("--skip-model", action="store_true", help="do not run the embedded model")
    options.add(made, ServerConfig, skip=[name for name in options.names(ServerConfig) if name not in ("host", "port")])
    return made


def run(namespace: argparse.Namespace) -> int:
    """Print the findings; 1 if one of them is a failure."""
    (server,) = options.resolve(namespace, ServerConfig)
    failed = False
    for finding in findings(server, with_model=not namespace.skip_model):
        print(f"{finding.level:<5}{finding.topic:<9}{finding.text}", flush=True)
        failed |= finding.level == "FAIL"
    return int(failed)


def findings(server: ServerConfig, with_model: bool) -> Iterator[Finding]:
    """All checks, the quick ones first."""
    yield from versions()
    yield from torch_build(importlib.metadata.distributions(), has_nvidia())
    yield processor(_read("/proc/cpuinfo"))
    yield memory(_available_memory(), memory_limit())
    yield port(server.host, server.port)
    yield from writable()
    yield kernels()
    if with_model:
        yield smoke_test()
    yield from calibrations(cache_dir() / "calibration")


def versions() -> Iterator[Finding]:
    """Python, Tandem and the packages it stands on."""
    yield Finding("ok", "system", f"Tandem {__version__}, Python {platform.python_version()}, {platform.platform()}")
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield Finding("ok", "packages", ", ".join(found))
    if missing:
        yield Finding("FAIL", "packages", f"missing: {', '.join(missing)}; pip install {' '.join(missing)}")


def torch_build(installed: object, nvidia: bool) -> Iterator[Finding]:
    """A CUDA build without a GPU wastes gigabytes; a CPU build beside a GPU leaves it idle."""
    names = {(d.metadata["Name"] or "").lower(): d.version for d in installed}  # type: ignore[attr-defined]
    version = names.get("torch")
    if version is None:
        return
    plain, cuda_packages = version.partition("+")[0], sorted(name for name in names if name.startswith("nvidia-"))
    is_cuda = "+cu" in version or bool(cuda_packages)
    if is_cuda and not nvidia:
        remove = f" && pip uninstall -y {' '.join(cuda_packages)} triton" if cuda_packages else ""
        advice = CPU_TORCH.format(version=plain) + remove
        text = f"{version} is a CUDA build and there is no NVIDIA GPU; {CPU_INDEX}; to save the space: {advice}"
        yield Finding("warn", "torch", text)
    elif nvidia and not is_cuda:
        yield Finding("warn", "torch", f"{version} cannot use the GPU of this machine; pip install torch=={plain}")
    else:
        yield Finding("ok", "torch", f"{version}, {'with' if nvidia else 'no'} NVIDIA GPU on this machine")


def has_nvidia() -> bool:
    """Whether the machine has an NVIDIA GPU with a driver."""
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def processor(cpuinfo: str) -> Finding:
    """Cores this process may use and the instruction sets that matter for matrix products."""
    flags = set(re.findall(r"\S+", " ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.M)[:1])))
    name = (re.findall(r"^model name\s*:\s*(.*)$", cpuinfo, re.M) or [platform.machine()])[0]
    known = [label for flag, label in ISA.items() if flag in flags]
    text = f"{name}, {len(os.sched_getaffinity(0))} cores usable, {' '.join(known) or 'no vector extensions known'}"
    if flags and not flags & {"avx2", "asimd"}:
        return Finding("warn", "cpu", text + "; without AVX2 or NEON everything is slow")
    if flags and not flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        return Finding("warn", "cpu", text + "; no bfloat16 arithmetic: --dtype float32 may be faster")
    return Finding("ok", "cpu", text)


def memory(available: int, limit: int | None) -> Finding:
    """What the engine may take: free memory, or less where a control group limits this process."""
    text = f"{available / GIB:.1f} GiB available" + (f", control group limit {limit / GIB:.1f} GiB" if limit else "")
    if min(available, limit or available) < GIB:
        return Finding("FAIL", "memory", text + "; at least 1 GiB is needed: stop something or raise the limit")
    return Finding("ok", "memory", text)


def memory_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The control group's memory limit in bytes (version 2 or 1); None where there is none."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(str(root / name)).strip()
        if text.isdigit() and int(text) < 2**60:
            return int(text)
    return None


def port(host: str, number: int) -> Finding:
    """Whether `tandem serve` could listen."""
    try:
        serve.bind(host, number).close()
    except ConfigError as error:
        return Finding("warn", "port", str(error))
    return Finding("ok", "port", f"{host}:{number} is free")


def writable() -> Iterator[Finding]:
    """The directories Tandem writes to: sockets in the temporary one, downloads in the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for topic, where in (("tmp", tempfile.gettempdir()), ("hub", HF_HUB_CACHE)):
        existing = next(p for p in [Path(where), *Path(where).parents] if p.exists())
        free = shutil.disk_usage(existing).free / GIB
        if os.access(existing, os.W_OK):
            yield Finding("ok", topic, f"{where} is writable, {free:.1f} GiB free")
        else:
            name = "TMPDIR" if topic == "tmp" else "HF_HOME"
            yield Finding("FAIL", topic, f"{where} is not writable: set {name} to a directory that is")


def kernels() -> Finding:
    """Which compiled kernels are there, which the engine takes, and why not the others."""
    try:
        from tandem.ops.cpu import library

        usable, reasons = library.available()
        stale = any(library.open_library(isa).stale for isa in usable)
    except (ImportError, OSError) as error:
        return Finding("FAIL", "kernels", f"torch does not load: {type(error).__name__}: {error}")
    if not usable:
        why = library.why_none(reasons)
        return Finding("warn", "kernels", f"none compiled, torch does their work: {why}")
    missing = "".join(f"; no {isa}: {reason}" for isa, reason in reasons.items())
    text = f"compiled for {', '.join(usable)}; {usable[0]} is in use (--cpu-isa changes that){missing}"
    if stale:
        return Finding("FAIL", "kernels", f"{text}; they were built from other sources: run {library.BUILD}")
    return Finding("ok", "kernels", text)


def smoke_test() -> Finding:
    """Load the embedded model in this process and let it generate."""
    start = time.perf_counter()
    try:
        from tandem.engine.engine import Engine
        from tandem.work import SamplingParams

        engine = Engine(EngineConfig())
        loaded = time.perf_counter()
        (tokens,) = engine.generate([[1, 2, 3, 4]], SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True))
        engine.check()
    except (TandemError, ImportError, OSError, RuntimeError) as error:
        return Finding("FAIL", "model", f"the embedded model does not run: {type(error).__name__}: {error}")
    rate = len(tokens) / (time.perf_counter() - loaded)
    report = engine.report
    same = "the same whatever its batch" if report.batch_invariant else "may depend on its batch"
    return Finding(
        "ok", "model",
        f"embedded model: ready in {loaded - start:.1f} s, {rate:.0f} tokens/s alone, {report.isa}, "
        f"{report.num_threads} threads, {report.kernels}; a request's text {same}",
    )  # fmt: skip


def calibrations(folder: Path) -> Iterator[Finding]:
    """What start-up has measured of each model, newest first; the newest few."""
    from tandem.engine import calibration

    files = calibration.kept(folder)
    yield Finding("ok", "tuning", f"{folder}: {len(files)} kept (--autotune again measures afresh)")
    for path, found in files[:SHOWN]:
        if found is None:
            yield Finding("warn", "tuning", f"{path.name} is damaged; the model's next start replaces it")
            continue
        at = ", ".join(f"{tokens} tokens {1e3 * seconds:.1f} ms" for tokens, *_, seconds in found.steps)
        key = ", ".join(f"{name} {value}" for name, value in found.key.items() if name not in UNSAID)
        text = f"{found.model}: {found.num_threads} threads, {at}; {key} ({path.name})"
        yield Finding("ok", "tuning", text)


def _available_memory() -> int:
    import psutil

    return psutil.virtual_memory().available


def _read(path: str) -> str:
    """A system file's text; empty where the system has no such file."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
