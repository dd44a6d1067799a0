"""Runs whose state goes to disk and comes back are, bit for bit, runs that stayed; and whatever happens to the disk
happens to nobody else.

Deterministic mode throughout, where each run's bits do not depend on the pace of the others.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import finetune_oracle as oracle
import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.config import CacheConfig, EngineConfig, ModelConfig, TrainingConfig
from tandem.engine import residents
from tandem.engine.client import EngineClient
from tandem.engine.engine import Engine
from tandem.errors import BudgetError, Cancelled, Diverged, TandemError
from tandem.finetune import spill
from tandem.memory.residency import Where
from tandem.work import (
    Example,
    LoraConfig,
    OptimParams,
    Pass,
    Probe,
    Publish,
    Request,
    SamplingParams,
    Save,
    TrainOp,
    Update,
)

MakeEngine = Callable[..., Engine]
TinyModel = Callable[[str], Path]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
ADAM = OptimParams(learning_rate=4e-3, weight_decay=0.01, max_grad_norm=2.0)
# Different in everything that a run consists of.
LORAS = (
    LoraConfig(rank=4, alpha=8.0, seed=1),
    LoraConfig(rank=2, alpha=2.0, use_rslora=True, target_modules=("q_proj", "down_proj"), seed=2),
    LoraConfig(rank=5, alpha=10.0, dropout=0.2, target_modules=("v_proj", "up_proj"), seed=3),
    LoraConfig(rank=3, alpha=1.0, seed=4),
    LoraConfig(rank=1, alpha=4.0, dropout=0.1, seed=5),
)
KINDS = ("adamw", "muon", "adamw8bit", "sgd", "lion")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return oracle.gentle_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def spilling(make_engine: MakeEngine, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Engines with room for so many runs; their files go when the test ends."""
    engines: list[Engine] = []

    def make(room: int | None, **options: Any) -> Engine:
        where = {"max_resident_runs": room, "train_spill_dir": str(tmp_path / "spilled")}
        engines.append(make_engine("llama", **{"deterministic": True} | where | options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    assert files(tmp_path) == [], "nothing is left"


def files(tmp_path: Path) -> list[str]:
    """What lies on the disk for runs."""
    return sorted(path.name for path in (tmp_path / "spilled").rglob("*.run"))


def batch(seed: int, *lengths: int) -> list[Example]:
    return oracle.examples(seed, lengths or (14, 5), scale=0.05)


def finish(engine: Engine, pending: set[int], most_s: float = 60.0) -> dict[int, Any]:
    """Step until these operations are done; every step is checked for leaks."""
    reports: dict[int, Any] = {}
    deadline = time.monotonic() + most_s
    while pending - reports.keys():
        assert time.monotonic() < deadline, f"{len(pending - reports.keys())} operations hang"
        if engine.has_work:
            engine.step()
        else:
            engine.training.wait()
        reports |= dict(engine.take_reports())
        engine.check()
    return reports


def until(engine: Engine, condition: Callable[[], bool], most_s: float = 20.0) -> None:
    deadline = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < deadline
        if engine.has_work:
            engine.step()
        engine.check()


def state(engine: Engine, run_id: str) -> dict[str, Any]:
    """All that a run is."""
    run = engine.training.device_run(run_id)
    tensors = {name: tensor.clone() for name, tensor in run.tensors().items()}
    return tensors | {"step": run.optimizer.step, "kind": run.optimizer.kind, "passes": run.num_passes}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


def where(engine: Engine, run_id: str) -> Where:
    return engine.training.residents.residency.where(engine.training._versions[run_id])


def said(report: Any) -> Any:
    """A report without what depends on the clock."""
    return tuple(
        getattr(report, name, None) for name in ("loss", "nll", "num_tokens", "num_correct", "step", "grad_norm")
    )


# ---------------------------------------------------------------- the same as if they had stayed

ACTIONS = st.lists(
    st.tuples(
        st.integers(0, len(LORAS) - 1),
        st.sampled_from(["pass", "pass", "long", "forward", "update", "update", "save", "publish", "wait", "step"]),
    ),
    min_size=5, max_size=30,
)  # fmt: skip


def op_of(number: int, action: str, index: int, folder: Path) -> TrainOp:
    run_id = f"run-{number}"
    match action:
        case "pass" | "long":
            return Pass(run_id, batch(index, *((30, 80, 9) if action == "long" else ())))
        case "forward":
            return Pass(run_id, batch(index), learns=False, wants_logprobs=True)
        case "update":
            return Update(run_id, OptimParams(learning_rate=1e-3, weight_decay=0.01, kind=KINDS[number]))
        case "save":
            return Save(run_id, str(folder / f"{index}"))
    return Publish(run_id, f"adapter-{number}")


def played(engine: Engine, actions: list[tuple[int, str]], folder: Path) -> dict[str, Any]:
    """Reports, files, texts and states that come of the actions."""
    for number, lora in enumerate(LORAS):
        engine.open_run(f"run-{number}", lora)
    pending: list[int] = []
    reports: dict[int, Any] = {}
    for index, (number, action) in enumerate(actions):
        if action == "wait":
            reports |= finish(engine, set(pending) - reports.keys())
        elif action == "step":
            engine.step()
            reports |= dict(engine.take_reports())
        else:
            pending.append(engine.enqueue(op_of(number, action, index, folder)))
    reports |= finish(engine, set(pending) - reports.keys())
    names = engine.adapters.names()
    return {
        "reports": [said(reports[op_id]) for op_id in pending],
        "texts": {name: engine.generate([[5, 6, 7, 8]], GREEDY, name) for name in sorted(names)},
        "states": [state(engine, f"run-{number}") for number in range(len(LORAS))],
        "files": {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        },
    }


def test_five_runs_in_room_for_two_are_five_runs(
    spilling: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is asked of whom in whatever order: every report, saved file, published text and tensor."""
    num_moved = 0

    @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(ACTIONS, st.integers(1, 3), st.sampled_from([None, 16]))
    def check(actions: list[tuple[int, str]], room: int, train_batch_tokens: int | None) -> None:
        nonlocal num_moved
        options = {"train_batch_tokens": train_batch_tokens} if train_batch_tokens else {}
        folders = [tmp_path_factory.mktemp("saves") for _ in range(2)]
        expected = played(spilling(None, **options), actions, folders[0])
        engine = spilling(room, **options)
        found = played(engine, actions, folders[1])
        for part in ("reports", "texts", "files"):
            assert found[part] == expected[part], part
        for mine, theirs in zip(found["states"], expected["states"], strict=True):
            assert_same(mine, theirs)
        num_moved += engine.training.residents.num_moves
        for number in range(len(LORAS)):
            engine.close_run(f"run-{number}")

    check()
    assert num_moved > 50, "it is to have been about something"


def test_gradients_that_add_up_survive_between_pass_and_update(spilling: Callable[..., Engine], tmp_path: Path) -> None:
    def steps(engine: Engine, moves: bool) -> dict[str, Any]:
        engine.open_run("mine", LORAS[2])
        for seed in range(4):
            engine.forward_backward("mine", batch(seed))
            if moves:
                engine.open_run("other", LORAS[0])
                engine.forward("other", batch(9))
                assert where(engine, "mine") is Where.AWAY and files(tmp_path)
                engine.close_run("other")
            if seed % 2:
                engine.optim_step("mine", ADAM)
        assert engine.gradients("mine")
        return state(engine, "mine")

    assert_same(steps(spilling(1), True), steps(spilling(None), False))


def test_a_probe_is_not_torn_apart(spilling: Callable[..., Engine]) -> None:
    """It moves the weights to and fro; others wait for its end."""

    small = {"train_batch_tokens": 8}

    def states(engine: Engine) -> list[dict[str, Any]]:
        pending = set()
        for run_id, lora in (("zeroth", LORAS[0]), ("first", LORAS[3])):
            engine.open_run(run_id, lora)
        for seed in range(3):
            pending.add(engine.enqueue(Probe("zeroth", batch(seed), ADAM, seed)))
            pending |= {engine.enqueue(Pass("first", batch(seed))), engine.enqueue(Update("first", ADAM))}
        finish(engine, pending)
        return [state(engine, "zeroth"), state(engine, "first")]

    for mine, theirs in zip(states(spilling(1, **small)), states(spilling(None, **small)), strict=True):
        assert_same(mine, theirs)


def test_what_dpo_compares_with_goes_along(
    spilling: Callable[..., Engine], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Also where the adapter that the run began from is gone by then."""
    parent = oracle.random_adapter(tiny_model("llama"), tmp_path / "parent", LORAS[0])
    pairs = batch(3, 12, 17)

    def losses(engine: Engine, moves: bool) -> list[float]:
        found = []
        engine.open_run("mine", LORAS[0], init_from=str(parent))
        for _ in range(3):
            found.append(engine.forward_backward("mine", pairs, "dpo").loss)
            engine.optim_step("mine", ADAM)
            if moves:
                (parent / "adapter_model.safetensors").unlink(missing_ok=True)
                engine.open_run("other", LORAS[0])
                engine.forward("other", batch(9))
                assert where(engine, "mine") is Where.AWAY
                engine.close_run("other")
        return found

    expected = losses(spilling(None), False)
    assert losses(spilling(1), True) == expected


def test_runs_from_files_find_room(spilling: Callable[..., Engine], tmp_path: Path) -> None:
    """They are read when they are opened, so that what cannot be read is refused then; somebody leaves for them."""
    plain, engine = spilling(None), spilling(2)
    plain.open_run("start", LORAS[0])
    plain.forward_backward("start", batch(1))
    plain.optim_step("start", ADAM)
    plain.save_run("start", tmp_path / "start")
    for number in range(6):
        report = engine.open_run(f"run-{number}", LORAS[0], resume_from=str(tmp_path / "start"))
        assert report.step == 1 and engine.training.residents.residency.count(Where.HERE) <= 2
    for number in range(6):
        assert_same(state(engine, f"run-{number}"), state(plain, "start"))


def test_a_published_version_outlives_its_runs_absence(spilling: Callable[..., Engine]) -> None:
    engine, prompt = spilling(1), [5, 6, 7, 8]
    engine.open_run("mine", LORAS[0])
    for seed in range(3):
        engine.forward_backward("mine", batch(seed))
        engine.optim_step("mine", OptimParams(learning_rate=0.05))
    engine.publish("mine", "adapter")
    before = engine.generate([prompt], GREEDY, "adapter")
    assert before != engine.generate([prompt], GREEDY)
    engine.submit(Request(request_id="r", prompt=prompt, sampling=GREEDY, adapter="adapter"))
    tokens = [event.token_id for event in engine.step()]
    engine.open_run("other", LORAS[0])
    pending = {engine.enqueue(Pass("other", batch(9))), engine.enqueue(Update("other", ADAM))}
    while engine.is_serving or pending:
        tokens += [event.token_id for event in engine.step()]
        pending -= dict(engine.take_reports()).keys()
    assert where(engine, "mine") is Where.AWAY
    assert tokens == before[0] == engine.generate([prompt], GREEDY, "adapter")[0]
    engine.forward_backward("mine", batch(4))
    engine.optim_step("mine", OptimParams(learning_rate=0.5))
    assert engine.generate([prompt], GREEDY, "adapter") == before, "a version never changes"


def test_without_a_reason_nothing_moves(make_engine: MakeEngine) -> None:
    engine = make_engine("llama")
    for number, lora in enumerate(LORAS):
        engine.open_run(f"run-{number}", lora)
        engine.forward_backward(f"run-{number}", batch(number))
    stats = engine.refresh_stats()
    assert stats.num_runs == len(LORAS) and stats.num_spilled == 0
    assert engine.training.residents.num_moves == 0


# ---------------------------------------------------------------- many


def test_two_hundred_runs_in_room_for_sixteen(spilling: Callable[..., Engine], tmp_path: Path) -> None:
    """Each trains two steps, twice around. At no time is there more in memory than may be, counted from the tensors."""
    lora, num_runs = LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj", "up_proj")), 200
    run_bytes = spilling(None).worker.trainer.state_bytes(lora)
    engine = spilling(None, train_resident_bytes=16 * run_bytes)
    ids = [f"run-{number}" for number in range(num_runs)]

    def lora_of(number: int) -> LoraConfig:
        return LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj", "up_proj"), seed=number)

    def ops(number: int, around: int) -> list[TrainOp]:
        seeds = [4 * number + 2 * around + step for step in range(2)]
        return [op for seed in seeds for op in (Pass(ids[number], batch(seed, 9)), Update(ids[number], ADAM))]

    for number, run_id in enumerate(ids):
        engine.open_run(run_id, lora_of(number))
    most = 0
    for around in range(2):
        pending = {engine.enqueue(op) for number in range(num_runs) for op in ops(number, around)}
        while pending:
            engine.step() if engine.has_work else engine.training.wait()
            held = sum(held_bytes(slot) for slot in engine.worker.trainer.slots.values())
            assert held <= engine.training.residents.residency.used_bytes <= 16 * run_bytes
            most = max(most, held)
            for op_id, report in engine.take_reports():
                assert not isinstance(report, TandemError), report
                pending.remove(op_id)
        engine.check()
    assert most > 8 * run_bytes, "the room is used"
    stats = engine.refresh_stats()
    assert (stats.num_runs, stats.run_bytes) == (num_runs, engine.training.residents.residency.used_bytes)
    assert stats.num_spilled >= num_runs - 16
    plain = spilling(None)
    for number in (0, 1, 15, 16, 77, 100, 198, 199):
        plain.open_run(ids[number], lora_of(number))
        oracle.play(plain, ids[number], [*ops(number, 0), *ops(number, 1)])
        assert_same(state(engine, ids[number]), state(plain, ids[number]))
    for run_id in ids:
        engine.close_run(run_id)
    until(engine, lambda: not engine.training.residents.futures)
    engine.training.residents._mover.submit(int).result()
    assert files(tmp_path) == [] and engine.training.residents.residency.used_bytes == 0


def held_bytes(slot: Any) -> int:
    tensors = [*slot.run.tensors().values(), *(t for layer in slot.layers for pair in layer.values() for t in pair)]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("room", [None, 3])
def test_one_that_diverges_disturbs_nobody(spilling: Callable[..., Engine], room: int | None) -> None:
    """Eight runs in one engine; the weights of one leave float32 and its losses are not numbers any more."""
    names = [f"run-{number}" for number in range(7)]

    def weights(with_bad: bool) -> dict[str, dict[str, Any]]:
        engine = spilling(room if with_bad else None)
        for number, run_id in enumerate([*names, "bad"] if with_bad else names):
            engine.open_run(run_id, LORAS[0] if run_id == "bad" else LORAS[number % len(LORAS)])
        pending: set[int] = set()
        bad: list[int] = []
        for step in range(3):
            for number, run_id in enumerate(names):
                pending |= {engine.enqueue(Pass(run_id, batch(10 * number + step)))}
                if with_bad and number == 3:
                    bad.append(engine.enqueue(Pass("bad", batch(step))))
                    bad.append(engine.enqueue(Update("bad", OptimParams(learning_rate=1e30))))
                pending |= {engine.enqueue(Update(run_id, ADAM))}
        reports = finish(engine, pending | set(bad))
        assert not any(isinstance(reports[op_id], TandemError) for op_id in pending)
        assert with_bad == any(isinstance(reports[op_id], Diverged) for op_id in bad)
        return {run_id: state(engine, run_id) for run_id in names}

    found, expected = weights(True), weights(False)
    for run_id in names:
        assert_same(found[run_id], expected[run_id])


# ---------------------------------------------------------------- while the disk takes its time


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written or read before the event is set."""
    event, write, read = threading.Event(), spill.write, spill.read

    def late(act: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any) -> Any:
            assert event.wait(30)
            return act(*args)

        return wait

    monkeypatch.setattr(spill, "write", late(write))
    monkeypatch.setattr(spill, "read", late(read))
    yield event
    event.set()


def test_a_slow_disk_stalls_nobody(spilling: Callable[..., Engine], gate: threading.Event) -> None:
    """While a run is on its way out and another waits for its place, requests are served and others train."""
    engine = spilling(2)
    for run_id in ("idle", "busy", "waits"):
        engine.open_run(run_id, LORAS[0])
    engine.forward("busy", batch(0))
    waiting = engine.enqueue(Pass("waits", batch(1)))
    engine.step()
    assert where(engine, "idle") is Where.LEAVING
    assert engine.forward_backward("busy", batch(2)).num_tokens > 0
    assert engine.optim_step("busy", ADAM).step == 1
    assert len(engine.generate([[5, 6, 7]], GREEDY)[0]) == 12
    assert where(engine, "idle") is Where.LEAVING and not engine.take_reports()
    gate.set()
    assert finish(engine, {waiting})[waiting].num_tokens > 0


def test_who_is_asked_for_before_it_has_left_stays(
    spilling: Callable[..., Engine], gate: threading.Event, tmp_path: Path
) -> None:
    engine = spilling(1)
    engine.open_run("mine", LORAS[0])
    engine.open_run("other", LORAS[1])
    expected = state(engine, "mine")
    waiting = engine.enqueue(Pass("other", batch(1)))
    engine.step()
    assert where(engine, "mine") is Where.LEAVING
    engine.forward_backward("mine", batch(2))
    engine.optim_step("mine", ADAM)
    assert state(engine, "mine")["step"] == 1 and expected["step"] == 0
    before = state(engine, "mine")
    gate.set()
    finish(engine, {waiting})
    assert where(engine, "mine") is Where.AWAY
    assert_same(state(engine, "mine"), before)
    engine.close_run("mine")
    engine.close_run("other")
    engine.training.residents._mover.submit(int).result()
    assert files(tmp_path) == []


@pytest.mark.parametrize("moment", ["leaving", "away", "coming", "unborn"])
def test_closing_at_any_moment(
    spilling: Callable[..., Engine], gate: threading.Event, tmp_path: Path, moment: str
) -> None:
    """Its operations are cancelled, its memory counted until it is free, its file goes; a new run may take its name."""
    engine = spilling(1)
    engine.open_run("other", LORAS[1])
    if moment == "unborn":
        gate.set()
        engine.forward("other", batch(0))
        engine.open_run("mine", LORAS[0])
        pending = engine.enqueue(Pass("mine", batch(0)))
    else:
        gate.set()
        engine.open_run("mine", LORAS[0])
        engine.forward("mine", batch(0))
        gate.clear()
        pending = engine.enqueue(Pass("other", batch(1)))
        engine.step()
        assert where(engine, "mine") is Where.LEAVING
        if moment != "leaving":
            gate.set()
            finish(engine, {pending})
            gate.clear()
            assert where(engine, "mine") is Where.AWAY
            if moment == "coming":
                engine.close_run("other")
                pending = engine.enqueue(Pass("mine", batch(1)))
                engine.step()
                assert where(engine, "mine") is Where.COMING
    engine.close_run("mine")
    reports = dict(engine.take_reports())
    if moment in ("coming", "unborn"):
        assert isinstance(reports[pending], Cancelled)
    gate.set()
    if moment == "leaving":
        finish(engine, {pending})
    until(engine, lambda: not engine.training.residents.futures)
    engine.training.residents._mover.submit(int).result()
    engine.training.residents.begin()
    engine.training.residents._mover.submit(int).result()
    assert files(tmp_path) == []
    engine.open_run("mine", LORAS[0])
    assert state(engine, "mine")["step"] == 0 and engine.forward_backward("mine", batch(2)).num_tokens > 0


# ---------------------------------------------------------------- when the disk fails


def refusing(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> list[int]:
    """The next so many writes or reads fail. Returns how often it came to that."""
    calls, act = [], getattr(spill, name)

    def refuse(*args: Any) -> Any:
        if len(calls) < times:
            calls.append(1)
            raise OSError(errno.ENOSPC if name == "write" else errno.EIO, os.strerror(errno.EIO))
        return act(*args)

    monkeypatch.setattr(spill, name, refuse)
    return calls


def test_a_full_disk_loses_nothing_and_is_said(
    spilling: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(residents, "RETRY_S", 0.05)
    calls = refusing(monkeypatch, "write", 2)
    engine, plain = spilling(1), spilling(None)
    for each in (engine, plain):
        each.open_run("mine", LORAS[0])
        each.forward_backward("mine", batch(1))
        each.optim_step("mine", ADAM)
        each.open_run("other", LORAS[1])
    with caplog.at_level(logging.WARNING, "tandem.engine"):
        pending = engine.enqueue(Pass("other", batch(2)))
        until(engine, lambda: len(calls) == 1 and where(engine, "mine") is Where.HERE)
        assert engine.forward("mine", batch(1)).num_tokens > 0, "it goes on where it is"
        assert finish(engine, {pending})[pending].loss == plain.forward_backward("other", batch(2)).loss
    assert len(calls) == 2 and caplog.text.count("training run mine cannot be moved to") == 2
    assert_same(state(engine, "mine"), state(plain, "mine"))


def test_a_disk_that_stays_full_is_an_answer(
    spilling: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever waits is told after a while what to do; the others never notice, and with room all is well again."""
    monkeypatch.setattr(residents, "RETRY_S", 0.02)
    (tmp_path / "spilled").write_text("a file where a directory should be")
    engine = spilling(1)
    engine.open_run("mine", LORAS[0])
    engine.open_run("other", LORAS[1])
    ids = [engine.enqueue(Pass("other", batch(2))), engine.enqueue(Update("other", ADAM))]
    reports = finish(engine, set(ids))
    for op_id in ids:
        assert isinstance(reports[op_id], BudgetError) and "free some disk space" in str(reports[op_id])
    assert engine.forward_backward("mine", batch(1)).num_tokens > 0
    (tmp_path / "spilled").unlink()
    assert engine.forward_backward("other", batch(2)).num_tokens > 0
    assert engine.optim_step("other", ADAM).step == 1


def test_a_file_that_cannot_be_read_is_its_own_runs_trouble(
    spilling: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = spilling(1)
    for run_id in ("mine", "other"):
        engine.open_run(run_id, LORAS[0])
        engine.forward_backward(run_id, batch(1))
        engine.optim_step(run_id, ADAM)
    assert where(engine, "mine") is Where.AWAY
    (path,) = (tmp_path / "spilled").rglob("*.run")
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    ids = [engine.enqueue(Pass("mine", batch(2))), engine.enqueue(Update("mine", ADAM))]
    others = [engine.enqueue(Pass("other", batch(2))), engine.enqueue(Update("other", ADAM))]
    reports = finish(engine, {*ids, *others})
    for op_id in ids:
        assert isinstance(reports[op_id], TandemError) and "mine cannot be read back" in str(reports[op_id])
    assert [reports[op_id].step for op_id in others[1:]] == [2]
    with pytest.raises(TandemError, match="cannot be read back"):
        engine.optim_step("mine", ADAM)
    with pytest.raises(TandemError, match="cannot be read back"):
        engine.weights("mine")
    path.write_bytes(whole)
    assert engine.forward_backward("mine", batch(2)).num_tokens > 0
    assert engine.optim_step("mine", ADAM).step == 2, "what was only a hiccup is over"
    path = next((tmp_path / "spilled").rglob("*.run"))
    engine.close_run("other")
    engine.training.residents._mover.submit(int).result()
    assert not path.exists()


def test_a_half_done_pass_that_fails_leaves_no_gradients(
    spilling: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of several microbatches of a pass is done when its run leaves and cannot come back: asked again, the pass
    counts once."""
    engine, plain = spilling(1, train_batch_tokens=16), spilling(None, train_batch_tokens=16)
    for each in (engine, plain):
        each.open_run("mine", LORAS[0])
    engine.open_run("other", LORAS[1])
    examples = batch(1, *[10] * 12)
    pending = engine.enqueue(Pass("mine", examples))
    until(engine, lambda: bool(state_gradients(engine, "mine")))
    other = engine.enqueue(Pass("other", batch(2, *[14] * 3)))
    until(engine, lambda: where(engine, "mine") is Where.AWAY)
    refusing(monkeypatch, "read", 1)
    reports = finish(engine, {pending, other})
    assert isinstance(reports[pending], TandemError) and reports[other].num_tokens > 0
    assert not any(bool(g.any()) for pair in engine.gradients("mine").values() for g in pair)
    for each in (engine, plain):
        each.forward_backward("mine", examples)
    assert oracle.is_same(engine.gradients("mine"), plain.gradients("mine"))


def state_gradients(engine: Engine, run_id: str) -> bool:
    slot = engine.worker.trainer.slots[engine.training._versions[run_id]]
    return bool(slot.run.gradients_P.any())


# ---------------------------------------------------------------- processes


def served(tiny_model: TinyModel, tmp_path: Path) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model=str(tiny_model("llama")), dtype="float32", num_threads=1),
        cache=CacheConfig(num_blocks=50),
        training=TrainingConfig(max_resident_runs=1, train_spill_dir=str(tmp_path / "spilled")),
    )


async def test_an_engine_that_ends_leaves_no_files(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Asked to stop, or killed: then the next one in the same directory cleans up, and only after the dead."""
    config = served(tiny_model, tmp_path)

    async def with_files() -> EngineClient:
        client = await EngineClient.start(config)
        for run_id in ("one", "two"):
            await client.open_run(run_id, LORAS[0])
            await client.forward_backward(run_id, batch(1))
            await client.optim_step(run_id, ADAM)
        return client

    stays = await with_files()
    assert len(files(tmp_path)) == 1
    killed = await with_files()
    assert len(files(tmp_path)) == 2
    killed.process.kill()
    await killed.wait_dead()
    await killed.close()
    again = await with_files()
    assert len(files(tmp_path)) == 2, "that of the dead is gone"
    assert (await stays.forward("one", batch(1))).num_tokens > 0, "that of the living is not"
    await again.close()
    await stays.close()
    assert list((tmp_path / "spilled").iterdir()) == []


def test_an_engine_whose_parent_dies_leaves_no_files(tiny_model: TinyModel, tmp_path: Path) -> None:
    script = f"""
import asyncio, os, sys
sys.path.insert(0, {str(Path(tiny_models.__file__).parent)!r})
from tandem.config import *
from tandem.engine.client import EngineClient
from tandem.work import *

async def main():
    client = await EngineClient.start(EngineConfig(
        model=ModelConfig(model={str(tiny_model("llama"))!r}, dtype="float32", num_threads=1),
        cache=CacheConfig(num_blocks=50),
        training=TrainingConfig(max_resident_runs=1, train_spill_dir={str(tmp_path / "spilled")!r}),
    ))
    for run_id in ("one", "two"):
        await client.open_run(run_id, LoraConfig(rank=4))
        await client.forward(run_id, [Example([5, 6], [6, 7], [1.0, 1.0])])
    print("ready", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    assert len(files(tmp_path)) == 1
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while any((tmp_path / "spilled").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list((tmp_path / "spilled").iterdir()) == []
