"""FSDP2: what N processes do to their shards is what one process does to the whole."""

import copy
import itertools

import pytest
import torch
from torch import nn

from nanoadam import linear, param_groups
from nanoadam.gradients import SelectedGradient
from nanoadam.optimizer import NanoAdam

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    pytest.mark.timeout(400),  # the first one waits for several processes
]

WIDE = 2048  # rows of which two are a chunk, so that shards of an even number of rows end between chunks
OPTIONS = {"lr": 1e-2, "density": 0.2, "mask_interval": 3, "state_dtype": torch.float32}
STEPS, ACCUMULATE = 4, 2


class Wide(nn.Module):
    """An embedding, two blocks that are sharded by themselves, a norm, a head."""

    def __init__(self, rows=16, bias=True, head=4):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(rows, WIDE)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDE, rows, bias=bias), nn.Tanh(), nn.Linear(rows, WIDE, bias=bias)) for _ in "ab"
        )
        self.norm = nn.LayerNorm(WIDE, bias=bias, elementwise_affine=bias)
        self.head = nn.Linear(WIDE, head, bias=bias)

    def forward(self, ids):
        hidden = self.embedding(ids).mean(1)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(self.norm(hidden))


def batch(rank, number):
    ids = torch.randint(0, 3, (6, 5), generator=torch.Generator().manual_seed(100 * number + rank), device="cpu")
    return ids.to(torch.get_default_device())


def loss_of(model, rank, number):
    return model(batch(rank, number)).float().square().mean()


def shard(model, **options):
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights(model):
    return torch.cat([whole(p).detach().reshape(-1).double() for p in model.parameters()])


# Name: model, groups, optimizer, how it is sharded, whether gradients are clipped.
EQUAL = {
    "weights": ({}, {}, {}, {}, True),
    "kept whole after forward": (
        {"bias": False},
        {"dense": ()},
        {"moments": "reset", "criterion": "largest"},
        {"reshard_after_forward": False},
        True,
    ),
    "schedule": ({}, {}, {"density": linear(0.5, 0.1, total_steps=5, interval=2)}, {}, True),
    "random": ({}, {}, {"criterion": "random"}, {}, False),
    "by gradient": ({}, {}, {"criterion": "gradient"}, {}, False),
    "dense gradients": ({}, {}, {"gradient_release": False}, {}, False),
    "columns": ({}, {"granularity": "column"}, {}, {}, True),
    "offloaded": ({}, {}, {"state_dtype": torch.bfloat16}, {"offload": True}, True),
}


def setting(name):
    model, groups, options, sharding, clip = EQUAL[name]
    model = Wide(**model)
    if sharding.get("offload"):
        from torch.distributed.fsdp import CPUOffloadPolicy

        sharding = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    return model, {"weight_decay": 0.1, **groups}, {**OPTIONS, **options}, sharding, clip


def train(model, opt, batches, clip, before=lambda micro: None):
    """Train; `batches(step, micro)` backpropagates."""
    for step in range(STEPS):
        for micro in range(ACCUMULATE):
            before(micro)
            batches(step, micro)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        opt.step()
        opt.zero_grad(set_to_none=step % 2 == 0)


def equal(rank, size, name):
    model, groups, options, sharding, clip = setting(name)
    shard(model, **sharding)
    opt = NanoAdam(param_groups(model, **groups), **options)
    train(
        model,
        opt,
        lambda step, micro: (loss_of(model, rank, ACCUMULATE * step + micro) / ACCUMULATE).backward(),
        clip,
    )
    return weights(model)


def on_one(size, name):
    model, groups, options, _, clip = setting(name)
    opt = NanoAdam(param_groups(model, **groups), **options, local=True)

    def batches(step, micro):
        for rank in range(size):
            (loss_of(model, rank, ACCUMULATE * step + micro) / (ACCUMULATE * size)).backward()

    train(model, opt, batches, clip)
    return weights(model)


def gradients(rank, size):
    """What `p.grad` is, and that whatever torch does to it is what it does to the dense one."""
    model = shard(Wide(rows=10))  # of three and two rows, or five: not between chunks
    opt = NanoAdam(param_groups(model), **OPTIONS)
    loss_of(model, rank, 0).backward()
    grad = model.blocks[0][0].weight.grad
    kind = type(grad).__name__, type(grad._local_tensor).__name__
    dense = {name: dense_of(p.grad).clone() for name, p in model.named_parameters()}
    norms = [torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in dense.values()]), order) for order in (2, 1)]
    ours = [torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9, norm_type=order) for order in (2, 1)]
    copied = copy.deepcopy(grad)
    loss_of(model, rank, 0).backward()  # added to what is there
    twice = torch.equal(dense_of(model.blocks[0][0].weight.grad), 2 * dense["blocks.0.0.weight"])
    kept = torch.equal(dense_of(copied), dense["blocks.0.0.weight"])
    bytes_ = opt.gradient_bytes(), sum(p.grad._local_tensor.nbytes for p in model.parameters())
    selected = [whole(opt.selected(p)).sum().item() for p in model.parameters()]
    positions = [opt.positions(p) for p in model.parameters()]
    opt.zero_grad(set_to_none=False)
    zeroed = not dense_of(model.blocks[0][0].weight.grad).any()
    return {
        "kind": kind, "twice": twice, "kept": kept, "zeroed": zeroed, "bytes": bytes_, "selected": selected,
        "norms": [(float(a), float(whole(b))) for a, b in zip(norms, ours, strict=True)], "positions": positions,
        "state": opt.state_bytes(),
    }  # fmt: skip


