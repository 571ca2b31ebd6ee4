"""Tables that the kernels read are kept only as long as they say where things are."""

import pytest
import torch

from nanoadam.optimizer import NanoAdam

pytest.importorskip("nanoadam.ops.triton", exc_type=ImportError)


def trained(backend, device, monkeypatch, between):
    monkeypatch.setenv("NANOADAM_BACKEND", backend)
    generator = torch.Generator().manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in ((6, 70), (3, 130))
    ]
    opt = NanoAdam(parameters, lr=1e-2, density=0.2, mask_interval=1, moments="reset", state_dtype=torch.float32)
    for step in range(6):
        if step == 3:
            between(opt)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        opt.step()
        opt.zero_grad()
    return opt, torch.cat([parameter.detach().flatten() for parameter in parameters])


def carry(opt):
    opt.param_groups[0]["moments"] = "carry"  # ages of their own: one tensor of the state is replaced


def test_a_selection_finds_state_that_was_replaced_in_part(device, monkeypatch):
    opt, weights = trained("triton", device, monkeypatch, carry)
    expected_opt, expected = trained("reference", device, monkeypatch, carry)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(opt.state.values(), expected_opt.state.values(), strict=True):
        assert torch.equal(ours["index"], theirs["index"])
        assert torch.equal(ours["entry_step"], theirs["entry_step"])


def test_a_captured_graph_has_tables_of_its_own(device, monkeypatch):
    from nanoadam.ops import launches as triton
    from nanoadam.ops import tables

    def capture(opt):
        before = {id(slot): dict(slot.cache) for slot in opt._slots.values()}
        monkeypatch.setattr(triton, "capturing", lambda device: True)
        monkeypatch.setattr(triton, "captured", [])
        for slot in opt._slots.values():
            slot.weight.grad = torch.ones_like(slot.weight)
        group = opt.param_groups[0]
        monkeypatch.setitem(group, "mask_interval", 100)  # refreshes stay out of a graph
        monkeypatch.setitem(group, "refreshed_at", group["steps"])
        opt.step()
        opt.zero_grad()
        for slot in opt._slots.values():
            kept = before[id(slot)]
            assert all(slot.cache[name][2] is kept[name][2] for name in ("gather", "update") if name in kept)
        eager = [
            launch for old in before.values() for name in ("gather", "update") if name in old for launch in old[name][2]
        ]
        launches = [kept for kept in triton.captured if isinstance(kept, list)]
        assert len(launches) == 2
        assert not any(launch.table is old.table for own in launches for launch in own for old in eager)
        cached = triton.corrections_of(0.9, 0.999, next(iter(opt.state)).device)  # which may be thrown out of its cache
        assert any(kept is cached for kept in triton.captured)
        monkeypatch.setattr(triton, "capturing", tables.capturing)

    trained("triton", device, monkeypatch, capture)
