"""Combinations of what a test is parametrized over: some of them in `make test`, all in `make test-all`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def crossed(*axes: Sequence[Any]) -> list[Any]:
    """All combinations as parameters, most of them marked `slow`.

    Those that are not are a Latin square: every value is among them and, of three axes or more, every two values of
    different axes together.
    """
    fewest = min(map(len, axes))
    cases = []
    for case in itertools.product(*map(enumerate, axes)):
        quick = sum(place for place, _ in case) % fewest == 0
        cases.append(pytest.param(*(value for _, value in case), marks=[] if quick else pytest.mark.slow))
    return cases
