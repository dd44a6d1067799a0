"""Serving beside training changes no token, training beside serving changes no weight, runs never touch each other.

Everywhere the latency targets are wide, so that training takes part in nearly every step, and where tokens are to ride
the engine is told that this pays; each test looks into the plans to see that it was so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import finetune_oracle as oracle
import pytest
import tiny_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.engine.engine import Engine
from tandem.errors import Cancelled, Diverged, TandemError
from tandem.work import (
    Example,
    LoraConfig,
    OptimParams,
    Pass,
    PassReport,
    Request,
    SamplingParams,
    Save,
    TrainOp,
    Update,
    UpdateReport,
)

TinyModel = Callable[[str], Path]
MakeEngine = Callable[..., Engine]
WIDE: dict[str, Any] = {"slo_tpot_ms": 2000.0}
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
# A wide eps: with the usual one, entries whose gradient is all rounding move as fast as any other.
ADAM = OptimParams(learning_rate=4e-3, eps=1e-4, weight_decay=0.01, max_grad_norm=2.0)
# Of different rank, scaling and targets; each has its own data.
LORAS = {
    "big": LoraConfig(rank=12, alpha=24.0, seed=1),
    "small": LoraConfig(rank=3, alpha=2.0, use_rslora=True, target_modules=("q_proj", "down_proj"), seed=2),
    "dropping": LoraConfig(rank=5, alpha=10.0, dropout=0.2, target_modules=("v_proj", "o_proj", "up_proj"), seed=3),
}
# float32: rows of the same batch in another order of summation; bfloat16: see the test.
SAME = 1e-5
BF16_TOLERANCE = 0.05


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return oracle.gentle_models(tmp_path_factory.mktemp("models"))


def prompts(seed: int = 0, lengths: Iterable[int] = (1, 5, 16, 17, 33, 60)) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(n)] for n in lengths]


def recipe(run_id: str, num_steps: int = 4, lengths: Sequence[int] = (30, 4, 17, 9)) -> list[TrainOp]:
    """Two passes and an update per step."""
    seed = sorted(LORAS).index(run_id) if run_id in LORAS else 9
    ops: list[TrainOp] = []
    for step in range(num_steps):
        for half in range(2):
            ops.append(Pass(run_id, oracle.examples(100 * seed + 2 * step + half, lengths, scale=0.02)))
        ops.append(Update(run_id, ADAM))
    return ops


@dataclass
class Session:
    """An engine at work: what has come of each operation and each request so far. Checked for leaks at every step."""

    engine: Engine
    reports: dict[int, PassReport | UpdateReport | TandemError | None] = field(default_factory=dict)
    texts: dict[str, list[int]] = field(default_factory=dict)
    pending: set[int] = field(default_factory=set)
    ended: dict[str, str] = field(default_factory=dict)

    def enqueue(self, op: TrainOp) -> int:
        op_id = self.engine.enqueue(op)
        self.pending.add(op_id)
        return op_id

    def submit(self, name: str, prompt: list[int], adapter: str | None = None, sampling: SamplingParams = GREEDY):
        self.texts[name] = []
        self.engine.submit(Request(request_id=name, prompt=prompt, sampling=sampling, adapter=adapter))

    def step(self) -> None:
        if self.engine.has_work:
            self.hear(self.engine.step())
        else:
            self.engine.training.wait()
        self.take()
        self.engine.check()

    def hear(self, events: Sequence[Any]) -> None:
        for event in events:
            assert event.request_id not in self.ended
            if event.token_id is not None:
                self.texts[event.request_id].append(event.token_id)
            if event.finish_reason:
                self.ended[event.request_id] = event.finish_reason

    def take(self) -> None:
        for op_id, report in self.engine.take_reports():
            self.pending.remove(op_id)
            self.reports[op_id] = report

    def finish(self, most_steps: int = 3000) -> None:
        """Step until every operation and request has come to its end."""
        self.take()
        for _ in range(most_steps):
            if not self.pending and not self.engine.has_work:
                assert self.ended.keys() == self.texts.keys()
                return
            self.step()
        raise AssertionError(f"not done after {most_steps} steps: {len(self.pending)} operations are pending")


def trained(engine: Engine, ops: Sequence[TrainOp], lora: LoraConfig) -> oracle.Factors:
    """The weights of a run by itself, one operation after the other."""
    run_id = ops[0].run_id
    engine.open_run(run_id, lora)
    oracle.play(engine, run_id, ops)
    weights = oracle.copied(engine.weights(run_id))
    engine.close_run(run_id)
    return weights


def riding(engine: Engine) -> Engine:
    """The engine, sure that slices of their own would take training's tokens far longer than a forward pass shared with
    serving: otherwise that is for the machine to say, and on a tiny model it says now this, now that."""
    limits = engine.training.limits
    cost = replace(limits.cost, fixed_s=limits.cost.fixed_s | {"forward": 100.0})
    engine.training.limits = replace(limits, cost=cost)
    return engine


def num_riding(engine: Engine) -> int:
    """Training tokens that were in one forward pass with tokens being served."""
    return sum(
        s.length
        for plan, *_ in engine.plan_log
        for s in plan.segments
        if s.row < 0 and any(other.row >= 0 for other in plan.segments)
    )


def num_beside(engine: Engine) -> int:
    """Slices of training in steps that served too."""
    return sum(len(plan.slices) for plan, *_ in engine.plan_log if any(s.row >= 0 for s in plan.segments))


# ---------------------------------------------------------------- serving does not notice


@pytest.mark.parametrize(
    ("family", "training"),
    [
        ("llama", {}),
        ("gemma2", {}),
        ("qwen2", {"train_window": 20}),
        ("llama", {"share_forward": False}),
        ("llama", {"deterministic": True}),
    ],
    ids=str,
)
def test_served_tokens_are_those_served_alone(
    make_engine: MakeEngine, tiny_model: TinyModel, tmp_path: Path, family: str, training: dict[str, Any]
) -> None:
    """Greedy, in float32: the base model and an adapter, arriving while two runs train."""
    adapter = oracle.random_adapter(tiny_model(family), tmp_path / "adapter", LoraConfig(rank=4))
    alone, beside = make_engine(family), Session(make_engine(family, **WIDE, **training))
    rides = not training.get("deterministic") and training.get("share_forward", True)
    if rides:
        riding(beside.engine)
    for engine in (alone, beside.engine):
        engine.load_adapter("mine", str(adapter))
    expected = {
        f"{name or 'base'} {i}": alone.generate([prompt], GREEDY, name)[0]
        for name in (None, "mine")
        for i, prompt in enumerate(prompts())
    }
    for run_id in ("big", "small"):
        beside.engine.open_run(run_id, LORAS[run_id])
        for op in recipe(run_id, num_steps=6):
            beside.enqueue(op)
    for i, prompt in enumerate(prompts()):
        for name in (None, "mine"):
            beside.submit(f"{name or 'base'} {i}", prompt, name)
            beside.step()
            beside.step()
    beside.finish()
    assert beside.texts == expected
    assert all(isinstance(report, PassReport | UpdateReport) for report in beside.reports.values())
    if rides:
        assert num_riding(beside.engine) > 100
    else:
        assert num_riding(beside.engine) == 0 and num_beside(beside.engine) > 10


def test_bfloat16_log_probabilities_move_less_than_rounding(make_engine: MakeEngine) -> None:
    """Texts of fixed tokens are scored beside training and alone: no log-probability moves by more than 0.05, a
    tenth of what bfloat16 itself is away from float32."""
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=0)

    def scores(engine: Engine, is_training: bool) -> list[float]:
        session = Session(engine)
        found: dict[str, list[float]] = {}
        if is_training:
            engine.open_run("big", LORAS["big"])
            for op in recipe("big", num_steps=6):
                session.enqueue(op)
        session.submit("talk", prompts()[2], sampling=SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
        for i, text in enumerate(prompts(3, (30, 45, 60))):
            for _ in range(4):
                session.step()
            engine.submit(Request(request_id=str(i), prompt=text, sampling=scoring))
            while str(i) not in found:
                for event in engine.step():
                    if event.prompt_logprobs:
                        found[str(i)] = [entry.logprob for entry in event.prompt_logprobs]
                    elif event.request_id == "talk":
                        session.hear([event])
        session.finish()
        return [value for values in found.values() for value in values]

    beside = riding(make_engine("llama", dtype="bfloat16", **WIDE))
    ours, alone = scores(beside, True), scores(make_engine("llama", dtype="bfloat16"), False)
    assert num_riding(beside) > 50
    assert len(ours) == len(alone) == 132
    assert max(abs(a - b) for a, b in zip(ours, alone, strict=True)) < BF16_TOLERANCE


def test_a_published_adapter_stays_while_its_run_goes_on(make_engine: MakeEngine, tmp_path: Path) -> None:
    """The adapter served was saved by the very run that trains on."""
    session = Session(riding(make_engine("llama", **WIDE)))
    engine = session.engine
    engine.open_run("big", LORAS["big"])
    for op in recipe("big", 2):
        session.enqueue(op)
    session.enqueue(Save("big", str(tmp_path / "first")))
    session.finish()
    engine.load_adapter("mine", str(tmp_path / "first"))
    alone = make_engine("llama")
    alone.load_adapter("mine", str(tmp_path / "first"))
    expected = [alone.generate([prompt], GREEDY, "mine")[0] for prompt in prompts()]
    assert expected != [alone.generate([prompt], GREEDY)[0] for prompt in prompts()], "the adapter must matter"
    for op in recipe("big", 6):
        session.enqueue(op)
    session.enqueue(Save("big", str(tmp_path / "second")))
    for i, prompt in enumerate(prompts()):
        session.submit(f"early {i}", prompt, "mine")
    session.step()
    engine.load_adapter("other", str(tmp_path / "first"))
    session.finish()
    for i, prompt in enumerate(prompts()):
        session.submit(f"late {i}", prompt, "mine")
    session.finish()
    for when in ("early", "late"):
        assert [session.texts[f"{when} {i}"] for i in range(len(expected))] == expected
    engine.load_adapter("mine", str(tmp_path / "second"))
    assert [engine.generate([prompt], GREEDY, "mine")[0] for prompt in prompts()] != expected
    assert num_riding(engine) > 0


def test_training_leaves_nothing_in_the_prefix_cache(make_engine: MakeEngine) -> None:
    """What has been trained on in the same blocks is computed anew for a request."""
    session = Session(riding(make_engine("llama", **WIDE)))
    session.engine.open_run("big", LORAS["big"])
    batch = oracle.examples(0, (64, 64))
    session.submit("talk", prompts()[2], sampling=SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
    for _ in range(3):
        session.step()
    session.enqueue(Pass("big", batch))
    session.finish()
    assert num_riding(session.engine) > 0 and session.engine.stats.prefix_hits == 0
    for i, example in enumerate(batch):
        session.submit(str(i), example.tokens)
    session.finish()
    assert session.engine.stats.prefix_hits == 0
    alone = make_engine("llama")
    assert [session.texts[str(i)] for i in range(2)] == alone.generate([e.tokens for e in batch], GREEDY)


def test_a_closed_run_leaves_no_bytes(make_engine: MakeEngine) -> None:
    session = Session(make_engine("llama", **WIDE))
    engine = session.engine
    for run_id, lora in LORAS.items():
        engine.open_run(run_id, lora)
        for op in recipe(run_id, 1):
            session.enqueue(op)
    session.submit("r", prompts()[2])
    session.finish()
    assert engine.refresh_stats().num_runs == len(engine.worker.resident) == len(LORAS)
    for run_id in LORAS:
        engine.close_run(run_id)
    assert engine.refresh_stats().num_runs == len(engine.worker.resident) == len(engine.worker.trainer.slots) == 0
    assert engine.published() == [] and engine.blocks.num_used == 0


def test_runs_do_not_take_the_seats_of_adapters(make_engine: MakeEngine, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Three runs train where one adapter may be resident and one be in a batch."""
    adapter = oracle.random_adapter(tiny_model("llama"), tmp_path / "adapter", LoraConfig(rank=4))
    session, alone = Session(make_engine("llama", max_loras=1, max_cpu_loras=1, **WIDE)), make_engine("llama")
    for run_id, lora in LORAS.items():
        session.engine.open_run(run_id, lora)
        for op in recipe(run_id, 2):
            session.enqueue(op)
    for engine in (alone, session.engine):
        engine.load_adapter("mine", str(adapter))
    for i, prompt in enumerate(prompts()):
        session.submit(str(i), prompt, "mine" if i % 2 else None)
    session.finish()
    for i, prompt in enumerate(prompts()):
        assert [session.texts[str(i)]] == alone.generate([prompt], GREEDY, "mine" if i % 2 else None)
    for run_id, lora in LORAS.items():
        expected = trained(alone, recipe(run_id, 2), lora)
        oracle.assert_near(session.engine.weights(run_id), expected, SAME)


