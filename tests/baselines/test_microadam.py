"""MicroAdam against a dense oracle in float64, and what a baseline must be able to do."""

import copy
import io
import math

import pytest
import torch

from nanoadam import NanoAdam, memory
from nanoadam.baselines import window
from nanoadam.baselines.microadam import MicroAdam


class Oracle:
    """Algorithm 1 of arXiv 2405.15593 with dense float64 vectors and an error that is never quantized."""

    def __init__(self, weight, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, density=0.01, window=10, block=4096):
        self.weight, self.error = weight.double().view(-1), torch.zeros(weight.numel(), dtype=torch.float64)
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, weight_decay
        self.density, self.window, self.block = density, window, block
        self.gradients: list[torch.Tensor] = []
        self.steps = 0

    def step(self, gradient):
        self.steps += 1
        total = gradient.double().view(-1) + self.error
        sparse = torch.zeros_like(total)
        for start in range(0, total.numel(), self.block):
            part = total[start : start + self.block]
            keep = math.ceil(self.density * part.numel())
            place = part.abs().sort(descending=True, stable=True).indices[:keep] + start
            sparse[place] = total[place]
        self.error = total - sparse
        self.gradients = [*self.gradients, sparse][-self.window :]
        moments = []
        for power, beta in zip((1, 2), self.betas, strict=True):
            weighted = sum(beta**age * g**power for age, g in enumerate(reversed(self.gradients)))
            moments.append((1 - beta) * weighted / (1 - beta**self.steps))
        self.weight = self.weight * (1 - self.lr * self.decay)
        self.weight = self.weight - self.lr * moments[0] / (moments[1].sqrt() + self.eps)


def exact_gradients(steps, blocks, block):
    """Small whole numbers, one nonzero position a bucket: the error then has two values a bucket, kept exactly."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        gradient = torch.zeros(blocks, block)
        gradient[:, 5 :: window.BUCKET] = (
            torch.randint(1, 8, (blocks, block // window.BUCKET), generator=generator) * 1.0
        )
        yield gradient


def train(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype).view(parameter.shape)
        optimizer.step()


def normal(shape, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("length", [3, 10])
def test_it_is_the_algorithm_where_the_error_is_exact(length, decay):
    start = torch.randn(4, 256)
    parameter = torch.nn.Parameter(start.clone())
    options = {"weight_decay": decay, "density": 1 / 256, "window": length}
    ours, oracle = MicroAdam([parameter], lr=1e-2, block_size=256, **options), Oracle(start, 1e-2, block=256, **options)
    for gradient in exact_gradients(25, 4, 256):
        train(ours, parameter, [gradient])
        oracle.step(gradient)
        torch.testing.assert_close(parameter.detach().double().view(-1), oracle.weight, rtol=1e-5, atol=1e-5)
    assert oracle.error.abs().max() > 10  # the error mattered


def test_at_density_1_it_is_adam_over_the_window():
    start = torch.randn(40, 30)
    parameter = torch.nn.Parameter(start.clone())
    ours, oracle = MicroAdam([parameter], lr=1e-2, density=1.0), Oracle(start, 1e-2, density=1.0)
    for gradient in normal((40, 30), 15):
        gradient = gradient.bfloat16().float()  # what the window holds
        train(ours, parameter, [gradient])
        oracle.step(gradient)
    torch.testing.assert_close(parameter.detach().double().view(-1), oracle.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (7, 31, 5), (1, 4100)])
def test_it_follows_the_algorithm_within_the_error_of_four_bits(shape):
    start = torch.zeros(shape)
    parameter, mean = torch.nn.Parameter(start.clone()), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, oracle = MicroAdam([parameter], lr=1e-2, density=0.05), Oracle(start, 1e-2, density=0.05)
    for noise in normal(shape, 60, seed=2):
        train(ours, parameter, [mean + 0.1 * noise])
        oracle.step(mean + 0.1 * noise)
    ours_moved, moved = parameter.detach().double().view(-1), oracle.weight
    assert torch.nn.functional.cosine_similarity(ours_moved, moved, dim=0) > 0.9
    assert 0.9 < ours_moved.norm() / moved.norm() < 1.1


def test_nothing_of_a_gradient_is_lost():
    """What was taken so far and what is held as error add up to what came in, within the quantizer's half steps."""
    parameter, shape, steps = torch.nn.Parameter(torch.zeros(16, 256)), (16, 256), 10
    optimizer = MicroAdam([parameter], lr=0.0, density=0.05, window=steps, block_size=256)
    incoming, allowed = torch.zeros(16 * 256), torch.zeros(64)
    state = optimizer.state[parameter]
    for gradient in normal(shape, steps):
        train(optimizer, parameter, [gradient])
        incoming += gradient.view(-1)
        allowed += (state["error_max"] - state["error_min"]).float() / 30 + 0.05  # and bfloat16 sums up to about 8
    taken = torch.zeros(16, 256)
    for index, value in zip(state["index"], state["value"], strict=True):
        taken.scatter_add_(1, index.view(16, -1).long(), value.view(16, -1).float())
    held = window.dequantize(state["error"], state["error_min"], state["error_max"]).float().view(-1)
    lost = (incoming - taken.view(-1) - held).abs().view(64, 64)
    assert (lost <= allowed[:, None]).all()


