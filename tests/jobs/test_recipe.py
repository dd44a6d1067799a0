"""What auto means, which rows make which step, schedules and names."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from tandem.jobs import recipe
from tandem.jobs.records import Job, TandemExtras


def job(**more):
    hyperparameters = dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier"), "auto")
    return Job(
        job_id="ftjob-abcdefghij", created_at=0, status="validating_files", model="demo", base_model="demo",
        training_file="file-1", seed=1, hyperparameters=hyperparameters | more.pop("hyperparameters", {}),
        tandem=TandemExtras(**more),
    )  # fmt: skip


@pytest.mark.parametrize(
    "num_rows, epochs, batch",
    [(1, 25, 1), (3, 25, 3), (10, 25, 4), (40, 10, 4), (133, 3, 4), (200, 3, 4), (1000, 3, 20), (10**6, 3, 32)],
)
def test_auto(num_rows, epochs, batch):
    found = recipe.resolve(job(), num_rows, 2048)
    assert found.hyperparameters == {"n_epochs": epochs, "batch_size": batch, "learning_rate_multiplier": 1.0}
    assert found.tandem.learning_rate == 2e-4 and found.total_steps == epochs * math.ceil(num_rows / batch)


def test_what_was_asked_for_is_kept_and_the_rate_is_multiplied():
    asked = {"n_epochs": 7, "batch_size": 64, "learning_rate_multiplier": 0.5}
    found = recipe.resolve(job(hyperparameters=asked, learning_rate=1e-3), 10, 2048)
    assert found.hyperparameters == asked | {"batch_size": 10}  # not more than there are rows
    assert recipe.recipe(found, 10).peak == 5e-4
    assert recipe.resolve(found, 10, 2048) == found  # a second check changes nothing
    assert recipe.resolve(job(), 10, 512).tandem.learning_rate == pytest.approx(4e-4)


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 20), st.integers(0, 2**31))
def test_every_epoch_has_every_row_once(num_rows, n_epochs, batch_size, seed):
    plan = recipe.Recipe(num_rows, n_epochs, batch_size, 1e-3, "linear", 0, seed)
    rows = [plan.batch(step) for step in range(plan.total_steps)]
    assert all(1 <= len(batch) <= batch_size for batch in rows)
    ends = [step for step in range(plan.total_steps) if plan.is_epoch_end(step)]
    assert len(ends) == n_epochs and ends[-1] == plan.total_steps - 1
    for epoch in range(n_epochs):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        assert sorted(row for step in steps for row in rows[step]) == list(range(num_rows))
    # In any order, as after a resume.
    assert [plan.batch(step) for step in reversed(range(plan.total_steps))] == rows[::-1]


@pytest.mark.parametrize(
    "schedule, oracle", [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_against_transformers(schedule, oracle, warmup):
    plan = recipe.Recipe(20, 2, 1, 1e-3, schedule, warmup, 0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = oracle(optimizer, warmup, 40)
    for step in range(40):
        if step >= warmup:
            assert plan.learning_rate(step) == pytest.approx(scheduler.get_last_lr()[0])
        else:  # theirs begins with a step at rate 0, which learns nothing
            assert 0 < plan.learning_rate(step) < 1e-3
        optimizer.step()
        scheduler.step()


def test_constant_and_a_warm_up_longer_than_the_job():
    assert {recipe.Recipe(9, 1, 1, 1e-3, "constant", 0, 0).learning_rate(step) for step in range(9)} == {1e-3}
    long = recipe.Recipe(4, 1, 1, 1e-3, "linear", 100, 0)
    assert [long.learning_rate(step) for step in range(4)] == pytest.approx([1e-3 * n / 101 for n in range(1, 5)])


@pytest.mark.parametrize(
    "base, plain",
    [
        ("demo", "demo"),
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("/models/My Model/", "My-Model"),
        ("a:b", "a-b"),
        ("//", "model"),
    ],
)
def test_names(base, plain):
    name = recipe.model_name(base, "acme", "sfx", "ftjob-AbCdEfGh12345")
    assert name == f"ft:{plain}:acme:sfx:AbCdEfGh"
    assert recipe.model_name(base, "acme", None, "ftjob-AbCdEfGh12345") == f"ft:{plain}:acme::AbCdEfGh"
    assert recipe.checkpoint_name(name, 12) == name + ":ckpt-step-12"