# ---------------------------------------------------------------- training does not notice


@pytest.mark.parametrize("run_id", ["big", "dropping"])
def test_deterministic_bits_do_not_depend_on_the_pace(make_engine: MakeEngine, run_id: str) -> None:
    """Steps of 1 ms or of 10 s, one operation at a time or all queued: the same bits."""
    ops = recipe(run_id, lengths=(250, 30, 4, 120))
    expected = trained(make_engine("llama", deterministic=True, train_step_ms=1e4), ops, LORAS[run_id])
    session = Session(make_engine("llama", deterministic=True, train_step_ms=1.0))
    session.engine.open_run(run_id, LORAS[run_id])
    for op in ops:
        session.enqueue(op)
    session.finish()
    assert oracle.is_same(session.engine.weights(run_id), expected)


def test_who_arrives_waits_for_one_slice_and_training_loses_nothing(make_engine: MakeEngine) -> None:
    ops = recipe("big", 2)
    expected = trained(make_engine("llama", deterministic=True), ops, LORAS["big"])
    engine = make_engine("llama", deterministic=True, train_step_ms=1e4)
    engine.open_run("big", LORAS["big"])
    pending = {engine.enqueue(op) for op in ops}
    run, most = engine.training.trainer.run, 0
    counted: list[object] = []
    engine.training.trainer.run = lambda *slice_and_due: counted.append(slice_and_due) or run(*slice_and_due)
    while pending:
        counted.clear()
        engine.step(somebody_waits=lambda: True)
        most = max(most, len(counted))
        pending -= {op_id for op_id, _ in engine.take_reports()}
    assert most == 1 and any(len(plan.slices) > 1 for plan, *_ in engine.plan_log)
    assert oracle.is_same(engine.weights("big"), expected)


