"""apply(base, diff(base, tuned)) is tuned in every bit, revert is the base, and what is refused changes nothing."""

import copy as copies
import dataclasses
import tempfile
from pathlib import Path

import pytest
import torch
from cases import copy, models, noise, same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from nanoadam import delta
from nanoadam.delta import DeltaError, Patch, bits


@given(models())
def test_apply_makes_the_finetuned_model_in_every_bit(drawn):
    base, tuned = drawn
    patch = delta.diff(base, tuned)
    model = copy(base)
    undo = delta.apply(model, patch)
    assert same(model, tuned)
    assert not delta.apply(model, patch).entries  # twice is once
    assert same(model, tuned)
    delta.apply(model, undo)
    assert same(model, base)


@settings(max_examples=40)
@given(models())
def test_a_file_holds_the_same_patch(drawn):
    base, tuned = drawn
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patch.safetensors"
        delta.diff(base, tuned).save(path)
        streamed = delta.diff(base, tuned, out=path.with_name("streamed.safetensors"))
        assert path.read_bytes() == path.with_name("streamed.safetensors").read_bytes()
        for patch in (path, Patch.load(path), Patch.load(path).to("cpu"), streamed):
            model = copy(base)
            undo = delta.apply(model, patch)
            assert same(model, tuned)
            delta.apply(model, undo)
            assert same(model, base)
        if all(tensor.is_contiguous() for tensor in tuned.values()):
            load_file(path)  # it is a safetensors file like any other


@settings(max_examples=40)
@given(models())
def test_files_are_served_like_memory(drawn):
    base, tuned = ({k: v.contiguous() for k, v in copy(state).items() if k != "tied"} for state in drawn)
    if not base:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(base, folder / "base.safetensors")
        save_file(tuned, folder / "tuned.safetensors")
        delta.diff(folder / "base.safetensors", folder / "tuned.safetensors", out=folder / "p.safetensors")
        delta.apply(folder / "base.safetensors", folder / "p.safetensors", out=folder / "out.safetensors")
        assert same(load_file(folder / "out.safetensors"), tuned)
        assert delta.verify(folder / "tuned.safetensors", folder / "p.safetensors").is_tuned
        assert delta.verify(folder / "base.safetensors", folder / "p.safetensors").is_base or same(base, tuned)


def test_a_tensor_without_a_change_costs_nothing():
    base = {"a": torch.randn(1000, 1000), "b": torch.randn(10)}
    tuned = copy(base)
    tuned["b"] += 1
    patch = delta.diff(base, tuned)
    assert list(patch) == ["b"]
    assert patch.nbytes == 40
    assert not delta.diff(base, copy(base)).entries


def linear_models():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 20, bias=False))
    base[3].weight = base[0].weight
    tuned = copies.deepcopy(base)
    with torch.no_grad():
        tuned[1].weight[3, 4] = -0.0
        tuned[0].weight[7] *= 2
        tuned[2].running_mean += 1
        tuned[2].num_batches_tracked += 5
    return base, tuned


def test_modules_in_place_with_tied_weights_and_buffers():
    base, tuned = linear_models()
    model = copies.deepcopy(base)
    own = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    patch = delta.diff(base, tuned)
    assert patch["0.weight"].tied == ("3.weight",)
    delta.apply(model, patch)
    assert same(model.state_dict(), tuned.state_dict())
    assert model[3].weight is model[0].weight
    assert own == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    delta.revert(model)
    assert same(model.state_dict(), base.state_dict())


@pytest.mark.parametrize("changed", ["0.weight", "3.weight"])
@pytest.mark.parametrize("files", [True, False])
def test_weights_that_are_tied_in_the_model_and_not_in_the_patch_are_refused(tmp_path, files, changed):
    base, _ = linear_models()
    tuned = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    tuned[changed].view(-1)[5] += 1
    before = {name: tensor for name, tensor in base.state_dict().items() if name != "3.weight"}
    if files:
        save_file(before, tmp_path / "base.safetensors")
        save_file(tuned, tmp_path / "tuned.safetensors")
    patch = (
        delta.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors") if files else delta.diff(base, tuned)
    )
    model = copies.deepcopy(base)
    with pytest.raises(DeltaError, match="is tied in"):
        delta.apply(model, patch)
    assert same(model.state_dict(), base.state_dict())
    apart = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    delta.apply(apart, delta.diff(apart, tuned))
    assert same(apart, tuned)


def test_weights_that_were_tied_in_the_finetune_alone():
    tuned, _ = linear_models()
    base = copies.deepcopy(tuned)
    base[3].weight = torch.nn.Parameter(torch.randn(base[3].weight.shape, dtype=base[3].weight.dtype))
    model = copies.deepcopy(base)
    delta.apply(model, delta.diff(base, tuned))
    assert same(model.state_dict(), tuned.state_dict())


