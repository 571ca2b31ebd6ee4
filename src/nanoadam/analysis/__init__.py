"""Where gradients fall and what finetuning moved: measures of Zhou et al. 2025 (arXiv 2506.21374).

Everything goes over one tensor at a time, and over a tensor in pieces: a pair of 7B checkpoints takes no more memory
than the two largest tensors of it. Needs torch and safetensors only.
"""

from nanoadam.analysis.checkpoints import Checkpoint, Pair, changes, heatmap, match, place
from nanoadam.analysis.gradients import GradientRecorder, measure_gradients
from nanoadam.analysis.measures import (
    Shift,
    effective_learning_rate,
    independent_ratio,
    overlap,
    ratio,
    relation,
    scatter,
    shift,
)

__all__ = [
    "Checkpoint",
    "GradientRecorder",
    "Pair",
    "Shift",
    "changes",
    "effective_learning_rate",
    "heatmap",
    "independent_ratio",
    "match",
    "measure_gradients",
    "overlap",
    "place",
    "ratio",
    "relation",
    "scatter",
    "shift",
]
