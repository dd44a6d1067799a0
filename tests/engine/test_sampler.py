"""The sampler against plain formulas and transformers' own filters; distributions by counting."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tandem.engine.sampler import Draw, sample, top_logprobs, uniform
from tandem.work import SamplingParams

VOCAB = 600


def draw(prompt: list[int] = [1, 2], generated: list[int] = [], seed: int = 0, index: int = 0, **params) -> Draw:  # noqa: B006
    return Draw(SamplingParams(**params), seed, index, [*prompt, *generated], len(prompt), eos_token_ids=(0,))


def counts(logits_V: torch.Tensor, num: int = 4000, **params) -> torch.Tensor:
    rows = [draw(seed=seed, **params) for seed in range(num)]
    tokens, _ = sample(logits_V.repeat(num, 1), rows)
    return torch.bincount(torch.tensor(tokens), minlength=logits_V.shape[0]).double() / num


def test_temperature_zero_is_the_largest_logit() -> None:
    logits_MV = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    tokens, reports = sample(logits_MV.clone(), [draw(temperature=0.0)] * 5)
    assert tokens == logits_MV.argmax(-1).tolist() and reports == [None] * 5


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0))
def test_frequencies_are_the_softmax(temperature: float) -> None:
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2
    expected = torch.softmax(logits_V / temperature, -1).double()
    assert (counts(logits_V, 20000, temperature=temperature) - expected).abs().max() < 0.015


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"top_k": 9, "top_p": 0.6}, [TopKLogitsWarper(9), TopPLogitsWarper(0.6)]),
        ({"top_k": 400, "top_p": 0.999}, [TopKLogitsWarper(400), TopPLogitsWarper(0.999)]),
        ({"top_p": 0.97, "flat": True}, [TopPLogitsWarper(0.97)]),
    ],
)
def test_filters_keep_what_transformers_keeps(params: dict, warpers: list) -> None:
    """Every kept token can be drawn and no other: supports and frequencies over many seeds are compared."""
    flat = params.pop("flat", False)
    scale = 0.3 if flat else 2.5
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2)) * scale
    scores = logits_V[None].clone()
    for warper in warpers:
        scores = warper(None, scores)
    expected = torch.softmax(scores[0], -1).double()
    found = counts(logits_V, 6000, temperature=1.0, **params)
    assert set(found.nonzero()[:, 0].tolist()) <= set(expected.nonzero()[:, 0].tolist())
    assert (found - expected).abs().max() < 0.03


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))
    prompt, generated = [4, 5], [7, 7, 9]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + generated]), logits_V[None].clone())[0]
    penalised = logits_V[None].clone()
    sample(penalised, [draw(prompt, generated, temperature=0.0, repetition_penalty=1.7)])
    assert torch.allclose(penalised[0], expected)


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    logits = torch.zeros(1, VOCAB)
    sample(logits, [draw([4, 5], [7, 7, 9], temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)])
    assert logits[0, 7] == -1.0 and logits[0, 9] == -0.75 and logits[0, 4] == 0.0


def test_logit_bias_and_min_tokens() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 0] = 50.0
    rows = [draw(temperature=0.0, min_tokens=3), draw(temperature=0.0, logit_bias={17: 100.0, 0: -100.0})]
    tokens, _ = sample(logits, rows)
    assert tokens[0] != 0 and tokens[1] == 17
    tokens, _ = sample(torch.eye(1, VOCAB), [draw([1], [2, 3, 4], temperature=0.0, min_tokens=3)])
    assert tokens == [0], "min_tokens reached: the end token may come"


def test_log_probabilities_are_of_the_models_own_logits() -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(4))
    expected = logits.log_softmax(-1)
    rows = [draw(temperature=0.3, logprobs=4, logit_bias={3: 5.0}, top_k=2), draw(temperature=0.0)]
    tokens, reports = sample(logits.clone(), rows)
    assert reports[1] is None and reports[0] is not None
    assert reports[0].logprob == pytest.approx(expected[0, tokens[0]].item(), abs=1e-5)
    assert reports[0].token_ids == expected[0].topk(4).indices.tolist()
    assert reports[0].rank == int((expected[0] > expected[0, tokens[0]]).sum()) + 1


def test_top_logprobs_zero_alternatives() -> None:
    (report,) = top_logprobs(torch.zeros(1, 8), [3], [0])
    assert report.token_ids == [] and report.logprob == pytest.approx(-math.log(8))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), index=st.integers(0, 128), position=st.integers(0, 100_000))
def test_uniform_is_in_range_and_depends_on_all_three(seed: int, index: int, position: int) -> None:
    u = uniform(seed, index, position)
    assert 0.0 <= u < 1.0
    assert (
        len(
            {
                u,
                uniform(seed + 1, index, position),
                uniform(seed, index + 1, position),
                uniform(seed, index, position + 1),
            }
        )
        == 4
    )


def test_uniform_is_uniform() -> None:
    found = sorted(uniform(1, 0, i) for i in range(20_000))
    assert max(abs(u - i / 20_000) for i, u in enumerate(found)) < 0.012


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_row_draws_the_same_among_any_batch_mates(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 10_000)))
    rows = []
    for i in range(data.draw(st.integers(1, 6))):
        params = {
            "temperature": rng.choice((0.0, 0.7, 1.3)),
            "top_k": rng.choice((0, 3, 50, 300)),
            "top_p": rng.choice((1.0, 0.99, 0.8)),
        }
        rows.append(draw(seed=rng.randrange(2**63), index=i, min_p=rng.choice((0.0, 0.05)), **params))
    # Rounded to bfloat16 as a model's are: many ties.
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(rng.randrange(1000))) * 2
    logits = logits.bfloat16().float()
    together, _ = sample(logits.clone(), rows)
    for i, row in enumerate(rows):
        (one,), _ = sample(logits[i : i + 1].clone(), [row])
        assert one == together[i]


@pytest.mark.parametrize("temperature", (1e-60, 1e-38, 1e-6))
@pytest.mark.parametrize("top_p", (1.0, 0.9))
def test_a_tiny_temperature_is_greedy(temperature: float, top_p: float) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(5)) * 20
    expected = logits.argmax(-1).tolist()
    assert sample(logits, [draw(temperature=temperature, top_p=top_p)] * 3)[0] == expected


def test_a_vocabulary_smaller_than_what_is_asked_for() -> None:
    (token,), (report,) = sample(torch.zeros(1, 8), [draw(temperature=1.0, top_k=50, top_p=0.9, logprobs=20)])
    assert 0 <= token < 8 and report is not None and len(report.token_ids) == 8
