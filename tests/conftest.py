"""Settings that every test shares."""

import os

import torch
from hypothesis import HealthCheck, settings

# Timing is nobody's claim here: a slow machine must not fail a test.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "default")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker is a process of its own; more threads than cores make all of them slow.
    torch.set_num_threads(1)