@pytest.mark.parametrize("run_id", sorted(LORAS))
def test_weights_trained_while_serving_are_those_trained_alone(make_engine: MakeEngine, run_id: str) -> None:
    """Bit for bit in deterministic mode; a run with dropout never rides."""
    ops = recipe(run_id)
    for deterministic in (True, False):
        expected = trained(make_engine("llama", deterministic=deterministic), ops, LORAS[run_id])
        session = Session(make_engine("llama", deterministic=deterministic, **WIDE))
        rides = not deterministic and LORAS[run_id].dropout == 0
        if rides:
            riding(session.engine)
        session.engine.open_run(run_id, LORAS[run_id])
        for op in ops:
            session.enqueue(op)
        for i, prompt in enumerate(prompts(1)):
            session.submit(str(i), prompt)
            session.step()
        session.finish()
        weights = session.engine.weights(run_id)
        if deterministic:
            assert oracle.is_same(weights, expected)
        oracle.assert_near(weights, expected, SAME)
        assert (num_riding(session.engine) > 0) is rides
        assert rides or num_beside(session.engine) > 0


@pytest.mark.parametrize("deterministic", [True, False])
def test_runs_never_touch_each_other(make_engine: MakeEngine, deterministic: bool) -> None:
    """Three runs of different rank, targets and data, their operations interleaved, with requests between."""
    options = {"deterministic": deterministic}
    alone = {run_id: trained(make_engine("llama", **options), recipe(run_id), lora) for run_id, lora in LORAS.items()}
    session = Session(riding(make_engine("llama", **options, **WIDE)))
    for priority, (run_id, lora) in enumerate(LORAS.items()):
        session.engine.open_run(run_id, lora, priority=priority)
    queues = {run_id: recipe(run_id) for run_id in LORAS}
    rng = random.Random(0)
    while any(queues.values()):
        run_id = rng.choice([name for name, ops in queues.items() if ops])
        session.enqueue(queues[run_id].pop(0))
        if rng.random() < 0.3:
            session.step()
        if rng.random() < 0.2:
            session.submit(f"request {len(session.texts)}", rng.choice(prompts(2)))
    session.finish()
    for run_id, expected in alone.items():
        found = session.engine.weights(run_id)
        if deterministic:
            assert oracle.is_same(found, expected), run_id
        oracle.assert_near(found, expected, SAME)