def dense_of(gradient):
    gradient = whole(gradient)
    return gradient.to_dense() if isinstance(gradient, SelectedGradient) else gradient


def against_adamw(rank, size):
    """At density 1 it is torch's AdamW, whatever the shards."""
    ends = []
    for kind in (NanoAdam, torch.optim.AdamW):
        model = shard(Wide(rows=7, head=3))
        options = {"density": 1.0, "state_dtype": torch.float32} if kind is NanoAdam else {}
        opt = kind(
            param_groups(model) if kind is NanoAdam else model.parameters(), lr=1e-3, weight_decay=0.1, **options
        )
        for group in opt.param_groups:
            group["weight_decay"] = 0.1
        for step in range(4):
            loss_of(model, rank, step).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
            opt.zero_grad()
        ends.append(weights(model))
    return ends


def synchronised(rank, size):
    """Accumulation under set_requires_gradient_sync(False) ends where accumulation with it does."""
    ends = []
    for quiet in (False, True):
        model = shard(Wide())
        opt = NanoAdam(param_groups(model), **OPTIONS)
        train(
            model,
            opt,
            lambda step, micro, model=model: (loss_of(model, rank, ACCUMULATE * step + micro) / 2).backward(),
            True,
            lambda micro, model=model, quiet=quiet: model.set_requires_gradient_sync(not quiet or micro == 1),
        )
        ends.append(weights(model))
    return ends


