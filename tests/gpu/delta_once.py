"""Hold the kernels of patches to plain PyTorch on a GPU, at sizes that the interpreter cannot do; needs no pytest.

python tests/gpu/delta_once.py        on two GPUs also: a server follows a trainer through NCCL
"""

import copy
import tempfile

import torch
import torch.distributed as dist
from torch import nn

from nanoadam import NanoAdam, delta
from nanoadam.chunks import layout
from nanoadam.delta import bits, coding, ops, reference, triton
from nanoadam.delta.sync import GroupChannel, Receiver, Sender


def noise(dtype, numel, generator):
    raw = torch.randint(-(2**31), 2**31, (numel * dtype.itemsize // 4 + 1,), generator=generator, device="cuda")
    return raw.to(torch.int32).view(torch.uint8)[: numel * dtype.itemsize].view(dtype)


def check_kernels():
    generator = torch.Generator("cuda").manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32, torch.uint8, torch.float64):
        tensors = [noise(dtype, n, generator) for n in (1, 1001, 4096 * 64 + 3, 131_072_001)]
        assert triton.hashes(tensors).tolist() == reference.hashes(tensors).tolist(), dtype
        for numel, density in ((45_088_768, 0.01), (131_072_000, 1e-4), (5_000_003, 0.5), (100, 0.2)):
            weight = noise(dtype, numel, generator)
            chosen = torch.rand(numel, generator=generator, device="cuda") < density
            positions = chosen.nonzero().view(-1).to(torch.int32)
            code = triton.encode(positions, numel)
            expected = coding.encode(positions, numel)
            for part in ("gaps", "low", "blocks"):
                assert torch.equal(getattr(code, part), getattr(expected, part)), (dtype, density, part)
            values = noise(dtype, len(positions), generator)
            parts = {"positions": positions, "values": values}
            listed = delta.Entry("w", "sparse", dtype, (numel,), parts, len(positions))
            for entry in (listed, listed.with_code(code)):
                mine, theirs = (ops.Job(entry, weight.clone()) for _ in range(2))
                a, b = triton.inspect([mine], hashed=True)[0], reference.inspect([theirs], hashed=True)[0]
                assert a.change == b.change
                assert bits.equal(a.old, b.old)
                triton.write([mine], [values])
                reference.write([theirs], [values])
                assert bits.equal(mine.weight, theirs.weight)
            assert torch.equal(triton.changed(weight, mine.weight), reference.changed(weight, mine.weight))
    print("kernels: done")


def check_collect():
    generator = torch.Generator("cuda").manual_seed(0)
    for shape, density in (((11008, 4096), 0.01), ((4096, 11008), 0.1), ((32000, 4096), 0.01)):
        lay = layout(shape, density)
        weight = torch.randn(shape, generator=generator, device="cuda").bfloat16()
        chunks = torch.rand(lay.lines * lay.full, lay.chunk, generator=generator, device="cuda")
        index = chunks.topk(lay.keep, 1).indices.sort(1).values.view(lay.lines, -1)
        if lay.tail:
            rest = torch.rand(lay.lines, lay.tail, generator=generator, device="cuda")
            index = torch.cat([index, rest.topk(lay.keep_tail, 1).indices.sort(1).values], 1)
        index = index.reshape(-1).to(torch.int16)
        ((a, b),), ((c, d),) = (each.collect([weight], [index], [lay]) for each in (triton, reference))
        assert torch.equal(a, c)
        assert bits.equal(b, d)
    print("collect: done")


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)).to("cuda", torch.bfloat16)


def train(model, optimizer):
    inputs = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    (model(inputs) - inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def same(a, b):
    return all(bits.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def check_recorder():
    model = small()
    server, base = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = NanoAdam(model.parameters(), lr=1e-2, density=0.05, mask_interval=7)
    recorder = delta.Recorder(model, optimizer)
    for i in range(50):
        train(model, optimizer)
        if i % 3 == 0:
            delta.apply(server, recorder.patch())
            assert same(server, model)
    with tempfile.TemporaryDirectory() as folder:
        delta.diff(base, model, out=f"{folder}/p.safetensors")
        delta.apply(base, f"{folder}/p.safetensors")
        assert same(base, model)
    delta.revert(base)
    assert same(base, small())
    print("recorder: done")


def follow(rank, address):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=address, rank=rank, world_size=2)
    model = small()
    if rank == 0:
        optimizer = NanoAdam(model.parameters(), lr=1e-2, density=0.05, mask_interval=7, local=True)
        sender = Sender(delta.Recorder(model, optimizer), GroupChannel())
    else:
        receiver = Receiver(model, GroupChannel())
    for _ in range(30):
        if rank == 0:
            train(model, optimizer)
            sender.send()
        else:
            assert receiver.receive()
        for parameter in model.parameters():
            other = parameter.detach().clone()
            dist.broadcast(other, 0)
            assert bits.equal(parameter, other)
    dist.destroy_process_group()


if __name__ == "__main__":
    check_kernels()
    check_collect()
    check_recorder()
    if torch.cuda.device_count() > 1:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(follow, (f"file://{folder}/rendezvous",), nprocs=2)
        print("nccl: done")
