"""Whole columns: which are selected, what is kept, and how they are updated, by every implementation."""

import copy

import numpy as np
import pytest
import torch

from crossed import crossed
from nanoadam.chunks import column_layout, layout
from nanoadam.ops import Adam, Rule, Selection, Slot, reference
from nanoadam.ops.rounding import seed_key

SHAPES = [(40, 130), (300, 21), (1, 7), (9, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rule(**changes):
    return Rule(**{"criterion": "smallest", "keep_zeros": False, "carry": True, "key": 1, "step": 0, **changes})


def new_slot(weight, state_dtype=torch.float32, ordinal=1):
    return Slot(weight, {n: torch.empty(0, dtype=state_dtype) for n in ("exp_avg", "exp_avg_sq")}, ordinal)


def selected(ops, weight, density, transposed=False, gradient=None, **changes):
    slot = new_slot(weight)
    lay = column_layout(weight.shape, density, transposed=transposed)
    ops.select([slot], [lay], rule(**changes), None if gradient is None else [gradient])
    return slot


def expected_columns(values, keep, largest=False, never=None):
    """By numpy alone: norms in float64 rounded to float32, NaN last, ties to the lower."""
    with np.errstate(over="ignore"):
        norms = (values.astype(np.float64) ** 2).sum(0).astype(np.float32)
    order = np.where(np.isnan(norms), np.inf, norms) if not largest else -np.where(np.isnan(norms), np.inf, norms)
    last = np.isnan(norms) if not largest else ~np.isnan(norms)
    columns = sorted(range(len(norms)), key=lambda c: (order[c], last[c], c))
    if never is not None:
        columns = [c for c in columns if not never[c]]
    return sorted(columns[:keep])


@pytest.mark.parametrize("criterion", ["smallest", "largest", "gradient"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_right_columns_are_selected(ops, device, criterion, transposed):
    for shape in [*SHAPES, (5, 1100)]:
        for dtype, density in zip(DTYPES, (0.01, 0.3, 1.0), strict=True):
            torch.manual_seed(0)
            weight, gradient = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            weight[:, ::3] = weight[:, :1].clone()  # ties
            weight[0, -1] = float("nan")
            by = (gradient if criterion == "gradient" else weight).double().numpy()
            keep = column_layout(shape, density).keep
            expected = expected_columns(by, keep, largest=criterion != "smallest")
            weight, gradient = ((w.t().contiguous() if transposed else w).to(device) for w in (weight, gradient))
            given = gradient if criterion == "gradient" else None
            slot = selected(ops, weight, density, transposed, given, criterion=criterion)
            assert slot.state["index"].tolist() == expected
            assert slot.state["index"].dtype == torch.int32
            assert slot.state["exp_avg"].shape == (keep, shape[0])
            assert not slot.state["exp_avg_sq"].any()


def test_random_columns_depend_on_seed_step_and_tensor_and_are_the_same_everywhere(ops, device):
    weight = torch.randn(20, 300)
    base = selected(ops, weight.to(device), 0.1, criterion="random").state["index"].cpu()
    assert torch.equal(base, selected(reference, weight, 0.1, criterion="random").state["index"])
    assert len(base) == 30
    for other in ({"key": 2}, {"step": 5}):
        assert (
            base.tolist() != selected(ops, weight.to(device), 0.1, criterion="random", **other).state["index"].tolist()
        )


@pytest.mark.parametrize("criterion", ["smallest", "random"])
def test_columns_of_zeros_stay_out_where_zeros_are_kept(ops, device, criterion):
    weight = torch.randn(20, 50)
    weight[:, 5:] = 0.0
    slot = selected(ops, weight.to(device), 0.5, keep_zeros=True, criterion=criterion)
    assert slot.state["index"].tolist() == [0, 1, 2, 3, 4] + [-1] * 20


@pytest.mark.parametrize(
    ("densities", "keep_zeros", "transposed"),
    crossed([(0.2, 0.2), (0.3, 0.1), (0.05, 0.4), (1.0, 0.1), (0.1, 1.0)], [False, True], [False, True]),
)
def test_a_refresh_carries_what_stays_and_forgets_the_rest(ops, device, densities, keep_zeros, transposed):
    torch.manual_seed(1)
    weight = torch.randn(300, 120)
    weight[:, ::4] = 0.0
    slot = selected(ops, (weight.t().contiguous() if transposed else weight).to(device), densities[0], transposed,
                    keep_zeros=keep_zeros)  # fmt: skip
    before = slot.state["index"].cpu().clone()
    moments = {n: torch.randn(120, 300) for n in ("exp_avg", "exp_avg_sq")}
    for name, values in moments.items():
        packed = values[before.clamp(min=0).long()].masked_fill((before < 0)[:, None], 0)
        slot.state[name] = packed.to(device)
    slot.steps = 70000  # beyond 16 bits
    stamps = torch.randint(60000, 70000, (120,))
    slot.state["entry_step"] = stamps[before.clamp(min=0).long()].to(torch.int16).to(device)
    weight += 0.7 * torch.randn(300, 120) * (weight != 0) * torch.rand(120)
    slot.parameter = (weight.t().contiguous() if transposed else weight).to(device)
    lay = column_layout(slot.weight.shape, densities[1], transposed=transposed)
    ops.select([slot], [lay], rule(keep_zeros=keep_zeros, step=3), None)
    after = slot.state["index"].cpu()
    never = (weight == 0).all(0).numpy() if keep_zeros else None
    expected = expected_columns(weight.double().numpy(), lay.keep, never=never)
    assert after[after >= 0].tolist() == expected
    old = set(before[before >= 0].tolist())
    for place, column in enumerate(after.tolist()):
        stays = column in old
        for name, values in moments.items():
            assert torch.equal(slot.state[name][place].cpu(), values[column] if stays else torch.zeros(300))
        age = (slot.steps - int(slot.state["entry_step"][place])) & 0xFFFF
        if column >= 0:
            assert age == (min(70000 - int(stamps[column]), 32768) if stays else 0)
    ops.select([slot], [lay], rule(carry=False), None)
    assert not slot.state["exp_avg"].any()
    assert slot.state["entry_step"].shape == (1,)
    assert (slot.steps - int(slot.state["entry_step"])) & 0xFFFF == 0


@pytest.mark.parametrize("in_use", [True, False])
def test_a_selection_in_use_keeps_its_columns(ops, device, in_use):
    slot = selected(ops, torch.randn(30, 50).to(device), 0.2)
    kept, before = slot.selection, slot.state["index"].clone()
    loan = kept.borrow() if in_use else None
    slot.weight.copy_(torch.randn(30, 50))
    ops.select([slot], [slot.layout], rule(), None)
    assert (slot.selection is not kept) == (in_use or ops is reference)
    if in_use:
        assert torch.equal(kept.index, before)
    assert loan is not None or not in_use


def to_device(slot, device):
    twin = copy.copy(slot)
    twin.parameter = slot.weight.detach().clone(memory_format=torch.preserve_format).to(device)
    twin.state = {name: value.clone().to(device if name != "step" else "cpu") for name, value in slot.state.items()}
    twin.selection = Selection(twin.state["index"], slot.layout)
    twin.cache = {}
    return twin


def slots_of(dtype, state_dtype=torch.float32, keep_zeros=False):
    torch.manual_seed(0)
    found = []
    for i, shape in enumerate(SHAPES):
        transposed = i % 2 == 1
        weight = torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, 0.0).to(dtype)
        slot = new_slot(weight, state_dtype, i)
        slot.state["step"] = torch.zeros(())
        lay = column_layout(shape, 0.3, transposed=transposed)
        reference.select([slot], [lay], rule(keep_zeros=keep_zeros), None)
        found.append(slot)
    return found


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_takes_and_accumulates_the_selected_columns(ops, device, dtype, kept):
    slots = [to_device(slot, device) for slot in slots_of(dtype)]
    gradients = [[torch.randn(slot.weight.shape).to(dtype) for slot in slots] for _ in range(2)]
    gradients[1][0] = torch.randn(slots[0].weight.shape[::-1]).to(dtype).t()  # which kernels leave to the reference
    entries = [torch.full(slot.layout.shape, float("nan"), dtype=kept, device=device) for slot in slots]
    for add, several in zip((False, True), gradients, strict=True):
        ops.gather(slots, [g.to(device) for g in several], entries, [add] * len(slots))
    for slot, got, first, second in zip(slots, entries, *gradients, strict=True):
        total = (first.to(kept).float() + second.float()).to(kept)
        total = total if slot.layout.transposed else total.t()
        assert torch.equal(got.cpu(), total[slot.state["index"].cpu().long()])


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "keep_zeros"), crossed(DTYPES, [torch.float32, torch.bfloat16], [False, True])
)
def test_update_is_the_references_and_touches_nothing_else(ops, device, dtype, state_dtype, keep_zeros):
    base = slots_of(dtype, state_dtype, keep_zeros)
    base[0].state["entry_step"] = torch.randint(0, 5, base[0].state["index"].shape, dtype=torch.int16)
    base[1].state["entry_step"] = torch.zeros(1, dtype=torch.int16)
    expected, got = [to_device(s, "cpu") for s in base], [to_device(s, device) for s in base]
    adam = Adam(
        lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, maximize=False, stochastic_rounding=True,
        key=seed_key(7), keep_zeros=keep_zeros,
    )  # fmt: skip
    for steps in (5, 6, 70000):
        gradients = [torch.randn(s.layout.shape) for s in base]
        for slots, module, where in ((expected, reference, "cpu"), (got, ops, device)):
            for slot in slots:
                slot.steps = steps
            module.update(slots, [g.to(where) for g in gradients], adam)
        for mine, theirs, start in zip(got, expected, base, strict=True):
            pairs = [
                (mine.weight, theirs.weight),
                *((mine.state[n], theirs.state[n]) for n in ("exp_avg", "exp_avg_sq")),
            ]
            for a, b in pairs:
                a = a.cpu()
                unit = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[a.dtype]
                torch.testing.assert_close(a, b, rtol=unit, atol=3e-7)
                if a.dtype != torch.float32:
                    assert (a != b).double().mean() < 0.02
            chosen = reference.mask(start.selection, start.weight.shape)
            if keep_zeros:
                chosen &= start.weight != 0
            assert torch.equal(mine.weight.cpu()[~chosen], start.weight[~chosen])
            with torch.no_grad():  # go on from the same place
                mine.weight.copy_(theirs.weight)
                for name in ("exp_avg", "exp_avg_sq"):
                    mine.state[name].copy_(theirs.state[name])
    for slot, start in zip(got[:2], base, strict=False):
        chosen = reference.mask(start.selection, start.weight.shape) & (start.weight != 0)
        assert (slot.weight.cpu() != start.weight)[chosen].double().mean() > 0.9


def test_kernels_that_count_in_64_bits_are_those_in_32(device, monkeypatch):
    host = pytest.importorskip("nanoadam.ops.triton", exc_type=ImportError)
    from nanoadam.ops import tables

    ends = []
    for wide in (False, True):
        monkeypatch.setattr(tables, "WIDE_FROM", 1 if wide else 2**31)
        slots = [to_device(slot, device) for slot in slots_of(torch.bfloat16)]
        entries = [torch.empty(slot.layout.shape, device=device) for slot in slots]
        torch.manual_seed(1)
        host.gather(slots, [torch.randn_like(s.weight) for s in slots], entries, [False] * len(slots))
        for slot in slots:
            slot.steps = 1
        adam = Adam(1e-2, 0.9, 0.999, 1e-8, 0.1, False, True, 3)
        host.update(slots, entries, adam)
        host.select(slots, [slot.layout for slot in slots], rule(step=1), None)
        ends.append(torch.cat([s.weight.float().flatten() for s in slots] + [s.state["index"].float() for s in slots]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_a_batch_looks_up_give_an_embeddings_entries(ops, device, dtype):
    torch.manual_seed(0)
    table = torch.randn(90, 24, device=device).to(dtype)
    slot = new_slot(table)
    lay = layout(table.shape, 0.1)
    ops.select([slot], [lay], rule(), None)
    selection = Selection(slot.state["index"], lay)
    ids = torch.randint(0, 40, (70,), device=device)
    ids[:40], ids[::9] = 7, -1  # one word many times, some that count for nothing
    gradient = torch.randn(70, 24, device=device).to(dtype)
    dense = torch.zeros(90, 24, dtype=torch.float64)
    dense.index_add_(0, ids[ids >= 0].cpu(), gradient[ids >= 0].double().cpu())
    held = (selection.index >= 0).cpu()
    position = reference.positions(selection.index.clamp(min=0), lay).cpu()
    expected = torch.where(held, dense.view(-1)[position], 0.0)
    entries = ops.row_entries(selection, ids, gradient)
    assert entries.dtype == torch.float32
    assert entries.equal(ops.row_entries(selection, ids, gradient))
    torch.testing.assert_close(entries.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    assert not ops.row_entries(selection, ids[:0], gradient[:0]).any()
