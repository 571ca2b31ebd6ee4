"""How tensors are cut, and how much of each chunk is kept."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoadam.chunks import MAX_CHUNK, layout
from oracle import chunk_bounds

SHAPES = [
    (1, 1),
    (3, 1),
    (1, 5000),
    (10, 5000),
    (4096, 3),
    (5, 4096),
    (7, 4097),
    (2, 3, 5, 7),
    (64, 3, 7, 7),
    (30522, 2),
]


def bounds_of(lay):
    """(start, stop, kept) of every chunk, read off the layout."""
    for line in range(lay.lines):
        for j in range(lay.per_line):
            start = line * lay.line + j * lay.chunk
            full = j < lay.full
            yield start, start + (lay.chunk if full else lay.tail), lay.keep if full else lay.keep_tail


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_are_those_of_the_definition(shape):
    assert [(a, b) for a, b, _ in bounds_of(layout(shape, 0.1))] == chunk_bounds(shape)


@given(
    shape=st.lists(st.integers(1, 90), min_size=1, max_size=4).filter(lambda s: math.prod(s) < 300_000),
    density=st.floats(1e-5, 1.0),
)
def test_chunks_tile_the_tensor_and_keep_the_promised_count(shape, density):
    lay = layout(shape, density)
    at = kept = 0
    for start, stop, keep in bounds_of(lay):
        assert start == at
        assert 0 < stop - start <= MAX_CHUNK
        assert keep == min(stop - start, max(1, round(density * (stop - start))))
        at, kept = stop, kept + keep
    assert at == lay.numel == math.prod(shape)
    assert kept == lay.selected
    assert sum(1 for _ in bounds_of(lay)) == lay.chunks


@pytest.mark.parametrize(
    ("rows", "cols"), [(4096, 4096), (11008, 4096), (768, 768), (3072, 768), (4096, 11008), (512, 4608)]
)
@pytest.mark.parametrize("shards", [2, 4, 8])
def test_sharding_rows_falls_between_chunks_of_usual_matrices(rows, cols, shards):
    edges = {start for start, _, _ in bounds_of(layout((rows, cols), 0.01))}
    assert all(rows // shards * cols * i in edges for i in range(shards))


@pytest.mark.parametrize(
    ("shape", "density", "word"),
    [((0, 3), 0.1, "no chunks"), ((), 0.1, "no chunks"), ((3,), 0.0, "density"), ((3,), 1.5, "1.5")],
)
def test_what_has_no_chunks_is_refused(shape, density, word):
    with pytest.raises(ValueError, match=word):
        layout(shape, density)
