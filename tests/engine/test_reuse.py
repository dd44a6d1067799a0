"""Training takes over what sampling computed: the same gradients, and only where the adapter is still the same one."""

from __future__ import annotations

import finetune_oracle as oracle
import pytest
import torch

from tandem.errors import Cancelled, NotFound
from tandem.work import Example, LoraConfig, OptimParams, Pass, Request, SamplingParams

LORA = LoraConfig(rank=4, alpha=8.0, seed=3)
ADAM = OptimParams(learning_rate=2e-2)
PROMPT = [5, 6, 7, 8, 9, 11, 13]
# Of float32: single rows are attended to in another order of summation than whole sequences.
TOLERANCE = 3e-6


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return oracle.gentle_models(tmp_path_factory.mktemp("models"))


def opened(make_engine, family="llama", lora=LORA, **options):
    """An engine with the run r, published as "policy", and its twin, which is not published: nothing is kept for it."""
    engine = make_engine(family, **options)
    for run in ("r", "twin"):
        engine.open_run(run, lora)
        learn(engine, run)
    engine.publish("r", "policy")
    return engine


def learn(engine, run="r"):
    engine.forward_backward(run, oracle.examples(0, [9, 12]))
    engine.optim_step(run, ADAM)


def sample(engine, prompt=PROMPT, n=3, keep=True, adapter="policy", max_tokens=9, steps=None):
    """The answers' tokens; after so many steps the request is dropped."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=7, n=n, ignore_eos=True)
    engine.submit(Request(request_id="q", prompt=prompt, sampling=sampling, adapter=adapter, keep_for_training=keep))
    answers = [[] for _ in range(n)]
    while engine.is_serving:
        for event in engine.step():
            answers[event.index].append(event.token_id)
        if steps is not None and (steps := steps - 1) == 0:
            engine.cancel("q")
    return answers


def examples(answers, prompt=PROMPT):
    found = []
    for i, answer in enumerate(answers):
        ids = prompt + answer
        weights = [0.0] * (len(prompt) - 1) + [1.0 + 0.5 * i] * len(answer)
        found.append(Example(ids[:-1], ids[1:], weights))
    return found


def reused(engine, batch, run="r", **options):
    """Tokens that the pass did not send up again."""
    return engine.forward_backward(run, batch, **options).metrics.get("reused_tokens", 0.0)


def assert_same_gradients(engine, tolerance=TOLERANCE):
    mine, other = engine.gradients("r"), engine.gradients("twin")
    for key, pair in mine.items():
        for found, expected in zip(pair, other[key], strict=True):
            assert expected.norm() > 0
            error = float((found - expected).norm() / expected.norm())
            assert error <= tolerance, f"{key}: {error:.1e}"


def num_kept(engine):
    """Tokens that could be found, after what is out of date has been cleared away."""
    kept = engine.worker.trainer.kept
    kept.find(-1, [])
    return kept.num_tokens


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("options", [{}, {"train_window": 7}, {"train_batch_tokens": 20}])
def test_gradients_are_those_of_the_ordinary_way(make_engine, family, options):
    engine = opened(make_engine, family, **options)
    batch = examples(sample(engine))
    report, ordinary = engine.forward_backward("r", batch), engine.forward_backward("twin", batch)
    assert report.metrics == {"reused_tokens": sum(len(e.tokens) for e in batch)} and not ordinary.metrics
    assert report.loss == pytest.approx(ordinary.loss, rel=1e-6)
    assert_same_gradients(engine)


def test_sampled_again_and_learnt_from_again(make_engine):
    """Several updates: each version's tokens are its own."""
    engine = opened(make_engine)
    for _ in range(3):
        batch = examples(sample(engine))
        assert reused(engine, batch) and not reused(engine, batch, "twin")
        assert_same_gradients(engine)
        for run in ("r", "twin"):
            engine.optim_step(run, ADAM)
        engine.publish("r", "policy")


