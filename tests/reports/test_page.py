"""Pages are whole: no network, no script error, nothing wider than a phone, both colour schemes, charts read aloud."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from browser import browsed
from nanoadam.reports import page
from nanoadam.reports.charts import Chart, Series, bars, draw, heat, label, log_ticks, tick_labels, ticks


@pytest.fixture(scope="module")
def whole() -> str:
    names = ["a class with quite a long name", "another", "third"]
    blocks = [
        page.table([("metric", "at the end", "before training", "always saying the commonest class"), *[
            (name, "0.1234", "0.1234", "0.1234") for name in names]]),
        page.charts([
            draw(Chart("Did the loss fall?", [Series("training", [(i, 1 / (1 + i)) for i in range(100)])])),
            draw(Chart("Which rate?", [Series("a", [(1e-4, 1.0), (1e-3, 0.5), (1e-2, 2.0)])], x="rate", log=True)),
            draw(Chart("Front?", [
                Series("", [(0.1, 1e-3), (0.2, 2e-2), (0.3, float("nan"))], "dots", color=0),
                Series("reached", [(0.1, 1e-1), (0.3, 1e-2)], "reach", labels=["rate 1", "rate 2"], color=0),
                Series("cloud", [(i / 900, 1e-3 + i / 1e3) for i in range(300)], "cloud"),
            ], x="new", y="old", log_y=True)),
            draw(Chart("Neurons?", [Series("arrows", [(1.0, -0.5)], "arrows")], x="x", square=(-1.5, 1.5))),
            heat("Where?", [str(i) for i in range(40)], [("a long name of a tensor", list(map(float, range(40)))),
                                                         ("other", [None, *[0.5] * 39])], "layer"),
            bars("Memory?", [("own", {"weights": 1e9, "state": 2e8}), ("AdamW", {"weights": 1e9, "state": 2e9})]),
        ]),
        page.section("Classes", page.confusion(names, [[10, 2, 0], [3, 7, 1], [0, 0, 5]])),
        page.section("Examples", page.table([("row", "right"), ("word " * 60, "x" * 80)], words=True)),
        page.section("Setup", page.setup({"settings": {"learning_rate": float("nan")}, "versions": {"torch": "2"}})),
    ]  # fmt: skip
    return page.whole("a <title> & more", "The verdict.", blocks, ["A note."], "What was done.")


def test_a_page_needs_no_other_file_and_is_well_formed(whole: str) -> None:
    assert not re.search(r"(src|href)=|@import|url\(|https?://(?!www\.w3\.org)", whole)
    assert "a &lt;title&gt; &amp; more" in whole
    for drawing in re.findall(r"<svg.*?</svg>", whole, flags=re.DOTALL):
        ElementTree.fromstring(drawing)
    assert "prefers-color-scheme: dark" in whole and "@media print" in whole


def test_the_verdict_comes_first_and_the_setup_last(whole: str) -> None:
    order = [
        whole.index(text) for text in ("The verdict.", "A note.", "<table", "Did the loss fall?", "How it was run")
    ]
    assert order == sorted(order)
    assert "<details><summary>How it was run</summary>" in whole


def test_nothing_is_wider_than_a_phone_and_values_show_on_hover(whole: str, tmp_path: Path) -> None:
    found = browsed(whole, tmp_path)
    assert found["inner"] == 390
    assert int(str(found["wide"])) <= 390
    assert re.fullmatch(r"step [45]\dtraining: 0\.0[12]\d*", str(found["tip"])), found["tip"]


def test_it_is_dark_where_the_reader_wants_it_dark(whole: str, tmp_path: Path) -> None:
    light, dark = (browsed(whole, tmp_path, f"--blink-settings=preferredColorScheme={n}") for n in (1, 0))
    assert light["back"] == "rgb(255, 255, 255)"
    assert dark["back"] == "rgb(20, 23, 29)"
    assert light["text"] != dark["text"]


def test_a_chart_is_told_to_those_who_do_not_see_it() -> None:
    drawn = draw(Chart("Did it?", [Series("loss", [(1, 0.7), (200, 0.25)]), Series("level", [(0, 0.5)], "level")]))
    assert 'aria-label="Did it? loss: 0.7 at step 1, 0.25 at step 200; level: 0.5."' in drawn
    assert 'role="img"' in drawn
    told = bars("Where?", [("own", {"weights": 1e9}), ("AdamW", {"weights": 1e9, "state": 2e9})])
    assert "own: weights 1 GB;AdamW: weights 1 GB, state 2 GB" in told


def test_series_that_belong_together_have_one_colour_and_points_say_what_they_are() -> None:
    drawn = draw(Chart("?", [
        Series("", [(1, 1.0), (2, 2.0)], "dots", color=3),
        Series("reached", [(1, 2.0), (2, 1.0)], "reach", labels=["rate 1", "rate 2"], color=3),
    ]))  # fmt: skip
    assert "c3" in drawn and "c0" not in drawn and drawn.count("<li>") == 1
    assert "rate 2" in drawn
    across, down = re.search(r'<path class="c3" d="M[\d.]+ ([\d.]+)V([\d.]+)L', drawn).groups()
    assert float(down) > float(across)  # first down to what is reached there, then across


def test_where_an_axis_is_logarithmic_what_is_not_positive_is_left_out() -> None:
    drawn = draw(Chart("?", [Series("a", [(0.0, 1.0), (1.0, 0.0), (2.0, 1e-4), (3.0, 1.0)])], log=True, log_y=True))
    assert drawn.count("<circle") == 2
    assert log_ticks(0.02, 5) == [0.1, 1.0] or len(log_ticks(0.02, 5)) > 2
    assert log_ticks(1.2, 8) == [2.0, 5.0]


def test_a_heat_map_is_told_and_leaves_gaps() -> None:
    drawn = heat("Where?", ["1", "2"], [("one", [0.0, 1.0]), ("two", [None, 3.0])], "layer")
    assert drawn.count("<rect") == 3
    assert 'aria-label="Where? 2 rows, 2 columns, from 0 to 3."' in drawn
    assert "<title>two, layer 2: 3</title>" in drawn
    assert heat("Where?", ["1"], [("one", [None])]) == ""


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.99, 1.01), (-3, 7), (1e-9, 5e-9), (12_345, 12_346), (5, 5)])
def test_ticks_are_round_few_and_around_the_values(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high
    assert 2 <= len(marks) <= 8
    labels = tick_labels(marks)
    assert len(set(labels)) == len(labels)


def test_steps_are_whole_numbers() -> None:
    assert all(mark == int(mark) for mark in ticks(1, 3, whole=True))
    assert [label(x) for x in (1_604, 0.25, 1e-5)] == ["1,604", "0.25", "1e-5"]


def test_what_is_not_finite_is_left_out() -> None:
    nan = float("nan")
    assert draw(Chart("?", [Series("loss", [(1, nan), (2, None)])])) == ""
    assert "NaN" not in draw(Chart("?", [Series("loss", [(1, 1.0), (2, nan), (3, 2.0)])]))
    assert bars("?", [("a", {"x": 0.0})]) == ""
