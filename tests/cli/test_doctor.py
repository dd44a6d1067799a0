"""Each check of `tandem doctor`, on machines described by text."""

import socket
import types
from pathlib import Path

import pytest

from tandem.__main__ import main
from tandem.cli import doctor
from tandem.engine import calibration

X86 = "model name\t: A CPU\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n"


def distribution(name, version):
    return types.SimpleNamespace(metadata={"Name": name}, version=version)


@pytest.mark.parametrize(
    ("packages", "nvidia", "level", "words"),
    [
        ({"torch": "2.13.0+cpu"}, False, "ok", "no NVIDIA GPU"),
        ({"torch": "2.13.0"}, False, "ok", "no NVIDIA GPU"),
        ({"torch": "2.13.0", "nvidia-cublas-cu12": "12"}, True, "ok", "with NVIDIA GPU"),
        ({"torch": "2.13.0", "nvidia-cublas-cu12": "12"}, False, "warn", "torch==2.13.0 --index-url"),
        ({"torch": "2.13.0+cu130"}, False, "warn", "save the space"),
        ({"torch": "2.13.0+cpu"}, True, "warn", "cannot use the GPU"),
    ],
)
def test_torch_builds(packages, nvidia, level, words):
    (finding,) = doctor.torch_build([distribution(n, v) for n, v in packages.items()], nvidia)
    assert finding.level == level and words in finding.text


def test_the_advice_removes_what_takes_the_space():
    installed = [distribution("torch", "2.13.0"), distribution("nvidia-cudnn-cu12", "9")]
    (finding,) = doctor.torch_build(installed, False)
    assert finding.text.endswith("pip uninstall -y nvidia-cudnn-cu12 triton")


@pytest.mark.parametrize(
    ("cpuinfo", "level", "words"),
    [
        (X86, "ok", "A CPU"),
        (X86, "ok", "AVX2 AVX512 BF16 AMX-BF16"),
        ("flags : fpu avx2", "warn", "--dtype float32"),
        ("flags : fpu sse2", "warn", "without AVX2"),
        ("Features\t: fp asimd bf16 i8mm", "ok", "NEON BF16 I8MM"),
        ("", "ok", "no vector extensions known"),
    ],
)
def test_processors(cpuinfo, level, words):
    finding = doctor.processor(cpuinfo)
    assert finding.level == level and words in finding.text


@pytest.mark.parametrize(
    ("available", "limit", "level"),
    [(8 * 2**30, None, "ok"), (8 * 2**30, 2**29, "FAIL"), (2**29, None, "FAIL"), (2**29, 8 * 2**30, "FAIL")],
)
def test_memory(available, limit, level):
    assert doctor.memory(available, limit).level == level


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [("memory.max", "1073741824\n", 2**30), ("memory.max", "max\n", None), ("none", "", None),
     ("memory/memory.limit_in_bytes", "1073741824", 2**30),
     ("memory/memory.limit_in_bytes", "9223372036854771712", None)],
)  # fmt: skip
def test_control_group_limits(tmp_path, name, text, expected):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert doctor.memory_limit(Path(tmp_path)) == expected


def test_kernels_that_are_there_and_those_that_are_not(tmp_path, monkeypatch):
    from tandem.ops.cpu import build, library

    usable, _ = library.available()
    finding = doctor.kernels()
    assert finding.level == ("ok" if usable else "warn") and all(isa in finding.text for isa in usable)
    assert not usable or f"{usable[0]} is in use" in finding.text
    monkeypatch.setattr(build, "LIBRARIES", tmp_path)
    finding = doctor.kernels()
    assert finding.level == "warn" and "none compiled" in finding.text
    monkeypatch.setattr(library, "available", lambda: (["avx2"], {"amx": "it was not built"}))
    stale = library.Library("avx2", None, frozenset({"tandem_x"}))
    monkeypatch.setattr(library, "open_library", lambda isa: stale)
    finding = doctor.kernels()
    assert finding.level == "FAIL" and "no amx: it was not built; they were built from other" in finding.text


def test_a_taken_port_is_said():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = doctor.port("127.0.0.1", other.getsockname()[1])
    assert taken.level == "warn" and "--port" in taken.text
    assert doctor.port("127.0.0.1", 0).level == "ok"


def test_one_failure_decides_the_exit_code(monkeypatch, capsys):
    assert main(["doctor", "--skip-model", "--port", "0"]) == 0
    assert "cores usable" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "memory_limit", lambda: 2**20)
    assert main(["doctor", "--skip-model", "--port", "0"]) == 1
    assert "FAIL memory" in capsys.readouterr().out


def test_what_was_calibrated_is_shown(tmp_path):
    assert "0 kept" in next(doctor.calibrations(tmp_path / "none")).text
    made = calibration.Calibration(
        model="some/model", key={"isa": "AVX512", "model": "0123456789abcdef"}, num_threads=6, decode_s=0.02,
        steps=[(1, 16, 0, 1, 0.0201), (253, 16, 31878, 1, 0.5)], seconds=2.0,
    )  # fmt: skip
    calibration._save(tmp_path / "a.json", made)
    (tmp_path / "b.json").write_text("{")
    head, *rest = doctor.calibrations(tmp_path)
    assert head.level == "ok" and head.text.startswith(f"{tmp_path}: 2 kept")
    assert {finding.level for finding in rest} == {"ok", "warn"}
    (good,) = (finding.text for finding in rest if finding.level == "ok")
    assert good == "some/model: 6 threads, 1 tokens 20.1 ms, 253 tokens 500.0 ms; isa AVX512 (a.json)"
    (bad,) = (finding.text for finding in rest if finding.level == "warn")
    assert "b.json is damaged" in bad


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    *_, finding = doctor.versions()
    assert finding.level == "FAIL" and "pip install no-such-package" in finding.text