def test_a_run_that_overflows_spoils_no_other_in_its_microbatch(make_engine: MakeEngine) -> None:
    """Its weights overflow in every product; its rows share windows, padding and matmuls with those of a good run."""
    ops = recipe("good", lengths=(12, 11, 10))
    expected = trained(make_engine("llama"), ops, LORAS["small"])
    session = Session(make_engine("llama", **WIDE))
    engine = session.engine
    engine.open_run("bad", LORAS["big"])
    for _ in range(3):
        session.enqueue(Pass("bad", oracle.examples(1, (8,))))
        session.enqueue(Update("bad", OptimParams(learning_rate=1e30)))
    session.finish()
    assert any(isinstance(report, Diverged) for report in session.reports.values())
    engine.open_run("good", LORAS["small"])
    session.submit("r", prompts()[3])
    for op in ops:
        if isinstance(op, Pass):
            session.enqueue(Pass("bad", oracle.examples(2, (12, 9, 11))))
        session.enqueue(op)
        session.step()
    session.finish()
    oracle.assert_near(engine.weights("good"), expected, SAME)
    assert session.texts["r"] == make_engine("llama").generate([prompts()[3]], GREEDY)[0]


def test_requests_take_the_blocks_of_training_and_its_gradients_stay_right(make_engine: MakeEngine) -> None:
    """A small cache: training rides in it until requests need its blocks, loses them, and starts its forward again."""
    passes = [Pass("big", oracle.examples(seed, (90, 70), scale=0.01)) for seed in range(6)]
    alone = make_engine("llama")
    alone.open_run("big", LORAS["big"])
    oracle.play(alone, "big", passes)
    texts = [alone.generate([prompt], GREEDY)[0] for prompt in prompts(4, (40, 60, 50, 45, 30, 20))]
    small = {"num_blocks": 15, "max_model_len": 200, "train_batch_tokens": 160, "train_window": 16}
    session = Session(riding(make_engine("llama", **small, **WIDE)))
    session.engine.open_run("big", LORAS["big"])
    for op in passes:
        session.enqueue(op)
    session.submit("0", prompts(4, (40,))[0])
    for i, prompt in enumerate(prompts(4, (40, 60, 50, 45, 30, 20))[1:], 1):
        for _ in range(6):
            session.step()
        session.submit(str(i), prompt)
    session.finish()
    assert [session.texts[str(i)] for i in range(len(texts))] == texts
    oracle.assert_near(session.engine.gradients("big"), alone.gradients("big"), SAME)
    assert any(plan.evicts_training for plan, *_ in session.engine.plan_log), "no request took training's blocks"
    assert num_riding(session.engine) > 0


