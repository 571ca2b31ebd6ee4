"""Gradients are measured tensor by tensor, and the model is left as it was."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional

import nanoadam
from nanoadam import analysis, columns
from nanoadam.analysis import gradients


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(5, 4), torch.randint(2, (5,))) for _ in range(count)]


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


MATRICES = ["0.weight", "2.weight", "4.weight"]


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_measured_is_the_gradient_of_the_mean_loss(count: int) -> None:
    model, data = net(), batches(count)
    found = analysis.measure_gradients(model, data, lambda w, g: (w.clone(), g.clone()), loss)
    (sum(loss(model, batch) for batch in data) / count).backward()
    assert list(found) == MATRICES
    for name, (weight, gradient) in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)
        assert torch.equal(weight, model.get_parameter(name))


def test_of_one_batch_only_one_gradient_is_there_at_a_time() -> None:
    model = net()
    held = []
    analysis.measure_gradients(
        model, batches(1), lambda w, g: held.append(sum(p.grad is not None for p in model.parameters())), loss
    )
    assert held == [1, 1, 1]


def test_the_model_keeps_its_gradients_and_hooks() -> None:
    model = net()
    loss(model, batches(2)[1]).backward()
    before = [p.grad for p in model.parameters()]
    analysis.measure_gradients(model, batches(1), loss=loss)
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    with pytest.raises(RuntimeError, match="broken"):
        analysis.measure_gradients(model, batches(1), loss=lambda m, b: (_ for _ in ()).throw(RuntimeError("broken")))
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_by_default_ratios_and_overlap_are_measured() -> None:
    found = analysis.measure_gradients(net(), batches(1), loss=loss)
    assert all(set(value) == {"ratio", "independent", "overlap"} and value["ratio"] >= 0 for value in found.values())


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="no batch"):
        analysis.measure_gradients(net(), [], loss=loss)
    model = net()
    with pytest.raises(ValueError, match="no gradient reached a matrix"):
        analysis.measure_gradients(model, batches(1), loss=lambda m, b: m[3].bias.sum())


def test_roles_come_with_the_tensors_and_frozen_ones_are_left_out() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    assert {name: role for name, (_, role) in gradients.tensors(model).items()} == {
        "2.weight": "matrix",
        "4.weight": "head",
    }


@pytest.mark.parametrize("kind", ["adamw", "nanoadam"])
def test_the_recorder_measures_at_its_steps_only(kind: str) -> None:
    model, data = net(), batches(4)
    seen: list[torch.Tensor] = []
    recorder = analysis.GradientRecorder(model, steps=(0, 2), measure=lambda w, g: seen.append(g.clone()) or 1.0)
    groups = nanoadam.param_groups(model)
    optimizer = torch.optim.AdamW(model.parameters()) if kind == "adamw" else nanoadam.NanoAdam(groups, density=0.5)
    expected = []
    for step, batch in enumerate(data):
        if step in (0, 2):
            scalar = loss(model, batch)
            expected += torch.autograd.grad(scalar, [model[4].weight, model[2].weight, model[0].weight])
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        recorder.advance()
    recorder.close()
    loss(model, data[0]).backward()
    assert [(r["step"], r["name"], r["role"]) for r in recorder.records] == [
        (step, name, role) for step in (0, 2) for name, role in
        (("4.weight", "head"), ("2.weight", "matrix"), ("0.weight", "matrix"))
    ]  # fmt: skip
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted)


class Words(nn.Module):
    """Every kind of layer that computes selected entries only, and one that does not."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.types = nn.Embedding(12, 8, padding_idx=0), nn.Embedding(2, 8)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.conv, self.head = nn.Conv1d(8, 8, 1), nn.Linear(8, 12)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.types((ids > 6).long())
        x = self.second(torch.relu(self.first(x)))
        return self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("granularity", ["weight", "column"])
def test_layers_that_compute_what_is_selected_compute_all_where_it_is_measured(granularity: str, tied: bool) -> None:
    def train(record: bool) -> tuple[Words, analysis.GradientRecorder | None]:
        model = Words(tied)
        torch.manual_seed(2)
        data = [torch.randint(12, (3, 5)) for _ in range(5)]
        recorder = analysis.GradientRecorder(model, (0, 1, 3), lambda w, g: g.clone()) if record else None
        groups = nanoadam.param_groups(model, granularity=granularity)
        optimizer = nanoadam.NanoAdam(groups, lr=1e-2, density=0.5, mask_interval=2, granularity=granularity)
        for step, ids in enumerate(data):
            whole = [slot.served.leaf is None for slot in optimizer._slots.values() if slot.served is not None]
            assert whole == ([record and step in (1, 3)] * len(whole) if step and not tied else whole)
            before = copy.deepcopy(model)
            scalar = functional.cross_entropy(model(ids).transpose(1, 2), ids)
            scalar.backward()
            optimizer.step()
            optimizer.zero_grad()
            if recorder is not None:
                recorder.advance()
                now = {r["name"]: r["value"] for r in recorder.records if r["step"] == step}
                assert bool(now) == (step in (0, 1, 3))
                functional.cross_entropy(before(ids).transpose(1, 2), ids).backward()
                for name, gradient in now.items():
                    torch.testing.assert_close(gradient, before.get_parameter(name).grad)
        if recorder is not None:
            assert {r["name"] for r in recorder.records} == {n for n, p in model.named_parameters() if p.dim() > 1}
            recorder.close()
        return model, recorder

    (plain, _), (recorded, _) = train(False), train(True)
    for expected, found in zip(plain.parameters(), recorded.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # the recorder changes nothing


def test_a_recorder_that_is_forgotten_asks_for_nothing_more() -> None:
    model = Words()
    recorder = analysis.GradientRecorder(model, (0,))
    assert len(columns._whole) == 6
    recorder.close()
    assert not columns._whole
    del recorder
    analysis.GradientRecorder(model, (0,))
    del model
    gc.collect()
    assert not columns._whole


def test_of_accumulated_gradients_the_sum_is_measured_once() -> None:
    model, data = net(), batches(2)
    recorder = analysis.GradientRecorder(model, steps=(0,), measure=lambda w, g: g.clone())
    for batch in data:
        loss(model, batch).backward()
    recorder.advance()
    assert len(recorder.records) == 3
    for record in recorder.records:
        torch.testing.assert_close(record["value"], model.get_parameter(record["name"]).grad)


def test_a_recorder_made_after_the_optimizer_says_so() -> None:
    model = net()
    optimizer = nanoadam.NanoAdam(nanoadam.param_groups(model), density=0.5)
    recorder = analysis.GradientRecorder(model, steps=(0,))
    with pytest.raises(ValueError, match="make the recorder before the optimizer"):
        loss(model, batches(1)[0]).backward()
    recorder.close()
    del optimizer
