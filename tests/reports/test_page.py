"""Pages are whole: no network, no script error, nothing wider than a phone, both colour schemes, charts read aloud."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from browser import browsed
from nanoadam.reports import page
from nanoadam.reports.charts import Chart, Series, bars, draw, label, tick_labels, ticks


@pytest.fixture(scope="module")
def whole() -> str:
    names = ["a class with quite a long name", "another", "third"]
    blocks = [
        page.table([("metric", "at the end", "before training", "always saying the commonest class"), *[
            (name, "0.1234", "0.1234", "0.1234") for name in names]]),
        page.charts([
            draw(Chart("Did the loss fall?", [Series("training", [(i, 1 / (1 + i)) for i in range(100)])])),
            draw(Chart("Which rate?", [Series("a", [(1e-4, 1.0), (1e-3, 0.5), (1e-2, 2.0)])], x="rate", log=True)),
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


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.99, 1.01), (-3, 7), (1e-9, 5e-9), (12_345, 12_346), (5, 5)])
def test_ticks_are_round_few_and_around_the_values(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high
    assert 2 <= len(marks) <= 8
    labels = tick_labels(marks)
    assert len(set(labels)) == len(labels)


def test_steps_are_whole_numbers() -> None:
    assert all(mark == int(mark) for mark in ticks(1, 3, whole=True))
    assert [label(x) for x in (1_604, 0.25, 1e-5)] == ["1,604", "0.25", "1e-05"]


def test_what_is_not_finite_is_left_out() -> None:
    nan = float("nan")
    assert draw(Chart("?", [Series("loss", [(1, nan), (2, None)])])) == ""
    assert "NaN" not in draw(Chart("?", [Series("loss", [(1, 1.0), (2, nan), (3, 2.0)])]))
    assert bars("?", [("a", {"x": 0.0})]) == ""
