"""The engine on real tiny models: the same text whatever the way, nothing leaked, nobody stalled."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.engine.engine import Engine
from tandem.errors import ContextTooLong, InvalidRequest, NotFound, Overloaded
from tandem.work import Request, SamplingParams, TokenEvent

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
LENGTHS = (1, 5, 16, 17, 33, 70)


@pytest.fixture
def tiny_engine(make_engine) -> Engine:
    return make_engine(num_blocks=24, max_model_len=100, max_num_batched_tokens=24, max_num_seqs=6)


def prompts(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(n)] for n in lengths]


def collect(engine: Engine) -> dict[tuple[str, int], list[TokenEvent]]:
    found: dict[tuple[str, int], list[TokenEvent]] = {}
    for events in engine.run():
        engine.check()
        for event in events:
            found.setdefault((event.request_id, event.index), []).append(event)
    return found


def ids(events: list[TokenEvent]) -> list[int]:
    return [e.token_id for e in events if e.token_id is not None]


@pytest.fixture
def alone(make_engine: Callable[..., Engine]) -> list[list[int]]:
    """Each prompt by itself, whole, without a prefix cache."""
    engine = make_engine(enable_prefix_caching=False)
    return [engine.generate([p], GREEDY)[0] for p in prompts()]


def test_same_text_as_transformers(tiny_model, alone: list[list[int]]) -> None:
    model = tiny_models.oracle(tiny_model("llama"))
    for prompt, text in zip(prompts(), alone, strict=True):
        ids_1L = torch.tensor([prompt])
        found = model.generate(ids_1L, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert found[0, len(prompt) :].tolist() == text


def test_same_text_with_batch_mates(make_engine, alone: list[list[int]]) -> None:
    assert make_engine().generate(prompts(), GREEDY) == alone


@pytest.mark.parametrize("chunk", (4, 7, 16, 33))
def test_same_text_in_chunks(make_engine, alone: list[list[int]], chunk: int) -> None:
    engine = make_engine(max_num_batched_tokens=chunk, max_num_seqs=4)
    assert engine.generate(prompts(), GREEDY) == alone
    assert max(plan.num_tokens for plan, *_ in engine.plan_log) <= chunk


def test_same_text_from_the_prefix_cache(make_engine, alone: list[list[int]]) -> None:
    engine = make_engine()
    engine.generate(prompts(), GREEDY)
    assert engine.generate(prompts(), GREEDY) == alone
    assert engine.stats.prefix_hits >= sum((n - 1) // 16 * 16 for n in LENGTHS)


def test_same_text_after_preemption(make_engine, alone: list[list[int]]) -> None:
    engine = make_engine(num_blocks=11, max_model_len=100, enable_prefix_caching=False)
    assert engine.generate(prompts(), GREEDY) == alone
    assert engine.stats.preemptions > 0


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen3", "mistral", "phi3", "llama-llama3", "smollm3", "qwen2"])
def test_every_family_every_way(make_engine, family: str) -> None:
    some = prompts(3, (3, 20, 45))
    plain = make_engine(family, enable_prefix_caching=False)
    expected = [plain.generate([p], GREEDY)[0] for p in some]
    tight = make_engine(family, num_blocks=9, max_model_len=80, max_num_batched_tokens=9, max_num_seqs=3)
    assert tight.generate(some, GREEDY) == expected
    assert tight.generate(some, GREEDY) == expected


def test_bfloat16_log_probabilities_agree_between_ways(make_engine) -> None:
    """Matmuls sum in another order at another batch size; stated tolerance: 0.15 nats on the chosen token's
    log-probability, for logits up to 30 in bfloat16 (8 bits of mantissa)."""
    prompt = prompts(5, (40,))[0]
    scoring = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)
    found = []
    for options in ({"max_num_batched_tokens": 512}, {"max_num_batched_tokens": 7, "max_num_seqs": 4}):
        engine = make_engine(dtype="bfloat16", **options)
        engine.submit(Request(request_id="r", prompt=prompt, sampling=scoring))
        (events,) = collect(engine).values()
        found.append([entry.logprob for entry in events[-1].prompt_logprobs])
    assert found[0] == pytest.approx(found[1], abs=0.15)


def test_choices_share_the_prompt_and_copy_on_write(make_engine) -> None:
    engine = make_engine()
    prompt = prompts(1, (41,))[0]
    sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=7, n=5, ignore_eos=True)
    engine.submit(Request(request_id="r", prompt=prompt, sampling=sampling))
    together = collect(engine)
    texts = [ids(together["r", i]) for i in range(5)]
    assert len({tuple(t) for t in texts}) == 5
    computed = sum(s.length for plan, *_ in engine.plan_log for s in plan.segments)
    assert computed <= 41 + 4 + 5 * 12, "a fork computes one prompt token, not the prompt"
    other = make_engine(enable_prefix_caching=False, max_num_seqs=1, max_num_batched_tokens=8)
    other.submit(Request(request_id="r", prompt=prompt, sampling=sampling))
    one_by_one = collect(other)
    assert [ids(one_by_one["r", i]) for i in range(5)] == texts


def test_a_seed_gives_the_same_text_among_others(make_engine) -> None:
    sampling = SamplingParams(max_tokens=16, temperature=0.9, top_p=0.95, seed=11, ignore_eos=True)
    first, *others = prompts(2)
    expected = make_engine().generate([first], sampling)[0]
    assert make_engine(max_num_batched_tokens=9, max_num_seqs=8).generate([first, *others], sampling)[0] == expected


def test_no_seed_means_different_texts(make_engine) -> None:
    engine = make_engine()
    sampling = SamplingParams(max_tokens=16, temperature=1.5, ignore_eos=True)
    assert len({tuple(engine.generate([[5, 6, 7]], sampling)[0]) for _ in range(4)}) > 1


def test_cancel_frees_every_block_at_once(make_engine) -> None:
    engine = make_engine()
    for i, prompt in enumerate(prompts()):
        engine.submit(Request(request_id=str(i), prompt=prompt, sampling=GREEDY))
    for _ in range(5):
        engine.step()
    for i in range(len(LENGTHS)):
        assert [e.finish_reason for e in engine.cancel(str(i))] == ["cancelled"]
        engine.check()
    assert not engine.has_work and engine.blocks.num_used == 0
    assert engine.cancel("0") == [] and engine.cancel("never seen") == []


def test_one_choice_can_be_cancelled(make_engine) -> None:
    engine = make_engine()
    sampling = SamplingParams(max_tokens=10, temperature=1.0, n=3, seed=1, ignore_eos=True)
    engine.submit(Request(request_id="r", prompt=[4, 5, 6], sampling=sampling))
    for _ in range(4):
        engine.step()
    engine.cancel("r", 0)
    rest = collect(engine)
    assert {index for _, index in rest} == {1, 2}


def test_prompt_log_probabilities_are_those_of_transformers(make_engine, tiny_model) -> None:
    prompt = prompts(4, (37,))[0]
    model = tiny_models.oracle(tiny_model("llama"))
    with torch.inference_mode():
        logprobs_LV = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    engine = make_engine(max_num_batched_tokens=8, max_num_seqs=4)
    engine.generate([prompt], GREEDY)  # a prefix in the cache must not swallow the scores
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=3)
    engine.submit(Request(request_id="r", prompt=prompt, sampling=sampling))
    ((event,),) = collect(engine).values()
    assert event.finish_reason == "length" and event.token_id is None
    assert len(event.prompt_logprobs) == len(prompt) - 1
    for place, entry in enumerate(event.prompt_logprobs):
        following = prompt[place + 1]
        assert entry.logprob == pytest.approx(logprobs_LV[place, following].item(), abs=1e-4)
        best = logprobs_LV[place].topk(3)
        assert entry.token_ids == best.indices.tolist()
        assert entry.rank == int((logprobs_LV[place] > logprobs_LV[place, following]).sum()) + 1


def test_stop_tokens_min_tokens_and_eos(make_engine) -> None:
    engine = make_engine()
    prompt = prompts(6, (9,))[0]
    plain = engine.generate([prompt], GREEDY)[0]
    stop = plain[5]
    first = plain.index(stop)
    stopped = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    engine.submit(Request(request_id="r", prompt=prompt, sampling=stopped))
    (events,) = collect(engine).values()
    assert ids(events) == plain[: first + 1]
    assert events[-1].finish_reason == "stop" and events[-1].stop_token
    late = SamplingParams(max_tokens=24, min_tokens=20, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    found = engine.generate([prompt], late)[0]
    assert len(found) >= 20 and stop not in found[:20]


def test_a_dirty_block_does_not_reach_its_next_owner(make_engine) -> None:
    """A sequence that left NaN behind (a diverged adapter) must not poison whoever gets its blocks."""
    engine = make_engine(enable_prefix_caching=False)
    expected = engine.generate(prompts(), GREEDY)
    engine.worker.kv[:, :, 1:] = float("nan")
    assert engine.generate(prompts(), GREEDY) == expected


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Request(request_id="r", prompt=[]), InvalidRequest),
        (Request(request_id="r", prompt=[-1]), InvalidRequest),
        (Request(request_id="r", prompt=[tiny_models.VOCAB_SIZE]), InvalidRequest),
        (Request(request_id="r", prompt=[5] * 250, sampling=SamplingParams(max_tokens=7)), ContextTooLong),
        (Request(request_id="r", prompt=[5], sampling=SamplingParams(logit_bias={999: 1.0})), InvalidRequest),
        (Request(request_id="r", prompt=[5], sampling=SamplingParams(stop_token_ids=(999,))), InvalidRequest),
        (Request(request_id="r", prompt=[5], adapter="nobody"), NotFound),
        (Request(request_id="r", prompt=[5], sampling=SamplingParams(n=13)), Overloaded),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(make_engine, request_: Request, error: type[Exception]) -> None:
    engine = make_engine(max_num_queued_reqs=8, max_num_seqs=4)
    with pytest.raises(error):
        engine.submit(request_)
    assert not engine.has_work
    engine.check()


def test_the_first_event_says_how_long_a_choice_was_queued(make_engine) -> None:
    engine = make_engine(max_num_seqs=1)
    for name in ("first", "second"):
        engine.submit(Request(request_id=name, prompt=[5, 6], sampling=SamplingParams(max_tokens=3, ignore_eos=True)))
    found = collect(engine)
    queued = {name: [event.queue_s for event in found[name, 0]] for name in ("first", "second")}
    assert all(times[1:] == [None, None] for times in queued.values())
    assert queued["second"][0] > queued["first"][0] >= 0


def test_a_request_id_in_use_is_refused(make_engine) -> None:
    engine = make_engine()
    engine.submit(Request(request_id="r", prompt=[5], sampling=GREEDY))
    with pytest.raises(InvalidRequest, match="in use"):
        engine.submit(Request(request_id="r", prompt=[5], sampling=GREEDY))
    collect(engine)


def test_a_plan_never_stalls_running_decodes(make_engine) -> None:
    """While a decode runs, no step is predicted to take more than three times its decodes alone."""
    engine = make_engine(num_blocks=400, max_num_batched_tokens=256)
    engine.submit(Request(request_id="stream", prompt=[5], sampling=SamplingParams(max_tokens=60, ignore_eos=True)))
    for _ in range(3):
        engine.step()
    for i in range(6):
        engine.submit(Request(request_id=str(i), prompt=prompts(i, (200,))[0], sampling=GREEDY))
    mixed = 0
    while engine.has_work:
        cost = engine.limits.cost
        engine.step()
        plan, *_ = engine.plan_log[-1]
        decodes = [s for s in plan.segments if s.length == 1 and s.samples]
        if decodes:
            mixed += len(decodes) < len(plan.segments)
            assert plan.predicted_s <= 3 * cost.predict(decodes) * (1 + 1e-9)
    assert mixed


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_prompt_log_probabilities_with_several_choices(make_engine, max_tokens: int) -> None:
    engine = make_engine(max_num_batched_tokens=8, max_num_seqs=4)
    prompt = prompts(7, (21,))[0]
    sampling = SamplingParams(max_tokens=max_tokens, n=3, prompt_logprobs=1, logprobs=1, seed=1, ignore_eos=True)
    engine.submit(Request(request_id="r", prompt=prompt, sampling=sampling))
    found = collect(engine)
    assert len(found) == 3 and len(found["r", 0][0].prompt_logprobs) == 20
    assert all(found["r", i][-1].finish_reason == "length" for i in range(3))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_valid_request_finishes_and_leaks_nothing(tiny_engine: Engine, data: st.DataObject) -> None:
    """Whatever the parameters, one request must never end the engine."""
    optional = st.none() | st.integers(0, 4)
    vocab = tiny_models.VOCAB_SIZE
    tokens = st.integers(0, vocab - 1)
    requests = []
    for i in range(data.draw(st.integers(1, 4))):
        sampling = SamplingParams(
            max_tokens=data.draw(st.integers(0, 6)),
            min_tokens=data.draw(st.integers(0, 9)),
            temperature=data.draw(st.sampled_from((0.0, 1e-300, 1e-6, 0.7, 2.0, 1e300))),
            top_k=data.draw(st.sampled_from((0, 1, 7, 10_000))),
            top_p=data.draw(st.sampled_from((1e-9, 0.5, 1.0))),
            min_p=data.draw(st.sampled_from((0.0, 0.3, 1.0))),
            presence_penalty=data.draw(st.sampled_from((-2.0, 0.0, 2.0))),
            frequency_penalty=data.draw(st.sampled_from((-2.0, 0.0, 2.0))),
            repetition_penalty=data.draw(st.sampled_from((0.01, 1.0, 100.0))),
            logit_bias=data.draw(st.dictionaries(tokens, st.sampled_from((-100.0, 100.0)), max_size=5)),
            seed=data.draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
            stop_token_ids=tuple(data.draw(st.lists(tokens, max_size=3))),
            ignore_eos=data.draw(st.booleans()),
            logprobs=data.draw(optional),
            prompt_logprobs=data.draw(optional),
            n=data.draw(st.integers(1, 3)),
        )
        prompt = data.draw(st.lists(tokens, min_size=1, max_size=40))
        requests.append(Request(request_id=f"{i}", prompt=prompt, sampling=sampling))
    for request in requests:
        tiny_engine.submit(request)
    found = collect(tiny_engine)
    assert sorted(found) == sorted((r.request_id, index) for r in requests for index in range(r.sampling.n))
    assert all(events[-1].finish_reason in ("stop", "length") for events in found.values())