@pytest.mark.parametrize("tokens", [60, 160])
def test_training_gets_on_beside_requests_that_leave_no_blocks(make_engine: MakeEngine, tokens: int) -> None:
    """There is all the time in the world, but the cache never has room for the microbatch."""
    session = Session(make_engine("llama", num_blocks=12, max_model_len=170, **WIDE))
    session.engine.open_run("big", LORAS["big"])
    op_id = session.enqueue(Pass("big", oracle.examples(0, (tokens,))))
    long = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    for i in range(300):
        if op_id in session.reports:
            break
        if session.engine.state.num_running + session.engine.state.num_waiting < 2:
            session.submit(str(i), prompts(i, (70,))[0], sampling=long)
        session.step()
    assert op_id in session.reports, "training starved"
    session.finish()


def test_closing_a_run_cancels_what_it_queued_and_harms_no_other(make_engine: MakeEngine) -> None:
    """Both have rows in the microbatch that is on its way when one of them is closed."""
    expected = trained(make_engine("llama"), recipe("small"), LORAS["small"])
    session = Session(riding(make_engine("llama", train_window=3, **WIDE)))
    for run_id in ("small", "big"):
        session.engine.open_run(run_id, LORAS[run_id])
    queued = [session.enqueue(op) for op in recipe("big")]
    for op in recipe("small"):
        session.enqueue(op)
    session.submit("r", prompts()[4])
    for _ in range(9):
        session.step()
    session.engine.close_run("big")
    session.take()
    cancelled = [op_id for op_id in queued if isinstance(session.reports[op_id], Cancelled)]
    assert cancelled and cancelled == queued[-len(cancelled) :]
    # The name is free at once, and the new run starts anew.
    session.engine.open_run("big", LORAS["big"])
    for op in recipe("big"):
        session.enqueue(op)
    session.finish()
    oracle.assert_near(session.engine.weights("small"), expected, SAME)
    again = trained(make_engine("llama"), recipe("big"), LORAS["big"])
    oracle.assert_near(session.engine.weights("big"), again, SAME)
    assert session.texts["r"] == make_engine("llama").generate([prompts()[4]], GREEDY)[0]


