"""What `p.grad` of a selected tensor is, and the hook that makes it."""

from nanoadam.gradients import gather, operations
from nanoadam.gradients.release import GradientRelease
from nanoadam.gradients.tensor import Box, SelectedGradient, gradient_bytes, is_zeroed

__all__ = ["Box", "GradientRelease", "SelectedGradient", "gather", "gradient_bytes", "is_zeroed", "operations"]
