"""`nanoadam finetune` by several processes: one run, as one process would make it, that any number of them resume."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_checkpoints import folder_for

import processes
import tiny

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

from transformers import TrainerCallback

from nanoadam.comparing import compare
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning import sharing
from nanoadam.finetuning.config import Config

pytestmark = [
    pytest.mark.timeout(400),  # the first one waits for several processes
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]


class StoppedError(Exception):
    pass


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise StoppedError


def config(root, **keys):
    """The last batch of an epoch has one row: one process has none of it."""
    base = {
        "model": str(root / "bert"), "train": str(root / "train.jsonl"), "validation": str(root / "dev.jsonl"),
        "batch_size": 5, "accumulate": 2, "max_grad_norm": 0.1, "epochs": 2.0, "log_every": 1, "save_every": 5,
        "learning_rate": 1e-3, "density": 0.25, "mask_interval": 3, "state_dtype": "float32", "device": "cpu",
        "eval_batch_size": 4, "samples": 2,
    }  # fmt: skip
    return Config(**{**base, **keys})


WHOLE = {"density": 1.0}  # shards cut chunks of small matrices, and what is selected of a part is another choice


def material(root):
    tiny.bert(dropout=0.0).bert.save_pretrained(root / "bert")
    tiny.tokenizer().save_pretrained(root / "bert")
    tiny.jsonl(root / "train.jsonl", tiny.sentences(36))
    tiny.jsonl(root / "dev.jsonl", tiny.sentences(9, first=36))


def comparison(root, **keys):
    """Replicas, a run that diverges, and a variant that several processes refuse."""
    sections = {
        "adamw": {"optimizer": "adamw", "learning_rates": [1e-3]},
        "nano": {"learning_rates": [1e-3, 1e35]},
        "sharded": {"optimizer": "lora", "shard": True, "learning_rates": [1e-3]},
    }
    own = config(root, epochs=1.0, save_model=False, **keys)
    return compare.Comparison(own, compare.variants(None, [1e-3], sections), seeds=(0,))


def compared(root, out):
    """Stopped after the first run, and gone on with."""

    def stop(what, done, total):
        if done == 1 and total == 4:
            raise StoppedError

    with contextlib.suppress(StoppedError):
        compare.run(comparison(root), out, stop, keep="best")
    return compare.resume(out)


def on_two(rank, size):
    root = Path(folder_for(rank, "launch"))
    if rank == 0:
        material(root)
    dist.barrier()
    results = finetune.run(config(root), root / "replicas")
    with contextlib.suppress(StoppedError):
        finetune.run(config(root, shard=True, **WHOLE), root / "stopped", watch=lambda _: Stop())
    dist.barrier()
    if rank == 0:
        shutil.copytree(root / "stopped", root / "by-replicas")
    dist.barrier()
    finetune.resume(root / "by-replicas", keys={"shard": False})
    try:
        finetune.run(config(root, learning_rate=1e35), root / "diverged")
    except finetune.Diverged as error:
        said = str(error)
    try:
        finetune.run(config(root, batch_size=1), root / "small")
    except ValueError as error:
        small = str(error)
    table = compared(root, root / "compared")
    try:
        compare.run(comparison(root), root / "jobs", jobs=2)
    except ValueError as error:
        small += str(error)
    return root, results, said, small, table


@pytest.fixture(scope="module")
def one(two):
    root = two[0][0]
    finetune.run(config(root), root / "one")
    finetune.run(config(root, **WHOLE), root / "one-whole")
    shutil.copytree(root / "stopped", root / "by-one")
    finetune.resume(root / "by-one")
    return root


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("metrics") or {key: line[key] for key in ("loss", "grad_norm")}) for line in found]


def assert_alike(folder, other):
    from safetensors.torch import load_file

    assert [step for step, _ in lines(folder)] == [step for step, _ in lines(other)]
    for (_, ours), (_, theirs) in zip(lines(folder), lines(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    ours, theirs = (load_file(each / "model" / "model.safetensors") for each in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


def test_two_processes_make_the_run_of_one(two, one):
    root = two[0][0]
    assert_alike(root / "replicas", root / "one")
    names = sorted(path.name for path in (root / "one").iterdir())
    assert sorted(path.name for path in (root / "replicas").iterdir()) == names
    assert two[0][1] == two[1][1]
    manifest = json.loads((root / "replicas" / "manifest.json").read_text())
    assert manifest["hardware"]["processes"] == 2
    details = [json.loads((root / name / "manifest.json").read_text())["details"] for name in ("replicas", "one")]
    assert [[row["text"] for row in each["samples"]] for each in details] == [
        [row["text"] for row in details[0]["samples"]]
    ] * 2


def test_shards_go_on_as_replicas_and_as_one_process(one):
    assert_alike(one / "by-replicas", one / "one-whole")
    assert_alike(one / "by-one", one / "one-whole")


def test_all_processes_say_the_same_of_a_run_that_cannot_go_on(two):
    assert two[0][2] == two[1][2]
    assert "at step" in two[0][2]
    assert "batch_size 1 cannot be shared out among 2 processes" in two[1][3]


def test_a_comparison_by_two_processes_is_that_by_one(two, tmp_path):
    root, *_, table = two[0]
    alone = compared(root, tmp_path / "alone")
    assert two[1][-1] == table
    for ours, theirs in zip(table["runs"][:3], alone["runs"][:3], strict=True):  # one process shards nothing
        for key in ("variant", "learning_rate", "stopped", "failed", "steps"):
            assert ours.get(key) == theirs.get(key)
        assert ours["metric"] == (theirs["metric"] and pytest.approx(theirs["metric"], rel=1e-4))
    assert [run["metric"] is None for run in table["runs"]] == [False, False, True, True]
    assert "at step" in table["runs"][2]["stopped"]
    assert table["runs"][3]["failed"]
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert sorted(path.name for path in (root / "compared").iterdir()) == names
    assert (root / "compared" / "runs" / table["kept"] / "model").is_dir()
    assert "leave out --jobs" in two[1][3]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_parts_are_the_batch(count):
    for size in range(1, 10):
        rows = list(range(10, 10 + size))
        parts = [sharing.part_of(rows, rank, count) for rank in range(count)]
        assert [row for part in parts for row in part if row >= 0] == rows
        assert all(part for part in parts)


def started(*arguments):
    """The command under torchrun, with two processes."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(processes._free_port()),
    ]
    return subprocess.Popen(
        [*launcher, "-m", "nanoadam", "finetune", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_bad_input_is_one_sentence(tmp_path):
    process = started("--model", "nothing", "--train", str(tmp_path / "none.csv"), "--out", str(tmp_path / "out"))
    out, said = process.communicate(timeout=200)
    assert process.returncode != 0
    assert out == ""
    assert [line for line in said.splitlines() if line.startswith("nanoadam: ")] == [
        f"nanoadam: there is no file {tmp_path / 'none.csv'}"
    ]
    assert "exitcode  : 2" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_one_goes_on(tmp_path):
    psutil = pytest.importorskip("psutil")  # comes with accelerate
    material(tmp_path)
    arguments = config(tmp_path, epochs=60.0)
    (tmp_path / "config.toml").write_text(arguments.to_toml())
    process = started(str(tmp_path / "config.toml"), "--out", str(tmp_path / "out"))
    deadline = time.monotonic() + 200
    while not list((tmp_path / "out" / "checkpoints").glob("checkpoint-*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (second,) = [
        child.pid for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"
    ]  # fmt: skip
    os.kill(second, signal.SIGKILL)
    _, said = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "SIGKILL" in said
    results = finetune.resume(tmp_path / "out")
    assert results["steps"] == json.loads((tmp_path / "out" / "manifest.json").read_text())["results"]["steps"] == 240