def test_some_examples_are_known_and_some_not(make_engine):
    engine = opened(make_engine)
    known = examples(sample(engine))
    fresh = oracle.examples(5, [8, 21])
    batch = [fresh[0], known[0], fresh[1], *known[1:]]
    logprobs = [
        engine.forward_backward(run, batch, wants_logprobs=True).logprobs for run in ("r", "twin")
    ]  # fmt: skip
    for found, expected in zip(*logprobs, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    assert_same_gradients(engine)


def test_prompts_in_chunks_prefix_hits_and_preemption(make_engine):
    """What was computed in pieces, by another request, or twice."""
    engine = opened(make_engine, num_blocks=12, block_size=4, max_num_batched_tokens=8, max_num_seqs=4)
    prompt = list(range(20, 41))
    first = sample(engine, prompt, n=4, max_tokens=8)
    assert engine.stats.preemptions
    hits = engine.stats.prefix_hits
    second = sample(engine, prompt + [3, 4], n=1)
    assert engine.stats.prefix_hits > hits
    batch = examples(first, prompt) + examples(second, prompt + [3, 4])
    assert reused(engine, batch) == sum(len(e.tokens) for e in batch)
    reused(engine, batch, "twin")
    assert_same_gradients(engine)


def test_a_prompt_whose_beginning_nobody_kept(make_engine):
    engine = opened(make_engine, block_size=4)
    sample(engine, keep=False)
    answers = sample(engine)
    assert engine.stats.prefix_hits and not reused(engine, examples(answers))


def test_beside_riding_tokens_and_another_adapter(make_engine):
    """Slices, riding tokens and kept rows in the same steps, and a second run sampled from at once."""
    engine = opened(make_engine)
    engine.publish("twin", "other")
    engine.enqueue(Pass("twin", oracle.examples(1, [30, 30])))
    mine = sample(engine)
    batch = examples(mine)
    engine.forward("twin", batch)
    engine.worker.trainer.discard(engine.training._versions["twin"])
    assert reused(engine, batch) == sum(len(e.tokens) for e in batch)
    engine.forward_backward("twin", batch)
    assert_same_gradients(engine)


def test_an_older_versions_tokens_are_not_taken(make_engine):
    engine = opened(make_engine)
    batch = examples(sample(engine))
    learn(engine)
    assert num_kept(engine) == 0
    assert not reused(engine, batch)
    # The name still means what the run was before its update.
    batch = examples(sample(engine))
    assert num_kept(engine) == 0 and not reused(engine, batch)


def test_an_update_while_it_samples(make_engine):
    engine = opened(make_engine)
    sampling = SamplingParams(max_tokens=9, temperature=1.0, seed=7, ignore_eos=True)
    engine.submit(Request(request_id="q", prompt=PROMPT, sampling=sampling, adapter="policy", keep_for_training=True))
    answer = [event.token_id for _ in range(4) for event in engine.step()]
    learn(engine)
    engine.publish("r", "policy")
    while engine.is_serving:
        answer += [event.token_id for event in engine.step()]
    assert num_kept(engine) == 0 and not reused(engine, examples([answer]))


def test_another_adapters_tokens_are_not_taken(make_engine):
    engine = opened(make_engine)
    engine.open_run("third", LoraConfig(rank=4, alpha=8.0, seed=4))
    engine.publish("third", "third")
    batch = examples(sample(engine, adapter="third"))
    assert not reused(engine, batch) and reused(engine, batch, "third")
    prompt = PROMPT[::-1]
    base = examples(sample(engine, prompt, adapter=None), prompt)
    assert not any(reused(engine, base, run) for run in ("r", "twin", "third"))


def test_other_tokens_are_not_taken(make_engine):
    engine = opened(make_engine)
    answers = sample(engine)
    longer = examples([[*answers[0], 3]])  # the last token sampled was never read by the model
    changed = examples([[answers[0][0] ^ 1, *answers[0][1:]]])
    assert not reused(engine, longer + changed)
    assert reused(engine, examples([answers[0][:5]]))


def test_requests_that_do_not_ask_leave_nothing(make_engine):
    engine = opened(make_engine)
    batch = examples(sample(engine, keep=False))
    assert num_kept(engine) == 0 and not reused(engine, batch)


@pytest.mark.parametrize("options", [{"train_memory_bytes": 1000}, {"deterministic": True}, {"kv_cache_dtype": "int8"}])
def test_where_nothing_may_be_kept(make_engine, options):
    engine = opened(make_engine, **options)
    batch = examples(sample(engine))
    assert num_kept(engine) == 0 and not reused(engine, batch)


def test_dropout_needs_a_forward_pass_of_its_own(make_engine):
    engine = opened(make_engine, lora=LoraConfig(rank=4, alpha=8.0, seed=3, dropout=0.2))
    batch = examples(sample(engine))
    assert not reused(engine, batch)
    assert engine.forward("r", batch).metrics["reused_tokens"]


def test_a_forward_pass_is_nothing_but_the_loss(make_engine):
    engine = opened(make_engine)
    batch = examples(sample(engine)) + oracle.examples(5, [17])
    found, expected = (engine.forward(run, batch, wants_logprobs=True) for run in ("r", "twin"))
    assert found.metrics["reused_tokens"] == sum(len(e.tokens) for e in batch[:-1])
    for mine, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert mine == pytest.approx(other, abs=1e-5)


def test_the_least_recently_used_make_room(make_engine):
    """Room for a few answers only: the newest whole ones stay, and nothing is ever mistaken for another."""
    engine = opened(make_engine)
    kept = engine.worker.trainer.kept
    kept.capacity = 40
    prompts = [[i, *PROMPT] for i in range(20, 26)]
    batches = []
    for prompt in prompts:
        batches.append(examples(sample(engine, prompt, n=2), prompt))
        assert kept.num_tokens <= 40
    found = [reused(engine, batch) for batch in batches]
    assert found[-1] == sum(len(e.tokens) for e in batches[-1]) and not found[0]
    for batch in batches:
        engine.forward_backward("twin", batch)
    assert_same_gradients(engine)


def test_what_is_dropped_midway_leaves_nothing_behind(make_engine):
    engine = opened(make_engine, train_step_ms=1.0)
    answers = sample(engine, steps=5)
    assert num_kept(engine)
    batch = [*examples([[*answers[0][:3], 9], answers[0][:3]]), *oracle.examples(2, [200] * 6)]
    engine.enqueue(Pass("r", batch))
    engine.step()
    engine.close_run("r")
    assert isinstance(engine.take_reports()[-1][1], Cancelled)
    assert num_kept(engine) == 0
    engine.close_run("twin")
    assert engine.worker.trainer.kept.nbytes == 0
    with pytest.raises(NotFound):
        engine.forward_backward("r", batch)


def test_in_bfloat16(make_engine):
    engine = opened(make_engine, dtype="bfloat16")
    batch = examples(sample(engine))
    assert reused(engine, batch) and not reused(engine, batch, "twin")
    mine, other = (
        torch.cat([t.flatten() for pair in engine.gradients(run).values() for t in pair]) for run in ("r", "twin")
    )
    assert (mine - other).norm() < 0.02 * other.norm()
