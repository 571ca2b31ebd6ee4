"""Work spread over processes: order, dependencies, and processes that die."""

import os
import time
from pathlib import Path

import pytest

from nanoadam.lab import pool


def leave(item: tuple[str, str, float]) -> str:
    """Writes a file after a while, and says which others were there when it began."""
    folder, name, seconds = item
    seen = ",".join(sorted(path.name for path in Path(folder).iterdir()))
    time.sleep(seconds)
    if name == "dies":
        os._exit(3)
    (Path(folder) / name).touch()
    return seen


def lost(item: tuple[str, str, float], why: str) -> str:
    return why


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_needs_another_begins_after_it(jobs: int, tmp_path: Path) -> None:
    items = [(str(tmp_path), "slow", 0.3), (str(tmp_path), "needs slow", 0.0), (str(tmp_path), "free", 0.0)]
    found = dict(pool.each(leave, items, jobs, lost, after=[None, 0, None]))
    assert sorted(found) == [0, 1, 2]
    assert "slow" in found[1].split(",")


def test_a_process_that_dies_costs_its_item_alone(tmp_path: Path) -> None:
    items = [(str(tmp_path), name, 0.0) for name in ("dies", "one", "two", "three")]
    found = dict(pool.each(leave, items, 2, lost, after=[None, 0, None, None]))
    assert found[0] == "its process ended with code 3"
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "three"}
