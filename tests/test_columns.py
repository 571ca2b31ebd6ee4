"""Linear layers that compute selected columns only: always what a dense backward would have been cut down to."""

import contextlib
import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import nanoadam
from nanoadam import columns
from nanoadam.gradients import SelectedGradient
from nanoadam.optimizer import NanoAdam

OPTIONS = {"lr": 1e-2, "density": 0.25, "mask_interval": 3, "granularity": "column"}


def network(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32, bias=bias),
        nn.ReLU(inplace=True),
        nn.Linear(32, 24, bias=bias),
        nn.Tanh(),
        nn.Linear(24, 4, bias=bias),
    ).to(dtype)


def optimizer_of(model, *, transposed=False, **options):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "roles": ["matrix"] * len(matrices), "transposed": transposed}]
    return NanoAdam([*groups, *([{"params": others, "dense": True}] if others else [])], **{**OPTIONS, **options})


def inputs(step, dtype=torch.float32, shape=(8, 16)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(dtype)


def bits(model):
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def shared(model, x):
    hidden = model[1](model[0](x))
    middle = model[2](hidden) + model[2](hidden * 2)
    return model[4](model[3](middle))


CASES = {
    "plain": lambda m, x: m(x),
    "three dimensions": lambda m, x: m(x.view(2, 4, 16)),
    "one row": lambda m, x: m(x[0]),
    "a transposed input": lambda m, x: m(x.t().contiguous().t()),
    "a shared layer": shared,
    "the weight used outside its layer": lambda m, x: m(x).mean() + functional.linear(x, m[0].weight).tanh().mean(),
    "only outside": lambda m, x: functional.linear(functional.linear(x, m[0].weight), m[2].weight),
    "recomputed": lambda m, x: checkpoint(m, x, use_reentrant=False),
    "recomputed by reentry": lambda m, x: checkpoint(m, x.requires_grad_(), use_reentrant=True),
    "inputs that need no gradient, frozen biases": lambda m, x: m[0].bias.requires_grad_(False) is None or m(x),
    "inputs that need a gradient": lambda m, x: m(x.requires_grad_()),
    "some rows unused": lambda m, x: m(x)[::2],
    "evaluation mode": lambda m, x: m.eval()(x),
    "a part without gradients": lambda m, x: m[2:](torch.no_grad()(m[:2])(x)),
    "retained and twice": lambda m, x: m(x),
    "two losses": lambda m, x: m(x),
    "an expanded gradient": lambda m, x: m(x).sum(),
}


def backward(case, output):
    loss = output.float().square().mean() if output.dim() else output
    if case == "retained and twice":
        loss.backward(retain_graph=True)
        loss.backward()
    elif case == "two losses":
        loss.backward(retain_graph=True)
        output.float().abs().mean().backward()
    else:
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_a_dense_backward_at_the_selected_columns(case, dtype):
    model, twin = network(dtype), network(dtype)
    opt = optimizer_of(model)
    for step in range(2):
        for m in (model, twin):
            backward(case, CASES[case](m, inputs(step, dtype)))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None
            continue
        if p.dim() == 2:
            assert type(p.grad) is SelectedGradient
            assert p.grad.entries.shape == (round(0.25 * p.shape[1]), p.shape[0])
        got = p.grad.to_dense() if p.dim() == 2 else p.grad
        expected = q.grad * opt.selected(p)
        tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 0.05, "atol": 2e-3}
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_that_of_the_layer(cache, dtype):
    model, twin = network(), network()
    opt = optimizer_of(model)
    for m in (model, twin):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            output = m(inputs(0).to(dtype))
            loss = output.float().square().mean()
        assert output.dtype == torch.bfloat16
        loss.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        got = p.grad.to_dense() if p.dim() == 2 else p.grad
        torch.testing.assert_close(got, q.grad * opt.selected(p), rtol=0.02, atol=1e-4)


def trained(model, opt, steps=50, accumulate=2, change=lambda model, opt, step: None, dtype=torch.float32):
    for step in range(steps):
        for micro in range(accumulate):
            model(inputs(10 * step + micro, dtype)).float().square().mean().backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
        change(model, opt, step)
        opt.step()
        opt.zero_grad(set_to_none=step % 2 == 0)
    return bits(model)


