"""Finetuning with Adam moments for the smallest weights only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanoadam import memory
    from nanoadam.groups import describe, param_groups
    from nanoadam.optimizer import NanoAdam
    from nanoadam.schedules import constant, cosine, linear, recommended_intervals
    from nanoadam.trainer import for_trainer

__version__ = "0.1.0"

__all__ = [
    "NanoAdam",
    "__version__",
    "constant",
    "cosine",
    "describe",
    "distributed",
    "for_trainer",
    "linear",
    "memory",
    "param_groups",
    "recommended_intervals",
]

# Where each name is from. They are imported when they are used: torch takes seconds, and `nanoadam --help` needs none.
_HOME = {
    "NanoAdam": "optimizer",
    "constant": "schedules",
    "cosine": "schedules",
    "describe": "groups",
    "for_trainer": "trainer",
    "linear": "schedules",
    "param_groups": "groups",
    "recommended_intervals": "schedules",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"nanoadam.{_HOME[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"nanoadam.{name}")
    raise AttributeError(f"module 'nanoadam' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
