"""benchmarks/delta.py runs on tiny shapes and writes what its README says; nothing here looks at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nanoadam

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "delta.py"


def results(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(nanoadam.__file__).parents[1])}
    command = [sys.executable, str(PROGRAM), "--model", "tiny", "--device", "cpu", "--repeats", "1", "--json", "-"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("head", ["dense", "selected"])
def test_one_device(head):
    data = results("--head", head, "--density", "0.05")
    rows = {row["what"] for row in data["times"]}
    assert {"hash of every weight", "Recorder: patch of a step", "apply from the device, checked"} <= rows
    assert "switch from one patch to another" in rows
    sizes = data["sizes"]
    assert sizes["file_mb"] < sizes["checkpoint_mb"]
    assert data["machine"]["versions"]["torch"]


def test_two_processes():
    data = results("--sync")
    assert set(data["sync_ms"]) >= {"patch, checked", "patch, unchecked", "full broadcast"}
    assert data["sent_mb"]["patch, checked"] < data["sent_mb"]["full broadcast"]
    assert data["backend"] == "gloo"