def test_an_entry_moves_its_weight_for_as_many_steps_as_the_window_has():
    parameter = torch.nn.Parameter(torch.zeros(1, 64))
    optimizer = MicroAdam([parameter], lr=1.0, density=1 / 64, window=4)
    before, moved = 0.0, []
    for step in range(7):
        train(optimizer, parameter, [torch.eye(1, 64) * (step == 0)])
        moved.append(parameter[0, 0].item() != before)
        before = parameter[0, 0].item()
    assert moved == [True] * 4 + [False] * 3


# The quantizer and the choice of entries


@pytest.mark.parametrize("spread", [0.0, 1e-30, 1e-6, 1.0, 1e6])
def test_quantization_is_off_by_half_a_step_at_most(spread):
    error = (spread * torch.randn(50, window.BUCKET)).bfloat16()
    code, low, high = window.quantize(error)
    assert code.dtype == torch.uint8 and code.shape == (50, window.BUCKET // 2)
    back = window.dequantize(code, low, high)
    half_step = (high.float() - low.float())[:, None] / 30
    rounding = torch.maximum(low.abs(), high.abs()).float()[:, None] / 256
    assert ((back.float() - error.float()).abs() <= half_step + rounding).all()
    assert torch.equal(back.amax(1), high) and torch.equal(back.amin(1), low)


@pytest.mark.parametrize(("length", "keep"), [(1, 1), (64, 64), (100, 1), (4096, 41), (32768, 328)])
def test_the_largest_are_taken_and_equal_ones_by_position(length, keep):
    values = torch.randn(3, length).mul(4).round().bfloat16()  # many ties
    expected = values.abs().sort(dim=1, descending=True, stable=True).indices[:, :keep].sort(1).values
    assert torch.equal(window.largest(values, keep), expected)


@pytest.mark.parametrize("numel", [1, 63, 64, 4096, 4097, 10_000])
@pytest.mark.parametrize("weights", [1, 5000, 1 << 20])
def test_parts_cover_every_weight_and_every_entry_once(numel, weights):
    blocks = window.blocks_of(numel, 0.01, 4096)
    parts = list(blocks.parts(weights))
    assert [p.start for p in parts] + [numel] == [0] + [p.stop for p in parts]
    assert [p.entries.start for p in parts] + [blocks.kept] == [0] + [p.entries.stop for p in parts]
    assert parts[-1].buckets.stop == blocks.buckets


def test_how_much_is_done_at_once_changes_nothing(monkeypatch):
    results = []
    for segment in (1, 1000, 1 << 18):
        monkeypatch.setattr(window, "SEGMENT_CPU", segment)
        parameter = torch.nn.Parameter(torch.ones(9, 700, dtype=torch.bfloat16))
        train(MicroAdam([parameter], lr=1e-2, block_size=512), parameter, normal((9, 700), 5))
        results.append(parameter.detach())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# State


def test_state_is_what_the_formula_says():
    shape, length = (512, 4096), 10
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    optimizer = MicroAdam([parameter], lr=1e-3, density=0.01, window=length)
    statistics = 4 * parameter.numel() // window.BUCKET
    formula = memory.estimate("microadam", params=parameter.numel(), density=0.01, window=length).state
    kept = 512 * math.ceil(0.01 * 4096)
    assert optimizer.state_bytes() == parameter.numel() // 2 + 4 * length * kept + statistics + 4
    assert optimizer.state_bytes() - statistics == pytest.approx(formula, rel=1e-3)  # 41 of 4096 are 1.001 %
    train(optimizer, parameter, [torch.ones(shape)])
    assert optimizer.state_bytes() == sum(t.nbytes for t in optimizer.state[parameter].values())  # all made at once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_resumes_bit_for_bit(dtype):
    def fresh():
        torch.manual_seed(0)
        matrix, vector = (
            torch.nn.Parameter(torch.randn(40, 700).to(dtype)),
            torch.nn.Parameter(torch.randn(9).to(dtype)),
        )
        return matrix, vector, MicroAdam([matrix, vector], lr=1e-3, weight_decay=0.1, window=3)

    gradients = list(zip(normal((40, 700), 8), normal((9,), 8), strict=True))

    def go(matrix, vector, optimizer, some):
        for first, second in some:
            matrix.grad, vector.grad = first.to(dtype), second.to(dtype)
            optimizer.step()

    through, interrupted, resumed = fresh(), fresh(), fresh()
    go(*through, gradients)
    go(*interrupted, gradients[:5])
    file = io.BytesIO()
    torch.save({"optimizer": interrupted[2].state_dict(), "weights": interrupted[:2]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    with torch.no_grad():
        for parameter, value in zip(resumed[:2], saved["weights"], strict=True):
            parameter.copy_(value)
    resumed[2].load_state_dict(saved["optimizer"])
    assert resumed[2].state[resumed[0]]["index"].dtype == torch.int16
    go(*resumed, gradients[5:])
    assert torch.equal(through[0], resumed[0]) and torch.equal(through[1], resumed[1])
    for name, value in through[2].state[through[0]].items():
        assert torch.equal(value, resumed[2].state[resumed[0]][name]), name


def test_a_copy_goes_on_like_the_original():
    parameter = torch.nn.Parameter(torch.randn(8, 64))
    optimizer = MicroAdam([parameter], lr=1e-2)
    train(optimizer, parameter, normal((8, 64), 3))
    twin = copy.deepcopy(optimizer)
    twin_parameter = twin.param_groups[0]["params"][0]
    train(optimizer, parameter, normal((8, 64), 3, seed=1))
    train(twin, twin_parameter, normal((8, 64), 3, seed=1))
    assert torch.equal(parameter, twin_parameter)


def test_loading_its_own_state_copies_nothing():
    parameter = torch.nn.Parameter(torch.randn(8, 64))  # accelerate's wrapper does it when a run begins
    optimizer = MicroAdam([parameter], lr=1e-2)
    train(optimizer, parameter, normal((8, 64), 3))
    before = {name: (value.data_ptr(), value.clone()) for name, value in optimizer.state[parameter].items()}
    optimizer.load_state_dict(optimizer.state_dict())
    for name, value in optimizer.state[parameter].items():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1]), name


def test_a_state_that_does_not_fit_is_refused():
    small, large = (MicroAdam([torch.nn.Parameter(torch.zeros(n, 64))], lr=1e-3) for n in (2, 4))
    with pytest.raises(ValueError, match="does not fit"):
        large.load_state_dict(small.state_dict())
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, 64))], lr=1e-3)
    with pytest.raises(ValueError, match="not saved by MicroAdam"):
        large.load_state_dict(other.state_dict())


