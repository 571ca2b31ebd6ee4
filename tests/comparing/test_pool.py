"""Work over processes: every item has a result, each its GPU and threads, and a death costs one item."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nanoadam.comparing import pool


def lost(item: object, why: str) -> str:
    return f"{item}: {why}"


def test_every_item_has_its_result_and_one_job_is_this_process() -> None:
    for jobs in (1, 2):
        found = dict(pool.each(os.path.basename, ["a/b", "c/d", "e/f"], jobs, lost))
        assert found == {0: "b", 1: "d", 2: "f"}
    assert {pid for _, pid in pool.each(_own_pid, ["", ""], 1, lost)} == {os.getpid()}
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        list(pool.each(len, ["a"], 0, lost))


def _own_pid(_: str) -> int:
    return os.getpid()


def test_gpus_are_taken_in_turn_and_threads_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert [pool._gpu(i)["CUDA_VISIBLE_DEVICES"] for i in range(5)] == ["5", "7", "5", "7", "5"]
    names = ["CUDA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_NUM_THREADS"]
    seen = dict(pool.each(os.getenv, names, 2, lost))
    assert {seen[0], seen[1]} == {"5", "7"}
    assert seen[2] == seen[3] == str(max(1, (os.cpu_count() or 1) // 2))
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]) == ("5,7", "64")


def test_a_process_that_dies_costs_its_item_only() -> None:
    found = dict(pool.each(os._exit, [3, 4, 5], 2, lost))
    assert found == {i: f"{code}: its process ended with code {code}" for i, code in enumerate((3, 4, 5))}


def test_no_process_outlives_the_work() -> None:
    results = pool.each(os.path.basename, ["a/b", "c/d", "e/f"], 2, lost)
    next(results)
    assert multiprocessing.active_children()
    results.close()
    assert not multiprocessing.active_children()


def test_no_process_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\nfrom pathlib import Path\nfrom nanoadam.comparing import pool\n"
        "def work(name):\n    Path(name).with_suffix('.part').write_text(str(os.getpid()))\n"
        "    os.replace(Path(name).with_suffix('.part'), name)\n    time.sleep(600)\n"
        "if __name__ == '__main__':\n    list(pool.each(work, sys.argv[1:], 2, lambda *_: None))\n"
    )
    files = [tmp_path / "a", tmp_path / "b"]
    parent = subprocess.Popen([sys.executable, str(program), *map(str, files)])
    _until(lambda: all(file.exists() for file in files))
    workers = [int(file.read_text()) for file in files]
    assert all(map(_runs, workers))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _until(lambda: not any(map(_runs, workers)))


def _runs(process: int) -> bool:
    """Also a process that has ended is there until somebody has asked for its code, which nobody may."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False)
    return state.stdout.strip()[:1] not in ("", "Z")


def _until(reached: Callable[[], bool]) -> None:
    for _ in range(1200):
        if reached():
            return
        time.sleep(0.1)
    raise AssertionError("not within two minutes")
