"""A part of a tensor is updated and chosen from as it is within the whole: random bits go by the place in the whole."""

import pytest
import torch

from nanoadam.chunks import column_layout, layout
from nanoadam.ops import Adam, Rule, Slot, reference
from nanoadam.ops.rounding import seed_key
from nanoadam.shards import Part

ROWS, FIRST, COLUMNS = 8, 4, 2048  # two rows are a chunk


def slots(kind, device):
    """Of a whole tensor, and of its lower half."""
    torch.manual_seed(0)
    width = COLUMNS if kind == "weights" else 160
    weight = torch.randn(ROWS, width).to(torch.bfloat16).to(device)
    found = []
    for rows, part in ((weight, None), (weight[FIRST:], Part((ROWS - FIRST, width), (ROWS, width), (FIRST, 0)))):
        mine = rows.clone()
        shape = {"dense": mine.shape, "columns": (width, len(mine))}.get(kind)
        lay = None if kind == "dense" else layout(mine.shape, 0.1)
        if kind == "columns":
            lay = column_layout(mine.shape, 1.0)
        moments = {
            n: torch.zeros(shape or lay.shape, dtype=torch.bfloat16, device=device) for n in ("exp_avg", "exp_avg_sq")
        }
        found.append((Slot(mine, {"step": torch.zeros(()), **moments}, 3, part=part), lay))
    return found


@pytest.mark.parametrize("kind", ["dense", "weights", "columns"])
def test_random_bits_go_by_the_place_in_the_whole(ops, device, kind):
    gradient = torch.randn(ROWS, COLUMNS).to(device)
    ends = []
    for slot, lay in slots(kind, device):
        mine = gradient[-len(slot.weight) :, : slot.weight.shape[1]].contiguous()
        adam = Adam(1e-3, 0.9, 0.999, 1e-8, 0.1, False, True, seed_key(7))
        slot.steps = 1
        slot.state["step"] += 1
        if kind == "dense":
            ops.update_dense([slot], [mine], adam)
        else:
            slot.steps = 0
            reference.select([slot], [lay], Rule("smallest", False, True, 0, 0), None)
            slot.steps = 1
            ops.update([slot], [reference.take(slot.selection, mine)], adam)
        ends.append(slot.weight[-(ROWS - FIRST) :].float())
    assert torch.equal(*ends)


def test_the_random_criterion_goes_by_the_place_in_the_whole(ops, device):
    chosen = []
    for slot, lay in slots("weights", device):
        ops.select([slot], [lay], Rule("random", False, True, seed_key(5), 11), None)
        chosen.append(reference.mask(slot.selection, slot.weight.shape)[-(ROWS - FIRST) :])
    assert torch.equal(*chosen)
