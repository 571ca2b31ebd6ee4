"""The kernels do what plain PyTorch does, bit for bit; without a GPU they run in Triton's interpreter."""

import dataclasses

import pytest
import torch
from cases import copy, noise, same

from nanoadam import delta
from nanoadam.chunks import layout
from nanoadam.delta import DeltaError, bits, coding, hashing, ops, reference

triton = pytest.importorskip("nanoadam.delta.triton", exc_type=ImportError)

DTYPES = [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_hashes(device, generator):
    shapes = [(1,), (3,), (4096 * 4,), (300, 77), (1001,), (4096 * 9 + 5,), (0,)]
    tensors = [noise(dtype, shape, generator).to(device) for dtype in DTYPES for shape in shapes]
    tensors += [tensors[-3][1:], torch.randn(6, 8, 3, 3, device=device).contiguous(memory_format=torch.channels_last)]
    assert triton.hashes(tensors).tolist() == reference.hashes(tensors).tolist()
    assert ops.hash_all([]) == []


def test_hashes_of_several_programs(device, generator, monkeypatch):
    monkeypatch.setattr(triton, "PARTS", 2)
    tensors = [noise(torch.bfloat16, (n,), generator).to(device) for n in (4096 * 12, 4096 * 4 + 2, 4096 * 11 + 1)]
    assert triton.hashes(tensors).tolist() == reference.hashes(tensors).tolist()


def jobs(device, generator, dtype, kind, *, coded=True):
    """Entries on tensors of several sizes; values are any bits."""
    made = []
    for shape, density in (((90, 70), 0.3), ((150, 1000), 0.002), ((1,), 1.0), ((64, 96), 1.0)):
        weight = noise(dtype, shape, generator).to(device)
        if kind == "columns":
            columns = (torch.rand(shape[-1], generator=generator) < 0.3).nonzero().view(-1).to(torch.int32)
            columns = columns if columns.numel() else torch.zeros(1, dtype=torch.int32)
            rows = weight.numel() // shape[-1]
            parts = {"columns": columns, "values": noise(dtype, (rows, columns.numel()), generator)}
            count = rows * columns.numel()
        else:
            positions = (torch.rand(weight.numel(), generator=generator) < density).nonzero().view(-1)
            positions = positions if positions.numel() else torch.zeros(1, dtype=torch.int64)
            count = positions.numel()
            parts = {"positions": positions.to(torch.int32), "values": noise(dtype, (count,), generator)}
        entry = delta.Entry(f"w{len(made)}", kind, dtype, shape, parts, count).to(device)
        made.append(ops.Job(ops.coded(entry) if coded else entry, weight))
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "coded"), [("sparse", True), ("sparse", False), ("columns", True)])
def test_inspect_and_write(device, generator, dtype, kind, coded):
    mine = jobs(device, generator, dtype, kind, coded=coded)
    theirs = [ops.Job(job.entry, job.weight.clone()) for job in mine]
    before = [job.weight.clone() for job in mine]
    assert coded is False or any(job.entry.bits for job in mine) or kind == "columns"
    for a, b in zip(triton.inspect(mine, hashed=True), reference.inspect(theirs, hashed=True), strict=True):
        assert bits.equal(a.old, b.old)
        assert a.change == b.change
    assert all(bits.equal(job.weight, weight) for job, weight in zip(mine, before, strict=True))
    triton.write(mine, [job.entry.values for job in mine])
    reference.write(theirs, [job.entry.values for job in theirs])
    assert all(bits.equal(a.weight, b.weight) for a, b in zip(mine, theirs, strict=True))
    assert not all(bits.equal(job.weight, weight) for job, weight in zip(mine, before, strict=True))


def test_int64_positions_and_many_low_bits(device, generator, monkeypatch):
    """What tensors of more than 2**31 weights need, made small."""
    weight = noise(torch.int8, (1 << 17,), generator).to(device)
    positions = torch.tensor([0, 5, 70_000, 131_071], device=device)
    entry = delta.Entry("w", "sparse", torch.int8, (1 << 17,), {"positions": positions, "values": weight[:4] ^ 1}, 4)
    monkeypatch.setattr(coding, "low_bits", lambda count, numel: 13)
    for given in (entry, ops.coded(entry)):
        mine, theirs = (ops.Job(given, weight.clone()) for _ in range(2))
        assert triton.inspect([mine], hashed=True)[0].change == reference.inspect([theirs], hashed=True)[0].change
        triton.write([mine], [entry.values])
        reference.write([theirs], [entry.values])
        assert torch.equal(mine.weight, theirs.weight)
        assert not torch.equal(mine.weight, weight)


def test_strides_go_another_way(device, generator):
    weight = torch.randn(8, 6, 5, 5, device=device).contiguous(memory_format=torch.channels_last)
    entry = delta.Entry("w", "sparse", torch.float32, (8, 6, 5, 5), {
        "positions": torch.arange(0, 1200, 7, dtype=torch.int32, device=device),
        "values": torch.ones(172, device=device),
    }, 172)  # fmt: skip
    job = ops.Job(entry, weight)
    assert bits.equal(triton.inspect([job], hashed=True)[0].old, weight.contiguous().view(-1)[::7])
    triton.write([job], [entry.values])
    assert bool((weight.contiguous().view(-1)[::7] == 1).all())


