"""Fronts and the areas under them, on cases computed by hand."""

import math
import re

import pytest

from nanoadam.comparing import fronts


def test_only_points_that_nothing_beats_are_on_the_front() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 3.0), (1.5, 3.5), (3.0, 1.0), (3.0, 1.0)]
    assert fronts.pareto(points) == [(1.0, 5.0), (2.0, 4.0), (3.0, 1.0)]


def test_a_run_that_diverged_is_on_no_front() -> None:
    assert fronts.pareto([(math.nan, 9.0), (9.0, math.inf), (1.0, 1.0)]) == [(1.0, 1.0)]
    assert fronts.pareto([]) == []


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(3.0, 2.0)], 6.0),
        ([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)], 6.0),  # columns of 3, 2 and 1
        ([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (1.5, 1.5), (0.5, 3.0)], 6.0),  # the last two are beaten
        ([(-1.0, 3.0), (3.0, -1.0)], 0.0),  # neither beats the reference in both
        ([], 0.0),
    ],
)
def test_area_of_a_staircase(points: list[tuple[float, float]], expected: float) -> None:
    assert fronts.area(points, (0.0, 0.0)) == pytest.approx(expected)
    moved = [(x + 10, y - 5) for x, y in points]
    assert fronts.area(moved, (10.0, -5.0)) == pytest.approx(expected)


def test_what_is_left_at_a_level_is_the_best_of_what_reaches_it() -> None:
    points = [(0.8, 0.9), (0.9, 0.5), (0.95, 0.6), (0.99, 0.1)]
    assert fronts.at_least(points, 0.9) == 0.6
    assert fronts.at_least(points, 0.96) == 0.1
    assert fronts.at_least(points, 1.0) is None


def test_one_row_for_each_method_with_means_and_areas() -> None:
    runs = [
        {"m": "a", "lr": 1, "seed": 0, "new": 0.2, "old": 0.8},
        {"m": "a", "lr": 1, "seed": 1, "new": 0.4, "old": 0.6},
        {"m": "a", "lr": 2, "seed": 0, "new": 0.6, "old": 0.5},
        {"m": "a", "lr": 2, "seed": 1, "new": 0.8, "old": None},
        {"m": "b", "lr": 1, "seed": 0, "new": 0.5, "old": 0.5},
    ]
    a, b = fronts.table(runs, ("new", "old"), (0.0, 0.0), lambda r: r["m"], lambda r: r["lr"])
    assert [(p["setting"], p["seeds"]) for p in a["points"]] == [(1, 2), (2, 2)]
    assert a["front"] == [a["points"][0]]  # the other diverged with one seed
    assert (a["front"][0]["x"], a["front"][0]["y"]) == pytest.approx((0.3, 0.7))
    assert a["area"] == pytest.approx(0.21)
    first, second = 0.2 * 0.8 + 0.4 * 0.5, 0.4 * 0.6
    assert a["area_mean"] == pytest.approx((first + second) / 2)
    assert a["area_std"] == pytest.approx(abs(first - second) / math.sqrt(2))
    assert (b["method"], b["seeds"], b["area_std"]) == ("b", 1, None)
    assert b["area"] == b["area_mean"] == pytest.approx(0.25)


def test_the_chart_shows_every_front() -> None:
    runs = [{"seed": 0, "m": m, "x": x, "y": 1 - x} for m in ("one", "two") for x in (0.1, 0.5)]
    rows = fronts.table(runs, ("x", "y"), (0.0, 0.0), lambda r: r["m"], lambda r: r["x"])
    drawn = fronts.chart(rows, ("new", "old"), "a title")
    assert re.findall(r"</i>([^<]*)</li>", drawn) == ["one (0.290)", "two (0.290)"]
    assert drawn.count('class="c0"') > 2 and drawn.count('class="c1"') > 2 and 'class="c2"' not in drawn
