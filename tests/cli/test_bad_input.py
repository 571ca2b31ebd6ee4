"""Every bad input gives an error that names the thing, the value and the remedy, and changes nothing."""

import pytest
import torch

from nanoadam.optimizer import NanoAdam
from nanoadam.schedules import Intervals


def weight(dtype=torch.float32, **options):
    return torch.nn.Parameter(torch.randn(4, 30).to(dtype), **options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "lr .*-1.0"),
        ({"lr": float("nan")}, ValueError, "lr .*nan"),
        ({"lr": torch.ones(2)}, ValueError, "one number"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas .*1.0"),
        ({"betas": 0.9}, ValueError, "betas"),
        ({"eps": -1e-8}, ValueError, "eps"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay .*-0.1"),
        ({"density": 0.0}, ValueError, r"density must be in \(0, 1\].*0.0"),
        ({"density": 1.5}, ValueError, "1.5"),
        ({"density": "linear"}, ValueError, r"nanoadam.linear\(...\)"),
        ({"mask_interval": 0}, ValueError, "mask_interval .*0"),
        ({"mask_interval": 2.5}, ValueError, "mask_interval .*2.5"),
        ({"mask_interval": (0, 1)}, ValueError, "mask_interval"),
        ({"mask_interval": Intervals(0, 1)}, ValueError, "mask_interval .*0"),
        ({"betas": (None, 0.9)}, ValueError, "betas .*None"),
        ({"maximize": "a"}, TypeError, "maximize .*'a'"),
        ({"keep_zeros": 1}, TypeError, "keep_zeros .*1"),
        ({"gradient_release": "no"}, TypeError, "gradient_release .*'no'"),
        ({"release_bytes": -1}, ValueError, "release_bytes .*-1"),
        ({"local": None}, TypeError, "local .*None"),
        ({"criterion": "small"}, ValueError, "smallest, largest, random, gradient; got 'small'"),
        ({"moments": "keep"}, ValueError, "carry, reset; got 'keep'"),
        ({"state_dtype": torch.float16}, ValueError, "state_dtype .*float16"),
        ({"grad_dtype": torch.int8}, ValueError, "grad_dtype .*int8"),
        ({"seed": -1}, ValueError, "seed .*-1"),
        ({"capturable": True}, ValueError, "capturable=False"),
    ],
)
def test_options_out_of_range_are_named(options, error, words):
    with pytest.raises(error, match=words):
        NanoAdam([weight()], **options)


@pytest.mark.parametrize(
    ("parameter", "error", "words"),
    [
        (lambda: weight(torch.complex64), TypeError, "'body.w' is complex; .*float32"),
        (lambda: weight(torch.float64), TypeError, "'body.w' is float64"),
        (lambda: weight(torch.float8_e4m3fn), TypeError, "'body.w' is float8_e4m3fn"),
        (lambda: torch.nn.Parameter(torch.ones(4, 4, dtype=torch.int32), requires_grad=False), TypeError, "int32"),
        (lambda: torch.nn.Parameter(torch.randn(4, 4).to_sparse()), TypeError, r"to_dense\(\)"),
    ],
)
def test_parameters_it_cannot_serve_are_named(parameter, error, words):
    with pytest.raises(error, match=words):
        NanoAdam([("body.w", parameter())])


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    p = weight()
    opt = NanoAdam([p], density=0.1)
    for bad in (
        {"params": [weight()], "density": 2.0},
        {"params": [weight(torch.complex64)]},
        {"params": [p]},
        {"params": [3]},
    ):
        with pytest.raises((ValueError, TypeError)):
            opt.add_param_group(bad)
    assert len(opt.param_groups) == 1
    assert list(opt.state) == [p]
    p.square().sum().backward()
    opt.step()


@pytest.mark.parametrize("released", [True, False])
def test_a_sparse_gradient_is_refused_and_nothing_changes(released):
    table = torch.nn.Embedding(10, 8, sparse=True)
    before = table.weight.detach().clone()
    opt = NanoAdam([("table", table.weight)], gradient_release=released)
    with pytest.raises(TypeError, match="'table' is sparse.*sparse=False"):
        table(torch.arange(3)).sum().backward()
        opt.step()
    assert torch.equal(table.weight, before)
    assert table.weight.grad is not None
    assert opt.param_groups[0]["steps"] == 0
    assert opt.state[table.weight]["step"] == 0


def test_a_sparse_gradient_of_a_dense_tensor_is_refused_before_anything_is_applied():
    table, other = torch.nn.Embedding(10, 8, sparse=True), weight()
    before = other.detach().clone()
    opt = NanoAdam([{"params": [other]}, {"params": [table.weight], "dense": True}])
    (table(torch.arange(3)).sum() + other.sum()).backward()
    with pytest.raises(TypeError, match="sparse=False"):
        opt.step()
    assert torch.equal(other, before)


def test_asking_for_the_selection_of_a_stranger_is_refused():
    with pytest.raises(ValueError, match="not in this optimizer"):
        NanoAdam([weight()]).selected(weight())


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("NANOADAM_BACKEND", "cuda")
    p = weight()
    opt = NanoAdam([p])
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="NANOADAM_BACKEND .*'cuda'"):
        opt.step()


@pytest.mark.parametrize("state", [{}, {"param_groups": [{}]}])
def test_parameters_are_required(state):
    with pytest.raises(ValueError, match="empty parameter list"):
        NanoAdam([])


def test_a_parameter_without_a_shape_yet_is_named():
    with pytest.raises(TypeError, match="'body.w' has no shape yet"):
        NanoAdam([("body.w", torch.nn.LazyLinear(3).weight)])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_parameter_whose_parts_nobody_can_place_is_refused_by_name():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = torch.nn.Parameter(distribute_tensor(torch.randn(4, 3, 6), mesh, [Shard(2)]))
        with pytest.raises(TypeError, match="'body.w' is placed as .*Shard.dim=2.*: redistribute it"):
            NanoAdam([("body.w", sharded)])
    finally:
        torch.distributed.destroy_process_group()
