"""Gaps: every list of positions comes back, in the bytes that were promised, and nothing wrong decodes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanoadam.delta import DeltaError, coding


def chosen(numel, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(numel, generator=generator) < density).nonzero().view(-1)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=60, unique=True), st.integers(1, 2**40))
def test_any_positions_come_back(positions, beyond):
    given = torch.tensor(sorted(positions))
    numel = int(given[-1]) + beyond
    code = coding.encode(given, numel)
    assert torch.equal(coding.decode(code, numel), given)
    assert code.nbytes < 6 * len(positions) + 16 * (1 + code.gaps.numel() // coding.BLOCK) + 2**17


@pytest.mark.parametrize("density", [1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_many_positions_come_back(density, dtype):
    given = chosen(3_000_000, density)
    assert torch.equal(coding.decode(coding.encode(given.to(dtype), 3_000_000), 3_000_000), given)


def test_pieces_make_the_same_code_as_the_whole(monkeypatch):
    given = chosen(300_000, 0.02)
    whole = coding.encode(given, 300_000)
    monkeypatch.setattr(coding, "_ENTRIES", 2 * coding.BLOCK)
    pieces = coding.encode(given, 300_000)
    assert torch.equal(whole.gaps, pieces.gaps)
    assert torch.equal(whole.blocks, pieces.blocks)
    assert torch.equal(coding.decode(whole, 300_000), given)


@pytest.mark.parametrize(
    ("density", "most"), [(0.1, 1.1), (0.03, 1.1), (0.01, 1.1), (1e-3, 2.0), (3e-4, 2.0), (1e-4, 2.0)]
)
def test_bytes_of_a_position(density, most):
    given = chosen(20_000_000, density)
    assert coding.encode(given, 20_000_000).nbytes / given.numel() <= most


def test_blocks_decode_by_themselves():
    given = chosen(400_000, 0.02)
    code = coding.encode(given, 400_000)
    assert code.blocks.shape[0] > 2
    for row, (entry, cursor) in enumerate(code.blocks.tolist()):
        found = []
        for byte in code.gaps[row * coding.BLOCK : (row + 1) * coding.BLOCK].tolist():
            cursor += byte << code.bits
            if byte < 255:
                found.append(cursor)
                cursor += 1
        assert found == given[entry : entry + len(found)].tolist()


@pytest.mark.parametrize("density", [0.001, 0.05])
def test_nothing_wrong_decodes(density):
    numel = 60_000
    given = chosen(numel, density)
    code = coding.encode(given, numel)
    longer = torch.cat([code.gaps, code.gaps.new_tensor([255])])
    wrong = [
        (code, numel - (numel - int(given[-1]))),  # the last position is out of range
        (coding.Coded(code.gaps[:-1], code.low, code.blocks, code.bits, code.count), numel),
        (coding.Coded(code.gaps, code.low, code.blocks, code.bits, code.count + 1), numel),
        (coding.Coded(code.gaps, code.low, code.blocks, code.bits, code.count - 1), numel),
        (coding.Coded(code.gaps, code.low, code.blocks + 1, code.bits, code.count), numel),
        (coding.Coded(code.gaps, code.low, code.blocks[:0], code.bits, code.count), numel),
        (coding.Coded(code.gaps, code.low, code.blocks, 25, code.count), numel),
        (coding.Coded(code.gaps, code.low, code.blocks, code.bits, 0), numel),
        (coding.Coded(longer, code.low, code.blocks, code.bits, code.count), numel),
    ]  # fmt: skip
    for broken, size in wrong:
        with pytest.raises(DeltaError, match=r"layer\.weight"):
            coding.decode(broken, size, "layer.weight")
