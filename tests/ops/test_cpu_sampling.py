"""The compiled ways from logits to tokens against their references, on every instruction set this machine has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tandem.engine.sampler import Draw, Head, sample
from tandem.ops import sampling
from tandem.ops.cpu import library
from tandem.ops.cpu.sampling import Sampling
from tandem.work import SamplingParams

DTYPES = [torch.float32, torch.bfloat16]
VOCABS = [1, 7, 16, 33, 511, 512, 513, 3001, 128_256]


@pytest.fixture(scope="module")
def ops(compiled: library.Library) -> Sampling:
    return Sampling(compiled)


def logits(rows: int, vocab: int, dtype: torch.dtype, spread: float = 3.0) -> Tensor:
    """Rows inside wider ones, whose other elements would win."""
    wide = torch.full((rows, vocab + 5), 1e9, dtype=dtype)
    wide[:, 2 : vocab + 2] = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    return wide[:, 2 : vocab + 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_argmax(ops: Sampling, dtype: torch.dtype, vocab: int) -> None:
    x = logits(7, vocab, dtype)
    # bfloat16 has equal ones: the first counts.
    expected = [row.float().tolist().index(row.float().max().item()) for row in x]
    assert ops.argmax(x).tolist() == expected
    assert ops.argmax(x.t().contiguous().t()).tolist() == expected
    for place in (0, vocab // 2, vocab - 1):
        x[3, place] = 1e4
        x[4] = float("-inf")
        x[4, place] = -1e30
        assert ops.argmax(x)[3:5].tolist() == [place, place]
        x[3, place] = 0.0


def test_argmax_of_odd_rows(ops: Sampling) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[nan, 1.0, 2.0], [-inf, -inf, -inf], [0.0, inf, inf], [nan, nan, nan]])
    found = ops.argmax(x).tolist()
    assert found[:3] == [2, 0, 1] and 0 <= found[3] < 3
    assert ops.argmax(x[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_draw_inverts_the_distribution(ops: Sampling, dtype: torch.dtype, vocab: int) -> None:
    rows = 23
    x, temperature = logits(rows, vocab, dtype), torch.linspace(0.05, 3.0, rows)
    u = torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u[0], u[1] = 0.0, 1.0 - 2.0**-53
    tokens = ops.draw(x, temperature, u)
    probs = torch.softmax(x.double() / temperature.double()[:, None], -1)
    after = probs.cumsum(-1).gather(1, tokens[:, None])[:, 0]
    own = probs.gather(1, tokens[:, None])[:, 0]
    # u lies in the token's own part of the distribution, up to the rounding of its edges.
    assert ((after - own - 2e-6 <= u) & (u <= after + 2e-6)).all()
    assert (own > 0).all()


def test_draws_follow_the_distribution(ops: Sampling) -> None:
    x = torch.tensor([0.5, -1.0, float("-inf"), 2.0, 0.0, float("-inf")])
    num = 20_000
    u = torch.rand(num, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens = ops.draw(x.repeat(num, 1), torch.full((num,), 0.7), u)
    found = torch.bincount(tokens, minlength=6) / num
    torch.testing.assert_close(found, torch.softmax(x / 0.7, -1), rtol=0, atol=0.015)
    assert found[2] == found[5] == 0
    reference = sampling.draw(x.repeat(num, 1), torch.full((num,), 0.7), u)
    assert (tokens != reference).sum() <= 2


FILTERS = [
    {"top_k": 1}, {"top_k": 5}, {"top_k": 300}, {"top_p": 0.1}, {"top_p": 0.9}, {"top_p": 0.999}, {"min_p": 0.3},
    {"min_p": 0.001}, {"top_k": 40, "top_p": 0.7}, {"top_p": 0.95, "min_p": 0.05}, {"top_k": 600, "min_p": 0.01},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.1}, {"top_k": 128_256}, {"top_p": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 33, 700, 3001])
@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
def test_filtered_draws(ops: Sampling, dtype: torch.dtype, vocab: int, spread: float) -> None:
    """Every kept token is drawn as often as the formula says: u goes through [0, 1) in even steps."""
    rows = 61
    x = logits(1, vocab, dtype, spread).expand(rows, vocab)
    u = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    for temperature in (0.3, 1.0, 2.5):
        for filters in FILTERS:
            top_k = torch.full((rows,), min(int(filters.get("top_k", vocab)), vocab))
            top_p, min_p = (torch.full((rows,), filters.get(n, d)) for n, d in (("top_p", 1.0), ("min_p", 0.0)))
            given = (torch.full((rows,), temperature), top_k, top_p, min_p, u)
            found = ops.draw_filtered(x, *given)
            expected = filtered(x[0].double() / torch.tensor(temperature).double(), filters)
            after = expected.cumsum(0)
            place = torch.argsort(x[0].double(), descending=True, stable=True).argsort()[found]
            assert (expected[place] > 0).all(), (temperature, filters)
            slack = 1e-5 + 2 * expected[expected > 0].min()  # for a token on an edge, in or out
            assert ((after - expected)[place] - slack <= u).all() and (u <= after[place] + slack).all()


def filtered(scaled: Tensor, filters: dict[str, float]) -> Tensor:
    """Probabilities of what is kept, the likeliest first."""
    probs = scaled.softmax(-1).sort(descending=True, stable=True).values
    probs[int(filters.get("top_k", len(probs))) :] = 0
    probs /= probs.sum()
    # A little more than the limits, for what lies on an edge up to rounding.
    keep = probs.cumsum(0) - probs < filters.get("top_p", 1.0) + 1e-6
    keep &= probs >= filters.get("min_p", 0.0) * probs[0] * (1 - 1e-5)
    keep[0] = True
    probs = torch.where(keep, probs, 0.0)
    return probs / probs.sum()


def test_the_reference_of_filtered_draws(ops: Sampling) -> None:
    rows = 64
    x = torch.randn(rows, 3001, generator=torch.Generator().manual_seed(5)) * 4
    u = torch.rand(rows, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    given = (torch.full((rows,), 0.8), torch.full((rows,), 50), torch.full((rows,), 0.9), torch.full((rows,), 0.01), u)
    assert torch.equal(sampling.draw_filtered(x, *given), ops.draw_filtered(x, *given))


def test_draws_of_odd_rows(ops: Sampling) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[-inf, 3.0, -inf], [nan, 1.0, 2.0], [-inf] * 3, [0.0, inf, 0.0]])
    found = ops.draw(x, torch.full((4,), 1.0), torch.full((4,), 0.5, dtype=torch.float64)).tolist()
    assert found[0] == 1 and all(0 <= token < 3 for token in found)
    cold = ops.draw(torch.tensor([[1.0, 1.001, 0.9]]), torch.tensor([1e-5]), torch.tensor([0.999], dtype=torch.float64))
    assert cold.tolist() == [1]
    with pytest.raises(ValueError, match="4 numbers of torch.float32"):
        ops.draw(x, torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_whatever_rows_and_threads(ops: Sampling, dtype: torch.dtype) -> None:
    x, rows = logits(9, 3001, dtype), 9
    temperature, u = torch.ones(rows), torch.rand(rows, dtype=torch.float64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [int(ops.draw(x[i : i + 1], temperature[:1], u[i : i + 1])) for i in range(rows)]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert ops.draw(x, temperature, u).tolist() == alone
    finally:
        torch.set_num_threads(before)


def test_the_sampler_chooses_the_same_with_them(ops: Sampling) -> None:
    """Rows that are read as they are, beside rows that ask for more."""
    kinds = [
        {"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.0, "logprobs": 3}, {"temperature": 1.0, "presence_penalty": 0.5},
        {"temperature": 0.7, "logprobs": 0}, {"temperature": 0.0, "min_tokens": 9},
        {"temperature": 0.0, "logit_bias": {5: 100.0}},
    ]  # fmt: skip
    draws = [Draw(SamplingParams(**kinds[i % 8]), i, 0, [1, 2, 3], 2, (0,)) for i in range(24)]
    x = torch.randn(24, 3001, generator=torch.Generator().manual_seed(3)).bfloat16()
    for is_plain in (True, False):
        expected = sample(x.clone(), draws, Head(is_plain=is_plain))
        found = sample(x.clone(), draws, Head(ops.argmax, ops.draw, ops.draw_filtered, is_plain=is_plain))
        assert found[0] == expected[0]
        assert [r and r.logprob for r in found[1]] == [r and r.logprob for r in expected[1]]
        assert [r is not None for r in found[1]] == [d.params.logprobs is not None for d in draws]
    assert expected[0][7] == 5
    capped = Head(ops.argmax, ops.draw, finish=lambda raw: 0.01 * torch.tanh(raw.float() / 0.01), is_plain=False)
    hot = [Draw(SamplingParams(temperature=1.0), i, 0, [1], 1) for i in range(64)]
    tokens, _ = sample((torch.eye(4)[:1] * 1e4).repeat(64, 1), hot, capped)
    assert len(set(tokens)) > 1, "with the soft cap all four are about as likely"
