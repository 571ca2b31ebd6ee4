"""What only a GPU can show: no waiting for it, CUDA graphs, and the trajectory of the reference.

The tests in `tests/ops` run natively too wherever there is a GPU.
"""

import copy

import pytest
import torch

from nanoadam.gradients import SelectedGradient
from nanoadam.optimizer import NanoAdam

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 700), torch.nn.GELU(), torch.nn.Linear(700, 64)).to("cuda", dtype)


def batch(step, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(step)
    return torch.randn(32, 64, generator=generator, device="cuda").to(dtype)


def bits(model):
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("release_bytes", [0, 100_000, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_release_on_and_off_agree(accumulate, release_bytes, dtype):
    results = []
    for released in (True, False):
        model = network(dtype)
        options = {"gradient_release": released, "release_bytes": release_bytes, "mask_interval": 3}
        opt = NanoAdam(model.parameters(), lr=1e-3, density=0.1, **options)
        for step in range(12):
            for micro in range(accumulate):
                model(batch(10 * step + micro, dtype)).float().square().mean().backward()
                assert isinstance(model[0].weight.grad, SelectedGradient) == released
            opt.step()
            opt.zero_grad()
        results.append(bits(model))
    if dtype == torch.float32 or accumulate == 1:
        assert torch.equal(*results)
    else:  # held gradients add up in float32, p.grad in bfloat16
        torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


def test_kernels_and_reference_train_alike(monkeypatch):
    results = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("NANOADAM_BACKEND", backend)
        model = network()
        opt = NanoAdam(model.parameters(), lr=1e-3, density=0.1, mask_interval=5)
        for step in range(30):
            model(batch(step)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
        results.append(bits(model))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("in_place", [True, False])
def test_nothing_of_a_training_step_waits_for_the_device(in_place):
    model = network(torch.bfloat16)
    opt = NanoAdam(model.parameters(), lr=1e-3, density=0.1, mask_interval=2)
    for step in range(6):
        x = batch(step, torch.bfloat16)
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")  # kernels are compiled by then
        try:
            for _ in range(2):
                model(x).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=not in_place)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_loss_scaling_skips_what_overflows_and_goes_on():
    results = []
    for released in (True, False):
        model = network()
        opt = NanoAdam(model.parameters(), lr=1e-3, density=0.1, gradient_release=released)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        for step in range(6):
            infinity = (model[0].weight * float("inf")).sum() if step == 2 else 0.0
            before = bits(model)
            scaler.scale(model(batch(step)).square().mean() + infinity).backward()
            if step % 2:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            assert torch.equal(before, bits(model)) == (step == 2)
        assert scaler.get_scale() == 2.0**9
        results.append(bits(model))
    assert torch.equal(*results)


def test_gradients_that_a_graph_writes_stay_readable_over_replays_and_refreshes():
    model = network()
    opt = NanoAdam(model.parameters(), lr=1e-2, density=0.1, mask_interval=2, capturable=True)
    static = batch(0)

    def one():
        opt.zero_grad()
        model(static).square().mean().backward()
        opt.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            one()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one()
    for group in opt.param_groups:
        group["steps"] = 3  # capturing runs nothing
    weight = model[2].weight
    for step in range(3, 9):
        static.copy_(batch(step))
        opt.refresh()
        mask, before = opt.selected(weight), copy.deepcopy(model)
        kept = weight.grad.clone() if step > 3 else None
        graph.replay()
        before.zero_grad()
        before(static).square().mean().backward()
        torch.testing.assert_close(weight.grad.to_dense(), before[2].weight.grad * mask)
        opt.refresh()
        if kept is not None and (step + 1) % 2 == 0:  # refreshed since
            with pytest.raises(RuntimeError, match="before refresh"):
                kept.norm()


def test_a_tensor_of_more_than_two_to_the_31_weights_with_short_rows():
    """5 GB, whose positions do not fit 32 bits: its last rows are trained like a small tensor."""
    if torch.cuda.get_device_properties(0).total_memory < 30e9:
        pytest.skip("needs 30 GB")
    rows, tail = 10_000_000, 1_000
    large = torch.nn.Parameter(torch.zeros(rows, 256, dtype=torch.bfloat16, device="cuda"))
    ends = torch.randn(tail, 256, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        large[:tail], large[-tail:] = ends, ends
    assert rows % 16 == 0 and tail % 8 == 0  # chunks of 16 rows begin where those of the small tensor do
    small = torch.nn.Parameter(ends[-992:].clone())
    options = {"lr": 1e-2, "density": 0.01, "mask_interval": 1, "stochastic_rounding": False, "keep_zeros": True}
    first, second = NanoAdam([large], **options), NanoAdam([small], **options)
    for step in range(3):
        factor = torch.randn(tail, 256, dtype=torch.bfloat16, device="cuda", generator=seeded(step))
        (large[-tail:] * factor).sum().backward()
        (small * factor[-992:]).sum().backward()
        assert torch.equal(large.grad._box.values[-small.grad._box.values.numel() :], small.grad._box.values)
        for opt in (first, second):
            opt.step()
            opt.zero_grad()
    assert torch.equal(large[-992:], small)
    assert torch.equal(large[:tail], ends)
    assert not large[tail:-tail].any()


def seeded(step):
    return torch.Generator("cuda").manual_seed(step)


def test_a_captured_step_replays_with_changing_lr_and_refreshes_between():
    results = []
    for captured in (True, False):
        model = network()
        lr = torch.tensor(1e-3, device="cuda")
        opt = NanoAdam(model.parameters(), lr=lr, density=0.1, mask_interval=4, capturable=True)
        static = batch(0)

        def one(model=model, opt=opt, static=static):
            model(static).square().mean().backward()
            opt.step()
            opt.zero_grad()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for step in range(3):
                static.copy_(batch(step))
                one()
        torch.cuda.current_stream().wait_stream(side)
        opt.refresh()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                one()
            for group in opt.param_groups:
                group["steps"] = 3  # capturing runs nothing
        for step in range(3, 15):
            lr.fill_(1e-3 / step)
            static.copy_(batch(step))
            opt.refresh()
            graph.replay() if captured else one()
        results.append(bits(model))
        assert all(int(opt.state[p]["step"]) == 15 for p in model.parameters())
    assert torch.equal(*results)


def test_dense_gradients_alive_stay_within_the_budget():
    layers = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, bias=False) for _ in range(24)]).to("cuda")
    x = torch.randn(8, 1024, device="cuda")
    one, peaks = 4 * 1024 * 1024, []
    for budget in (0, 8 * one):
        opt = NanoAdam(layers.parameters(), density=0.01, release_bytes=budget)
        for _ in range(2):
            layers(x).sum().backward()
            opt.step()
            opt.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layers(x).sum().backward()
        peaks.append((torch.cuda.max_memory_allocated() - before) / one)
        opt.zero_grad()
    assert peaks[0] < 5
    assert peaks[1] < 14


def test_a_compiled_model_is_trained():
    model = network()
    compiled = torch.compile(model)
    opt = NanoAdam(compiled.parameters(), lr=1e-3, density=0.1)
    before = bits(model)
    for step in range(3):
        compiled(batch(step)).square().mean().backward()
        assert isinstance(model[0].weight.grad, SelectedGradient)
        opt.step()
        opt.zero_grad()
    changed = bits(model) != before
    assert 0.05 < changed.float().mean().item() < 0.2
    assert opt.selected(model[0].weight).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_a_captured_step_leaves_a_parameter_without_gradient_alone():
    model, unused = network(), torch.nn.Parameter(torch.randn(64, 64, device="cuda"))
    opt = NanoAdam([*model.parameters(), unused], lr=1e-3, density=0.1, mask_interval=100, capturable=True)
    static, before = batch(0), unused.detach().clone()

    def one():
        model(static).square().mean().backward()
        opt.step()
        opt.zero_grad()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            one()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one()
    for _ in range(4):
        graph.replay()
    assert [int(opt.state[p]["step"]) for p in (*model.parameters(), unused)] == [7, 7, 7, 7, 0]
    assert torch.equal(unused, before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_parameters_on_two_devices_are_trained_as_on_one():
    results = []
    for devices in (("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")):
        torch.manual_seed(0)
        first, second = torch.nn.Linear(64, 700).to(devices[0]), torch.nn.Linear(700, 64).to(devices[1])
        parameters = [*first.parameters(), *second.parameters()]
        opt = NanoAdam(parameters, lr=1e-3, density=0.1, mask_interval=3)
        for step in range(10):
            second(first(batch(step)).relu().to(devices[1])).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            opt.step()
            opt.zero_grad()
        results.append(torch.cat([p.detach().cpu().view(-1) for p in parameters]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("steps", [0, 4])
def test_a_model_may_move_after_its_optimizer_was_made(steps):
    results = []
    for moved in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 700), torch.nn.GELU(), torch.nn.Linear(700, 64))
        if not moved:
            model.to("cuda")
        opt = NanoAdam(model.parameters(), lr=1e-3, density=0.1, mask_interval=3)
        for step in range(steps + 6):
            if step == steps:
                model.to("cuda")
            device = next(model.parameters()).device
            model(batch(step).to(device)).square().mean().backward()
            opt.step()
            opt.zero_grad()
        results.append(bits(model))
    # Gradients of the CPU are rounded in other ways, which a quotient of moments may enlarge; a lost moment or a wrong
    # selection would show as a whole learning rate.
    torch.testing.assert_close(*results, rtol=1e-4, atol=5e-5)
