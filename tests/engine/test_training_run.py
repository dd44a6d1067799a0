"""A whole training run: fifty steps against a PEFT loop, saved and gone on with, dropout, and what diverges."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import finetune_oracle as oracle
import pytest
import tiny_adapters
import torch
from safetensors.torch import load_file

from tandem.engine.engine import Engine
from tandem.errors import Diverged, InvalidRequest, ModelError, NotFound, TandemError
from tandem.model.gradients import dropout_mask, hash_64
from tandem.work import Example, LoraConfig, OptimParams, Pass, Request, SamplingParams, TrainOp, Update

TinyModel = Callable[[str], Path]
MakeEngine = Callable[..., Engine]
LORA = LoraConfig(rank=4, alpha=8.0, seed=3)
ADAM = OptimParams(learning_rate=3e-3, weight_decay=0.01, max_grad_norm=1.0)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return oracle.gentle_models(tmp_path_factory.mktemp("models"))


def mean_of(batch: Sequence[Example], parts: int = 1) -> list[Example]:
    """Weights such that the losses of `parts` batches like this add up to a mean."""
    total = sum(sum(e.weights) for e in batch) * parts
    return [Example(e.tokens, e.targets, [w / total for w in e.weights]) for e in batch]


def learning_rate(step: int, num_steps: int, kind: str) -> float:
    """Five steps of warm-up under a line or half a cosine down to zero."""
    left = (num_steps - step) / num_steps
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[kind]
    return 4e-3 * min((step + 1) / 5, shape)


def recipe(
    num_steps: int, schedule: str = "constant", accumulate: int = 1, seed: int = 0, clip: float = 2.5
) -> list[TrainOp]:
    """Some epochs over 18 examples of 2 to 25 tokens, three a pass, in an order of their own each epoch."""
    rows = oracle.examples(seed, range(2, 26, 1))[:18]
    order: list[int] = []
    ops: list[TrainOp] = []
    generator = torch.Generator().manual_seed(seed)
    for step in range(num_steps):
        for _ in range(accumulate):
            if len(order) < 3:
                order = torch.randperm(len(rows), generator=generator).tolist()
            picked, order = order[:3], order[3:]
            ops.append(Pass("r", mean_of([rows[i] for i in picked], accumulate)))
        rate = learning_rate(step, num_steps, schedule)
        ops.append(Update("r", OptimParams(learning_rate=rate, beta2=0.99, weight_decay=0.05, max_grad_norm=clip)))
    return ops


@pytest.mark.parametrize(
    ("family", "lora", "schedule", "accumulate", "clip", "training"),
    [
        ("llama", LoraConfig(rank=8, alpha=16.0, seed=1), "linear", 1, 2.5, {"train_window": 20}),
        ("gemma3", LoraConfig(rank=3, alpha=2.0, use_rslora=True), "cosine", 2, 1.05, {}),
        ("phi3", LoraConfig(target_modules=("qkv_proj", "down_proj")), "constant", 1, 2.5, {"deterministic": True}),
    ],
    ids=["llama", "gemma3", "phi3"],
)
def test_fifty_steps_are_pefts(
    make_engine: MakeEngine, tiny_model: TinyModel, tmp_path: Path,
    family: str, lora: LoraConfig, schedule: str, accumulate: int, clip: float, training: dict[str, Any],
) -> None:  # fmt: skip
    """From the start that the engine draws; same data order, clipping, weight decay, schedule, accumulation."""
    engine = make_engine(family, **training)
    engine.open_run("r", lora)
    start = oracle.copied(engine.weights("r"))
    assert not any(b.any() for _, b in start.values()) and all(a.any() for a, _ in start.values())
    engine.save_run("r", str(tmp_path / "start"))
    run = oracle.PeftRun(tiny_model(family), tmp_path / "start")
    assert oracle.is_same(run.weights(), start)
    ops = recipe(50, schedule, accumulate, clip=clip)
    theirs = oracle.play(run, None, ops)
    ours = oracle.play(engine, "r", ops)
    norms = [report.grad_norm for report in theirs if hasattr(report, "grad_norm")]
    assert min(norms) < clip < max(norms), "some steps are to be clipped, and some not"
    for found, expected in zip(ours, theirs, strict=True):
        if hasattr(expected, "loss"):
            assert found.loss == pytest.approx(expected.loss, abs=1e-4)
            assert found.num_tokens == expected.num_tokens
        else:
            assert found.step == expected.step and found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
    losses = [report.loss * accumulate for report in theirs if hasattr(report, "loss")]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6]), "it is to learn something"
    oracle.assert_near(oracle.change(engine.weights("r"), start), oracle.change(run.weights(), start), 1e-3)


# ---------------------------------------------------------------- save and go on


def first_half_then(engine: Engine, ops: Sequence[TrainOp], lora: LoraConfig, path: Path) -> oracle.Factors:
    """Half of the operations, a save, and the rest in a new run that starts from it."""
    engine.open_run("r", lora)
    oracle.play(engine, "r", ops[: len(ops) // 2])
    step = sum(isinstance(op, Update) for op in ops[: len(ops) // 2])
    engine.save_run("r", str(path))
    engine.close_run("r")
    report = engine.open_run("r", lora, resume_from=str(path))
    assert report.step == step
    oracle.play(engine, "r", ops[len(ops) // 2 :])
    return engine.weights("r")


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_is_the_uninterrupted_one(make_engine: MakeEngine, tmp_path: Path, dropout: float) -> None:
    lora = LoraConfig(rank=4, alpha=8.0, dropout=dropout)
    ops = recipe(8, "linear", 1)
    whole = make_engine("llama", deterministic=True)
    whole.open_run("r", lora)
    oracle.play(whole, "r", ops)
    resumed = first_half_then(make_engine("llama", deterministic=True), ops, lora, tmp_path / "half")
    assert oracle.is_same(resumed, whole.weights("r")), "bit for bit in deterministic mode"
    loose = first_half_then(make_engine("llama", train_window=6), ops, lora, tmp_path / "loose")
    oracle.assert_near(loose, whole.weights("r"), 1e-4)


def test_saving_changes_nothing(make_engine: MakeEngine, tmp_path: Path) -> None:
    ops = recipe(6)
    plain, saving = make_engine("llama", deterministic=True), make_engine("llama", deterministic=True)
    plain.open_run("r", LORA)
    expected = oracle.play(plain, "r", ops)
    saving.open_run("r", LORA)
    found = []
    for i, op in enumerate(ops):
        found += oracle.play(saving, "r", [op])
        saving.save_run("r", str(tmp_path / str(i)))
    assert [getattr(r, "loss", None) for r in found] == [getattr(r, "loss", None) for r in expected]
    assert oracle.is_same(saving.weights("r"), plain.weights("r"))


def test_a_save_that_cannot_be_written_leaves_nothing_and_the_run_goes_on(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine = make_engine("llama", deterministic=True)
    engine.open_run("r", LORA)
    ops = recipe(2)
    oracle.play(engine, "r", ops)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TandemError, match="file"):
        engine.save_run("r", str(tmp_path / "file" / "checkpoint"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("not to be lost")
    with pytest.raises(TandemError, match="taken"):
        engine.save_run("r", str(tmp_path / "taken"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["mine"]
    engine.save_run("r", str(tmp_path / "good"))
    oracle.play(engine, "r", ops)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "good", "taken"]


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", LoraConfig(rank=4, alpha=8.0)),
        ("gemma2", LoraConfig(rank=6, alpha=3.0, use_rslora=True, dropout=0.1, target_modules=("v_proj", "up_proj"))),
        ("phi3", LoraConfig(rank=2, alpha=5.0)),
    ],
    ids=["llama", "gemma2", "phi3"],
)
def test_a_saved_adapter_is_the_same_in_peft_and_served(
    make_engine: MakeEngine, tiny_model: TinyModel, tmp_path: Path, family: str, lora: LoraConfig
) -> None:
    engine = make_engine(family)
    engine.open_run("r", lora)
    oracle.play(engine, "r", recipe(5))
    engine.save_run("r", str(tmp_path / "trained"))
    tensors = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert all(t.dtype == torch.float32 for t in tensors.values())
    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (lora.rank, lora.alpha, lora.use_rslora)
    run = oracle.PeftRun(tiny_model(family), tmp_path / "trained")
    assert oracle.is_same(run.weights(), engine.weights("r"))

    (example,) = oracle.examples(50, (40,))
    text = [*example.tokens, example.targets[-1]]
    logprobs = tiny_adapters.logprobs(tiny_model(family), tmp_path / "trained", text)
    expected = logprobs[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0].tolist()
    engine.load_adapter("mine", str(tmp_path / "trained"))
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=0)
    engine.submit(Request(request_id="s", prompt=text, sampling=scoring, adapter="mine"))
    found = next(event for events in engine.run() for event in events).prompt_logprobs
    assert [entry.logprob for entry in found] == pytest.approx(expected, abs=1e-4)
    report = engine.forward("r", [Example(example.tokens, example.targets, [1.0] * 40)])
    assert report.loss == report.nll == pytest.approx(-sum(expected), rel=1e-5)
    assert engine.generate([text[:20]], SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True), "mine")[0] == (
        tiny_adapters.generate(tiny_model(family), tmp_path / "trained", text[:20], 12)
    )


def test_continuing_from_an_adapter_takes_its_weights_but_not_its_optimiser(
    make_engine: MakeEngine, tiny_model: TinyModel, tmp_path: Path
) -> None:
    engine = make_engine("llama")
    engine.open_run("r", LORA)
    oracle.play(engine, "r", recipe(4))
    engine.save_run("r", str(tmp_path / "first"))
    report = engine.open_run("next", LORA, init_from=str(tmp_path / "first"))
    assert report.step == 0 and oracle.is_same(engine.weights("next"), engine.weights("r"))
    run, ops = oracle.PeftRun(tiny_model("llama"), tmp_path / "first"), recipe(4, seed=1)
    oracle.play(run, None, ops)
    oracle.play(engine, "next", ops)
    oracle.assert_near(engine.weights("next"), run.weights(), 1e-5)


def test_a_directory_that_does_not_fit_is_refused(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine("llama")
    engine.open_run("r", LORA)
    saved = tmp_path / "saved"
    engine.save_run("r", str(saved))
    engine.close_run("r")
    others = (LoraConfig(rank=5, alpha=8.0), LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj",)))
    for other in others:
        for source in ("init_from", "resume_from"):
            with pytest.raises(TandemError, match=r"rank|shape"):
                engine.open_run("r", other, **{source: str(saved)})
    for source in ("init_from", "resume_from"):
        with pytest.raises(ModelError, match="nowhere"):
            engine.open_run("r", LORA, **{source: str(tmp_path / "nowhere")})
    broken = shutil.copytree(saved, tmp_path / "broken")
    for file in broken.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:200])
    for source in ("init_from", "resume_from"):
        with pytest.raises(ModelError, match="broken"):
            engine.open_run("r", LORA, **{source: str(broken)})
    engine.open_run("r", LORA, init_from=str(saved))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"target_modules": ("q_proj", "wq")}, "target_modules"),
        ({"target_modules": ()}, "target_modules"),
        ({"rank": 0}, "rank"),
        ({"rank": 257}, "rank"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
    ],
)
def test_a_shape_that_cannot_be_trained_is_refused_by_name(
    make_engine: MakeEngine, fields: dict[str, Any], param: str
) -> None:
    engine = make_engine("llama")
    with pytest.raises(InvalidRequest) as caught:
        engine.open_run("r", LoraConfig(**fields))
    assert caught.value.param == param
    engine.open_run("r", LORA)


def test_runs_are_known_by_name(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine("llama")
    for use in (
        lambda: engine.forward_backward("r", oracle.examples(0, (4,))),
        lambda: engine.forward("r", oracle.examples(0, (4,))),
        lambda: engine.optim_step("r", ADAM),
        lambda: engine.save_run("r", str(tmp_path / "x")),
        lambda: engine.close_run("r"),
    ):
        with pytest.raises(NotFound, match="'r'|run r"):
            use()
    engine.open_run("r", LORA)
    with pytest.raises(TandemError, match="r"):
        engine.open_run("r", LORA)
    engine.close_run("r")
    engine.open_run("r", LORA)


@pytest.mark.parametrize(
    "example",
    [
        Example([], [], []),
        Example([3, 4], [4], [1.0, 1.0]),
        Example([3, 4], [4, 5], [1.0]),
        Example([3, 264], [4, 5], [1.0, 1.0]),
        Example([3, 4], [4, -1], [1.0, 1.0]),
        Example([3, 4], [4, 5], [1.0, float("nan")]),
        Example([3, 4], [4, 5], [1.0, float("inf")]),
        Example([3] * 257, [3] * 257, [1.0] * 257),
    ],
    ids=["empty", "targets", "weights", "token", "target", "nan", "inf", "too long"],
)
def test_an_example_that_can_never_work_is_refused_and_nothing_of_its_pass_is_done(
    make_engine: MakeEngine, example: Example
) -> None:
    engine = make_engine("llama")
    engine.open_run("r", LORA)
    with pytest.raises(InvalidRequest):
        engine.forward_backward("r", [*oracle.examples(0, (5,)), example])
    assert not any(t.any() for pair in engine.gradients("r").values() for t in pair)
    assert engine.forward_backward("r", oracle.examples(0, (5,))).num_tokens > 0


# ---------------------------------------------------------------- what diverges


def test_a_pass_that_overflows_is_reported_by_the_update_and_forgotten(make_engine: MakeEngine) -> None:
    """The weights are bit for bit those before; training goes on as if that pass had never been."""
    ops = recipe(4)
    plain, shaken = make_engine("llama", deterministic=True), make_engine("llama", deterministic=True)
    for engine in (plain, shaken):
        engine.open_run("r", LORA)
        oracle.play(engine, "r", ops[:4])
    before = oracle.copied(shaken.weights("r"))
    huge = [Example(e.tokens, e.targets, [3e38 if w else 0.0 for w in e.weights]) for e in oracle.examples(9, (6, 9))]
    shaken.forward_backward("r", huge)
    with pytest.raises(Diverged, match="learning rate"):
        shaken.optim_step("r", ADAM)
    assert oracle.is_same(shaken.weights("r"), before)
    for engine in (plain, shaken):
        oracle.play(engine, "r", ops[4:])
    assert oracle.is_same(shaken.weights("r"), plain.weights("r"))


@pytest.mark.parametrize("rate", [1e30, 1e38])
def test_a_learning_rate_that_diverges_stops_the_run_and_harms_nobody(make_engine: MakeEngine, rate: float) -> None:
    """With the smaller one the next pass overflows; the larger one makes the weights themselves infinite."""
    engine = make_engine("llama")
    engine.open_run("good", LORA)
    alone = make_engine("llama")
    alone.open_run("good", LORA)
    engine.open_run("r", LORA)
    wild = OptimParams(learning_rate=rate)
    batch = oracle.examples(3, (8, 5))
    with pytest.raises(Diverged):
        for _ in range(10):
            before = oracle.copied(engine.weights("r"))
            engine.forward_backward("r", batch)
            engine.optim_step("r", wild)
    assert oracle.is_same(engine.weights("r"), before), "the weights are those before that step"
    assert all(t.isfinite().all() for pair in before.values() for t in pair)
    for each in (engine, alone):
        oracle.play(each, "good", recipe(3))
    oracle.assert_near(engine.weights("good"), alone.weights("good"), 1e-5)
    prompt = [5, 6, 7]
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    assert engine.generate([prompt], greedy) == alone.generate([prompt], greedy)


# ---------------------------------------------------------------- dropout


def dropped_gradients(engine: Engine, lora: LoraConfig, adapter: Path) -> oracle.Factors:
    engine.open_run("r", lora, init_from=str(adapter))
    engine.forward_backward("r", oracle.examples(0, (25, 4, 18)))
    engine.forward_backward("r", oracle.examples(1, (11, 11)))
    return oracle.copied(engine.gradients("r"))


def test_dropout_drops_the_same_whatever_the_window(
    make_engine: MakeEngine, tiny_model: TinyModel, tmp_path: Path
) -> None:
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.3, seed=5)
    adapter = oracle.random_adapter(tiny_model("llama"), tmp_path / "adapter", lora)
    whole = dropped_gradients(make_engine("llama"), lora, adapter)
    for training in (
        {"train_window": 7}, {"train_batch_tokens": 10}, {"train_memory_bytes": 1}, {"deterministic": True},
    ):  # fmt: skip
        found = dropped_gradients(make_engine("llama", **training), lora, adapter)
        oracle.assert_near(found, whole, 1e-5)
    again = dropped_gradients(make_engine("llama", deterministic=True), lora, adapter)
    assert oracle.is_same(again, found), "the same seed gives the same"
    other = dropped_gradients(make_engine("llama"), LoraConfig(rank=4, alpha=8.0, dropout=0.3, seed=6), adapter)
    none = dropped_gradients(make_engine("llama"), LoraConfig(rank=4, alpha=8.0), adapter)
    assert min(oracle.worst(other, whole).error, oracle.worst(none, whole).error) > 0.1


def test_dropout_is_pefts_with_the_same_masks(make_engine: MakeEngine, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Masks stand before every lora_A and differ by example, layer and target; a forward drops nothing."""
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.25, seed=5)
    adapter = oracle.random_adapter(tiny_model("qwen3"), tmp_path / "adapter", lora)
    run, engine = oracle.PeftRun(tiny_model("qwen3"), adapter), make_engine("qwen3", train_window=8)
    engine.open_run("r", lora, init_from=str(adapter))
    batch = oracle.examples(2, (20, 13, 6))
    assert engine.forward("r", batch).loss == pytest.approx(run.forward(batch).loss, rel=1e-5)
    run.drop(lambda i, layer, target, x: dropout_mask(0.25, (hash_64(5, i), layer, target), 0, len(x), x))
    for _ in range(2):
        assert engine.forward_backward("r", batch).loss == pytest.approx(run.forward_backward(batch).loss, rel=1e-5)
    oracle.assert_near(engine.gradients("r"), run.gradients(), 1e-5)