@pytest.mark.parametrize(
    "options", [{}, {"criterion": "largest"}, {"criterion": "random"}, {"moments": "reset"}, {"transposed": True}]
)
def test_release_on_and_off_agree_over_refreshes_and_schedules(options):
    ends = []
    for released in (True, False):
        model = network()
        density = nanoadam.linear(0.5, 0.1, total_steps=40, interval=10)
        options = {**options, "density": density, "gradient_release": released, "state_dtype": torch.float32}
        options["eps"] = 1e-4  # or rounding of gradients near zero would turn into whole steps
        ends.append(trained(model, optimizer_of(model, **options)))
        if options.get("transposed"):  # the group takes the rows of its layers, which compute whole gradients then
            touched = (model[0].weight.detach() != network()[0].weight.detach()).any(1)
            assert 0 < touched.sum() < len(touched)
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(
    tokens=st.integers(1, 9),
    inner=st.integers(1, 40),
    outer=st.integers(1, 40),
    density=st.floats(0.01, 1.0),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    accumulate=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_drawn_layers_agree_with_a_dense_backward(tokens, inner, outer, density, bias, dtype, accumulate, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(inner, outer, bias=bias).to(dtype)
    twin = copy.deepcopy(layer)
    opt = optimizer_of(layer, density=density)
    for micro in range(accumulate):
        for m in (layer, twin):
            (m(inputs(micro, dtype, (tokens, inner))).float() ** 2).sum().backward()
    expected = twin.weight.grad * opt.selected(layer.weight)
    unit = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 5e-3}[dtype]
    largest = float(expected.abs().max())
    torch.testing.assert_close(layer.weight.grad.to_dense(), expected, rtol=unit, atol=unit * largest + 1e-7)


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if type(tensor) is torch.Tensor and func not in (torch.ops.aten.t.default, torch.ops.aten.detach.default):
                self.largest = max(self.largest, tensor.numel() if tensor._base is None else 0)
        return out


def test_backward_makes_nothing_of_the_weights_size_and_forward_keeps_selected_inputs_only():
    layer = nn.Linear(400, 500, bias=False)
    opt = optimizer_of(layer, density=0.1)
    x = torch.randn(30, 400, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    sizes = sorted(t.numel() for t in saved if t.is_floating_point())
    assert sizes == [30 * 40, 400 * 500]  # selected inputs, and the weight itself, which takes nothing
    assert any(t.data_ptr() == layer.weight.data_ptr() for t in saved)
    with Peak() as peak:
        y.sum().backward()
    assert peak.largest < 400 * 500 / 4
    assert layer.weight.grad.entries.numel() == 40 * 500
    assert opt.columns(layer.weight).numel() == 40


def test_without_an_optimizer_that_wants_it_the_layer_is_as_it_was():
    plain = nn.Linear.forward
    model = network()
    opt = optimizer_of(model)
    assert nn.Linear.forward is not plain
    opt.release(False)
    assert nn.Linear.forward is plain
    model(inputs(0)).sum().backward()
    assert type(model[0].weight.grad) is torch.Tensor
    opt.release(True)
    assert nn.Linear.forward is not plain
    del opt
    assert nn.Linear.forward is plain
    optimizer_of(model, gradient_release=False)
    NanoAdam(model.parameters())
    assert nn.Linear.forward is plain


def test_nobody_sees_anything_of_it():
    model = network()
    before = {name: type(p) for name, p in model.named_parameters()}
    opt = optimizer_of(model)
    trained(model, opt, 2)
    assert {name: type(p) for name, p in model.named_parameters()} == before
    assert vars(model[0]).keys() == vars(nn.Linear(1, 1)).keys()
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    for other in (twin, again):
        assert other.state_dict().keys() == model.state_dict().keys()
        other(inputs(0)).sum().backward()
        assert type(other[0].weight.grad) is torch.Tensor, "a copy belongs to no optimizer"
    both_model, both = copy.deepcopy((model, opt))
    both_model(inputs(0)).sum().backward()
    assert type(both_model[0].weight.grad) is SelectedGradient
    both.zero_grad()
    assert torch.equal(trained(model, opt, 4), trained(both_model, both, 4))


def test_gradients_asked_for_directly_agree():
    model, twin = network(), network()
    opt = optimizer_of(model)
    mask = None
    for create_graph in (False, True):
        found = []
        for m in (model, twin):
            loss = m(inputs(0)).square().mean()
            mask = opt.selected(model[2].weight)
            found.append(torch.autograd.grad(loss, m[2].weight, create_graph=create_graph)[0])
        assert (type(found[0]) is SelectedGradient) == (not create_graph)
        got = found[0].to_dense() if not create_graph else found[0]
        torch.testing.assert_close(got, found[1] * mask)
    for p in model.parameters():
        assert p.grad is None


def test_gradients_of_gradients_are_whole():
    """A gradient penalty: the norm of the gradient for the inputs, whose gradient reaches the weights."""
    found = []
    for released in (True, False):
        model = network()
        opt = optimizer_of(model, gradient_release=released)
        x = inputs(0).requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        mask = opt.selected(model[2].weight)
        found.append([p.grad.to_dense() if p.dim() == 2 and released else p.grad for p in model.parameters()])
        found[-1][2] = found[-1][2] * mask
    for i in (2, 3):
        torch.testing.assert_close(found[0][i], found[1][i], rtol=1e-4, atol=1e-6)


def test_an_exception_between_forward_and_backward_changes_nothing():
    ends = []
    for fails in (True, False):
        model = network()
        opt = optimizer_of(model)
        for step in range(4):
            if fails:
                with contextlib.suppress(ArithmeticError):
                    model(inputs(99 + step))
                    raise ArithmeticError
            model(inputs(step)).square().mean().backward()
            opt.step()
            opt.zero_grad()
        ends.append(bits(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("how", ["step", "refresh", "load"])
def test_a_refresh_between_forward_and_backward_is_refused(how):
    model = network()
    opt = optimizer_of(model, mask_interval=1)
    trained(model, opt, 2, 1)
    loss = model(inputs(0)).square().mean()
    state = copy.deepcopy(opt.state_dict())
    if how == "step":
        model(inputs(1)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        model(inputs(2))
    elif how == "load":
        opt.load_state_dict(state)
    else:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(torch.rand_like(p))
        opt.param_groups[0]["steps"] += 1
        opt.refresh()
    with pytest.raises(RuntimeError, match=r"refreshed between this layer's forward|modified by an inplace"):
        loss.backward()
    opt.zero_grad()
    trained(model, opt, 2)


def test_zeroing_between_forward_and_backward_is_the_usual_loop():
    ends = []
    for order in ("before", "between"):
        model = network()
        opt = optimizer_of(model, mask_interval=1)
        for step in range(6):
            if order == "before":
                opt.zero_grad()
            loss = model(inputs(step)).square().mean()
            if order == "between":
                opt.zero_grad()
            loss.backward()
            opt.step()
        ends.append(bits(model))
    assert torch.equal(*ends)


def test_weights_loaded_after_the_optimizer_was_made_are_the_ones_selected_from():
    model = network()
    opt = optimizer_of(model)
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})
    expected = opt.selected(model[2].weight)
    before = model[2].weight.detach().clone()
    trained(model, opt, 1)
    assert torch.equal(opt.columns(model[2].weight), expected.all(0).nonzero().view(-1))
    assert not (model[2].weight != before)[~expected].any()


def test_a_resumed_run_ends_bit_for_bit_like_one_that_never_stopped():
    options = {"density": nanoadam.linear(0.5, 0.1, total_steps=12, interval=4)}
    whole = network()
    expected = trained(whole, optimizer_of(whole, **options), 12)
    model = network()
    opt = optimizer_of(model, **options)
    trained(model, opt, 7)
    again = network()
    again.load_state_dict(model.state_dict())
    other = optimizer_of(again, **options)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for step in range(7, 12):
        for micro in range(2):
            again(inputs(10 * step + micro)).float().square().mean().backward()
        torch.nn.utils.clip_grad_value_(again.parameters(), 1.0)
        other.step()
        other.zero_grad()
    assert torch.equal(bits(again), expected)


def test_pruned_weights_stay_pruned():
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p[p.abs() < p.abs().median()] = 0
                p[:, :3] = 0
    zeros = [p == 0 for p in model.parameters()]
    start = bits(model)
    end = trained(model, optimizer_of(model, keep_zeros=True, density=0.9, weight_decay=0.1), 6)
    assert not torch.equal(start, end)
    for p, zero in zip(model.parameters(), zeros, strict=True):
        assert p.dim() == 1 or torch.equal(p[zero], torch.zeros_like(p[zero]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_never_selected_keep_their_bits(dtype):
    model = network(dtype)
    opt = optimizer_of(model, weight_decay=0.5)
    before = {p: p.detach().clone() for p in model.parameters() if p.dim() == 2}
    touched = {p: torch.zeros_like(p, dtype=torch.bool) for p in before}

    def look(model, opt, step):
        for p, seen in touched.items():
            seen |= opt.selected(p)
            assert opt.columns(p).tolist() == opt.selected(p).all(0).nonzero().view(-1).tolist()

    trained(model, opt, 20, change=look, dtype=dtype)
    for p, seen in touched.items():
        assert torch.equal(p[~seen], before[p][~seen])
        assert not torch.equal(p[seen], before[p][seen])


def test_the_first_step_of_a_column_that_enters_has_length_lr():
    torch.manual_seed(0)
    layer = nn.Linear(40, 30, bias=False)
    opt = optimizer_of(layer, lr=1e-3, density=0.2, mask_interval=10, state_dtype=torch.float32, criterion="smallest")
    before = None
    for step in range(31):
        if step and step % 10 == 0:
            with torch.no_grad():
                layer.weight[:, before[::2]] = 5.0  # make room
        weights = layer.weight.detach().clone()
        layer(inputs(step, shape=(8, 40))).square().mean().backward()
        opt.step()
        opt.zero_grad()
        now = opt.columns(layer.weight)
        if before is not None and step % 10 == 0:
            new = [c for c in now.tolist() if c not in before.tolist()]
            assert new
            torch.testing.assert_close(
                (layer.weight - weights).abs()[:, new], torch.full((30, len(new)), 1e-3), rtol=0.02, atol=0
            )
        before = now


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_model_is_served_without_a_graph_break(compiler):
    ends = []
    for compiled in (True, False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = network()
        opt = optimizer_of(model, state_dtype=torch.float32)
        run = torch.compile(model, backend=compiler, fullgraph=True) if compiled else model
        for step in range(8):
            for micro in range(2):
                run(inputs(10 * step + micro)).square().mean().backward()
                assert type(model[2].weight.grad) is SelectedGradient
            opt.step()
            opt.zero_grad()
        if compiled:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
            loss = run(inputs(0)).square().mean()
            assert type(torch.autograd.grad(loss, model[2].weight)[0]) is SelectedGradient
        ends.append(bits(model))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_conv1d_of_transformers_whose_columns_are_rows():
    transformers = pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    twin = copy.deepcopy(model)
    groups = nanoadam.param_groups(model, granularity="column")
    opt = NanoAdam(groups, density=0.25)
    tokens = torch.randint(0, 64, (2, 9))
    for m in (model, twin):
        m(tokens, labels=tokens).loss.backward()
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert weight.grad.entries.shape == (8, 128)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        got = p.grad.to_dense() if isinstance(p.grad, SelectedGradient) else p.grad
        torch.testing.assert_close(got, q.grad * opt.selected(p), rtol=1e-4, atol=1e-6, msg=name)
    del opt
    assert Conv1D.forward.__module__ == Conv1D.__module__


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input) + functional.linear(input, self.weight)


def test_a_layer_with_a_forward_of_its_own_is_left_alone_and_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Doubled(8, 8), nn.Linear(8, 2))
    twin = copy.deepcopy(model)
    groups = nanoadam.param_groups(model, granularity="column")
    assert "made whole in backward, by a forward of their own: 1.weight" in nanoadam.describe(groups)
    opt = NanoAdam(groups, density=0.5)
    for m in (model, twin):
        m(inputs(0, shape=(3, 8))).square().mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        got = p.grad.to_dense() if isinstance(p.grad, SelectedGradient) else p.grad
        torch.testing.assert_close(got, q.grad * opt.selected(p))


def test_groups_by_column_hold_linear_layers_and_nothing_else():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Conv1d(5, 3, 1), nn.Linear(8, 2))
    groups = nanoadam.param_groups(model, granularity="column")
    assert {g["role"]: g["param_names"] for g in groups} == {
        "weights, by column": ["1.weight"],
        "weights": ["0.weight", "2.weight"],
        "head": ["3.weight"],
        "norms and biases": ["1.bias", "2.bias", "3.bias"],
    }
    assert [g.get("granularity") for g in groups] == ["column", None, None, None]
    selected = nanoadam.param_groups(model, granularity="column", selected="3")
    assert "3.weight" in selected[0]["param_names"]
    with pytest.raises(ValueError, match="granularity must be 'weight' or 'column', got 'row'"):
        nanoadam.param_groups(model, granularity="row")


def test_by_default_the_largest_columns_and_the_smallest_weights_are_selected():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 8))
    opt = NanoAdam([{"params": model.parameters()}], density=0.25, granularity="column", lr=1e-3)
    norms = model[1].weight.detach().square().sum(0)
    bare = NanoAdam([nn.Parameter(torch.randn(3, 8, 8))], density=0.25, granularity="column", lr=1e-3)
    for optimizer in (opt, bare):
        optimizer.refresh()
    assert set(opt.columns(model[1].weight).tolist()) == set(norms.topk(4).indices.tolist())
    (weight,) = bare.param_groups[0]["params"]
    assert weight.detach()[bare.selected(weight)].abs().max() < weight.detach()[~bare.selected(weight)].abs().max()
    assert opt.param_groups[0]["criterion"] is None  # saved as what it was
    saved = opt.state_dict()
    opt.load_state_dict(saved)


def test_two_optimizers_on_one_layer_get_whole_gradients():
    model = network(bias=False)
    first = optimizer_of(model)
    second = optimizer_of(model[2], density=0.5)
    with pytest.warns(UserWarning, match="in 2 NanoAdam optimizers"):
        model(inputs(0)).square().mean().backward()
    assert type(model[0].weight.grad) is SelectedGradient
    assert type(model[2].weight.grad) is torch.Tensor
    assert columns._served
    del first, second
    assert not columns._served


class Words(nn.Module):
    """A small language model, its embedding selected from weight by weight."""

    def __init__(self, tied=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 12, padding_idx=3)
        self.inner = nn.Linear(12, 12)
        self.head = nn.Linear(12, 50)
        if tied:
            self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.embed(ids))))


