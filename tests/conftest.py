"""Settings that every test shares."""

import importlib
import importlib.util
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined

# Timing is nobody's claim here: a slow machine must not fail a test.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "default")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker is a process of its own; more threads than cores make all of them slow.
    torch.set_num_threads(1)


# Rooms of an extra that is not installed have nothing to test. noxfile.py runs the rest without each extra in turn.
ROOMS = {
    ("typer", "rich"): ["cli", "comparing", "demo", "finetuning", "paper", "reports", "test_benchmarks.py"],
    ("sklearn", "matplotlib", "tomli_w"): ["comparing", "demo", "finetuning", "paper", "reports"],
    ("transformers", "datasets", "accelerate", "scipy", "tqdm", "PIL", "filelock"): [
        "comparing", "finetuning", "paper", "test_groups.py", "test_memory.py", "test_trainer.py",
    ],
    ("peft",): ["finetuning/test_shira.py", "test_groups.py", "test_memory.py"],
}  # fmt: skip
collect_ignore = [
    path
    for packages, paths in ROOMS.items()
    if any(importlib.util.find_spec(package) is None for package in packages)
    for path in paths
]


@pytest.fixture
def device() -> torch.device:
    """Where tensors of backend tests live: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation of the operations in turn, forced; kernels run in Triton's interpreter without a GPU."""
    if request.param == "triton":
        pytest.importorskip("nanoadam.ops.triton", exc_type=ImportError)
    monkeypatch.setenv("NANOADAM_BACKEND", request.param)
    return str(request.param)


@pytest.fixture
def ops(backend: str):
    """The module of that implementation."""
    return importlib.import_module(f"nanoadam.ops.{backend}")
