"""Gradients of a training run against PEFT + autograd in float32: every family, every window, any adapter.

How far off a tensor is, is the norm of the difference over the norm of PEFT's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import finetune_oracle as oracle
import pytest
import tiny_models
import torch

from tandem.engine.engine import Engine
from tandem.work import Example, LoraConfig, PassReport

TOLERANCE = 1e-5
FAMILIES = sorted(tiny_models.FAMILIES)
# None: whole microbatches. 7 and 16 cut sequences in several places, and some windows hold several sequences.
WINDOWS = (1, 7, 16, None)
LORA = LoraConfig(rank=5, alpha=9.0)
# Beyond all sliding windows (9) and scaled contexts (32); one sequence is a single token.
LENGTHS = (37, 1, 12, 33)
# transformers' longrope switches factors by a sequence's own length, ours by the model's context: stay above 32.
LONG_LENGTHS = (37, 33, 40)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return oracle.gentle_models(tmp_path_factory.mktemp("models"))


def batch_for(family: str) -> list[Example]:
    return oracle.examples(0, LONG_LENGTHS if "longrope" in family else LENGTHS)


Expected = tuple[Path, oracle.Factors, PassReport]


@pytest.fixture(scope="module")
def expected(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Expected]:
    """expected("llama") -> an adapter of every target, and what PEFT finds on `batch_for` the family."""

    @cache
    def find(family: str) -> Expected:
        adapter = oracle.random_adapter(tiny_model(family), tmp_path_factory.mktemp("adapter") / family, LORA)
        run = oracle.PeftRun(tiny_model(family), adapter)
        report = run.forward_backward(batch_for(family))
        return adapter, run.gradients(), report

    return find


def assert_same_report(found: PassReport, expected: PassReport) -> None:
    assert found.num_tokens == expected.num_tokens and found.num_correct == expected.num_correct
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.nll == pytest.approx(expected.nll, rel=1e-5)


def assert_gradients(engine: Engine, run_id: str, expected: oracle.Factors) -> None:
    oracle.assert_near(engine.gradients(run_id), expected, TOLERANCE)


# ---------------------------------------------------------------- the oracle itself


@pytest.mark.parametrize("family", ["llama-bias", "gemma2", "phi3"])
def test_the_oracle_agrees_with_finite_differences(
    tiny_model: Callable[[str], Path], expected: Callable[[str], Expected], family: str
) -> None:
    """Both factors of a lower and an upper layer, each along its own gradient, in float64."""
    adapter, gradients, _ = expected(family)
    run, batch = oracle.PeftRun(tiny_model(family), adapter, torch.float64), batch_for(family)
    first, last = min(gradients), max(gradients)
    for (layer, target), side in ((first, "A"), (first, "B"), (last, "A"), (last, "B")):
        parameter = run.parameter(layer, target, side)
        gradient = gradients[layer, target]["AB".index(side)].double()
        direction = (gradient if side == "A" else gradient.T) / gradient.norm()
        losses = []
        with torch.no_grad():
            for step in (1e-3, -2e-3, 1e-3):
                parameter += step * direction
                losses.append(run.forward(batch).loss)
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(float(gradient.norm()), rel=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_is_sharper_than_the_tolerance(
    tiny_model: Callable[[str], Path], expected: Callable[[str], Expected], family: str
) -> None:
    adapter, gradients, _ = expected(family)
    exact = oracle.PeftRun(tiny_model(family), adapter, torch.float64)
    exact.forward_backward(batch_for(family))
    assert oracle.worst(gradients, exact.gradients()).error < TOLERANCE / 2


FEATURES: dict[str, tuple[str, dict[str, object]]] = {
    "attention soft cap": ("gemma2", {"attn_logit_softcapping": None}),
    "final soft cap": ("gemma2", {"final_logit_softcapping": None}),
    "window of all layers": ("mistral", {"sliding_window": None}),
    "window of phi3": ("phi3", {"sliding_window": None}),
    "window of some layers": ("gemma3", {"sliding_window": 200}),
    "llama3 rope": ("llama-llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "linear rope": ("llama-linear", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "yarn rope": ("llama-yarn", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "layers without rope": ("smollm3", {"no_rope_layer_interval": 100}),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_missing_feature_would_show(expected: Callable[[str], Expected], tmp_path: Path, feature: str) -> None:
    family, without = FEATURES[feature]
    plain = tiny_models.build(family, tmp_path / "plain", **{"initializer_range": 0.1} | without)
    adapter, gradients, _ = expected(family)
    run = oracle.PeftRun(plain, adapter)
    run.forward_backward(batch_for(family))
    assert oracle.worst(run.gradients(), gradients).error > 1000 * TOLERANCE


# ---------------------------------------------------------------- the engine against it


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_pefts(
    make_engine: Callable[..., Engine], expected: Callable[[str], Expected], family: str, window: int | None
) -> None:
    adapter, gradients, report = expected(family)
    engine = make_engine(family, train_window=window)
    engine.open_run("r", LORA, init_from=str(adapter))
    assert_same_report(engine.forward_backward("r", batch_for(family)), report)
    assert_gradients(engine, "r", gradients)
    assert longest_slice(engine) == (window or sum(len(e.tokens) for e in batch_for(family)))
    engine.close_run("r")


def longest_slice(engine: Engine) -> int:
    """Tokens of the longest slice that went through a layer; there is one."""
    kinds = ("forward", "backward")
    return max(s.stop - s.start for plan, *_ in engine.plan_log for s in plan.slices if s.kind in kinds)


ADAPTERS: dict[str, tuple[str, LoraConfig]] = {
    "q v": ("llama", LoraConfig(rank=8, alpha=16.0, target_modules=("q_proj", "v_proj"))),
    "k alone, rank 1": ("qwen3", LoraConfig(rank=1, alpha=2.0, target_modules=("k_proj",))),
    "o alone": ("gemma2", LoraConfig(rank=3, alpha=1.0, target_modules=("o_proj",))),
    "mlp, rslora": ("gemma3", LoraConfig(
        rank=16, alpha=4.0, target_modules=("gate_proj", "up_proj", "down_proj"), use_rslora=True)),
    "up alone": ("qwen2", LoraConfig(rank=2, alpha=3.0, target_modules=("up_proj",))),
    "down alone": ("mistral", LoraConfig(rank=2, alpha=3.0, target_modules=("down_proj",))),
    "rank above every width": ("llama-bias", LoraConfig(rank=130, alpha=20.0, use_rslora=True)),
    "rank 256": ("llama-tied", LoraConfig(rank=256, alpha=16.0, target_modules=("q_proj", "gate_proj"))),
    "fused qkv": ("phi3", LoraConfig(rank=6, alpha=7.0, target_modules=("qkv_proj",), use_rslora=True)),
    "fused gate up, o": ("phi3", LoraConfig(rank=6, alpha=7.0, target_modules=("o_proj", "gate_up_proj"))),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_of_any_adapter(
    make_engine: Callable[..., Engine], tiny_model: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    family, lora = ADAPTERS[name]
    adapter = oracle.random_adapter(tiny_model(family), tmp_path / "adapter", lora, seed=1)
    run, batch = oracle.PeftRun(tiny_model(family), adapter), oracle.examples(1, (20, 9))
    report = run.forward_backward(batch)
    engine = make_engine(family, train_window=11)
    opened = engine.open_run("r", lora, init_from=str(adapter))
    assert opened.num_parameters == sum(a.numel() + b.numel() for a, b in run.weights().values())
    assert oracle.is_same(engine.weights("r"), run.weights())
    assert_same_report(engine.forward_backward("r", batch), report)
    assert_gradients(engine, "r", run.gradients())


def test_passes_add_up_over_microbatches_and_a_forward_adds_nothing(
    make_engine: Callable[..., Engine], tiny_model: Callable[[str], Path], expected: Callable[[str], Expected]
) -> None:
    adapter = expected("llama")[0]
    run, engine = oracle.PeftRun(tiny_model("llama"), adapter), make_engine("llama", train_batch_tokens=24)
    engine.open_run("r", LORA, init_from=str(adapter))
    batches = [oracle.examples(2, (5, 30, 2, 8, 3, 14)), oracle.examples(3, (1,)), oracle.examples(4, (23, 2))]
    for batch in batches:
        assert_same_report(engine.forward("r", batch), run.forward(batch))
        assert_same_report(engine.forward_backward("r", batch), run.forward_backward(batch))
        assert_same_report(engine.forward("r", batch), run.forward(batch))
    assert_gradients(engine, "r", run.gradients())


@pytest.mark.parametrize("window", [1, 8])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_forward_alone_in_windows(
    make_engine: Callable[..., Engine], expected: Callable[[str], Expected], family: str, window: int
) -> None:
    adapter, _, report = expected(family)
    engine = make_engine(family, train_window=window)
    engine.open_run("r", LORA, init_from=str(adapter))
    assert_same_report(engine.forward("r", batch_for(family)), report)
    assert not any(t.any() for pair in engine.gradients("r").values() for t in pair)


def test_weights_may_be_zero_negative_or_large(
    make_engine: Callable[..., Engine], tiny_model: Callable[[str], Path], expected: Callable[[str], Expected]
) -> None:
    adapter = expected("gemma2")[0]
    run, engine = oracle.PeftRun(tiny_model("gemma2"), adapter), make_engine("gemma2", train_window=8)
    engine.open_run("r", LORA, init_from=str(adapter))
    plain = oracle.examples(5, (12, 20, 6))
    signs = [Example(e.tokens, e.targets, [w * (-3.0, 100.0)[i % 2] for i, w in enumerate(e.weights)]) for e in plain]
    silent = [Example(e.tokens, e.targets, [0.0] * len(e.weights)) for e in plain]
    last = [Example(e.tokens, e.targets, [*[0.0] * (len(e.weights) - 1), 1.0]) for e in plain]
    for batch in (signs, [silent[0], last[1], silent[2]], last):
        assert_same_report(engine.forward_backward("r", batch), run.forward_backward(batch))
    assert_gradients(engine, "r", run.gradients())


def test_examples_without_any_weight_train_nothing(
    make_engine: Callable[..., Engine], expected: Callable[[str], Expected]
) -> None:
    adapter, gradients, _ = expected("llama")
    engine = make_engine("llama")
    engine.open_run("r", LORA, init_from=str(adapter))
    silent = [Example(e.tokens, e.targets, [0.0] * len(e.weights)) for e in oracle.examples(6, (5, 9))]
    for found in (engine.forward("r", silent), engine.forward_backward("r", silent)):
        assert (found.loss, found.nll, found.num_tokens, found.num_correct) == (0.0, 0.0, 0, 0)
    assert not any(t.any() for pair in engine.gradients("r").values() for t in pair)
    engine.forward_backward("r", batch_for("llama"))
    assert_gradients(engine, "r", gradients)


@pytest.mark.parametrize("kept_bytes", [1, 150_000])
def test_gradients_do_not_depend_on_what_is_kept(
    make_engine: Callable[..., Engine], expected: Callable[[str], Expected], kept_bytes: int
) -> None:
    """With a byte to keep activations in, every layer is computed again, one example at a time."""
    adapter, gradients, report = expected("gemma3")
    engine = make_engine("gemma3", train_window=10, train_memory_bytes=kept_bytes)
    engine.open_run("r", LORA, init_from=str(adapter))
    assert_same_report(engine.forward_backward("r", batch_for("gemma3")), report)
    assert_gradients(engine, "r", gradients)


@pytest.mark.parametrize("training", [{"deterministic": True}, {"train_window": 50}, {}], ids=str)
def test_a_long_sequence(
    make_engine: Callable[..., Engine], tiny_model: Callable[[str], Path], expected: Callable[[str], Expected],
    training: dict[str, object],
) -> None:  # fmt: skip
    """As long as the model's context, beside short ones."""
    adapter = expected("qwen2")[0]
    run, batch = oracle.PeftRun(tiny_model("qwen2"), adapter), oracle.examples(7, (3, 256, 60))
    report = run.forward_backward(batch)
    engine = make_engine("qwen2", **training)
    engine.open_run("r", LORA, init_from=str(adapter))
    assert_same_report(engine.forward_backward("r", batch), report)
    assert_gradients(engine, "r", run.gradients())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bfloat16_is_as_near_to_float32_as_pefts(
    make_engine: Callable[..., Engine], tiny_model: Callable[[str], Path], expected: Callable[[str], Expected],
    family: str,
) -> None:  # fmt: skip
    """Mean distance from the float32 gradients at most 1.5 times that of PEFT's own bfloat16, in any window."""
    adapter, exact, _ = expected(family)
    run = oracle.PeftRun(tiny_model(family), adapter, torch.bfloat16)
    run.forward_backward(batch_for(family))
    theirs = oracle.mean(run.gradients(), exact)
    for window in (None, 7):
        engine = make_engine(family, dtype="bfloat16", train_window=window)
        engine.open_run("r", LORA, init_from=str(adapter))
        engine.forward_backward("r", batch_for(family))
        ours = oracle.mean(engine.gradients("r"), exact)
        assert 1e-4 < ours < 1.5 * theirs