def test_an_expanded_tensor_is_refused():
    base = torch.ones(1, 8).expand(4, 8)
    tuned = base.clone()
    tuned[2, 3] = 5
    with pytest.raises(DeltaError, match="expanded"):
        delta.apply({"x": base}, delta.diff({"x": base}, {"x": tuned}))
    assert base.eq(1).all()


def test_a_patch_under_the_other_name_of_a_tied_weight():
    base, tuned = linear_models()
    files = {k: v for k, v in tuned.state_dict().items() if k != "0.weight"}  # saved under the head's name
    patch = delta.diff({k: v for k, v in base.state_dict().items() if k != "0.weight"}, files)
    model = copies.deepcopy(base)
    delta.apply(model, patch)
    assert same(model.state_dict(), tuned.state_dict())


def test_with_applied():
    base, tuned = linear_models()
    model, patch = copies.deepcopy(base), delta.diff(base, tuned)
    with delta.applied(model, patch) as inside:
        assert inside is model
        assert same(model.state_dict(), tuned.state_dict())
        with delta.applied(model, patch):  # already there: nothing to do, and nothing to take back
            pass
        assert same(model.state_dict(), tuned.state_dict())
    assert same(model.state_dict(), base.state_dict())
    with pytest.raises(DeltaError, match="no patch to take back"):
        delta.revert(model)


def test_patches_stack():
    base, tuned = linear_models()
    further = copies.deepcopy(tuned)
    with torch.no_grad():
        further[1].bias += 1
    model = copies.deepcopy(base)
    delta.apply(model, delta.diff(base, tuned))
    delta.apply(model, delta.diff(tuned, further))
    delta.revert(model)
    assert same(model.state_dict(), tuned.state_dict())
    delta.revert(model)
    assert same(model.state_dict(), base.state_dict())


def test_revert_refuses_weights_that_were_trained_since():
    base, tuned = linear_models()
    model = copies.deepcopy(base)
    delta.apply(model, delta.diff(base, tuned))
    with torch.no_grad():
        model[0].weight[0] += 1
    before = copies.deepcopy(model.state_dict())
    with pytest.raises(DeltaError, match=r"0\.weight"):
        delta.revert(model)
    assert same(model.state_dict(), before)


# Strength


def test_strength_moves_between_base_and_tuned():
    base = {"w": torch.randn(64, 64).bfloat16(), "n": torch.tensor(3), "same": torch.ones(4)}
    tuned = {"w": base["w"].clone(), "n": torch.tensor(9), "same": torch.ones(4)}
    tuned["w"].view(-1)[::9] = 2.0
    patch = delta.diff(base, tuned)
    for strength, expected in ((0.0, base), (1.0, tuned)):
        model = copy(base)
        delta.apply(model, patch, strength)
        assert same(model, expected)
    model = copy(base)
    undo = delta.apply(model, patch, 0.75)
    wanted = (base["w"].float() + 0.75 * (tuned["w"].float() - base["w"].float())).bfloat16()
    assert torch.equal(model["w"], torch.where(base["w"] == tuned["w"], base["w"], wanted))
    assert model["n"] == 9
    delta.apply(model, undo)
    assert same(model, base)


@settings(max_examples=50)
@given(models(), st.sampled_from([-0.5, 0.0, 0.3, 1.0, 1.5]))
def test_any_strength_can_be_taken_back(drawn, strength):
    base, tuned = drawn
    model = copy(base)
    delta.apply(model, delta.apply(model, delta.diff(base, tuned), strength))
    assert same(model, base)


def test_a_strength_on_top_of_the_finetuned_model_is_refused():
    base, tuned = linear_models()
    model, patch = copies.deepcopy(base), delta.diff(base, tuned)
    delta.apply(model, patch)
    with pytest.raises(DeltaError, match="already"):
        delta.apply(model, patch, 0.5)
    assert same(model.state_dict(), tuned.state_dict())
    with pytest.raises(DeltaError, match="strength"):
        delta.apply(model, patch, float("nan"))


# New heads


def test_a_new_head_on_a_module():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    tuned = nn.Sequential(copies.deepcopy(base[0]), nn.Linear(4, 5))
    patch = delta.diff(base, tuned)
    assert patch["1.weight"].kind == "new"
    model = copies.deepcopy(base)
    delta.apply(model, patch)
    assert same(model.state_dict(), tuned.state_dict())
    assert model[1].out_features == 5
    assert torch.equal(model(torch.ones(1, 4)), tuned(torch.ones(1, 4)))
    delta.revert(model)
    assert same(model.state_dict(), base.state_dict())
    assert model[1].out_features == 2


