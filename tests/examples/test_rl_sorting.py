"""examples/rl_sorting.py: two updates of either kind on the embedded model, and what is counted and drawn."""

import argparse
import asyncio
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rl():
    spec = importlib.util.spec_from_file_location("rl_sorting", ROOT / "examples" / "rl_sorting.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        module.GROUP, module.GROUPS = 4, 3
        yield module
    finally:
        del sys.modules[spec.name]


@pytest.fixture(scope="module")
def logs(rl):
    args = argparse.Namespace(goal=0.0, updates=2, threads=1)
    return {mode: asyncio.run(rl.run(mode, 5, args)) for mode in ("overlapped", "turns")}


@pytest.mark.parametrize("mode", ["overlapped", "turns"])
def test_updates_are_made(logs, mode):
    log = logs[mode]
    assert len(log.rewards) == len(log.seconds) == 2 and all(0 <= reward <= 1 for reward in log.rewards)
    assert log.seconds == sorted(log.seconds) and log.parts_s["sampling"] > 0
    assert {"loss", "backward", "update"} <= log.parts_s.keys()


def test_both_see_the_same_questions_and_answers_until_they_learn(logs):
    assert logs["overlapped"].rewards[0] == logs["turns"].rewards[0]


def test_training_takes_over_all_that_sampling_computed(logs):
    ours, turns = logs["overlapped"], logs["turns"]
    assert ours.reused_tokens == ours.tokens > 0 and "forward" not in ours.parts_s
    assert turns.reused_tokens == 0 and turns.parts_s["forward"] > 0


def test_a_right_answer_is_pushed_and_a_wrong_one_pulled(rl):
    made = rl.example([5, 6, 7], rl.Answer([8, 9], [-0.5, -0.25], 1.0), 1.5)
    assert (made.tokens, made.targets) == ([5, 6, 7, 8], [6, 7, 8, 9])
    assert made.weights == [0.0, 0.0, 1.0, 1.0] and made.advantages == [0.0, 0.0, 1.5, 1.5]
    assert made.logprobs == [0.0, 0.0, -0.5, -0.25]


def test_figures(rl):
    log = rl.Log("overlapped", 1, rewards=[0.5] * 8, seconds=[1.0, 5.0, 9.0, 10.0, 11.0, 12.0, 30.0, 31.0], tokens=62)
    assert log.update_s == 1.0 and log.smooth == 0.0
    assert log.figures()["trained_tokens_per_s"] == 2.0
    assert rl.Log("turns", 1, rewards=[0.5], seconds=[3.0]).update_s == 3.0


def test_the_plot_has_a_line_for_each_run(rl, logs, tmp_path):
    pytest.importorskip("matplotlib")
    rl.plot([*logs.values(), *logs.values()], str(tmp_path / "rl.png"))
    assert (tmp_path / "rl.png").stat().st_size > 10_000