def uneven(rank, size):
    """Shards that end within chunks, and processes that have nothing of a tensor: right, though not one process's."""
    model = shard(Wide(rows=3, head=1).to(torch.bfloat16))
    opt = NanoAdam(param_groups(model, granularity="column", dense=()), lr=1e-2, mask_interval=2, density=0.1)
    before = weights(model)
    for step in range(5):
        loss_of(model, rank, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()
        moved = sum(int(whole(opt.selected(p)).sum()) for p in model.parameters() if p.dim() > 1)
        opt.zero_grad()
    return before, weights(model), moved


def mixed(rank, size):
    """A mixed-precision policy, a loss scale, an overflow on one process only."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = shard(Wide(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    opt = NanoAdam(param_groups(model), **OPTIONS)
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=8.0)
    ends = []
    for step in range(4):
        factor = float("inf") if step == 2 and rank == 1 else 1.0
        scaler.scale(loss_of(model, rank, step) * factor).backward()
        if step % 2:
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        ends.append(weights(model))
    return [torch.equal(a, b) for a, b in itertools.pairwise(ends)], ends[-1], scaler.get_scale()


def hybrid(rank, size):
    """HSDP: replicas of shards."""
    from torch.distributed.device_mesh import init_device_mesh

    model = shard(
        Wide(),
        mesh=init_device_mesh(torch.get_default_device().type, (2, size // 2), mesh_dim_names=("replicas", "shards")),
    )
    opt = NanoAdam(param_groups(model, weight_decay=0.1), **OPTIONS)
    train(model, opt, lambda s, m: (loss_of(model, rank, ACCUMULATE * s + m) / ACCUMULATE).backward(), True)
    return weights(model)


def tensor_parallel(rank, size):
    """Layers cut along dimensions 0 and 1."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    ends = []
    for cut in (False, True):
        model = Wide(bias=False)
        if cut:
            mesh = init_device_mesh(torch.get_default_device().type, (size,))
            for block in model.blocks:
                parallelize_module(block, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        opt = NanoAdam(param_groups(model), **{**OPTIONS, "density": 1.0}, local=not cut)
        for step in range(4):
            loss_of(model, 0, step).backward()
            opt.step()
            opt.zero_grad()
        ends.append(weights(model))
    refused = None
    try:
        NanoAdam(param_groups(model, granularity="column"))
    except ValueError as error:
        refused = str(error)
    return ends, refused


def switched(rank, size):
    """Parameters put into the groups after the optimizer was made, as accelerate does it."""
    model = Wide()
    opt = NanoAdam(param_groups(model), **OPTIONS)
    names = {id(p): name for name, p in model.named_parameters()}
    members = [[names[id(p)] for p in group["params"]] for group in opt.param_groups]
    shard(model)
    now = dict(model.named_parameters())
    for group, mine in zip(opt.param_groups, members, strict=True):
        group["params"] = [now[name] for name in mine]
    kinds = []
    for step in range(3):
        loss_of(model, rank, step).backward()
        kinds.append(type(model.head.weight.grad._local_tensor).__name__)
        kinds.append(type(model.embedding.weight.grad._local_tensor).__name__)
        opt.step()
        opt.zero_grad()
    fresh = shard(Wide())
    other = NanoAdam(param_groups(fresh), **OPTIONS)
    for step in range(3):
        loss_of(fresh, rank, step).backward()
        other.step()
        other.zero_grad()
    return kinds, torch.equal(weights(model), weights(fresh)), len(opt.state)


def on_two(rank, size):
    found = {("equal", name): equal(rank, size, name) for name in EQUAL}
    for function in (gradients, against_adamw, synchronised, uneven, mixed, tensor_parallel, switched):
        found[function.__name__] = function(rank, size)
    return found


def on_four(rank, size):
    found = {("equal", name): equal(rank, size, name) for name in ("columns",)}
    return {**found, "hybrid": hybrid(rank, size), "uneven": uneven(rank, size)}


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_are_one_with_both_batches(two, name):
    first, second = (end["equal", name] for end in two)
    assert torch.equal(first, second)
    apart = (first - on_one(2, name)).abs() > 1e-3
    assert apart.sum() <= (20 if name == "by gradient" else 0)  # gradients are rounded, so some choose otherwise


@pytest.mark.parametrize("name", ["columns", "hybrid"])
def test_four_processes_are_one_with_four_batches(four, name):
    ends = [end["hybrid" if name == "hybrid" else ("equal", name)] for end in four]
    assert all(torch.equal(ends[0], end) for end in ends)
    torch.testing.assert_close(ends[0], on_one(4, name if name != "hybrid" else "weights"), rtol=1e-3, atol=1e-3)


def test_gradients_are_sharded_and_selected(two):
    for end in (end["gradients"] for end in two):
        assert end["kind"] == ("DTensor", "SelectedGradient")
        assert end["twice"]
        assert end["kept"]
        assert end["zeroed"]
        for expected, norm in end["norms"]:
            assert norm == pytest.approx(expected, rel=1e-5)
        ours, dense = end["bytes"]
        assert ours < 0.5 * dense


def test_positions_and_selected_are_of_the_full_tensor(two):
    first, second = (end["gradients"] for end in two)
    assert first["selected"] == second["selected"]
    for count, mine, others in zip(first["selected"], first["positions"], second["positions"], strict=True):
        assert (
            mine is None or mine.numel() == 0 or (mine.numel() + others.numel() == count and mine.max() < others.min())
        )


def test_at_density_one_it_is_adamw(two):
    ours, theirs = two[0]["against_adamw"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_accumulation_without_synchronising_ends_in_the_same_place(two):
    torch.testing.assert_close(*two[0]["synchronised"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ends", ["two", pytest.param("four", marks=pytest.mark.slow)])
def test_uneven_and_empty_shards(ends, request):
    found = [end["uneven"] for end in request.getfixturevalue(ends)]
    before, after, moved = found[0]
    assert all(torch.equal(after, end[1]) for end in found)
    assert after.isfinite().all()
    model = Wide(rows=3, head=1)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert 0.1 * matrices < moved < 0.3 * matrices  # one of three columns, where there are only three
    changed = (before != after).float().mean()
    assert 0.01 < changed < 0.5


def test_mixed_precision_and_an_overflow_that_one_process_sees(two):
    still, _, scale = two[0]["mixed"]
    assert still == [False, True, False]
    assert scale == 4.0
    assert torch.equal(two[0]["mixed"][1], two[1]["mixed"][1])


def test_tensor_parallel_layers(two):
    (alone, cut), refused = two[0]["tensor_parallel"]
    torch.testing.assert_close(cut, alone, rtol=1e-3, atol=1e-3)
    assert "sharded along its inputs" in refused


def test_flat_tensors_in_place_of_matrices_are_refused():
    """As DeepSpeed's ZeRO-1 and -2 put them into the groups; ZeRO-3 marks what it takes apart."""
    model = Wide()
    opt = NanoAdam(param_groups(model), **OPTIONS)
    group = opt.param_groups[0]
    group["params"] = [torch.cat([p.detach().reshape(-1) for p in group["params"]]).requires_grad_()]
    group.pop("param_names", None)
    with pytest.raises(TypeError, match="DeepSpeed ZeRO-1 and -2 do"):
        opt.step()
    model.embedding.weight.ds_id = 0
    with pytest.raises(TypeError, match="ZeRO-3"):
        NanoAdam(param_groups(model), **OPTIONS)


def test_parameters_that_are_sharded_after_the_optimizer_was_made(two):
    for kinds, same, states in (end["switched"] for end in two):
        assert kinds[-1] == "SelectedGradient"
        assert same
        assert states == len(list(Wide().parameters()))
