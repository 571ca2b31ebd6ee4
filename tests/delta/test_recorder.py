"""A Recorder's patches, applied one after the other, are the trainer's weights in every bit."""

import copy

import pytest
import torch
from cases import same
from torch import nn

import nanoadam
from crossed import crossed
from nanoadam import delta
from nanoadam.delta import DeltaError


class Tiny(nn.Module):
    """Tied and untied matrices, a convolution, buffers, a frozen part, weights in two dtypes."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 24, dtype=dtype)
        self.conv = nn.Conv1d(24, 24, 3, padding=1, dtype=dtype)
        self.norm = nn.BatchNorm1d(24, dtype=dtype)
        self.wide = nn.Linear(24, 5000, dtype=dtype)
        self.down = nn.Linear(5000, 24, dtype=dtype)
        self.frozen = nn.Linear(24, 24, dtype=dtype).requires_grad_(False)
        self.head = nn.Linear(24, 30, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.norm(self.conv(self.embed(tokens).transpose(1, 2))).transpose(1, 2)
        return self.head(self.frozen(x + self.down(self.wide(x).relu())))


def make(model, **options):
    options = {
        "lr": 3e-2,
        "density": nanoadam.linear(0.3, 0.05, total_steps=200, interval=40),
        "mask_interval": 7,
    } | options
    groups = nanoadam.param_groups(model)
    matrices = [group for group in groups if not group.get("dense")]
    matrices[0]["mask_interval"] = 3  # groups of their own intervals
    matrices[0]["density"] = 0.02
    return nanoadam.NanoAdam(groups, **options)


def step(model, optimizer, i):
    generator = torch.Generator().manual_seed(i)
    tokens = torch.randint(0, 30, (4, 8), generator=generator)
    loss = nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("every", [1, pytest.param(5, marks=pytest.mark.slow), 37])
def test_200_steps(dtype, every):
    model = Tiny(dtype)
    server = copy.deepcopy(model)
    optimizer = make(model)
    recorder = delta.Recorder(model, optimizer)
    sizes = []
    for i in range(200):
        step(model, optimizer, i)
        if (i + 1) % every == 0:
            patch = recorder.patch()
            sizes.append(patch.count)
            delta.apply(server, patch)  # with all hashes
            assert same(server.state_dict(), model.state_dict()), i
    delta.apply(server, recorder.patch())
    assert same(server.state_dict(), model.state_dict())
    assert not recorder.patch().entries
    assert "frozen.weight" not in patch
    if every == 1:
        assert sizes[-1] < 0.12 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"keep_zeros": True},
        {"criterion": "gradient"},
        {"criterion": "random"},
        {"moments": "reset"},
        {"stochastic_rounding": False},
        {"weight_decay": 0.1},
        {"density": 1.0},
        {"gradient_release": False},
    ],
    ids=str,
)
def test_every_option(options):
    model = Tiny()
    with torch.no_grad():
        model.wide.weight[:, ::2] = 0
    server = copy.deepcopy(model)
    optimizer = make(model, **options)
    recorder = delta.Recorder(model, optimizer)
    for i in range(25):
        step(model, optimizer, i)
        if i % 3 == 0:
            delta.apply(server, recorder.patch())
            assert same(server.state_dict(), model.state_dict())


def test_patches_survive_a_file_and_compose(tmp_path):
    model = Tiny()
    base, server = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = make(model)
    recorder = delta.Recorder(model, optimizer, base="tiny")
    whole = None
    for i in range(12):
        step(model, optimizer, i)
        recorder.patch().save(tmp_path / "p.safetensors")
        patch = delta.Patch.load(tmp_path / "p.safetensors")
        assert patch.base == "tiny"
        whole = patch.to("cpu") if whole is None else delta.compose(whole, patch)
        delta.apply(server, patch)
    assert same(server.state_dict(), model.state_dict())
    delta.apply(base, whole)
    assert same(base.state_dict(), model.state_dict())


def test_without_a_reset_the_patch_starts_where_the_last_one_did():
    model = Tiny()
    base = copy.deepcopy(model)
    optimizer = make(model)
    recorder = delta.Recorder(model, optimizer)
    for i in range(30):
        step(model, optimizer, i)
        if i % 10 == 9:
            fresh = copy.deepcopy(base)
            delta.apply(fresh, recorder.patch(reset=False))
            assert same(fresh.state_dict(), model.state_dict())


def test_a_wrong_server_is_noticed():
    model = Tiny()
    server = copy.deepcopy(model)
    optimizer = make(model)
    recorder = delta.Recorder(model, optimizer)
    step(model, optimizer, 0)
    recorder.patch()  # lost
    step(model, optimizer, 1)
    with pytest.raises(DeltaError, match="neither"):
        delta.apply(server, recorder.patch())


def test_reseed_serves_whoever_comes():
    model = Tiny()
    optimizer = make(model)
    recorder = delta.Recorder(model, optimizer)
    step(model, optimizer, 0)
    with torch.no_grad():
        model.wide.weight += 1  # not the optimizer's doing
    recorder.reseed()
    torch.manual_seed(1)
    server = Tiny()
    with torch.no_grad():
        server.frozen.weight.zero_()
    delta.apply(server, recorder.patch())
    assert same(server.state_dict(), model.state_dict())
    step(model, optimizer, 1)
    delta.apply(server, recorder.patch())
    assert same(server.state_dict(), model.state_dict())


def test_loading_an_optimizer_makes_the_next_patch_whole():
    model = Tiny()
    optimizer = make(model)
    step(model, optimizer, 0)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    server = copy.deepcopy(model)
    recorder = delta.Recorder(model, optimizer)
    step(model, optimizer, 1)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    step(model, optimizer, 2)
    delta.apply(server, recorder.patch())
    assert same(server.state_dict(), model.state_dict())


def test_without_hashes():
    model = Tiny()
    server = copy.deepcopy(model)
    optimizer = make(model)
    recorder = delta.Recorder(model, optimizer, verify=False)
    for i in range(10):
        step(model, optimizer, i)
        patch = recorder.patch()
        assert all(entry.base is entry.result is None for entry in patch.values())
        delta.apply(server, patch)
    assert same(server.state_dict(), model.state_dict())


def test_nothing_is_kept_until_a_refresh():
    model = Tiny()
    optimizer = make(model, density=0.02, mask_interval=1000)
    recorder = delta.Recorder(model, optimizer)
    for i in range(3):  # the matrices are refreshed every three steps
        step(model, optimizer, i)
    assert not recorder._touched
    step(model, optimizer, 3)
    assert len(recorder._touched) == 4


def test_memory_is_bounded_by_a_bit_a_weight():
    model = Tiny()
    optimizer = make(model)
    recorder = delta.Recorder(model, optimizer)
    for i in range(30):
        step(model, optimizer, i)
    numel = model.wide.weight.numel()
    touched = recorder._touched[model.wide.weight]
    assert touched.mask is not None
    kept = touched.mask.nbytes + sum(selection.index.nbytes for selection in touched.selections)
    assert kept <= numel // 8 + 1 + numel // 8


def test_what_was_frozen_after_it_was_trained_is_sent():
    model = Tiny()
    server = copy.deepcopy(model)
    optimizer = make(model)
    recorder = delta.Recorder(model, optimizer)
    step(model, optimizer, 0)
    for frozen in (model.wide.weight, model.norm.weight):
        frozen.requires_grad_(False)
    step(model, optimizer, 1)
    delta.apply(server, recorder.patch())
    assert same(server.state_dict(), model.state_dict())
    step(model, optimizer, 2)
    patch = recorder.patch()
    assert "wide.weight" not in patch
    delta.apply(server, patch)
    assert same(server.state_dict(), model.state_dict())


@pytest.mark.parametrize(("dtype", "every"), crossed([torch.float32, torch.bfloat16], [1, 5, 37]))
def test_whole_columns(dtype, every):
    model = Tiny(dtype)
    server = copy.deepcopy(model)
    optimizer = make(model, granularity="column")
    recorder = delta.Recorder(model, optimizer)
    kinds = set()
    for i in range(100):
        step(model, optimizer, i)
        if (i + 1) % every == 0:
            patch = recorder.patch()
            kinds |= {entry.kind for name, entry in patch.entries.items() if name == "wide.weight"}
            delta.apply(server, patch)
            assert same(server.state_dict(), model.state_dict()), i
    assert kinds == {"columns"} if every < 37 else kinds <= {"columns", "dense"}


def test_whole_columns_that_are_rows():
    model = nn.Sequential(nn.Linear(20, 20, bias=False))
    server = copy.deepcopy(model)
    groups = [{"params": list(model.parameters()), "granularity": "column", "transposed": True}]
    optimizer = nanoadam.NanoAdam(groups, lr=1e-2, density=0.1, mask_interval=3)
    recorder = delta.Recorder(model, optimizer)
    for _ in range(10):
        model(torch.randn(4, 20)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        patch = recorder.patch()
        assert patch.count % 20 == 0
        delta.apply(server, patch)
        assert same(server.state_dict(), model.state_dict())


def test_what_is_refused():
    model = Tiny()
    with pytest.raises(DeltaError, match="AdamW"):
        delta.Recorder(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(DeltaError, match="not the model's"):
        delta.Recorder(copy.deepcopy(model), make(model))
    optimizer = make(model)
    recorder = delta.Recorder(model, optimizer)
    recorder.close()
    assert not optimizer._selection_hooks


def test_what_a_cleared_state_had_selected_is_sent():
    model = Tiny()
    optimizer = make(model, mask_interval=1000)
    recorder, server = delta.Recorder(model, optimizer), copy.deepcopy(model)
    for i in range(4):
        step(model, optimizer, i)
        optimizer.state.clear()
        step(model, optimizer, 10 + i)
        delta.apply(server, recorder.patch())
        assert same(server.state_dict(), model.state_dict())
