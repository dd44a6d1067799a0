"""Examples that begin alike go through the layers once up to where they part. Against PEFT, which takes each alone."""

from __future__ import annotations

import random

import finetune_oracle as oracle
import pytest
import tiny_models

from tandem.scheduler.progress import Progress
from tandem.work import Example, LoraConfig, Pass

TOLERANCE = 1e-5
LORA = LoraConfig(rank=5, alpha=9.0)
FAMILIES = sorted(tiny_models.FAMILIES)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return oracle.gentle_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """adapter("llama") -> a PEFT directory with every target."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = oracle.random_adapter(tiny_model(family), tmp_path_factory.mktemp("a") / family, LORA)
        return made[family]

    return get


def tail(rng, length):
    return [rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(length)]


def example(rng, prompt, answer):
    ids = prompt + answer
    weights = [0.0] * (len(prompt) - 1) + [rng.uniform(0.2, 1.0) for _ in answer]
    return Example(ids[:-1], ids[1:], weights)


def tree(seed=0, root=36):
    """Two questions with one beginning, four and two answers; one answer whose question begins as the first, another
    that has nothing in common with any, and one question that is a part of another's."""
    rng = random.Random(seed)
    first = tail(rng, root)
    one, two = first + tail(rng, 5), first + tail(rng, 11)
    return [
        example(rng, one, tail(rng, 7)), example(rng, one, tail(rng, 1)), example(rng, two, tail(rng, 9)),
        example(rng, one, tail(rng, 12)), example(rng, tail(rng, 34), tail(rng, 3)), example(rng, two, tail(rng, 4)),
        example(rng, first, tail(rng, 6)), example(rng, one, tail(rng, 2)),
    ]  # fmt: skip


def num_computed(engine):
    """Tokens that went down through the last layer."""
    last = len(engine.worker.spec.layers) - 1
    slices = [s for plan, *_ in engine.plan_log for s in plan.slices if s.kind == "backward" and s.layer == last]
    return sum(s.stop - s.start for s in slices)


def num_read(batch):
    return sum(len(e.tokens) for e in batch)


@pytest.mark.parametrize(
    ("family", "window"),
    [(family, 7) for family in FAMILIES] + [("llama", 1), ("gemma2", 16), ("phi3", None), ("mistral", None)],
)
def test_gradients_are_pefts(make_engine, tiny_model, adapter, family, window):
    engine, batch = make_engine(family, train_window=window), tree()
    run = oracle.PeftRun(tiny_model(family), adapter(family))
    expected = run.forward_backward(batch)
    engine.open_run("r", LORA, init_from=str(adapter(family)))
    found = engine.forward_backward("r", batch)
    assert (found.num_tokens, found.num_correct) == (expected.num_tokens, expected.num_correct)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    oracle.assert_near(engine.gradients("r"), run.gradients(), TOLERANCE)
    assert num_computed(engine) < 0.6 * num_read(batch)


@pytest.mark.parametrize("seed", range(6))
def test_trees_at_random_over_microbatches(make_engine, tiny_model, adapter, seed):
    """Cut into microbatches and windows of any size, several passes, some with every log-probability."""
    rng = random.Random(seed)
    options = {"train_window": rng.choice([3, 8, 40, None]), "train_batch_tokens": rng.choice([30, 90, 1024])}
    if seed % 3 == 0:
        options["deterministic"] = True
    engine, run = make_engine("llama", **options), oracle.PeftRun(tiny_model("llama"), adapter("llama"))
    engine.open_run("r", LORA, init_from=str(adapter("llama")))
    for step in range(3):
        batch = tree(10 * seed + step, root=rng.choice([9, 20, 60]))
        rng.shuffle(batch)
        expected, found = run.forward_backward(batch), engine.forward_backward("r", batch, wants_logprobs=step == 1)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        if step == 1:
            apart = [engine.forward("r", [each], wants_logprobs=True).logprobs[0] for each in batch]
            for mine, alone in zip(found.logprobs, apart, strict=True):
                assert mine == pytest.approx(alone, abs=1e-4)
    oracle.assert_near(engine.gradients("r"), run.gradients(), TOLERANCE)