# ---------------------------------------------------------------- anything in any order

MENU: tuple[Callable[[str], TrainOp], ...] = (
    lambda run_id: Pass(run_id, oracle.examples(1, (14,), scale=0.1)),
    lambda run_id: Pass(run_id, oracle.examples(2, (5, 33, 2), scale=0.05)),
    lambda run_id: Pass(run_id, oracle.examples(3, (20, 1)), learns=False),
    lambda run_id: Pass(run_id, [Example([5, 6], [6, 7], [0.0, 0.0])]),
    lambda run_id: Update(run_id, ADAM),
    lambda run_id: Update(run_id, ADAM),
)
WAYS: tuple[dict[str, Any], ...] = (
    {"train_window": 13},
    {"train_window": 40, "train_batch_tokens": 50},
    {"deterministic": True},
    {"share_forward": False, "train_memory_bytes": 40_000, "train_window": 20},
    {"max_resident_runs": 1, "train_batch_tokens": 40},
)
RUNS = st.sampled_from(sorted(LORAS))
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("op"), RUNS, st.integers(0, len(MENU) - 1)),
        st.tuples(st.just("op"), RUNS, st.integers(0, len(MENU) - 1)),
        st.tuples(st.just("step"), st.integers(1, 6), st.none()),
        st.tuples(st.just("submit"), st.integers(0, 5), st.booleans()),
        st.tuples(st.just("cancel"), st.integers(0, 9), st.none()),
        st.tuples(st.just("close"), RUNS, st.none()),
        st.tuples(st.just("save"), RUNS, st.none()),
    ),
    max_size=40,
)


@dataclass
class Life:
    """One run from open to close: its operations and their ids; saves are in `saved`."""

    run_id: str
    ops: list[TrainOp] = field(default_factory=list)
    op_ids: list[int] = field(default_factory=list)
    is_closed: bool = False


