"""What a patch takes, as it was promised: bytes for each changed weight, and for LLaMA-2-7B in all."""

import math

import pytest
import torch

from nanoadam import delta
from nanoadam.chunks import layout
from nanoadam.comparing.shapes import MODELS


def selected(shape, density, dtype=torch.bfloat16):
    """A tensor, and a copy in which one selection of NanoAdam's has changed."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator).to(dtype)
    lay = layout(shape, density)
    assert not lay.tail
    chosen = base.view(-1, lay.chunk).float().abs().topk(lay.keep, 1, largest=False).indices
    tuned = base.clone()
    tuned.view(-1, lay.chunk).scatter_(1, chosen, torch.full(chosen.shape, 3.0, dtype=dtype))
    return base, tuned


@pytest.mark.parametrize("density", [0.01, 0.03, 0.1])
def test_bytes_of_a_changed_bf16_weight(density):
    base, tuned = selected((1024, 4096), density)
    entry = delta.diff({"w": base}, {"w": tuned})["w"]
    positions = sum(part.nbytes for name, part in entry.parts.items() if name != "values")
    assert positions <= 1.1 * entry.count
    assert entry.nbytes < 3.2 * entry.count


def test_bytes_of_whole_columns():
    base = torch.randn(4096, 1024).bfloat16()
    tuned = base.clone()
    tuned[:, ::97] += 1
    entry = delta.diff({"w": base}, {"w": tuned})["w"]
    assert entry.kind == "columns"
    assert entry.nbytes <= 2.1 * entry.count


def test_llama_2_7b_at_1_percent():
    """Under 220 MB beside what is trained in full; the untied head alone is 262 MB."""
    base, tuned = selected((1024, 4096), 0.01)
    entry = delta.diff({"w": base}, {"w": tuned})["w"]
    shapes = MODELS["llama-2-7b"]()
    count = sum(layout(p.shape, 0.01).selected for p in shapes if not p.dense)
    assert count * entry.nbytes / entry.count < 220e6
    head = next(p for p in shapes if p.name == "lm_head.weight")
    assert 261e6 < 2 * math.prod(head.shape) < 263e6
    saved = 2 * math.prod(head.shape) - layout(head.shape, 0.01).selected * entry.nbytes / entry.count
    assert saved > 257e6  # with selected="lm_head"


def test_a_file_is_hardly_larger_than_its_parts(tmp_path):
    base = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(256, 512).bfloat16() for i in range(40)}
    tuned = {name: torch.where(torch.rand(tensor.shape) < 0.02, 1.0, tensor) for name, tensor in base.items()}
    patch = delta.diff(base, {name: tensor.bfloat16() for name, tensor in tuned.items()})
    patch.save(tmp_path / "p.safetensors")
    assert (tmp_path / "p.safetensors").stat().st_size < patch.nbytes + 900 * len(patch)
