"""torch.distributed.checkpoint: the same processes go on bit for bit, others with every moment that they can keep."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from test_shards import OPTIONS, Wide, loss_of, shard, weights, whole

from nanoadam import linear, param_groups
from nanoadam.optimizer import NanoAdam

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    pytest.mark.timeout(400),  # the first one waits for several processes
]

KINDS = {  # rows of the model, groups, optimizer
    "weights": (16, {}, {"density": linear(0.5, 0.1, total_steps=5, interval=2)}),
    "uneven": (3, {}, {"state_dtype": torch.bfloat16}),
    "columns": (16, {"granularity": "column"}, {}),
    "reset": (16, {}, {"moments": "reset"}),
}


def setting(kind, sharded=True):
    rows, groups, options = KINDS[kind]
    model = Wide(rows=rows)
    model = shard(model) if sharded else model
    return model, NanoAdam(param_groups(model, **groups), **{**OPTIONS, **options}, local=not sharded)


def train(model, opt, rank, steps):
    for step in steps:
        loss_of(model, rank, step).backward()
        opt.step()
        opt.zero_grad()


def states(model, opt):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model_state, opt_state = get_state_dict(model, opt)
    return {"model": model_state, "optim": opt_state}


def load(folder, model, opt):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    opt.prepare(3)
    found = states(model, opt)
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=found["model"], optim_state_dict=found["optim"])


def moments(model, opt):
    """Of every weight by name, as dense tensors: those of weights that are not selected are NaN."""
    found = {}
    for name, p in model.named_parameters():
        slot = opt._slots[p]
        if slot.selection is None:
            continue
        dense = torch.full(slot.weight.shape, float("nan"))
        if dense.numel():
            from nanoadam.ops import reference

            reference.put(slot.selection, slot.state["exp_avg_sq"].float(), dense)
        from nanoadam.shards import like

        found[name] = whole(like(dense, p))
    return found


def kept(before, after):
    """Weights selected before and after; of them, those whose moment is the same; and all selected before."""
    both = [(a, b, ~a.isnan() & ~b.isnan()) for a, b in ((before[name], after[name]) for name in before)]
    return (
        sum(int(held.sum()) for _, _, held in both),
        sum(int((a[held] == b[held]).sum()) for a, b, held in both),
        sum(int((~a.isnan()).sum()) for a, _, _ in both),
    )


def folder_for(rank, name):
    """The same on every process."""
    folders = [os.path.join(tempfile.gettempdir(), f"nanoadam-{os.getpid()}-{name}")]
    dist.broadcast_object_list(folders)
    return folders[0]


def save_and_go_on(rank, size):
    import torch.distributed.checkpoint as dcp

    found = {}
    for kind in KINDS:
        model, opt = setting(kind)
        train(model, opt, rank, range(3))
        folder = folder_for(rank, kind)
        if kind == "weights":
            dcp.async_save(states(model, opt), checkpoint_id=folder).result()
        else:
            dcp.save(states(model, opt), checkpoint_id=folder)
        then = moments(model, opt)
        train(model, opt, rank, range(3, 6))
        again, other = setting(kind)
        load(folder, again, other)
        same = kept(then, moments(again, other))
        train(again, other, rank, range(3, 6))
        found[kind] = (weights(model), weights(again), same, folder, then)
    return found


def exported(rank, size, kind):
    """A full, unsharded export, taken up by one process and by shards."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model, opt = setting(kind)
    train(model, opt, rank, range(3))
    options = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(model, opt, options=options)
    plain, alone = setting(kind, sharded=False)
    set_optimizer_state_dict(plain, alone, state)
    back, other = setting(kind)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(back, other, state, options=options)
    then = moments(model, opt)
    found = kept(then, moments(plain, alone)), kept(then, moments(back, other))
    taken, third = setting(kind)  # and what one process has saved is taken up by shards
    train(plain, alone, 0, range(1))
    third.load_state_dict(alone.state_dict())
    return (*found, kept(moments(plain, alone), moments(taken, third)))


def resumed_by_others(rank, size, folders):
    found = {}
    for kind, folder in folders.items():
        model, opt = setting(kind)
        load(folder, model, opt)
        found[kind] = moments(model, opt)
        train(model, opt, rank, range(3, 5))
        found[kind, "end"] = weights(model)
    return found


def on_two(rank, size):
    return {
        "saved": save_and_go_on(rank, size),
        "exported": [exported(rank, size, kind) for kind in ("uneven", "columns")],
    }


def on_four(rank, size):
    """Saves with four, for one process to resume."""
    import torch.distributed.checkpoint as dcp

    model, opt = setting("uneven")
    train(model, opt, rank, range(3))
    folder = folder_for(rank, "four")
    dcp.save(states(model, opt), checkpoint_id=folder)
    return folder, moments(model, opt)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_processes_go_on_bit_for_bit(two, kind):
    for end in two:
        straight, resumed, (both, same, before), _, _ = end["saved"][kind]
        assert torch.equal(straight, resumed)
        assert both == same == before > 0


def test_an_export_is_taken_up_by_one_process_and_one_process_by_shards(two):
    for both, same, before in (each for found in two[0]["exported"] for each in found):
        assert both == same
        assert both > 0.98 * before  # of chunks that are cut otherwise, some have less room


@pytest.fixture(scope="module")
def one(two, four):
    """A mesh of one process that resumes what two and four have saved."""
    folders = {kind: two[0]["saved"][kind][3] for kind in KINDS}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return resumed_by_others(0, 1, folders), resumed_by_others(0, 1, {"uneven": four[0][0]})
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_with_what_two_have_saved(two, one, kind):
    both, same, before = kept(two[0]["saved"][kind][4], one[0][kind])
    assert both == same
    assert both == before or (kind == "uneven" and both > 0.98 * before)
    assert one[0][kind, "end"].isfinite().all()


def test_one_process_goes_on_with_what_four_have_saved(four, one):
    both, same, before = kept(four[0][1], one[1]["uneven"])
    assert both == same
    assert both > 0.98 * before
