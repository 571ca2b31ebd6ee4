"""Claims about `nanoadam.groups`: what users say themselves, and a learning rate of its own for the head."""

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import architectures
from architectures import Net, bert, by_name, encoder, gpt2, mlp, selected
from nanoadam.groups import describe, param_groups

known = architectures.known


# Overrides


@pytest.mark.parametrize(
    "override",
    [
        "bert.pooler.dense.weight",
        "*.pooler.*",
        "bert.pooler",
        ["bert.pooler"],
        lambda name, parameter: "pooler" in name and parameter.shape == (16, 16),
        transformers.models.bert.modeling_bert.BertPooler,
    ],
)
def test_overrides_beat_recognition(override: Any) -> None:
    model = bert("BertForSequenceClassification")
    found = by_name(model, dense=override, weight_decay=0.1)
    assert found["bert.pooler.dense.weight"] == ("matrix", False, 0.1)
    assert selected(model) - selected(model, dense=override) == {"bert.pooler.dense.weight"}


def test_a_module_stands_for_all_within_it() -> None:
    model = bert("BertForSequenceClassification")
    lost = selected(model) - selected(model, dense=model.bert.encoder)
    assert lost == {name for name in selected(model) if name.startswith("bert.encoder.")}


def test_a_sequential_means_itself_and_not_its_layers() -> None:
    inner = mlp()
    model = Net(inner=inner, out=nn.Linear(3, 3))
    assert selected(model, dense=inner) == set()


def test_heads_can_be_selected_from() -> None:
    model = bert("BertForSequenceClassification")
    assert by_name(model, selected="classifier")["classifier.weight"] == ("head", True, 0.0)
    assert by_name(model, selected="classifier")["classifier.bias"] == ("bias", False, 0.0)


def test_tied_weights_answer_to_each_of_their_names() -> None:
    model = gpt2("GPT2LMHeadModel")
    assert "transformer.wte.weight" not in selected(model, dense="lm_head")
    assert "transformer.wte.weight" not in selected(model, dense="lm_head.weight")
    assert "transformer.wte.weight" not in selected(model, dense=model.lm_head)


def test_forced_weights_keep_their_decay_in_a_group_of_their_own() -> None:
    groups = param_groups(bert("BertForSequenceClassification"), dense=nn.Embedding, weight_decay=0.1)
    assert [group["role"] for group in groups] == ["weights", "head", "dense weights", "norms and biases"]
    assert groups[2]["weight_decay"] == 0.1
    assert "dense weights: bert.embeddings.word_embeddings.weight" in describe(groups)


def test_claims_by_both_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'0\.weight' is claimed by both dense= and selected="):
        param_groups(mlp(), dense="0.*", selected=nn.Linear)


@pytest.mark.parametrize("option", ["dense", "selected"])
def test_a_pattern_without_a_match_names_the_nearest(option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option}='bert.poler' matches no parameter.*bert\.pooler"):
        param_groups(bert("BertForSequenceClassification"), **{option: "bert.poler"})


def test_a_type_or_module_without_a_match_is_refused() -> None:
    with pytest.raises(ValueError, match="dense=Embedding matches no module with parameters; this model has Linear"):
        param_groups(mlp(), dense=nn.Embedding)
    with pytest.raises(ValueError, match="names a Linear that is not part of the model"):
        param_groups(mlp(), dense=nn.Linear(2, 2))


def test_selecting_from_vectors_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"selected='\*\.bias' names only tensors of dimension < 2"):
        param_groups(mlp(), selected="*.bias")


@pytest.mark.parametrize("nonsense", [3, [3], [None]])
def test_other_overrides_are_refused(nonsense: Any) -> None:
    with pytest.raises(TypeError, match="dense= takes name patterns"):
        param_groups(mlp(), dense=nonsense)


# A learning rate of its own for the head


def rates(model: nn.Module, **options: Any) -> dict[str, float | None]:
    return {name: group.get("lr") for group in param_groups(model, **options) for name in group["param_names"]}


def test_a_heads_rate_is_that_of_its_weights_and_biases_alone(known: tuple[nn.Module, set[str]]) -> None:
    model, heads = known
    if not heads:
        with pytest.raises(
            ValueError, match=r"head_lr=0\.5 is for a head, and \w+ has none that is trained.*leave head_lr"
        ):
            param_groups(model, head_lr=0.5)
        return
    biases = {name.removesuffix("weight") + "bias" for name in heads}
    expected = {name: 0.5 if name in heads | biases else None for name, _ in model.named_parameters()}
    assert rates(model, head_lr=0.5) == expected
    # What is selected from and decayed stays as it was.
    assert by_name(model, head_lr=0.5, weight_decay=0.1) == by_name(model, weight_decay=0.1)


def test_without_a_rate_for_the_head_no_group_has_one(known: tuple[nn.Module, set[str]]) -> None:
    assert set(rates(known[0], head_lr=None).values()) == {None}


def test_a_head_with_a_norm_has_one_rate() -> None:
    model = Net(encoder=encoder(), head=nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 3)))
    assert {name for name, rate in rates(model, head_lr=0.5).items() if rate} == {
        "head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias",
    }  # fmt: skip
    roles_ = [group["role"] for group in param_groups(model, head_lr=0.5)]
    assert roles_ == ["weights", "head", "norms and biases", "head norms and biases"]


def test_a_head_that_is_selected_from_keeps_its_rate() -> None:
    groups = param_groups(mlp(), selected="4", head_lr=0.5, weight_decay=0.1)
    own = next(group for group in groups if group["role"] == "selected head")
    assert (own["param_names"], own["lr"], own["dense"], own["weight_decay"]) == (["4.weight"], 0.5, False, 0.1)


def test_an_output_tied_to_the_embeddings_keeps_the_rate_of_the_rest() -> None:
    found = rates(bert("BertForPreTraining"), head_lr=0.5)
    assert {name for name, rate in found.items() if rate} == {
        "cls.seq_relationship.weight", "cls.seq_relationship.bias",
    }  # fmt: skip


def test_adapters_keep_the_rate_of_the_rest() -> None:
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    found = rates(peft.get_peft_model(bert("BertForSequenceClassification"), config), head_lr=0.5)
    assert all((rate is None) == ("lora_" in name) for name, rate in found.items())
    assert sum("classifier" in name for name in found) == 2
    config = peft.LoraConfig(r=2, target_modules=["query", "classifier"])
    with pytest.raises(ValueError, match="none that is trained"):
        param_groups(peft.get_peft_model(bert("BertForSequenceClassification"), config), head_lr=0.5)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), "1e-3", True, [1e-3]])
def test_a_rate_out_of_range_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"head_lr must be a finite number of at least 0, or None .*; got"):
        param_groups(mlp(), head_lr=bad)


def test_a_frozen_head_has_no_rate() -> None:
    model = mlp()
    model[4].requires_grad_(False)
    with pytest.raises(ValueError, match="none that is trained"):
        param_groups(model, head_lr=0.5)


def test_description_tells_the_rate_of_the_head() -> None:
    groups = param_groups(mlp(), head_lr=0.5)
    assert "learning rate of the head: 0.5" in describe(groups)
    assert "learning rate of the head: 0.5" in describe(torch.optim.AdamW(groups, lr=0.1).param_groups)
    for same in (param_groups(mlp()), torch.optim.AdamW(param_groups(mlp()), lr=0.1).param_groups):
        assert "learning rate" not in describe(same)
