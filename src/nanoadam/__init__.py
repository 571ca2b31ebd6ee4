"""Finetuning with Adam moments for the smallest weights only."""

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
    "for_trainer",
    "linear",
    "memory",
    "param_groups",
    "recommended_intervals",
]
