"""Deadlines from targets: what training may take of a step, and what it must keep for the next prompt."""

from types import SimpleNamespace

import pytest

from tandem.config import TrainingConfig
from tandem.engine.pace import AIM, LEAST_PUT_BY, Pace
from tandem.scheduler.budget import CostModel


def row(row_id, num_generated):
    return SimpleNamespace(row_id=row_id, num_generated=num_generated)


@pytest.fixture
def pace():
    made = Pace(TrainingConfig(slo_tpot_ms=100.0), CostModel())
    made.arrive(1, 9.5)
    made.commit([row(1, 1)], [], 10.0)
    return made


def test_the_default_target_is_twice_one_stream_and_readable():
    slow = Pace(TrainingConfig(), CostModel())
    assert slow.tpot_s == pytest.approx(2 * (0.020 + 512e-6 + 1e-4))
    assert Pace(TrainingConfig(), CostModel(points=((1, 1e-4),), per_context_s=0.0)).tpot_s == 0.02


def test_slack_adds_up_while_a_row_is_ahead(pace):
    assert pace.slack_s([row(1, 1)], [], 10.0) == pytest.approx(AIM * 0.1)
    assert pace.slack_s([row(1, 11)], [], 10.4) == pytest.approx(11 * AIM * 0.1 - 0.4)
    assert pace.slack_s([row(1, 2)], [], 10.5) < 0


def test_the_tightest_row_decides_and_rows_without_a_token_do_not(pace):
    pace.arrive(2, 9.0)
    assert pace.slack_s([row(2, 0)], [], 10.0) == float("inf")
    pace.commit([row(2, 1)], [], 10.05)
    assert pace.slack_s([row(1, 5), row(2, 1)], [], 10.05) == pytest.approx(AIM * 0.1)


def test_time_is_put_by_for_the_next_prompt(pace):
    """Of a prompt's steps, each of which gave the rows that decode a token, what took longer than that may."""
    for _ in range(2):
        pace.stalled(0.25, 10.1)
    pace.stalled(None, 10.2)
    lost_s = 2 * (0.25 - AIM * 0.1)
    few, many = row(1, 2), row(1, 200)
    assert pace.slack_s([few], [], 10.0) == pytest.approx(2 * (AIM - LEAST_PUT_BY) * 0.1)
    assert pace.slack_s([many], [], 10.0) == pytest.approx(200 * AIM * 0.1 - lost_s)
    pace.p95_s(100.0)
    assert pace.slack_s([many], [], 10.0) == pytest.approx(200 * AIM * 0.1), "an old stall is forgotten"


@pytest.mark.parametrize(("share", "put_by"), [(0.9, 0.02), (0.985, 0.035), (1.0, 0.05), (1.5, 0.05)])
def test_more_is_put_by_the_nearer_recent_requests_are_to_their_target(pace, share, put_by):
    pace.stalled(10.0, 10.1)
    pace.stalled(None, 10.2)
    done = row(1, 11)
    pace.commit([done], [done], 10.0 + 10 * share * 0.1)
    pace.p95_s(12.0)
    pace.commit([row(2, 1)], [], 12.0)
    assert pace.slack_s([row(2, 1)], [], 12.0) == pytest.approx((AIM - put_by) * 0.1)
    pace.p95_s(100.0)
    assert pace.slack_s([row(2, 1)], [], 12.0) == pytest.approx(AIM * 0.1), "old requests are forgotten"


def test_a_prompt_that_takes_no_longer_than_a_token_costs_nothing(pace):
    pace.stalled(0.08, 10.1)
    pace.stalled(None, 10.2)
    assert pace.slack_s([row(1, 80)], [], 10.0) == pytest.approx(80 * AIM * 0.1)


def test_who_waits_too_long_stops_training(pace):
    pace.arrive(3, 10.0)
    assert pace.slack_s([], [row(3, 0)], 10.5) == pytest.approx(1.0)
    assert pace.slack_s([], [row(3, 0)], 12.0) < 0


def test_what_users_saw(pace):
    pace.commit([row(1, 6)], [row(1, 6)], 11.0)
    ttft_s, tpot_s = pace.p95_s(11.0)
    assert (ttft_s, tpot_s) == (pytest.approx(0.5), pytest.approx(0.2))
    assert pace.p95_s(1000.0) == (0.0, 0.0)
