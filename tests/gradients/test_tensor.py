"""A `SelectedGradient` reads as the dense gradient it stands for, and no write to it is lost."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoadam.chunks import layout
from nanoadam.gradients import Box, SelectedGradient, gradient_bytes
from nanoadam.ops import Rule, Slot, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(30, 50), (2, 4500), (1, 1), (8, 4, 3, 3)]


def selection(shape, density=0.2, seed=0, zeros=0.0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).masked_fill(torch.rand(shape, generator=generator) < zeros, 0.0)
    lay = layout(shape, density)
    slot = Slot(weight, {name: torch.zeros(lay.selected) for name in ("exp_avg", "exp_avg_sq")}, 0)
    reference.select([slot], [lay], Rule("smallest", zeros > 0, True, 0, 0), None)
    return slot.selection


def gradient(shape=(30, 50), dtype=torch.float32, density=0.2, seed=0, zeros=0.0, chosen=None):
    """A gradient of some selection, its entries exact in its dtype."""
    chosen = chosen or selection(shape, density, seed, zeros)
    generator = torch.Generator().manual_seed(seed + 1)
    values = torch.randn(chosen.index.numel(), generator=generator).to(dtype).float().masked_fill(chosen.index < 0, 0)
    return SelectedGradient(Box(chosen, values), torch.empty(shape, dtype=dtype))


def plain(value):
    """A result as ordinary tensors."""
    if isinstance(value, torch.Tensor):
        return value.to_dense() if type(value) is not torch.Tensor else value
    return list(map(plain, value)) if isinstance(value, (list, tuple)) else value


def mask_of(g):
    return reference.mask(g._box.selection, g.shape)


NEVER_DENSE = {
    "abs().max()": lambda x: x.abs().max(),
    "max": lambda x: x.max(),
    "min": lambda x: x.min(),
    "sum": lambda x: x.sum(),
    "sum over all dimensions": lambda x: x.sum(dim=tuple(range(x.dim())), keepdim=True),
    "mean": lambda x: x.mean(),
    "std": lambda x: x.std(),
    "var": lambda x: x.var(correction=0),
    "mean of squares": lambda x: (x**2).mean(),
    "isfinite": lambda x: torch.isfinite(x).all(),
    "isnan": lambda x: x.isnan().any(),
    "isinf": lambda x: x.isinf().any(),
    "any": lambda x: x.any(),
    "all": lambda x: x.all(),
    "share of zeros": lambda x: (x == 0).float().mean(),
    "count_nonzero": lambda x: torch.count_nonzero(x),
    **{f"norm of order {p}": lambda x, p=p: torch.linalg.vector_norm(x, p) for p in (0, 0.5, 1, 2, 3, math.inf)},
    "norm in float64": lambda x: torch.linalg.vector_norm(x, 2, dtype=torch.float64),
    ".norm()": lambda x: x.norm(),
    "norms of a list": lambda x: torch._foreach_norm([x, torch.ones(3)]),
    "times a number": lambda x: 0.5 * x,
    "times a 0-d tensor": lambda x: x * torch.tensor(0.25),
    "by a number": lambda x: x / 4,
    "negative": lambda x: -x,
    "absolute": lambda x: x.abs(),
    "sign": lambda x: x.sign(),
    "square": lambda x: x.square(),
    "plus one": lambda x: x + 1,
    "clamped": lambda x: x.clamp(-0.5, 0.25),
    "clamped above zero": lambda x: x.clamp(min=0.25),
    "nan_to_num": lambda x: x.nan_to_num(1.0),
    "compared": lambda x: x > 0.5,
    "exponential": lambda x: x.exp(),
    "twice itself": lambda x: x + x,
    "itself times itself": lambda x: x * x,
    "clone": lambda x: x.clone(),
    "detached": lambda x: x.detach(),
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "same shape": lambda x: x.view(x.shape),
}
THROUGH_A_DENSE_COPY = {
    "flattened": lambda x: x.view(-1),
    "a row": lambda x: x[0],
    "indexed": lambda x: x[..., 0, 0] if x.dim() > 1 else x[0],
    "transposed": lambda x: x.transpose(0, 1),
    "reshaped": lambda x: x.reshape(-1, 1),
    "norm of rows": lambda x: torch.linalg.vector_norm(x, 2, dim=0),
    "norm of negative order": lambda x: torch.linalg.vector_norm(x, -1),
    "least norm": lambda x: torch.linalg.vector_norm(x, -math.inf),
    "max of rows": lambda x: x.max(dim=0),
    "histogram": lambda x: torch.histc(x.float(), 10, -3, 3),
    "argmax": lambda x: x.abs().argmax(),
    "concatenated": lambda x: torch.cat([x.flatten(), torch.ones(3, dtype=x.dtype)]),
    "stacked": lambda x: torch.stack([x, x]),
    "plus a dense one": lambda x: x + torch.ones(x.shape, dtype=x.dtype),
    "a dense one plus it": lambda x: torch.ones(x.shape, dtype=x.dtype) + x,
    "times a dense one": lambda x: x * torch.arange(x.numel(), dtype=x.dtype).view(x.shape),
    "lerp": lambda x: torch.ones(x.shape, dtype=x.dtype).lerp(x, 0.5),
    "where": lambda x: torch.where(x > 0, x, torch.full((), -1.0, dtype=x.dtype)),
    "sorted": lambda x: x.flatten().sort().values,
    "softmax": lambda x: x.float().softmax(-1),
    "unbound": lambda x: x.unbind(0),
    "split": lambda x: x.split(1),
    "foreach maximum": lambda x: torch._foreach_maximum([x], 0.5),
}


KINDS = list(itertools.product(SHAPES, DTYPES, [0.0, 0.9]))


@pytest.mark.parametrize("what", [*NEVER_DENSE, *THROUGH_A_DENSE_COPY])
def test_it_reads_as_the_dense_gradient(what, monkeypatch):
    function = {**NEVER_DENSE, **THROUGH_A_DENSE_COPY}[what]
    for shape, dtype, zeros in KINDS:
        g = gradient(shape, dtype, zeros=zeros)
        dense = g.to_dense()
        with monkeypatch.context() as patch:
            if what in NEVER_DENSE:
                patch.setattr(SelectedGradient, "to_dense", lambda *_, **__: pytest.fail("made dense"))
            result = function(g)
        expected, got = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (function(dense), plain(result)))
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            # torch sums 16 bits in its own order; ours come from float32 entries
            tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 3e-3}[dtype]
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_it_is_of_the_parameters_shape_dtype_and_device_and_says_what_it_is():
    g = gradient((30, 50), torch.bfloat16)
    assert (g.shape, g.dtype, g.device.type, g.numel()) == ((30, 50), torch.bfloat16, "cpu", 1500)
    assert g.layout == torch.strided
    assert not g.requires_grad
    assert g.is_leaf
    assert g.entries.dtype == torch.float32
    assert torch.equal(g.to_dense().flatten()[g.positions()], g.entries.bfloat16())
    assert "300 entries of 1500" in repr(g)
    assert gradient_bytes(g) == 4 * 300
    assert gradient_bytes(torch.ones(3)) == 12


# Writing

IN_PLACE = {
    "mul_ by a number": lambda x, d: x.mul_(0.5),
    "mul_ by a 0-d tensor": lambda x, d: x.mul_(torch.tensor(0.25)),
    "mul_ by one number in a tensor": lambda x, d: x.mul_(torch.tensor([2.0])),
    "mul_ by a mask": lambda x, d: x.mul_((d > 0).to(x.dtype)),
    "mul_ by a row": lambda x, d: x.mul_(d[:1]),
    "div_": lambda x, d: x.div_(3),
    "neg_": lambda x, d: x.neg_(),
    "abs_": lambda x, d: x.abs_(),
    "sign_": lambda x, d: x.sign_(),
    "clamp_": lambda x, d: x.clamp_(-0.5, 0.25),
    "clamp_ from below": lambda x, d: x.clamp_(min=-0.5),
    "clamp_min_": lambda x, d: x.clamp_min_(-0.25),
    "nan_to_num_": lambda x, d: x.nan_to_num_(),
    "zero_": lambda x, d: x.zero_(),
    "fill_ with zero": lambda x, d: x.fill_(0),
    "masked_fill_ with zero": lambda x, d: x.masked_fill_(d > 0, 0),
    "a slice of all": lambda x, d: x[:].mul_(2),
    "a view of the same shape": lambda x, d: x.view(x.shape).mul_(2),
    "detached": lambda x, d: x.detach().mul_(2),
    ".data": lambda x, d: x.data.mul_(2),
    "lerp_ to itself": lambda x, d: x.lerp_(x.clone(), 0.5),
    "addcmul_": lambda x, d: x.addcmul_(x.clone(), x.clone(), value=-0.5),
    "foreach mul": lambda x, d: torch._foreach_mul_([x, torch.ones(2)], 0.5),
    "foreach mul by a tensor": lambda x, d: torch._foreach_mul_([x], torch.tensor(0.5)),
    "foreach mul by several": lambda x, d: torch._foreach_mul_([x, torch.ones(2)], [0.5, 2.0]),
    "foreach div": lambda x, d: torch._foreach_div_([x], 4.0),
    "foreach neg": lambda x, d: torch._foreach_neg_([x]),
    "foreach clamp_min": lambda x, d: torch._foreach_clamp_min_([x], -0.5),
    "foreach clamp_max": lambda x, d: torch._foreach_clamp_max_([x], 0.25),
    "foreach zero": lambda x, d: torch._foreach_zero_([x]),
    "+= itself": lambda x, d: x.add_(x.clone()),
    "-= itself, twice": lambda x, d: x.sub_(x.clone(), alpha=2),
}
FROM_A_DENSE_ONE = {
    "add_": lambda x, d: x.add_(d),
    "add_ with a factor": lambda x, d: x.add_(d, alpha=0.5),
    "sub_": lambda x, d: x.sub_(d),
    "copy_": lambda x, d: x.copy_(d),
    "copy_ of another dtype": lambda x, d: x.copy_(d.double()),
    "foreach add": lambda x, d: torch._foreach_add_([x], [d]),
    "foreach copy": lambda x, d: torch._foreach_copy_([x], [d]),
    "a slice of all": lambda x, d: x[:].copy_(d),
    "item assignment of all": lambda x, d: x.__setitem__(slice(None), d),
}


@pytest.mark.parametrize("what", [*IN_PLACE, *FROM_A_DENSE_ONE])
def test_in_place_it_does_what_a_dense_gradient_does_on_the_selection(what, monkeypatch):
    operation = {**IN_PLACE, **FROM_A_DENSE_ONE}[what]
    for shape, zeros in itertools.product(SHAPES, [0.0, 0.9]):
        g = gradient(shape, zeros=zeros)
        dense, other = g.to_dense(), torch.randn(shape, generator=torch.Generator().manual_seed(7))
        alias = g.detach()
        with monkeypatch.context() as patch:
            patch.setattr(SelectedGradient, "to_dense", lambda *_, **__: pytest.fail("made dense"))
            operation(g, other)
        operation(dense, other)
        torch.testing.assert_close(g.to_dense(), dense * mask_of(g), rtol=1e-6, atol=0)
        assert torch.equal(alias.to_dense(), g.to_dense())
        assert not g.entries[g._box.selection.index < 0].any()


REFUSED = {
    "add_ of a number": lambda x: x.add_(1),
    "+= number": lambda x: x.__iadd__(1),
    "add_ of a 0-d tensor": lambda x: x.add_(torch.tensor(1.0)),
    "add_ of a row": lambda x: x.add_(torch.ones(x.shape[-1])),
    "clamp_ above zero": lambda x: x.clamp_(min=0.1),
    "clamp_ below zero": lambda x: x.clamp_(max=-0.1),
    "foreach clamp above zero": lambda x: torch._foreach_clamp_min_([x], 0.1),
    "foreach add": lambda x: torch._foreach_add_([x], 1),
    "foreach exp": lambda x: torch._foreach_exp_([x]),
    "foreach maximum": lambda x: torch._foreach_maximum_([x], 0.5),
    "exp_": lambda x: x.exp_(),
    "fill_": lambda x: x.fill_(3),
    "masked_fill_": lambda x: x.masked_fill_(torch.ones(x.shape, dtype=torch.bool), 2.0),
    "nan_to_num_ of nothing": lambda x: x.eq_(0),
    "normal_": lambda x: x.normal_(),
    "uniform_": lambda x: x.uniform_(),
    "bernoulli_": lambda x: x.bernoulli_(0.5),
    "div_ by a dense one": lambda x: x.div_(torch.ones(x.shape)),
    "an item": lambda x: x.__setitem__((0, 0), 7),
    "a row": lambda x: x.__setitem__(0, 7),
    "a mask": lambda x: x.__setitem__(torch.ones(x.shape, dtype=torch.bool), 0),
    "all": lambda x: x.__setitem__(slice(None), 7),
    "a row in place": lambda x: x[0].mul_(0),
    "a view in place": lambda x: x.view(-1).mul_(0),
    "a flattened one in place": lambda x: x.flatten().zero_(),
    "a view of a view": lambda x: x.view(-1)[3:].mul_(0),
    "a part of it": lambda x: x.split(1)[0].mul_(0),
    "transposed in place": lambda x: x.transpose(0, 1).mul_(0),
    "squared off": lambda x: x.transpose_(0, 1),
    "copy_ to a view": lambda x: x.view(-1).copy_(torch.ones(x.numel())),
    "its view in a foreach": lambda x: torch._foreach_mul_([x.view(-1)], 0.0),
    "out=": lambda x: torch.mul(torch.ones(x.shape), 2, out=x),
    "out= a view": lambda x: torch.mul(torch.ones(x.numel()), 2, out=x.view(-1)),
    "index_add_": lambda x: x.index_add_(0, torch.tensor([0]), torch.ones(1, *x.shape[1:])),
    "scatter_": lambda x: x.scatter_(0, torch.zeros(x.shape, dtype=torch.int64), 1.0),
    "a gradient of other weights": lambda x: x.add_(gradient(tuple(x.shape), seed=5)),
    "copy_ of one of other weights": lambda x: x.copy_(gradient(tuple(x.shape), seed=5)),
    "init": lambda x: torch.nn.init.normal_(x),
    ".data =": lambda x: setattr(x, "data", torch.ones(x.shape)),
    "set_": lambda x: x.set_(torch.ones(x.shape)),
    "resize_": lambda x: x.resize_(3),
    "data_ptr": lambda x: x.data_ptr(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_write_that_would_be_lost_is_refused_and_nothing_changes(what):
    g = gradient((30, 50))
    before = g.to_dense()
    with pytest.raises(TypeError, match=r"to_dense\(\)"):
        REFUSED[what](g)
    assert torch.equal(g.to_dense(), before)


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_scalars_that_are_not_finite_stay_within_the_selection(number):
    for scale in (
        lambda x: x.mul_(number),
        lambda x: torch._foreach_mul_([x], torch.tensor(number)),
        lambda x: x.div_(0),
    ):
        g = gradient()
        scale(g)
        assert not g.entries.isfinite().any()
        assert torch.equal(g.to_dense() == 0, ~mask_of(g))
    assert torch.equal((g * number).to_dense() == 0, ~mask_of(g))


def test_it_can_be_written_into_other_tensors():
    g = gradient()
    dense = g.to_dense()
    for write in (
        lambda target, x: target.add_(x),
        lambda target, x: target.copy_(x),
        lambda target, x: target.lerp_(x, 0.1),
        lambda target, x: target.mul_(0.9).add_(x, alpha=0.1),
        lambda target, x: target.addcmul_(x, x, value=0.5),
        lambda target, x: torch.mul(x, 0.5, out=target),
        lambda target, x: torch._foreach_add_([target], [x]),
        lambda target, x: torch._foreach_lerp_([target], [x], 0.1),
        lambda target, x: torch._foreach_addcmul_([target], [x], [x], 0.5),
        lambda target, x: torch._foreach_addcmul_([target], [x], [x], [0.5]),
        lambda target, x: torch._foreach_addcdiv_([target], [x], [target + 1], torch.tensor([0.5])),
        lambda target, x: target.view(-1)[:50].copy_(x[0]),
    ):
        got, expected = torch.ones(30, 50), torch.ones(30, 50)
        write(got, g)
        write(expected, dense)
        assert torch.equal(got, expected)
    for like in (torch.zeros_like(g), torch.empty_like(g), g.new_zeros(3), torch.ones_like(g, dtype=torch.float64)):
        assert type(like) is torch.Tensor


@settings(max_examples=60)
@given(
    shape=st.sampled_from(SHAPES),
    density=st.sampled_from([0.01, 0.3, 1.0]),
    zeros=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 99),
    names=st.lists(st.sampled_from(sorted({**IN_PLACE, **FROM_A_DENSE_ONE})), max_size=8),
)
def test_any_row_of_operations_is_that_of_a_dense_gradient(shape, density, zeros, seed, names):
    g = gradient(shape, density=density, zeros=zeros, seed=seed)
    dense, chosen = g.to_dense(), mask_of(g)
    for i, name in enumerate(names):
        other = torch.randn(shape, generator=torch.Generator().manual_seed(seed + i))
        for x in (g, dense):
            {**IN_PLACE, **FROM_A_DENSE_ONE}[name](x, other)
        dense.mul_(chosen)
    torch.testing.assert_close(g.to_dense(), dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.linalg.vector_norm(g), torch.linalg.vector_norm(dense), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in dir(torch.Tensor) if name.endswith("_") and not name.endswith("__")])
def test_every_in_place_method_of_torch_is_right_or_refused(name):
    """Whatever torch has, with arguments that most of them take: never a write that is lost."""
    for arguments in ((), (0.5,), (torch.full((30, 50), 0.5),), (0, 1), (0.1, 0.9), (torch.ones(30, 50) > 0, 0.5)):
        g = gradient()
        dense, chosen = g.to_dense(), mask_of(g)
        state = torch.get_rng_state()
        try:
            getattr(g, name)(*arguments)
        except (TypeError, RuntimeError, NotImplementedError, AttributeError, ValueError, IndexError):
            torch.testing.assert_close(g.to_dense(), dense, rtol=0, atol=0)
            continue
        torch.set_rng_state(state)
        getattr(dense, name)(*arguments)
        if g.shape == dense.shape and name not in ("share_memory_", "requires_grad_"):
            torch.testing.assert_close(g.to_dense(), dense * chosen, equal_nan=True)
            if name not in ("add_", "sub_", "subtract_", "copy_", "mul_", "multiply_"):
                torch.testing.assert_close(g.to_dense(), dense, equal_nan=True)


# Copies

COPIES = {
    "clone": lambda g: g.clone(),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda g: pickle.loads(pickle.dumps(g)),
    "to float and back": lambda g: g.double().float(),
}


def through_a_file(g):
    file = io.BytesIO()
    torch.save(g, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("what", [*COPIES, "a file"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copy_is_equal_and_apart(what, dtype):
    g = gradient((2, 4500), dtype)
    before = g.to_dense()
    twin = {**COPIES, "a file": through_a_file}[what](g)
    assert type(twin) is SelectedGradient
    assert torch.equal(twin.to_dense().to(dtype), before)
    if what != "copy":
        twin.mul_(0)
        assert torch.equal(g.to_dense(), before)
    if what not in ("clone", "to float and back"):
        g._box.selection.index.fill_(0)  # as a later refresh would
        twin.zero_().add_(torch.ones(2, 4500, dtype=dtype))
        assert twin.to_dense().count_nonzero() == twin.entries.numel()


def test_shared_memory_holds_the_entries():
    g = gradient()
    before = g.to_dense()
    assert not g.is_shared()
    g.share_memory_()
    assert g.is_shared()
    assert torch.equal(g.to_dense(), before)


def test_numpy_and_lists_are_dense_copies():
    import numpy as np

    g = gradient((3, 4))
    assert np.array_equal(g.numpy(), g.to_dense().numpy())
    assert np.array_equal(np.asarray(g), g.to_dense().numpy())
    assert g.tolist() == g.to_dense().tolist()
    assert g.view(-1).tolist() == g.to_dense().view(-1).tolist()
    assert torch.equal(torch.from_dlpack(g), g.to_dense())
    assert torch.equal(torch.from_dlpack(g[0]), g.to_dense()[0])
    for write_to in (g.numpy(), np.asarray(g), g[0].numpy(), np.asarray(g[0])):
        with pytest.raises(ValueError, match="read-only"):
            write_to.fill(0)
    np.array(g).fill(0)  # a copy of one's own, as with any tensor
    with pytest.raises(TypeError, match="share_memory_"):
        g[0].share_memory_()


def slot_of(weight):
    lay = layout(weight.shape, 0.2)
    slot = Slot(weight, {name: torch.zeros(lay.selected) for name in ("exp_avg", "exp_avg_sq")}, 0)
    reference.select([slot], [lay], Rule("smallest", False, True, 0, 0), None)
    return slot


def test_a_gradient_that_is_kept_never_changes_its_positions(ops, device):
    torch.manual_seed(0)
    slot = slot_of(torch.randn(30, 50))
    slot.parameter = slot.weight.to(device)
    slot.state = {name: value.to(device) for name, value in slot.state.items()}
    slot.selection = type(slot.selection)(slot.state["index"], slot.layout)
    g = gradient(chosen=slot_of(slot.weight.cpu()).selection)
    g = SelectedGradient(Box(slot.selection, g.entries.to(device)), slot.weight)
    twin, before = g.clone(), g.to_dense()
    for seed in (1, 2):
        slot.weight.copy_(torch.randn(30, 50, generator=torch.Generator().manual_seed(seed)))
        ops.select([slot], [slot.layout], Rule("smallest", False, True, 0, 0), None)
        assert torch.equal(g.to_dense(), before)
    index = slot.state["index"]
    del g
    ops.select([slot], [slot.layout], Rule("smallest", False, True, 0, 0), None)
    assert torch.equal(twin.to_dense(), before)
    if ops is not reference:
        assert slot.state["index"] is index, "nobody needs the old positions, so no memory is taken for new ones"


def test_a_refresh_in_place_makes_older_gradients_stale(ops, device):
    slot = slot_of(torch.randn(30, 50))
    g = gradient(chosen=slot.selection)
    twin = g.clone()
    index = slot.state["index"]
    slot.weight.copy_(torch.randn(30, 50))
    ops.select([slot], [slot.layout], Rule("smallest", False, True, 0, 0, in_place=True), None)
    assert slot.state["index"] is index
    for use in (lambda: g.norm(), lambda: g.to_dense(), lambda: twin.mul_(2), lambda: repr(twin)):
        with pytest.raises(RuntimeError, match="before refresh"):
            use()
