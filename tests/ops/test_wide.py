"""Tensors of 2**31 weights or more: positions in 64 bits, and kernels that count with them."""

import pytest
import torch

from nanoadam.baselines import MicroAdam
from nanoadam.chunks import layout
from nanoadam.optimizer import NanoAdam

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("nanoadam.ops.kernels", exc_type=ImportError)
tables = pytest.importorskip("nanoadam.ops.tables", exc_type=ImportError)
tl = triton.language


@triton.jit
def places(row, index, entries, out, N: tl.constexpr):
    lane = tl.arange(0, N)
    entry = tl.load(entries + lane)
    within = tl.load(index + lane).to(tl.int32)
    tl.store(out + lane, kernels._entry_position(row, entry, within, True))


@triton.jit
def entries_of(row, blocks, out, live, N: tl.constexpr):
    for i in range(N):
        entry, inside = kernels._entries(row, tl.load(blocks + i), True, 16)
        tl.store(out + i * 16 + tl.arange(0, 16), entry)
        tl.store(live + i * 16 + tl.arange(0, 16), inside.to(tl.int8))


def table_row(lay, device):
    row = torch.zeros(kernels.COLUMNS.value, dtype=torch.int64)
    for column, number in (
        (kernels.LINE, lay.line),
        (kernels.CHUNK, lay.chunk),
        (kernels.FULL, lay.full),
        (kernels.KEEP, lay.keep),
        (kernels.KEPT_PER_LINE, lay.kept_per_line),
        (kernels.SELECTED, lay.selected),
    ):
        row[column.value] = number
    return row.to(device)


# Short rows, which lie in one line; rows of one chunk; rows of several; and nearly all of them selected.
@pytest.mark.parametrize(
    ("shape", "density"),
    [((10_000_000, 256), 1e-4), ((600_000, 4096), 1e-4), ((70_000, 40_000), 1e-4), ((50_000_000, 100), 0.9)],
)
def test_positions_beyond_31_bits_are_what_they_are(shape, density, device):
    lay = layout(shape, density)
    assert lay.numel >= tables.WIDE_FROM
    entry = torch.linspace(0, lay.selected - 1, 16, dtype=torch.float64).long()
    out = torch.zeros(16, dtype=torch.int64, device=device)
    index = torch.full((16,), 7, dtype=torch.int16, device=device)
    places[(1,)](table_row(lay, device), index, entry.to(device), out, N=16)
    line, within = entry // lay.kept_per_line, entry % lay.kept_per_line
    expected = line * lay.line + torch.clamp(within // lay.keep, max=lay.full) * lay.chunk + 7
    assert torch.equal(out.cpu(), expected)
    assert expected[-1] > 2**31

    blocks = torch.tensor([0, lay.selected // 16], dtype=torch.int32, device=device)
    out, live = torch.zeros(32, dtype=torch.int64, device=device), torch.zeros(32, dtype=torch.int8, device=device)
    entries_of[(1,)](table_row(lay, device), blocks, out, live, N=2)
    expected = (blocks.cpu().long()[:, None] * 16 + torch.arange(16)).view(-1)
    assert torch.equal(out.cpu(), expected)
    assert torch.equal(live.cpu().bool(), expected < lay.selected)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize("make", [NanoAdam, MicroAdam])
def test_kernels_that_count_in_64_bits_train_to_the_bit_like_those_in_32(make, dtype, device, monkeypatch):
    monkeypatch.setenv("NANOADAM_BACKEND", "triton")
    ends = []
    for wide in (False, True):
        monkeypatch.setattr(tables, "WIDE_FROM", 1 if wide else 2**31)
        torch.manual_seed(0)
        shapes = [(6, 70), (2, 4500), (4, 3, 3, 3), (37,)]
        parameters = [torch.nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in shapes]
        with torch.no_grad():
            parameters[2].data = parameters[2].data.contiguous(memory_format=torch.channels_last)
        options = {"mask_interval": 2} if make is NanoAdam else {"window": 3}
        opt = make(parameters, lr=1e-2, density=0.2, **options)
        for _ in range(3):
            sum((p * torch.randn_like(p)).sum() for p in parameters).backward()
            opt.step()
            opt.zero_grad()
        ends.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert torch.equal(*ends)
