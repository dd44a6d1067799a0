"""Building the CPU kernels and choosing among them: caches, compilers that lack something, machines that lack more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tandem import ops
from tandem.errors import ConfigError
from tandem.ops.cpu import build, library

ROOT = Path(build.__file__).resolve().parents[3]
SOURCE = """
#include "vector.h"
TANDEM_EXPORT void tandem_probe(float* values, int64_t n, float by) {
    tandem::parallel_ranges(n, 3, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) values[i] += by * static_cast<float>(tandem::Vec::width);
    });
}
"""
needs_compiler = pytest.mark.skipif(
    build._compiler() is None or not build.cpu_isas(), reason="no C++ compiler, or a CPU without AVX2"
)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Folders of a small build of its own."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    for name in ("common.h", "vector.h"):
        shutil.copy(build.SOURCES / name, sources)
    (sources / "probe.cpp").write_text(SOURCE)
    (sources / "other.cpp").write_text("int other() { return 1; }\n")
    return {"libraries": tmp_path / "lib", "objects": tmp_path / "obj", "sources": sources}


@pytest.fixture
def only_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ISAS", {"avx2": build.ISAS["avx2"]})


def objects(places: dict[str, Path]) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in places["objects"].glob("*.o")}


@needs_compiler
def test_only_what_changed_is_compiled_again(places, only_avx2) -> None:
    assert list(build.build(**places).built) == ["avx2"]
    first, linked = objects(places), (places["libraries"] / "kernels_avx2.so").stat().st_mtime_ns
    assert len(first) == 3
    build.build(**places)
    assert objects(places) == first
    assert (places["libraries"] / "kernels_avx2.so").stat().st_mtime_ns == linked
    (places["sources"] / "other.cpp").write_text("int other() { return 2; }\n")
    build.build(**places)
    assert len(set(objects(places).items()) - set(first.items())) == 1
    # A header changes what includes it, here through another header.
    with (places["sources"] / "common.h").open("a") as header:
        header.write("// changed\n")
    before = objects(places)
    build.build(**places)
    (new,) = set(objects(places)) - set(before)
    assert new.startswith("probe-")


@needs_compiler
def test_a_built_function_runs_on_all_threads(places, only_avx2) -> None:
    build.build(**places)
    handle = library.open_library("avx2", places["libraries"])
    values = torch.zeros(1001)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            handle.bind("tandem_probe", "plf")(values.data_ptr(), 1001, 0.5)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(values, torch.full((1001,), 8.0))


@needs_compiler
def test_an_error_in_a_source_is_said_and_keeps_the_old_library(places, only_avx2) -> None:
    build.build(**places)
    library_file = places["libraries"] / "kernels_avx2.so"
    before = library_file.read_bytes()
    (places["sources"] / "other.cpp").write_text("int other() { return }\n")
    outcome = build.build(**places)
    assert outcome.failed and not outcome.built
    assert any("other.cpp" in note and "error" in note for note in outcome.notes)
    assert library_file.read_bytes() == before
    outcome = build.build(**places, keep_going=True)
    assert outcome.failed and list(outcome.built) == ["avx2"]


def compiler_that(folder: Path, script: str) -> str:
    path = folder / "odd-c++"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_an_instruction_set_the_compiler_does_not_know_is_left_out(places, tmp_path, monkeypatch) -> None:
    real = build._compiler()[0]
    script = f'case "$*" in *-mamx-tile*) exit 1;; *-mavx512f*) exit 1;; esac\nexec {real} "$@"\n'
    monkeypatch.setenv("CXX", compiler_that(tmp_path, script))
    outcome = build.build(**places)
    assert list(outcome.built) == ["avx2"] and not outcome.failed
    assert [note.split()[0] for note in outcome.notes] == ["amx", "avx512"]


def test_no_compiler_is_one_line_and_no_error(tmp_path) -> None:
    """As by hand: a process of its own, nothing but the standard library on its path."""
    script = shutil.copy(build.__file__, tmp_path / "build.py")
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    done = subprocess.run(
        [sys.executable, "-I", str(script)], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "no C++ compiler" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_auto_takes_the_best_that_is_built(monkeypatch) -> None:
    usable, reasons = library.available()
    assert set(usable) | set(reasons) == set(build.ISAS)
    assert usable == [isa for isa in build.ISAS if isa in usable]
    chosen = library.load()
    assert (chosen.isa if chosen else None) == (usable[0] if usable else None)
    assert library.load("torch") is None
    for isa in usable:
        forced = library.load(isa)
        assert forced is not None and forced.isa == isa
        assert isa in ops.load("cpu", torch.float32, isa).name


def test_nothing_built_is_one_log_line_and_works(tmp_path, caplog, monkeypatch) -> None:
    assert library.load(folder=tmp_path) is None
    assert len(caplog.records) == 1
    assert "build.py" in caplog.text if build.cpu_isas() else "neither AVX2" in caplog.text
    monkeypatch.setattr(build, "LIBRARIES", tmp_path)
    kernels = ops.load("cpu", torch.float32)
    assert kernels.name == "torch"
    kernels.silu_mul(torch.ones(4, 8))


def test_a_cpu_without_avx2(monkeypatch, caplog) -> None:
    monkeypatch.setattr(build, "cpu_isas", list)
    assert library.load() is None
    assert "neither AVX2 nor AVX512" in caplog.text
    with pytest.raises(ConfigError, match="--cpu-isa avx2 does not run here: this CPU.*what does: torch"):
        library.load("avx2")


@needs_compiler
def test_a_forced_one_that_is_missing_says_what_there_is(places, monkeypatch) -> None:
    monkeypatch.setattr(build, "cpu_isas", lambda: ["avx512", "avx2"])
    monkeypatch.setattr(build, "ISAS", {"avx2": build.ISAS["avx2"]})
    build.build(**places)
    monkeypatch.undo()
    monkeypatch.setattr(build, "cpu_isas", lambda: ["avx512", "avx2"])
    monkeypatch.setattr(build, "SOURCES", places["sources"])
    with pytest.raises(ConfigError, match="avx512 does not run here: it was not built.*what does: avx2, torch"):
        library.load("avx512", places["libraries"])
    found = library.load(folder=places["libraries"])
    assert found is not None and found.isa == "avx2"


@needs_compiler
def test_a_function_with_another_interface_is_not_called(places, only_avx2, monkeypatch) -> None:
    build.build(**places)
    monkeypatch.setattr(build, "cpu_isas", lambda: ["avx2"])
    monkeypatch.setattr(build, "SOURCES", places["sources"])
    library.load("avx2", places["libraries"]).bind("tandem_probe", "plf")
    (places["sources"] / "probe.cpp").write_text(SOURCE.replace("float by)", "double by)"))
    with pytest.raises(ConfigError, match="other sources: run python .*build.py, or use --cpu-isa torch"):
        library.load("avx2", places["libraries"]).bind("tandem_probe", "plf")
    (places["sources"] / "probe.cpp").write_text(SOURCE.replace("values[i] +=", "values[i] -="))
    library.load("avx2", places["libraries"]).bind("tandem_probe", "plf")


@needs_compiler
def test_a_file_that_is_no_library_is_a_reason(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(build, "cpu_isas", lambda: ["avx2"])
    (tmp_path / "kernels_avx2.so").write_bytes(b"not a library")
    usable, reasons = library.available(tmp_path)
    assert usable == [] and "does not load" in reasons["avx2"]


def test_the_tiles_may_be_refused(monkeypatch) -> None:
    monkeypatch.setattr(build, "cpu_isas", lambda: list(build.ISAS))
    monkeypatch.setattr(library, "_tiles_granted", lambda: False)
    usable, reasons = library.available()
    assert "amx" not in usable and "tiles" in reasons["amx"]


@needs_compiler
def test_a_wheel_brings_the_libraries_and_an_editable_install_builds_in_place(tmp_path) -> None:
    tree = tmp_path / "tree"
    skipped = shutil.ignore_patterns("lib", "obj", "__pycache__", "model.safetensors")
    shutil.copytree(ROOT / "tandem", tree / "tandem", ignore=skipped)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tree)
    # One small source instead of all: the time is the compiler's.
    for path in (tree / "tandem/ops/cpu/csrc").glob("*.cpp"):
        path.unlink()
    (tree / "tandem/ops/cpu/csrc/probe.cpp").write_text(SOURCE)
    hook = "from hatchling.build import build_editable, build_wheel; print({}('{}'))"
    for kind in ("build_editable", "build_wheel"):
        done = subprocess.run(
            [sys.executable, "-c", hook.format(kind, tmp_path)], cwd=tree, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        name = done.stdout.split()[-1]
        files = zipfile.ZipFile(tmp_path / name).namelist()
        if kind == "build_editable":
            assert name.endswith("py3-none-any.whl")
            assert (tree / "tandem/ops/cpu/lib/kernels_avx2.so").exists()
        else:
            assert "py3-none-linux" in name
            assert "tandem/ops/cpu/lib/kernels_avx2.so" in files and "tandem/ops/cpu/csrc/probe.cpp" in files
            assert not [file for file in files if "/obj/" in file]


def test_make_builds_again_when_a_source_is_newer(tmp_path) -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    tree = tmp_path / "tree"
    (tree / "tandem/ops/cpu/csrc").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tree)
    built = tree / "built"
    (tree / "tandem/ops/cpu/build.py").write_text(f"open({str(built)!r}, 'a').write('x')\n")
    source = tree / "tandem/ops/cpu/csrc/a.cpp"
    source.write_text("")
    (tree / f".ready-{sys.executable.replace('/', '_')}").write_text("")

    def make() -> int:
        command = ["make", f"PYTHON={sys.executable}", "PIP=true", "kernels"]
        subprocess.run(command, cwd=tree, check=True, capture_output=True)
        return len(built.read_text())

    assert make() == 1 and make() == 1
    later = built.stat().st_mtime + 10
    os.utime(source, (later, later))
    assert make() == 2
