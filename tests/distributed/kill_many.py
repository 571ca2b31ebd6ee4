"""Kill one of two processes with -9 at any moment, many times: all end with an error, and the last checkpoint resumes.

python tests/distributed/kill_many.py --times 50
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples"))
SIZE, PATIENCE = 2, 60.0  # processes; seconds until all of them have to have ended


def work(folder: Path, steps: int) -> None:
    """Train shards, and save at every second step, so that most kills hit a saving."""
    import datetime

    import distributed_loop as example
    import torch.distributed as dist

    example.EVERY = 2
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    loss = example.train(True, folder, steps)
    print(f"loss {loss:.4f} after {steps} steps", flush=True)
    dist.destroy_process_group()


def start(folder: Path, steps: int, size: int, port: int) -> list[subprocess.Popen]:
    command = [sys.executable, __file__, "--folder", str(folder), "--steps", str(steps)]
    fixed = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **fixed, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]


def ends(processes: list[subprocess.Popen]) -> list[str]:
    """What each has said; raises TimeoutExpired for one that hangs."""
    limit = time.monotonic() + PATIENCE
    return [process.communicate(timeout=max(0.1, limit - time.monotonic()))[0] for process in processes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--steps", type=int)
    given = parser.parse_args()
    if given.folder is not None:
        work(given.folder, given.steps)
        return
    import distributed_loop as example

    random.seed(0)
    folder = Path(tempfile.mkdtemp())
    for turn in range(given.times):
        processes = start(folder, 10**6, SIZE, 20000 + 7 * turn + os.getpid() % 1000)
        before = example.last_checkpoint(folder)
        while example.last_checkpoint(folder) == before and all(each.poll() is None for each in processes):
            time.sleep(0.02)  # it has resumed, trained and saved
        time.sleep(random.random())
        processes[turn % SIZE].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        said = ends(processes)
        codes = [each.returncode for each in processes]
        if not all(codes):
            raise SystemExit(f"turn {turn}: codes {codes}\n{said}")
        _, step = example.last_checkpoint(folder)
        others = next(text for i, text in enumerate(said) if i != turn % SIZE).strip().splitlines()
        print(
            f"{turn + 1:3d}: all ended {time.monotonic() - killed:4.1f} s after it, at step {step}: {others[-1][:90]}",
            flush=True,
        )
    _, step = example.last_checkpoint(folder)
    for size in (SIZE, 1):
        processes = start(folder, step + 2 * (size == 1) + 2, size, 19000 + size)
        print(f"resumed by {size}: {ends(processes)[0].strip()}")
        if any(each.returncode for each in processes):
            raise SystemExit("the last checkpoint does not resume")


if __name__ == "__main__":
    main()
