"""The kernels compile for GPUs, on machines that have none: the interpreter accepts more than the compiler does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "arguments",
    [("90", "--check"), pytest.param(("90",), marks=pytest.mark.slow), pytest.param(("80",), marks=pytest.mark.slow)],
    ids=["for the compiler", "for sm_90", "for sm_80"],
)
def test_every_kernel_compiles(arguments, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("sm_") == 39