def test_masks_do_not_depend_on_which_examples_go_together(
    make_engine: MakeEngine, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """An example without any weight counts as one, whether it goes through the layers alone or beside others."""
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.3, seed=5)
    adapter = oracle.random_adapter(tiny_model("llama"), tmp_path / "adapter", lora)
    (silent,) = [Example(e.tokens, e.targets, [0.0] * 9) for e in oracle.examples(3, (9,))]
    batch = oracle.examples(4, (12, 7))
    one_by_one, at_once = make_engine("llama"), make_engine("llama")
    for engine in (one_by_one, at_once):
        engine.open_run("r", lora, init_from=str(adapter))
    for example in (silent, *batch):
        one_by_one.forward_backward("r", [example])
    at_once.forward_backward("r", [silent, *batch])
    oracle.assert_near(one_by_one.gradients("r"), at_once.gradients("r"), 1e-5)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_masks_are_fair_coins(rate: float) -> None:
    like = torch.empty(200, 300)
    masks = [
        dropout_mask(rate, (key, layer, target), 0, 200, like)
        for key, layer, target in ((1, 0, "q_proj"), (1, 0, "k_proj"), (1, 1, "q_proj"), (2, 0, "q_proj"))
    ]
    deviation = math.sqrt(rate * (1 - rate) / masks[0].numel())
    for mask in masks:
        assert mask.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)])
        dropped = (mask == 0).double()
        assert abs(dropped.mean() - rate) < 5 * deviation
        # Neighbours along a row and along a column are dropped together as often as chance has it.
        for pairs in (dropped[1:] * dropped[:-1], dropped[:, 1:] * dropped[:, :-1]):
            assert abs(pairs.mean() - rate**2) < 8 * deviation
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs(((one == 0) & (other == 0)).double().mean() - rate**2) < 8 * deviation
    later = dropout_mask(rate, (1, 0, "q_proj"), 150, 50, like[:50])
    assert torch.equal(later, masks[0][150:])