def ids(step, shape=(4, 7)):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embeddings_gradient_is_made_at_the_selected_entries(dtype, compiler, tied):
    torch._dynamo.reset()
    model = Words(tied, dtype)
    optimizer = NanoAdam(nanoadam.param_groups(model), **{**OPTIONS, "granularity": "weight"})
    forward = torch.compile(model, backend=compiler, fullgraph=True) if compiler else model
    table = model.embed.weight
    for step in range(5):
        dense = copy.deepcopy(model)
        dense(ids(step)).float().square().mean().backward()
        forward(ids(step)).float().square().mean().backward()
        mask = optimizer.selected(table)
        expected = dense.embed.weight.grad * mask
        if dtype is torch.float32 or tied:
            torch.testing.assert_close(table.grad.to_dense(), expected)
        else:  # ours is summed in float32, torch's in bfloat16
            torch.testing.assert_close(table.grad.to_dense().float(), expected.float(), rtol=0.03, atol=1e-3)
        optimizer.step()
        optimizer.zero_grad()
    # A tied table's gradient comes whole from the head: from then on its lookup is torch's own.
    assert optimizer._slots[table].served.needs_whole == tied


def test_no_gradient_of_a_tables_size_is_made():
    model = nn.Sequential(nn.Embedding(4000, 16), nn.Linear(16, 2))
    optimizer = NanoAdam(nanoadam.param_groups(model), density=0.01, lr=1e-2)  # noqa: F841 - it is what selects
    loss = model(torch.randint(0, 4000, (3, 5))).square().mean()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss.backward()
    assert max(event.cpu_memory_usage for event in profile.events()) < model[0].weight.nbytes / 2
    assert isinstance(model[0].weight.grad, SelectedGradient)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_embeddings_that_torch_treats_in_their_own_way_are_left_alone(options):
    model = Words()
    model.embed = nn.Embedding(50, 12, **options)
    if options.get("sparse"):
        optimizer = NanoAdam(nanoadam.param_groups(model), lr=1e-2)
        with pytest.raises(TypeError, match="sparse"):
            model(ids(0)).square().mean().backward()
        return
    optimizer = NanoAdam(nanoadam.param_groups(model), lr=1e-2, density=0.25)
    dense = copy.deepcopy(model)
    for each in (dense, model):
        each(ids(0)).square().mean().backward()
    expected = dense.embed.weight.grad * optimizer.selected(model.embed.weight)
    torch.testing.assert_close(model.embed.weight.grad.to_dense(), expected)


def test_gradients_of_gradients_of_an_embedding():
    def penalty(model):
        table = model.embed.weight
        (first,) = torch.autograd.grad(model(ids(0)).square().mean(), table, create_graph=True)
        return first

    model = Words()
    optimizer = NanoAdam(nanoadam.param_groups(model), **{**OPTIONS, "granularity": "weight"})
    dense = copy.deepcopy(model)
    first, expected = penalty(model), penalty(dense)
    mask = optimizer.selected(model.embed.weight)
    torch.testing.assert_close(first, expected * mask)
    (second,) = torch.autograd.grad(first.square().sum(), model.inner.weight)
    (expected,) = torch.autograd.grad((expected * mask).square().sum(), dense.inner.weight)
    torch.testing.assert_close(second, expected)
