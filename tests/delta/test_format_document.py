"""The reader in docs/delta-format.md, written from that page alone, decodes what the library writes."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import copy, models
from hypothesis import given, settings

from nanoadam import delta
from nanoadam.delta import bits

PAGE = Path(__file__).parents[2] / "docs" / "delta-format.md"


def reader():
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    assert len(code.splitlines()) <= 100
    namespace = {}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace


READER = reader()
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def arrays(state):
    return {
        name: bits.flat(tensor).numpy().view(UNSIGNED[tensor.element_size()]).reshape(tuple(tensor.shape))
        for name, tensor in state.items()
    }


def check(base, tuned, folder):
    delta.diff(base, tuned).save(folder / "p.safetensors")
    result, wanted = READER["apply"](arrays(base), folder / "p.safetensors"), arrays(tuned)
    assert set(result) == set(wanted)
    for name, array in wanted.items():
        assert result[name].dtype == array.dtype
        assert np.array_equal(result[name], array), name


@settings(max_examples=60)
@given(models())
def test_any_model(tmp_path_factory, drawn):
    base, tuned = ({name: t for name, t in copy(state).items() if name != "tied"} for state in drawn)
    check(base, tuned, tmp_path_factory.mktemp("reader"))


@pytest.mark.parametrize("density", [0.2, 0.01, 0.001, 1e-4])
def test_many_positions(tmp_path, density):
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(600, 500, generator=generator).bfloat16()}
    tuned = {"w": torch.where(torch.rand(600, 500, generator=generator) < density, 9.0, base["w"].float()).bfloat16()}
    check(base, tuned, tmp_path)


def test_it_refuses_damage(tmp_path):
    base, tuned = {"w": torch.zeros(40, 30)}, {"w": torch.zeros(40, 30)}
    tuned["w"][::7, ::5] = 1
    path = tmp_path / "p.safetensors"
    delta.diff(base, tuned).save(path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)
    with pytest.raises(AssertionError, match="damaged"):
        READER["apply"](arrays(base), path)


def test_its_hash_is_the_library_s():
    for numel in (1, 7, 4096 * 3 + 1):
        tensor = torch.randn(numel).half()
        (array,) = arrays({"w": tensor}).values()
        assert int(READER["hash_of"](array), 16) == delta.ops.hash_all([tensor])[0]


def test_the_table_of_sizes_is_what_is_written(tmp_path):
    """The row of bytes on the page, for positions at random."""
    row = re.search(r"\| bytes \|(.*)\|", PAGE.read_text()).group(1)
    given = [float(cell) for cell in row.split("|")]
    densities = [0.5, 0.1, 0.01, 0.003, 0.001, 1e-4, 1e-5]
    numel, generator = 20_000_000, torch.Generator().manual_seed(0)
    for density, expected in zip(densities, given, strict=True):
        positions = (torch.rand(numel, generator=generator) < density).nonzero().view(-1)
        code = delta.coding.encode(positions, numel)
        assert abs(code.nbytes / code.count - expected) < (0.1 if density == 1e-5 else 0.02)
