"""Linear layers that compute selected columns only: always what a dense backward would have been cut down to."""

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import nanoadam
from column_networks import bits, inputs, network, optimizer_of, trained
from nanoadam import columns
from nanoadam.gradients import SelectedGradient
from nanoadam.optimizer import NanoAdam


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
    gc.collect()  # a Recorder of another test keeps its optimizer alive in a circle
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