def test_two_runs_in_one_microbatch_share_nothing_with_each_other(make_engine, tiny_model, adapter):
    engine, batch = make_engine("llama"), tree()
    engine.open_run("r", LORA, init_from=str(adapter("llama")))
    engine.open_run("fresh", LORA)
    ids = [engine.enqueue(Pass(run, batch)) for run in ("r", "fresh")]
    while engine.has_work:
        engine.step()
    assert {op_id for op_id, _ in engine.take_reports()} == set(ids)
    apart = make_engine("llama", share_prefixes=False)
    apart.open_run("r", LORA, init_from=str(adapter("llama")))
    apart.open_run("fresh", LORA)
    for run in ("r", "fresh"):
        apart.forward_backward(run, batch)
        oracle.assert_near(engine.gradients(run), oracle.copied(apart.gradients(run)), TOLERANCE)
    assert num_computed(apart) == 2 * num_read(batch) > 3 * num_computed(engine) / 2


def test_preferences_share_their_prompt(make_engine, adapter):
    rng = random.Random(3)
    prompts = [tail(rng, 30), tail(rng, 17)]
    batch = [example(rng, prompt, tail(rng, length)) for prompt in prompts for length in (4, 9)]
    batch = [Example(e.tokens, e.targets, [float(w > 0) for w in e.weights]) for e in batch]
    engines = [make_engine("llama", share_prefixes=shares) for shares in (True, False)]
    for engine in engines:
        engine.open_run("r", LORA, init_from=str(adapter("llama")))
        engine.forward_backward("r", batch, "dpo", {"beta": 0.4})
    ours, apart = (oracle.copied(engine.gradients("r")) for engine in engines)
    oracle.assert_near(ours, apart, TOLERANCE)
    assert num_computed(engines[0]) < 0.75 * num_computed(engines[1])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_who_may_share(make_engine, dropout):
    """With dropout every example has masks of its own."""
    engine, batch = make_engine("llama"), tree()
    engine.open_run("r", LoraConfig(rank=5, alpha=9.0, dropout=dropout))
    engine.forward_backward("r", batch)
    assert (num_computed(engine) == num_read(batch)) == (dropout > 0)


def rows_of(batch, **options):
    progress = Progress(2, 10**6, mixes=True, **{"shares": True} | options)
    progress.open("r", 1, 10, 0, may_ride=True)
    progress.enqueue(1, Pass("r", batch))
    return progress.assemble()


def text(tokens, num_prompt):
    return Example(tokens, tokens, [0.0] * num_prompt + [1.0] * (len(tokens) - num_prompt))


def test_what_is_shared():
    prompt = list(range(20))
    found = rows_of([text([*prompt, 30, 31], 20), text([*prompt, 30, 32], 20), text([*prompt[:12], 40, 41], 12)])
    # The token 30 has a weight in both: each has its own.
    assert [r.past for r in found.rows] == [(), ((0, 20),), ((0, 12),)]
    assert [r.length for r in found.rows] == [22, 2, 2] and found.num_tokens == 26 and found.num_read == 58
    assert not found.may_ride


def test_what_is_not_worth_it():
    prompt = list(range(20))
    alike = text([*prompt, 30], 20)
    for batch in (
        [text([*prompt[:7], i, *prompt], 20) for i in (30, 31)],  # seven tokens
        [text([*prompt, *range(40, 400, 1 + i)], 20) for i in (0, 1)],  # a small part of the whole
        [text([*prompt, 30], 0), text([*prompt, 30], 0)],  # every token has a weight
        [alike],
    ):
        found = rows_of(batch)
        assert not any(r.past for r in found.rows) and found.may_ride and found.num_tokens == found.num_read
    assert not any(r.past for r in rows_of([alike, alike], shares=False).rows)
    # Of two that are the same each has its last token.
    assert [r.length for r in rows_of([alike, alike]).rows] == [21, 1]