def test_damage_is_found_before_anything_is_written(device, generator):
    for kind, coded in (("sparse", True), ("sparse", False), ("columns", True)):
        for job in jobs(device, generator, torch.bfloat16, kind, coded=coded)[:2]:
            for part in set(job.entry.parts) - {"values", "low"}:
                for at in (0, -1):
                    for flip in (1, 64):
                        parts = {name: tensor.clone() for name, tensor in job.entry.parts.items()}
                        bits.flat(parts[part])[at] ^= flip
                        broken = dataclasses.replace(job.entry, parts=parts)
                        with_reference, with_kernels = (self_check(each, broken, job) for each in (reference, triton))
                        assert with_reference == with_kernels, (kind, part, at, flip)


def self_check(module, entry, job):
    """Whether positions are refused; where they are not, what they do to the hash."""
    weight = job.weight.clone()
    try:
        change = module.inspect([ops.Job(entry, weight)], hashed=True)[0].change
    except DeltaError:
        change = None
    assert bits.equal(weight, job.weight)
    return change


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 4095, 20_000])
def test_what_differs(device, generator, dtype, numel):
    before = noise(dtype, (numel,), generator).to(device)
    after = before.clone()
    bits.bits(after)[:: max(1, numel // 100)] ^= 1
    assert torch.equal(triton.changed(before, after), reference.changed(before, after))
    assert triton.changed(before, before).numel() == 0


@pytest.mark.parametrize("density", [1.0, 0.5, 0.02, 0.001, 1e-4])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_codes(device, generator, density, dtype):
    numel = 120_000
    positions = (torch.rand(numel, generator=generator) < density).nonzero().view(-1).to(device, dtype)
    mine, theirs = triton.encode(positions, numel), reference.encode(positions, numel)
    for part in ("gaps", "low", "blocks"):
        assert torch.equal(getattr(mine, part), getattr(theirs, part)), part
    assert (mine.bits, mine.count) == (theirs.bits, theirs.count)


def test_codes_of_long_runs(device):
    """A gap that takes several blocks of continuation bytes, at the start and inside."""
    positions = torch.cat([torch.arange(900_000, 901_000), torch.arange(2_500_000, 2_520_000)]).to(device)
    mine, theirs = triton.encode(positions, 2_600_000), reference.encode(positions, 2_600_000)
    assert torch.equal(mine.gaps, theirs.gaps)
    assert torch.equal(mine.blocks, theirs.blocks)
    assert torch.equal(coding.decode(mine, 2_600_000), positions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_selections(device, generator, dtype):
    weights, indices, layouts = [], [], []
    for shape, density in (((40, 200), 0.1), ((3, 5000), 0.01), ((7, 9), 1.0), ((1, 13_000), 0.02)):
        lay = layout(shape, density)
        weights.append(torch.randn(shape, generator=generator).to(device, dtype))
        rows = []
        for _ in range(lay.lines):
            for chunk in range(lay.per_line):
                short = lay.tail and chunk == lay.per_line - 1
                length, keep = (lay.tail, lay.keep_tail) if short else (lay.chunk, lay.keep)
                rows.append(torch.randperm(length, generator=generator)[:keep].sort().values)
        indices.append(torch.cat(rows).to(device, torch.int16))
        layouts.append(lay)
    mine, theirs = (each.collect(weights, indices, layouts) for each in (triton, reference))
    for (a, b), (c, d), weight in zip(mine, theirs, weights, strict=True):
        assert torch.equal(a, c)
        assert bits.equal(b, d)
        assert bits.equal(weight.view(-1)[a.long()], b)


def test_apply_and_revert_by_kernels(device, generator, monkeypatch):
    monkeypatch.setenv("NANOADAM_BACKEND", "triton")
    base = {
        "sparse": noise(torch.bfloat16, (120, 90), generator),
        "columns": noise(torch.float32, (30, 40), generator),
        "dense": noise(torch.float16, (50,), generator),
    }
    tuned = copy(base)
    bits.bits(tuned["sparse"]).view(-1)[::50] ^= 3
    bits.bits(tuned["columns"])[:, [1, 9]] ^= 5
    bits.bits(tuned["dense"]).add_(1)
    base, tuned = ({name: tensor.to(device) for name, tensor in state.items()} for state in (base, tuned))
    patch = delta.diff(base, tuned)
    assert [entry.kind for entry in patch.values()] == ["sparse", "columns", "dense"]
    model = {name: tensor.clone() for name, tensor in base.items()}
    undo = delta.apply(model, patch)
    assert same(model, tuned)
    delta.apply(model, undo)
    assert same(model, base)
    monkeypatch.setenv("NANOADAM_BACKEND", "reference")
    for name, entry in delta.diff(base, tuned).items():
        assert (entry.base, entry.result) == (patch[name].base, patch[name].result)
        assert all(bits.equal(part, patch[name].parts[key]) for key, part in entry.parts.items())
    assert hashing.total(hashing.hash_tensor(tuned["dense"])) == patch["dense"].result
