"""Saving, loading, copying: training goes on bit for bit."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch.utils._pytree import tree_leaves

from crossed import crossed
from nanoadam.optimizer import NanoAdam
from nanoadam.schedules import linear


def network(dtype):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 80), torch.nn.Tanh(), torch.nn.Linear(80, 4)).to(dtype)


def make(model, **options):
    schedule = linear(0.3, 0.1, total_steps=20, interval=7)
    return NanoAdam(model.parameters(), **{"lr": 1e-2, "density": schedule, "mask_interval": 3, "seed": 5, **options})


def advance(model, opt, first, last):
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(8, 12, generator=generator).to(dtype)).float().square().mean().backward()
        opt.step()
        opt.zero_grad()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def bits(model):
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


@pytest.mark.parametrize(
    ("options", "dtype"),
    crossed(
        [{}, {"moments": "reset"}, {"state_dtype": torch.float32}, {"density": 0.2, "mask_interval": 4}],
        [torch.float32, torch.bfloat16, torch.float16],
    ),
)
def test_resuming_at_any_step_continues_bit_for_bit(dtype, options):
    whole = network(dtype)
    opt = make(whole, **options)
    checkpoints = {}
    for step in range(24):
        checkpoints[step] = through_a_file({"model": whole.state_dict(), "opt": opt.state_dict()})
        advance(whole, opt, step, step + 1)
    for step in (0, 1, 3, 7, 8, 14, 22):
        model = network(dtype)
        resumed = NanoAdam(model.parameters())  # every option comes from the state
        saved = copy.deepcopy(checkpoints[step])
        model.load_state_dict(saved["model"])
        resumed.load_state_dict(state_dict=saved["opt"])
        advance(model, resumed, step, 24)
        assert torch.equal(bits(model), bits(whole)), step
        for mine, theirs in zip(resumed.state.values(), opt.state.values(), strict=True):
            for name in theirs:
                assert mine[name].dtype == theirs[name].dtype
                assert torch.equal(mine[name], theirs[name])


def test_index_dtypes_survive_loading_into_bf16_parameters():
    model = network(torch.bfloat16)
    opt = make(model)
    advance(model, opt, 0, 5)
    fresh = make(model)
    fresh.load_state_dict(through_a_file(opt.state_dict()))
    state = fresh.state[model[0].weight]
    assert (state["index"].dtype, state["entry_step"].dtype, state["exp_avg"].dtype) == (
        torch.int16,
        torch.int16,
        torch.bfloat16,
    )
    assert torch.equal(state["index"], opt.state[model[0].weight]["index"])


def test_a_loaded_state_is_a_copy():
    model, twin = network(torch.float32), network(torch.float32)
    opt, other = make(model), make(twin)
    advance(model, opt, 0, 2)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(opt.state_dict())
    advance(model, opt, 2, 10)
    advance(twin, other, 2, 10)
    assert torch.equal(bits(model), bits(twin))


def test_pickling_the_optimizer_with_its_model_continues_bit_for_bit():
    model = network(torch.float32)
    opt = make(model, release_bytes=123)
    advance(model, opt, 0, 5)
    twin, other = pickle.loads(pickle.dumps((model, opt)))
    assert other.release_bytes == 123
    advance(model, opt, 5, 12)
    advance(twin, other, 5, 12)
    assert torch.equal(bits(model), bits(twin))


def test_schedulers_resume_with_it():
    runs = []
    for interrupted in (False, True):
        model = network(torch.float32)
        opt = make(model)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)
        for step in range(12):
            if interrupted and step == 6:
                saved = through_a_file([opt.state_dict(), scheduler.state_dict()])
                opt = make(model)
                scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)
                opt.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            advance(model, opt, step, step + 1)
            scheduler.step()
        runs.append(bits(model))
    assert torch.equal(*runs)


@pytest.mark.parametrize("scheduled", [False, True])
def test_distributed_checkpoint_loads_into_a_fresh_optimizer(tmp_path, scheduled):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    options = {} if scheduled else {"density": 0.2}
    model = network(torch.bfloat16)
    opt = make(model, **options)
    advance(model, opt, 0, 8)
    saved = {"opt": get_optimizer_state_dict(model, opt), "model": model.state_dict()}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)

    twin = network(torch.bfloat16)
    other = make(twin, **options)
    if scheduled:
        other.prepare(8)  # DCP reads into tensors of the shapes that were saved
    target = {"opt": get_optimizer_state_dict(twin, other), "model": twin.state_dict()}
    dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    twin.load_state_dict(target["model"])
    set_optimizer_state_dict(twin, other, target["opt"])
    assert torch.equal(bits(model), bits(twin))
    advance(model, opt, 8, 16)
    advance(twin, other, 8, 16)
    assert torch.equal(bits(model), bits(twin))


def test_a_prepared_optimizer_is_a_fresh_one():
    with pytest.raises(ValueError, match="new optimizer"):
        make(network(torch.float32)).prepare(-1)
    model = network(torch.float32)
    opt = make(model)
    advance(model, opt, 0, 1)
    with pytest.raises(ValueError, match="new optimizer"):
        opt.prepare(3)


def test_every_option_comes_from_the_state_what_is_dense_and_what_is_released_too():
    for options in ({"criterion": "gradient", "density": 0.2}, {"dense": True}):
        model = network(torch.float32)
        groups = [{"params": list(model.parameters()), **options}]
        opt = NanoAdam(groups, lr=1e-2)
        advance(model, opt, 0, 3)
        twin = copy.deepcopy(model)
        other = NanoAdam(twin.parameters())
        other.load_state_dict(opt.state_dict())
        advance(model, opt, 3, 8)
        advance(twin, other, 3, 8)
        assert torch.equal(bits(model), bits(twin))


def test_a_parameter_that_missed_a_refresh_by_gradient_is_selected_from_when_it_has_one():
    runs = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        p, q = torch.nn.Parameter(torch.randn(4, 50)), torch.nn.Parameter(torch.randn(4, 50))
        options = {"criterion": "gradient", "density": 0.2, "mask_interval": 5, "lr": 1e-2}
        opt = NanoAdam([p, q], **options)
        for step in range(8):
            if interrupted and step == 2:
                saved = through_a_file(opt.state_dict())
                opt = NanoAdam([p, q], **options)
                opt.load_state_dict(saved)
            (p.square().sum() + (q.square().sum() if step else 0.0)).backward()
            opt.step()
            opt.zero_grad()
        runs.append(torch.cat([p.detach(), q.detach()]))
    assert torch.equal(*runs)


def test_freezing_saving_and_unfreezing_in_mid_schedule_goes_on():
    model = network(torch.float32)
    opt = make(model)
    advance(model, opt, 0, 5)
    model[0].weight.requires_grad_(False)
    advance(model, opt, 5, 9)
    twin = copy.deepcopy(model)
    other = make(twin)
    other.load_state_dict(through_a_file(opt.state_dict()))
    for m, o in ((model, opt), (twin, other)):
        m[0].weight.requires_grad_(True)
        advance(m, o, 9, 16)
    assert torch.equal(bits(model), bits(twin))


def test_loading_what_does_not_fit_changes_nothing():
    model = network(torch.float32)
    opt = make(model)
    advance(model, opt, 0, 4)
    before = copy.deepcopy(opt.state_dict())
    other = torch.nn.Linear(7, 30)
    wrong_shape = NanoAdam(
        [other.weight, other.bias, torch.nn.Parameter(torch.ones(4, 80)), torch.nn.Parameter(torch.ones(4))]
    )
    adamw = torch.optim.AdamW(model.parameters())
    fewer = NanoAdam([model[0].weight])
    incomplete = copy.deepcopy(before)
    del incomplete["state"][0]["entry_step"]
    for bad, word in (
        (wrong_shape.state_dict(), "'parameter 0 of group 0'"),
        (adamw.state_dict(), "not saved by NanoAdam"),
        (fewer.state_dict(), r"\[1\]"),
        (incomplete, "'entry_step': None"),
        ({}, "'param_groups'"),
    ):
        with pytest.raises(ValueError, match=word):
            opt.load_state_dict(bad)
        after = opt.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for key, state in before["state"].items():
            assert all(torch.equal(state[name], after["state"][key][name]) for name in state)


class Live(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes of new tensors alive at once."""

    def __init__(self):
        super().__init__()
        self.users, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                place = storage.data_ptr()
                if place and (place in self.users or place not in known):
                    self.users.setdefault(place, []).append(1)
                    self.now += storage.nbytes() if len(self.users[place]) == 1 else 0
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(tensor, self.gone, place, storage.nbytes())
        return out

    def gone(self, place, size):
        self.users[place].pop()
        if not self.users[place]:
            del self.users[place]
            self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_its_own_state_takes_no_memory(dtype):
    # accelerate's wrapper, and so the Trainer, does this to every optimizer when a run begins.
    model = torch.nn.Linear(512, 512).to(dtype)
    opt = NanoAdam(model.parameters(), density=0.1)
    before = {name: value.data_ptr() for name, value in opt.state[model.weight].items() if name != "step"}
    with Live() as live:
        opt.load_state_dict(opt.state_dict())
    assert live.peak < 0.15 * opt.state_bytes()  # whether all indices are empty is asked of one tensor at a time
    assert {name: value.data_ptr() for name, value in opt.state[model.weight].items() if name != "step"} == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_a_checkpoint_takes_one_copy_of_the_state(dtype):
    model = torch.nn.Linear(512, 512).to(dtype)
    saved = through_a_file(NanoAdam(model.parameters(), density=0.1).state_dict())
    opt = NanoAdam(model.parameters(), density=0.1)
    with Live() as live:
        opt.load_state_dict(saved)
    assert live.peak < 1.15 * opt.state_bytes()
    mine = {value.data_ptr() for state in opt.state.values() for value in state.values()}
    assert not mine & {value.data_ptr() for state in saved["state"].values() for value in state.values()}


def test_a_tensor_without_gradient_when_the_density_falls_can_be_saved_and_is_selected_from_later():
    def make():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(8, 64)) for _ in range(2)]
        schedule = linear(0.5, 0.1, total_steps=8, interval=2)
        return parameters, NanoAdam(parameters, lr=1e-2, density=schedule, mask_interval=100, criterion="gradient")

    def run(parameters, opt, steps):
        for step in steps:
            for i, parameter in enumerate(parameters):
                parameter.grad = None if i == 1 and 2 <= step < 5 else torch.randn(8, 64, generator=seeded(step))
            opt.step()
        return torch.cat([parameter.detach().flatten() for parameter in parameters])

    whole = run(*make(), range(8))
    parameters, opt = make()
    run(parameters, opt, range(4))
    assert not opt.selected(parameters[1]).any()
    copies, resumed = make()
    for own, parameter in zip(copies, parameters, strict=True):
        own.data.copy_(parameter.data)
    resumed.load_state_dict(opt.state_dict())
    assert torch.equal(run(copies, resumed, range(4, 8)), whole)
    assert resumed.selected(copies[1]).any()


def seeded(step):
    return torch.Generator().manual_seed(step)
