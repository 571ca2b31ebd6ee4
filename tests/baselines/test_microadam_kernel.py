"""The Triton kernel of MicroAdam against plain PyTorch, in the interpreter where there is no GPU.

State is the same bit for bit. Weights may differ by the rounding of a quotient and a square root.
"""

import pytest
import torch

from nanoadam.baselines.microadam import MicroAdam

pytest.importorskip("nanoadam.ops.triton", exc_type=ImportError)


def run(backend, monkeypatch, device, shapes, dtype, steps=4, ties=False, **options):
    monkeypatch.setenv("NANOADAM_BACKEND", backend)
    generator = torch.Generator().manual_seed(0)

    def draw(shape):
        values = torch.randn(shape, generator=generator)
        return ((2 * values).round() if ties else values).to(dtype).to(device)

    parameters = [torch.nn.Parameter(draw(shape)) for shape in shapes]
    optimizer = MicroAdam(parameters, lr=1e-2, **options)
    for step in range(steps):
        for i, parameter in enumerate(parameters):
            parameter.grad = None if (step, i) == (1, 1) else draw(parameter.shape)  # one falls behind
        optimizer.step()
    return [parameter.detach() for parameter in parameters], [optimizer.state[parameter] for parameter in parameters]


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((7, 100), (3, 128)), {"block_size": 256, "window": 3, "weight_decay": 0.1}),
        (((1, 1), (2, 33), (5, 64)), {"density": 0.05}),
        (((9, 171), (3, 128)), {"block_size": 512, "density": 0.02, "window": 3, "ties": True}),  # few weights move
        (((4, 64), (2, 65)), {"block_size": 128, "density": 1.0, "stochastic_rounding": False}),
        (((3, 171), (9, 9)), {"block_size": 192, "density": 0.1, "ties": True, "window": 1}),
    ],
)
def test_the_kernel_gives_the_same_weights_and_the_same_state(shapes, options, dtype, device, monkeypatch):
    expected, expected_states = run("reference", monkeypatch, device, shapes, dtype, **options)
    weights, states = run("triton", monkeypatch, device, shapes, dtype, **options)
    for i, (ours, theirs) in enumerate(zip(weights, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-7)
        assert dtype == torch.float32 or (ours != theirs).float().mean() < 0.01
        for name, value in expected_states[i].items():
            assert torch.equal(states[i][name], value), (i, name)


def test_what_the_kernel_does_not_serve_goes_the_other_way(device, monkeypatch):
    shapes = ((6, 4, 5, 5), (1, 8200))
    for options in ({"block_size": 16384}, {}):
        expected, _ = run("reference", monkeypatch, device, shapes, torch.float32, steps=2, **options)
        monkeypatch.setattr("nanoadam.baselines.window_triton.MAX_BLOCK", 64)
        weights, _ = run("triton", monkeypatch, device, shapes, torch.float32, steps=2, **options)
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