# What it does with tensors


def test_gradients_are_left_as_they_are():
    parameter = torch.nn.Parameter(torch.zeros(4, 64))
    optimizer, (gradient,) = MicroAdam([parameter], lr=1e-3), normal((4, 64), 1)
    parameter.grad = gradient.clone()
    optimizer.step()
    assert torch.equal(parameter.grad, gradient)


def test_strides_change_nothing():
    start, gradients = torch.randn(6, 10, 4, 4), normal((6, 10, 4, 4), 4)
    plain = torch.nn.Parameter(start.clone())
    strided = torch.nn.Parameter(start.clone().to(memory_format=torch.channels_last))
    train(MicroAdam([plain], lr=1e-2, density=0.1), plain, gradients)
    train(MicroAdam([strided], lr=1e-2, density=0.1), strided, gradients)
    assert strided.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, strided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_tensors_are_updated_as_nanoadam_does(dtype):
    def groups():
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(8, 8).to(dtype)), torch.nn.Parameter(torch.randn(8).to(dtype))]

    ours, theirs = groups(), groups()
    options = {"lr": 1e-2, "weight_decay": 0.1}
    first = MicroAdam([{"params": ours, "dense": True}], **options)
    second = NanoAdam([{"params": theirs, "dense": True}], gradient_release=False, **options)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape).to(dtype)
            b.grad = a.grad.clone()
        first.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_small_updates_of_bfloat16_weights_are_lost_only_without_stochastic_rounding():
    moved = {}
    for stochastic in (True, False):
        parameter = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = MicroAdam([parameter], lr=1e-5, density=1.0, stochastic_rounding=stochastic)
        train(optimizer, parameter, [torch.ones(64, 64)] * 20)
        moved[stochastic] = 1 - parameter.detach().float().mean().item()
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(20e-5, rel=0.5)


def test_parameters_without_gradient_stay():
    first, second, frozen = (torch.nn.Parameter(torch.ones(4, 64)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = MicroAdam([first, second, frozen, torch.nn.Parameter(torch.zeros(0, 3))], lr=1e-2, weight_decay=0.1)
    train(optimizer, first, normal((4, 64), 2))
    assert torch.equal(second, torch.ones(4, 64)) and frozen not in optimizer.state
    frozen.requires_grad_(True)
    train(optimizer, frozen, normal((4, 64), 1))
    assert not torch.equal(frozen, torch.ones(4, 64))


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", -1.0), ("eps", 0.0), ("betas", (0.9, 1.0)), ("density", 0.0), ("density", 1.5), ("window", 0),
     ("block_size", 100), ("block_size", 65536), ("seed", -1), ("weight_decay", -0.1)],
)  # fmt: skip
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(ValueError, match=f"{option} must be .* group 0"):
        MicroAdam([torch.nn.Parameter(torch.zeros(2, 2))], **{"lr": 1e-3, option: value})


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(TypeError, match="complex64"):
        MicroAdam([torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], lr=1e-3)
    embedding = torch.nn.Embedding(8, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse"):
        MicroAdam(embedding.parameters(), lr=1e-3).step()
