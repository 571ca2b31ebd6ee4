"""examples/distributed_loop.py: replicas and shards end where one process ends, and resume with another number."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_checkpoints import folder_for

import nanoadam

pytestmark = pytest.mark.timeout(400)  # the first one waits for several processes
sys.path.append(str(Path(__file__).parents[2] / "examples"))


def on_two(rank, size):
    import distributed_loop as example

    folder = Path(folder_for(rank, "example"))
    straight = [example.train(shard, None) for shard in (False, True)]
    example.train(True, folder, steps=45)  # stops after the second checkpoint
    if rank == 0:
        shutil.copytree(folder, f"{folder}-of-two")
        (folder / "60").mkdir()  # one that was not finished
    dist.barrier()
    return straight, example.train(True, folder), f"{folder}-of-two", document(rank, folder)


def document(rank, folder):
    """Run the code of docs/distributed.md; how many blocks."""
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    inputs = torch.randn(3, 2, 4, 32, generator=torch.Generator().manual_seed(rank)).unbind()
    for i, block in enumerate(blocks):
        if i < 3:  # the last one goes on with the shards of the one before
            model = example_model()
            names = {"model": model, "layers": [model[0], model[2]], "batches": inputs, "folder": f"{folder}-document"}
            names |= {"nanoadam": nanoadam, "torch": torch}
        exec(block, names)
        names["model"](inputs[0][0]).mean().backward()
        names["optimizer"].step()
    return len(blocks)


def example_model():
    import distributed_loop as example

    return example.make_model()


@pytest.fixture(scope="module")
def one(two):
    import distributed_loop as example

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        folder = Path(two[0][2])
        found = example.last_checkpoint(folder)
        return example.train(False, None), example.train(True, folder), found[1]
    finally:
        dist.destroy_process_group()


def test_replicas_and_shards_learn_what_one_process_learns(two, one):
    (replicas, shards), resumed, *_ = two[0]
    alone, resumed_alone, begun = one
    assert alone < 0.9
    assert replicas == pytest.approx(alone, rel=1e-3)
    assert shards == pytest.approx(alone, rel=1e-3)
    assert resumed == shards
    assert begun == 40
    assert resumed_alone == pytest.approx(shards, rel=1e-3)


def test_the_code_of_the_page_runs(two):
    assert all(end[3] == 4 for end in two)
