"""compose: two patches as one, in every bit, and only where the result follows from the two."""

import dataclasses

import pytest
import torch
from cases import change, copy, models, same
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoadam import delta
from nanoadam.delta import DeltaError, bits


@settings(max_examples=80)
@given(models(), st.integers(0, 2**31), st.data())
def test_one_after_the_other(drawn, seed, data):
    base, middle = drawn
    generator = torch.Generator().manual_seed(seed)
    last = {}
    for name, tensor in copy(middle).items():
        how = data.draw(st.sampled_from(["none", "few", "columns", "all", "removed"]))
        if how != "removed":
            last[name] = change(tensor, how, generator)
    if "tied" in middle:  # all names of a tensor go together
        names = [name for name in middle if middle[name] is middle["tied"]]
        if all(name in last for name in names):
            last |= dict.fromkeys(names, last["tied"])
        else:
            last = {name: tensor for name, tensor in last.items() if name not in names}
    patch = delta.compose(delta.diff(base, middle), delta.diff(middle, last))
    model = copy(base)
    undo = delta.apply(model, patch)
    assert same(model, last)
    assert not delta.apply(model, patch).entries
    delta.apply(model, undo)
    assert same(model, base)


def parts():
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(90, 40, generator=generator).bfloat16(), "c": torch.randn(50, 30), "d": torch.ones(9)}
    one, two = copy(base), copy(base)
    one["w"].view(-1)[::40] = 1.5
    two["w"].view(-1)[1::37] = 2.5
    two["w"].view(-1)[::40] = base["w"].view(-1)[::40]
    one["c"][:, 3] += 1
    two["c"][:, 4] += 1
    one["d"] += 1
    return base, one, two


def test_disjoint_patches_of_one_base_in_any_order():
    base, one, two = parts()
    both = copy(base)
    for name in base:
        for tuned in (one, two):
            changed = bits.bits(tuned[name]) != bits.bits(base[name])
            both[name] = torch.where(changed, tuned[name], both[name])
    for a, b in ((one, two), (two, one)):
        patch = delta.compose(delta.diff(base, a), delta.diff(base, b))
        assert patch["c"].kind == "columns"
        model = copy(base)
        delta.apply(model, patch)  # with its hashes
        assert same(model, both)


def test_patches_that_overlap_on_one_base_are_refused():
    base, one, _ = parts()
    other = copy(base)
    other["w"].view(-1)[80] = 9
    with pytest.raises(DeltaError, match="w: both patches change 1 of the same weights"):
        delta.compose(delta.diff(base, one), delta.diff(base, other))
    other = copy(base)
    other["d"] += 2
    with pytest.raises(DeltaError, match="d: both patches change it, each of them on the base"):
        delta.compose(delta.diff(base, one), delta.diff(base, other))
    same_patch = delta.compose(delta.diff(base, one), delta.diff(base, one))
    model = copy(base)
    delta.apply(model, same_patch)
    assert same(model, one)


def test_strangers_are_refused():
    base, one, two = parts()
    foreign = copy(base)
    foreign["d"] *= 3
    further = copy(foreign)
    further["w"][0, 1] = 8
    with pytest.raises(DeltaError, match="d: .* do not belong together"):  # by what it says of an untouched tensor
        delta.compose(delta.diff(base, one), delta.diff(foreign, further))
    with pytest.raises(DeltaError, match="bfloat16"):
        delta.compose(delta.diff(base, one), delta.diff({"w": torch.ones(3)}, {"w": torch.zeros(3)}))
    prefixed = dataclasses.replace(delta.diff(base, two), prefix="bert.")
    with pytest.raises(DeltaError, match=r"bert\."):
        delta.compose(delta.diff(base, one), prefixed)


def test_verify_still_knows_what_neither_touched():
    base, one, two = parts()
    base, one, two = ({**state, "same": torch.ones(3)} for state in (base, one, two))
    patch = delta.compose(delta.diff(base, one), delta.diff(base, two))
    assert delta.verify(base, patch).is_base
    assert delta.verify({**base, "same": torch.zeros(3)}, patch).other == ("same",)
