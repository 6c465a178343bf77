"""The learning rate at the corners of every schedule."""

import math
from dataclasses import replace

import pytest
from small_runs import config_of

from minigpt.config import TrainingConfig
from minigpt.training.schedule import lr_scale, momentum, progress, with_max_steps

BASE = TrainingConfig(
    max_steps=1000, warmup_fraction=0.1, decay_fraction=0.5, final_lr_fraction=0.2
)


def scale(schedule: str, at: float, **changes: float) -> float:
    return lr_scale(replace(BASE, schedule=schedule, **changes), at)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear", "constant"])
def test_every_schedule_warms_up_linearly_from_a_tenth(schedule: str) -> None:
    assert scale(schedule, 0) == pytest.approx(0.1)
    assert scale(schedule, 0.05) == pytest.approx(0.55)
    assert scale(schedule, 0.1) == pytest.approx(1)
    assert scale(schedule, 0.1 - 1e-9) == pytest.approx(1)
    assert scale(schedule, 0, warmup_fraction=0.0) == pytest.approx(1)


@pytest.mark.parametrize(
    ("schedule", "corners"),
    [
        ("wsd", {0.3: 1, 0.5: 1, 0.75: 0.2 + 0.8 / 2, 0.9: 0.2 + 0.8 / 5, 1: 0.2}),
        ("linear", {0.55: 0.6, 0.325: 0.8, 1: 0.2}),
        (
            "cosine",
            {0.55: 0.6, 0.325: 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2, 1: 0.2},
        ),
        ("constant", {0.3: 1, 1: 1}),
    ],
)
def test_schedules_have_their_expected_values_at_the_corners(
    schedule: str, corners: dict[float, float]
) -> None:
    for at, value in corners.items():
        assert scale(schedule, at) == pytest.approx(value), at


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear"])
def test_schedules_end_at_zero_by_default(schedule: str) -> None:
    assert lr_scale(TrainingConfig(max_steps=10, schedule=schedule), 1.0) == pytest.approx(0)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_schedules_stay_between_zero_and_the_peak_for_any_fractions(
    schedule: str, warmup: float, decay: float
) -> None:
    values = [
        scale(schedule, i / 200, warmup_fraction=warmup, decay_fraction=decay) for i in range(201)
    ]
    assert all(0 <= value <= 1 + 1e-12 for value in values)
    after = values[math.ceil(warmup * 200) :]
    assert after == sorted(after, reverse=True)


def test_with_max_steps_progress_depends_only_on_the_step() -> None:
    assert [progress(BASE, step, elapsed) for step in (0, 250, 1000) for elapsed in (0, 1e9)] == [
        0,
        0,
        0.25,
        0.25,
        1,
        1,
    ]


def test_with_max_minutes_progress_is_the_fraction_of_the_time() -> None:
    config = TrainingConfig(max_minutes=2)
    assert [progress(config, 10**9, s) for s in (0, 30, 119, 120, 500)] == pytest.approx(
        [0, 0.25, 119 / 120, 1, 1]
    )


def test_with_both_limits_progress_follows_the_first_to_be_reached() -> None:
    config = TrainingConfig(max_steps=100, max_minutes=1)
    assert progress(config, 50, 6) == 0.5
    assert progress(config, 10, 45) == 0.75


@pytest.mark.parametrize("epochs", [0.01, 0.5, 1, 2, 3.7])
@pytest.mark.parametrize("n_tokens", [1000, 1024, 12_345])
def test_an_epoch_has_enough_steps_to_see_every_token_once(epochs: float, n_tokens: int) -> None:
    config = config_of(max_steps=0, max_epochs=epochs, batch_size=4, context_warmup_length=4)
    n_seen = n_steps = 0
    while n_seen < epochs * n_tokens:
        n_seen += 4 * 16
        n_steps += 1
    assert with_max_steps(config, n_tokens).training.max_steps == n_steps


def test_the_lower_of_max_steps_and_max_epochs_applies() -> None:
    for max_steps, expected in ((5, 5), (50, 16)):
        config = config_of(max_steps=max_steps, max_epochs=1.0, batch_size=4)
        resolved = with_max_steps(config, 1000)
        assert resolved.training.max_steps == expected
        assert with_max_steps(resolved, 1000) == resolved, "resuming must not change the limit"
    plain = config_of(max_steps=5)
    assert with_max_steps(plain, 1000) == plain


def test_the_momentum_rises_linearly_from_seven_tenths() -> None:
    config = replace(BASE, momentum=0.9, momentum_warmup_steps=100)
    expected = [0.7, 0.75, 0.9, 0.9]
    assert [momentum(config, step) for step in (0, 25, 100, 999)] == pytest.approx(expected)
    assert momentum(replace(config, momentum_warmup_steps=0), 0) == 0.9
    assert momentum(replace(config, momentum=0.5), 50) == 0.5
