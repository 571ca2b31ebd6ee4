"""benchmarks/delta.py runs on tiny shapes and writes what its README says; nothing here looks at a time."""

import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

import nanoadam

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "delta.py"
FEW = ["--model", "tiny", "--device", "cpu", "--repeats", "1", "--json", "-"]


def results(*arguments):
    """In this process: to start one takes longer than what it does here."""
    out, threads = io.StringIO(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(io.StringIO()):
        patch.setattr(sys, "argv", [str(PROGRAM), *FEW, *arguments])
        patch.syspath_prepend(str(PROGRAM.parent))
        try:
            runpy.run_path(str(PROGRAM), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
    return json.loads(out.getvalue())


def results_alone(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(nanoadam.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *FEW, *arguments], capture_output=True, text=True, env=environment, timeout=110
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("head", ["dense", pytest.param("selected", marks=pytest.mark.slow)])
def test_one_device(head):
    data = results("--head", head, "--density", "0.05")
    rows = {row["what"] for row in data["times"]}
    assert {"hash of every weight", "Recorder: patch of a step", "apply from the device, checked"} <= rows
    assert "switch from one patch to another" in rows
    sizes = data["sizes"]
    assert sizes["file_mb"] < sizes["checkpoint_mb"]
    assert data["machine"]["versions"]["torch"]


@pytest.mark.slow
def test_two_processes():
    data = results_alone("--sync")
    assert set(data["sync_ms"]) >= {"patch, checked", "patch, unchecked", "full broadcast"}
    assert data["sent_mb"]["patch, checked"] < data["sent_mb"]["full broadcast"]
    assert data["backend"] == "gloo"
