"""Latency figures against numpy and against cases small enough to work out by hand."""

import math

import numpy
import pytest

from tandem.cli import latency
from tandem.cli.latency import Trial


def trial(sent, *chunks, tokens=None, status=200, error=None):
    return Trial(sent, 5, len(chunks) if tokens is None else tokens, status, error, list(chunks))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("p", [0, 50, 95, 99, 100])
def test_percentiles_are_numpys(count, p):
    values = numpy.random.default_rng(count).exponential(size=count).tolist()
    assert latency.percentile(values, p) == pytest.approx(float(numpy.percentile(values, p)))


def test_one_request_by_hand():
    figures = latency.summarise([trial(10.0, 10.5, 10.6, 10.9)], 2.0, {"ttft": 600, "tpot": 150})
    assert figures["median_ttft_ms"] == pytest.approx(500)
    assert figures["mean_tpot_ms"] == pytest.approx(200)
    assert figures["mean_itl_ms"] == pytest.approx(200) and figures["p99_itl_ms"] == pytest.approx(298)
    assert figures["median_e2el_ms"] == pytest.approx(900)
    assert (figures["output_throughput"], figures["total_token_throughput"]) == (1.5, 4.0)
    assert figures["request_goodput"] == 0.0


def test_tpot_counts_tokens_not_pieces():
    assert trial(0.0, 1.0, 2.0, tokens=5).tpot == pytest.approx(0.25)
    assert trial(0.0, 1.0).tpot is None


def test_rejected_and_failed_are_counted_apart_and_leave_the_latencies_alone():
    trials = [
        trial(0.0, 1.0, 2.0),
        trial(0.0, status=429, error="full"),
        trial(0.0, status=503, error="loading"),
        trial(0.0, status=500, error="bug"),
        trial(0.0, 5.0, error="broke off"),
    ]
    figures = latency.summarise(trials, 1.0, {})
    assert (figures["completed"], figures["rejected"], figures["failed"]) == (1, 2, 2)
    assert figures["p99_ttft_ms"] == pytest.approx(1000) and figures["request_goodput"] is None


@pytest.mark.parametrize(
    ("goals", "good"),
    [({"ttft": 1000}, 2), ({"ttft": 999}, 1), ({"tpot": 1}, 1), ({"ttft": 500, "tpot": 1}, 1), ({"e2el": 100}, 0)],
)
def test_goodput_wants_every_goal(goals, good):
    trials = [trial(0.0, 1.0, 2.0), trial(0.0, 0.5)]
    assert latency.summarise(trials, 1.0, goals)["request_goodput"] == good


def test_nothing_completed_has_no_latencies():
    figures = latency.summarise([], 1.0, {})
    assert math.isnan(figures["mean_ttft_ms"]) and figures["request_throughput"] == 0
    assert any("nan" in line for line in latency.table(figures, ["ttft"]))


def test_stall_sorts_gaps_by_the_long_prompts_time():
    # Sent at 10, first token at 12: gaps 1 | the 3 that overlaps its start, the 0.5 inside | not the one after.
    streams = [trial(0.0, 8.0, 9.0, 12.0, 20.0), trial(0.0, 10.5, 11.0)]
    figures = latency.stall(streams, 10.0, 12.0)
    assert figures["before_max_gap_ms"] == pytest.approx(1000)
    assert figures["during_max_gap_ms"] == pytest.approx(3000)
    assert figures["during_median_gap_ms"] == pytest.approx(1750)