def test_a_head_that_was_drawn_at_random_is_nobodys():
    torch.manual_seed(0)
    base, other, tuned = ({"head": torch.randn(3, 3), "w": torch.ones(2)} for _ in range(3))
    patch = delta.diff(base, tuned, new=["head"])
    assert patch["head"].kind == "new"
    delta.apply(other, patch)
    assert same(other, tuned)
    delta.apply(other, patch, 0.5)  # new tensors come whole at any strength
    assert same(other, tuned)


def test_a_module_without_a_place_is_refused():
    base, tuned = {"w": torch.ones(2)}, {"w": torch.ones(2), "extra": torch.ones(3)}
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(2))
    with pytest.raises(DeltaError, match="no place for 'extra'"):
        delta.apply(model, delta.diff(base, tuned))


def test_a_base_saved_without_its_head():
    base = {"encoder.weight": torch.randn(6, 6), "encoder.bias": torch.zeros(6)}
    tuned = {f"bert.{name}": tensor.clone() for name, tensor in base.items()} | {"classifier.weight": torch.ones(2, 6)}
    tuned["bert.encoder.weight"][0, 0] = 9
    patch = delta.diff(base, tuned)
    assert (patch.prefix, set(patch)) == ("bert.", {"bert.encoder.weight", "classifier.weight"})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(base, folder / "base.safetensors")
        delta.apply(folder / "base.safetensors", patch, out=folder / "out.safetensors")
        assert same(load_file(folder / "out.safetensors"), tuned)
        assert delta.verify(folder / "base.safetensors", patch).is_base
        assert delta.verify(folder / "out.safetensors", patch).is_tuned


# What is refused


def refused(model, patch, match, **options):
    before = copy(model)
    with pytest.raises(DeltaError, match=match):
        delta.apply(model, patch, **options)
    assert same(model, before)


def tensors():
    generator = torch.Generator().manual_seed(1)
    base = {"first": torch.randn(200, 100, generator=generator), "w": torch.randn(300, 100, generator=generator)}
    base["w"] = base["w"].bfloat16()
    tuned = copy(base)
    tuned["first"][0, 0] += 1
    tuned["w"].view(-1)[::97] = 1.0
    return base, tuned


def test_another_base_is_refused_and_nothing_changes():
    base, tuned = tensors()
    patch = delta.diff(base, tuned, name="org/base")
    wrong = copy(base)
    wrong["w"][299, 99] += 1  # the last weight of the last tensor
    refused(wrong, patch, r"w in the state dict .* org/base")
    delta.apply(wrong, patch, verify=False)
    assert torch.equal(wrong["w"].view(-1)[::97], tuned["w"].view(-1)[::97])


def test_other_forms_are_refused_and_nothing_changes():
    base, tuned = tensors()
    patch = delta.diff(base, tuned)
    refused({**copy(base), "w": base["w"].float()}, patch, r"w is float32 .* bfloat16 .* dtype=torch.bfloat16")
    refused({**copy(base), "w": base["w"][:200].clone()}, patch, r"w has shape \[200, 100\]")
    refused({"first": base["first"].clone()}, patch, "no tensor 'w'")
    refused(copy(base), 3, "a patch is")
    for model in ([base["w"]], {"w": 3}, None):
        with pytest.raises(DeltaError):
            delta.apply(model, patch)
    refused(copy(base), patch, "out is for saved models", out="x")


def test_a_patch_that_makes_something_else_is_refused_and_nothing_changes():
    base, tuned = tensors()
    patch = delta.diff(base, tuned)
    for part in ("values", "gaps", "blocks"):
        for at in (0, -1):
            entry = patch["w"]
            broken = {name: tensor.clone() for name, tensor in entry.parts.items()}
            bits.flat(broken[part])[at] ^= 1
            spoilt = Patch({**patch.entries, "w": dataclasses.replace(entry, parts=broken)})
            refused(copy(base), spoilt, "w: ")


def test_meta_and_sharded_and_odd_tensors_are_refused():
    base, tuned = tensors()
    patch = delta.diff(base, tuned)
    for wrong in (torch.empty(2, device="meta"), torch.eye(2).to_sparse()):
        with pytest.raises(DeltaError, match="first"):
            delta.apply({**base, "first": wrong}, patch)
    with pytest.raises(DeltaError, match="complex64"):
        delta.diff({"c": torch.ones(2)}, {"c": torch.ones(2, dtype=torch.complex64)}).save("/nowhere/x")


def test_bools_that_are_none_are_refused():
    base, tuned = {"b": torch.zeros(100, dtype=torch.bool)}, {"b": torch.ones(100, dtype=torch.bool)}
    patch = delta.diff(base, tuned)
    bits.bits(patch["b"].values)[3] = 2
    refused(copy(base), patch, "bool", verify=False)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16])
def test_noise_of_any_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    base = {"w": noise(dtype, (100, 100), generator)}
    tuned = {"w": noise(dtype, (100, 100), generator)}
    model = copy(base)
    delta.apply(model, delta.diff(base, tuned))
    assert same(model, tuned)
