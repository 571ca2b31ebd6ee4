"""Density over steps, and the intervals of the paper's table 13."""

import pytest

from nanoadam.schedules import Schedule, constant, cosine, linear, recommended_intervals


def test_linear_falls_from_start_to_end_in_steps_of_the_interval():
    schedule = linear(0.10, 0.04, total_steps=1000, interval=100)
    assert schedule(0) == 0.10
    assert schedule(99) == 0.10
    assert schedule(100) == pytest.approx(0.094)
    assert schedule(950) == pytest.approx(0.046)
    assert schedule(1000) == schedule(10**6) == 0.04


def test_an_interval_longer_than_the_run_switches_the_schedule_off():
    schedule = linear(0.10, 0.04, total_steps=100, interval=101)
    assert {schedule(t) for t in range(0, 5000, 7)} == {0.10}


def test_cosine_is_half_way_at_half_time_and_flat_at_both_ends():
    schedule = cosine(0.2, 0.1, total_steps=1000, interval=1)
    assert schedule(500) == pytest.approx(0.15)
    assert schedule(0) - schedule(10) < 1e-4
    assert schedule(1000) == 0.1
    assert all(schedule(t) >= schedule(t + 1) for t in range(1000))


def test_constant_never_changes():
    assert {constant(0.01)(t) for t in (0, 1, 10**9)} == {0.01}


# Steps per epoch at batch 32 of the training sets, and table 13's intervals where the rule gives both.
@pytest.mark.parametrize(
    ("examples", "mask", "density"), [(8551, 6, 33), (67349, 52, 263), (104743, 81, 409), (392702, 306, 1533)]
)
def test_recommended_intervals_are_table_13s(examples, mask, density):
    assert recommended_intervals(examples // 32) == (mask, density)


def test_recommended_intervals_of_a_tiny_epoch_are_at_least_one():
    assert recommended_intervals(1) == (1, 1)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: linear(0.0, 0.1, total_steps=1, interval=1), "start"),
        (lambda: linear(0.1, 1.5, total_steps=1, interval=1), "1.5"),
        (lambda: linear(0.1, 0.1, total_steps=0, interval=1), "total_steps"),
        (lambda: cosine(0.1, 0.1, total_steps=10, interval=2.5), "interval"),
        (lambda: Schedule("step", 0.1, 0.1, 1, 1), "linear"),
        (lambda: recommended_intervals(0), "steps_per_epoch"),
    ],
)
def test_what_makes_no_sense_is_refused(call, word):
    with pytest.raises(ValueError, match=word):
        call()
