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

# pytest's workers, and the processes that tests start, are many: more threads than cores make all of them slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


# Rooms of an extra that is not installed have nothing to test. noxfile.py runs the rest without each extra in turn.
ROOMS = {
    ("typer", "rich"): ["cli", "comparing", "demo", "finetuning", "paper", "reports", "test_benchmarks.py"],
    ("sklearn", "tomli_w"): ["comparing", "demo", "finetuning", "paper", "reports"],
    ("transformers", "datasets", "accelerate"): [
        "comparing", "finetuning", "paper", "test_groups.py", "test_group_overrides.py", "test_memory.py",
        "test_trainer.py",
    ],
    ("peft",): ["finetuning/test_shira.py", "test_groups.py", "test_group_overrides.py", "test_memory.py"],
}  # fmt: skip
collect_ignore = [
    path
    for packages, paths in ROOMS.items()
    if any(importlib.util.find_spec(package) is None for package in packages)
    for path in paths
]


# Tests that use an extra in a file of tests that do not.
USES = {
    "sklearn": ("test_cli.py::test_demo_", "test_a_missing_extra_is_named_before", "test_a_run_without_the_lab_extra",
                "test_an_unknown_experiment_lists_all"),
    "tomli_w": ("test_launched.py::test_other_ways_to_shard_", "test_launched.py::test_what_does_not_go_with_",
                "test_fuzz.py::test_configs"),
    "transformers": ("test_memory_refuses_a_folder_without_a_config",),
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for package, names in USES.items():
        if importlib.util.find_spec(package) is None:
            for item in items:
                if any(name in item.nodeid for name in names):
                    item.add_marker(pytest.mark.skip(reason=f"needs {package}"))


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
