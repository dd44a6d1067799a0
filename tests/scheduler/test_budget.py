"""The cost model: its interpolation against hand-computed values, its fit against models that made the measurements."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.scheduler.budget import CostModel, Load, Measurement, fit, predicted_wait
from tandem.work import Segment

MODEL = CostModel(points=((1, 1.0), (4, 4.0), (8, 5.0)), per_context_s=0.1, per_pair_s=0.01, per_sample_s=0.001)


@pytest.mark.parametrize(
    "segments, seconds",
    [
        ([], 0.0),
        ([Segment(0, 0, 1, False)], 1 + 0.1),
        ([Segment(0, 9, 1, True)], 1 + 1.0 + 0.001),  # reads 10 keys, its own included
        ([Segment(0, 0, 3, False)], 3 + 0.06),  # 1 + 2 + 3 pairs
        ([Segment(0, 10, 2, True)], 2 + 0.01 * (11 + 12) + 0.001),
        ([Segment(0, 0, 6, False)], 4.5 + 0.21),  # between two points
        ([Segment(0, 0, 16, False)], 7 + 0.01 * 136),  # beyond the last
        ([Segment(0, 4, 1, True), Segment(1, 0, 3, False)], 4 + 0.5 + 0.06 + 0.001),
    ],
)
def test_prediction_by_hand(segments, seconds):
    assert MODEL.predict(segments) == pytest.approx(seconds)


def test_a_single_point_is_a_constant():
    assert CostModel(points=((8, 2.0),), per_context_s=0).seconds(Load(tokens=100)) == 2.0


segment = st.builds(Segment, st.just(0), st.integers(0, 5000), st.integers(1, 600), st.booleans())


@given(st.lists(segment, max_size=5), segment)
def test_more_work_never_takes_less(segments, more):
    assert CostModel().predict([*segments, more]) >= CostModel().predict(segments)


def test_correction_goes_towards_what_is_measured():
    model = MODEL
    for _ in range(200):
        model = model.corrected(model.seconds(Load(4)), 3 * MODEL.seconds(Load(4)))
    assert model.scale == pytest.approx(3, rel=0.01)
    assert model.points == MODEL.points


def test_correction_is_bounded_and_one_outlier_moves_it_little():
    assert MODEL.corrected(1.0, 1000.0).scale < 1.08
    assert MODEL.corrected(1.0, 1e-9).scale > 0.92
    assert MODEL.corrected(0.0, 1.0) == MODEL == MODEL.corrected(1.0, 0.0)
    for measured, bound in ((1e9, 16.0), (1e-9, 1 / 16)):
        model = MODEL
        for _ in range(1000):
            model = model.corrected(1.0, measured)
        assert model.scale == bound


def loads(generator: random.Random) -> list[Load]:
    made = []
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        made.append(Load(tokens, 0, 0, 0))
        for _ in range(3):
            made.append(
                Load(tokens, generator.randrange(50_000), generator.randrange(200_000), generator.randrange(64))
            )
    return made


def test_fit_finds_the_model_that_made_the_measurements():
    generator = random.Random(5)
    truth = CostModel(
        points=((1, 0.02), (16, 0.022), (64, 0.04), (256, 0.13), (512, 0.26)),
        per_context_s=4e-7,
        per_pair_s=9e-8,
        per_sample_s=2e-4,
    )
    found = fit([Measurement(load, truth.seconds(load)) for load in loads(generator)])
    for _ in range(100):
        load = Load(generator.choice([1, 4, 16, 40, 64, 256, 700]), generator.randrange(40_000), 5_000, 7)
        assert found.seconds(load) == pytest.approx(truth.seconds(load), rel=0.02)


def test_fit_bears_noise_and_outliers_and_stays_monotone():
    generator = random.Random(6)
    truth = CostModel()
    measured = []
    for load in loads(generator):
        for repeat in range(3):
            slow = 50.0 if repeat == 1 and generator.random() < 0.3 else 1.0
            measured.append(Measurement(load, truth.seconds(load) * generator.uniform(0.95, 1.05) * slow))
    found = fit(measured)
    heights = [seconds for _, seconds in found.points]
    assert heights == sorted(heights) and heights[0] > 0
    assert min(found.per_context_s, found.per_pair_s, found.per_sample_s) >= 0
    for tokens in (1, 20, 100, 500):
        assert found.seconds(Load(tokens, 9000, 9000, 8)) == pytest.approx(
            truth.seconds(Load(tokens, 9000, 9000, 8)), rel=0.15
        )


def test_fit_of_one_row_and_of_none():
    assert fit([Measurement(Load(4), 0.5)]).seconds(Load(4)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no calibration measurements"):
        fit([])


@pytest.mark.parametrize(
    "arguments, seconds",
    [
        ({"queued_tokens": 1000, "tokens_per_s": 500.0}, 2.0),
        ({"queued_tokens": 1000, "tokens_per_s": 0.0}, 0.0),  # nothing known yet
        ({"queued_tokens": 0, "tokens_per_s": 500.0, "queued_rows": 3, "free_seats": 4, "rows_per_s": 2.0}, 0.0),
        ({"queued_tokens": 0, "tokens_per_s": 500.0, "queued_rows": 3, "free_seats": 0, "rows_per_s": 2.0}, 2.0),
        ({"queued_tokens": 5000, "tokens_per_s": 500.0, "queued_rows": 3, "free_seats": 0, "rows_per_s": 2.0}, 10.0),
    ],
)
def test_predicted_wait(arguments, seconds):
    assert predicted_wait(**arguments) == pytest.approx(seconds)