def assert_near(found: Any, expected: Any) -> None:
    assert type(found) is type(expected), (found, expected)
    if isinstance(expected, PassReport):
        assert (found.num_tokens, found.num_correct) == (expected.num_tokens, expected.num_correct)
        assert found.loss == pytest.approx(expected.loss, rel=1e-4, abs=1e-4)
        assert found.nll == pytest.approx(expected.nll, rel=1e-4, abs=1e-4)
    else:
        assert found.step == expected.step
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3, abs=1e-5)


def play(session: Session, actions: Sequence[tuple[str, Any, Any]], folder: Path) -> tuple[list[Life], dict[str, Any]]:
    """Do what `actions` say and wait for the end of it all. Returns the lives and, by request, (prompt, adapted)."""
    lives: list[Life] = []
    current: dict[str, Life] = {}
    requests: dict[str, Any] = {}
    for kind, one, other in actions:
        if kind in ("op", "save") and one not in current:
            session.engine.open_run(one, LORAS[one])
            current[one] = Life(one)
            lives.append(current[one])
        if kind in ("op", "save"):
            life = current[one]
            path = folder / f"{lives.index(life)}-{len(life.ops)}"
            life.ops.append(MENU[other](one) if kind == "op" else Save(one, str(path)))
            life.op_ids.append(session.enqueue(life.ops[-1]))
        elif kind == "step":
            for _ in range(one):
                session.step()
        elif kind == "submit":
            name = str(len(requests))
            requests[name] = (one, other)
            session.submit(name, prompts()[one], "mine" if other else None)
        elif kind == "cancel" and str(one) in requests:
            session.hear(session.engine.cancel(str(one)))
        elif kind == "close" and one in current:
            session.engine.close_run(one)
            session.take()
            current.pop(one).is_closed = True
    session.finish()
    for run_id in current:
        session.engine.close_run(run_id)
    return lives, requests


def assert_like_alone(life: Life, reports: Sequence[Any], alone: Engine) -> None:
    done = [report for report in reports if not isinstance(report, Cancelled)]
    assert life.is_closed or len(done) == len(reports)
    assert all(isinstance(report, Cancelled) for report in reports[len(done) :]), "done in order"
    alone.open_run(life.run_id, LORAS[life.run_id])
    for op, found in zip(life.ops, done):
        if isinstance(op, Save):
            assert found is None and (Path(op.path) / "adapter_config.json").is_file()
        else:
            (expected,) = oracle.play(alone, life.run_id, [op])
            assert_near(found, expected)
    alone.close_run(life.run_id)


def test_any_interleaving_gives_what_each_run_alone_gives(
    make_engine: MakeEngine, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Operations of three runs, requests, cancels, saves and closed runs in any order: every operation has exactly one
    report, that of its run alone or Cancelled; every text is a request's own; nothing hangs, no block is left."""
    folder = tmp_path_factory.mktemp("any")
    adapter = oracle.random_adapter(tiny_model("llama"), folder / "adapter", LoraConfig(rank=4))
    alone = make_engine("llama")
    alone.load_adapter("mine", str(adapter))
    texts = {
        (i, adapted): alone.generate([prompt], GREEDY, "mine" if adapted else None)[0]
        for i, prompt in enumerate(prompts())
        for adapted in (False, True)
    }

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(st.sampled_from(WAYS), st.booleans(), ACTIONS)
    def check(way: dict[str, Any], prefers_riding: bool, actions: list[tuple[str, Any, Any]]) -> None:
        engine = make_engine("llama", num_blocks=14, max_model_len=120, max_num_seqs=3, **WIDE, **way)
        engine.load_adapter("mine", str(adapter))
        session = Session(riding(engine) if prefers_riding else engine)
        lives, requests = play(session, actions, tmp_path_factory.mktemp("saves"))
        engine.check()
        assert engine.blocks.num_used == 0 and not engine.has_work
        for life in lives:
            assert_like_alone(life, [session.reports[op_id] for op_id in life.op_ids], alone)
        for name, choice in requests.items():
            text, is_whole = session.texts[name], session.ended[name] != "cancelled"
            assert text == texts[choice] if is_whole else text == texts[choice][: len(text)]

    check()
