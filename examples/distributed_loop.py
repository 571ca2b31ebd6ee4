"""A training loop on several processes: replicas, or FSDP2's shards; checkpoints that any number of them can resume.

    torchrun --nproc-per-node 2 examples/distributed_loop.py
    torchrun --nproc-per-node 2 examples/distributed_loop.py --shard --folder checkpoints

Run the second again, with another number of processes if you like, and it goes on from its last checkpoint.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import nanoadam

STEPS, BATCH, EVERY = 60, 64, 20


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's share of a batch that does not depend on how many share it."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, 32, generator=generator)
    inputs = inputs.chunk(dist.get_world_size())[dist.get_rank()]
    return inputs, inputs[:, :4].argmax(dim=1)


def last_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest that is whole: .metadata is written last."""
    found = sorted((int(path.parent.name), path.parent) for path in folder.glob("*/.metadata"))
    return (found[-1][1], found[-1][0]) if found else None


def train(shard: bool, folder: Path | None, steps: int = STEPS) -> float:
    """Train; the loss of the last step, averaged over the processes."""
    model = make_model()
    if shard:
        fully_shard(model)
    optimizer = nanoadam.NanoAdam(nanoadam.param_groups(model), lr=3e-3, density=0.1, mask_interval=5)
    if not shard:
        nanoadam.distributed.replicate(model, optimizer)
    first = 0
    if folder is not None and (found := last_checkpoint(folder)) is not None:
        path, first = found
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loss = torch.tensor(0.0)
    for step in range(first, steps):
        inputs, labels = batch(step)
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if folder is not None and (step + 1) % EVERY == 0:
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.save(state, checkpoint_id=folder / str(step + 1))
    loss = loss.detach() / dist.get_world_size()
    dist.all_reduce(loss)
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    dist.init_process_group("gloo")  # on GPUs: "nccl", and model and batch on cuda:LOCAL_RANK
    loss = train(given.shard, given.folder)
    if os.environ["RANK"] == "0":
        print(f"{dist.get_world_size()} processes, {'shards' if given.shard else 'replicas'}: last loss {loss:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
