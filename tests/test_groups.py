"""Claims about `nanoadam.groups`: what is selected from, what is dense, in models as people have them."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import peft
import pytest
import torch
import transformers
from torch import nn

import architectures
from architectures import (
    Net,
    bert,
    by_name,
    distilbert,
    gpt2,
    llama,
    mlp,
    qwen,
    qwen_moe,
    roberta,
    roles,
    t5,
    tied_lm,
    vit,
)
from nanoadam import groups as grouping
from nanoadam.groups import describe, param_groups

known = architectures.known
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)


# Recognition


def test_heads_are_found(known: tuple[nn.Module, set[str]]) -> None:
    model, heads = known
    assert {name for name, role in roles(model).items() if role == "head"} == heads


def test_heads_are_dense_and_decayed(known: tuple[nn.Module, set[str]]) -> None:
    model, heads = known
    found = by_name(model, weight_decay=0.1)
    assert all(found[name] == ("head", False, 0.1) for name in heads)


def test_each_parameter_is_listed_once_in_the_models_order(known: tuple[nn.Module, set[str]]) -> None:
    model, _ = known
    order = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    groups = param_groups(model)
    listed = [name for group in groups for name in group["param_names"]]
    assert sorted(listed) == sorted(order)
    for group in groups:
        places = [order[name] for name in group["param_names"]]
        assert places == sorted(places)
        assert [
            dict(model.named_parameters())[name] is p
            for name, p in zip(group["param_names"], group["params"], strict=True)
        ]


def test_few_groups(known: tuple[nn.Module, set[str]]) -> None:
    groups = param_groups(known[0])
    assert len(groups) <= 3
    assert [group["role"] for group in groups] == [
        role for role in ("weights", "head", "norms and biases") if role in {group["role"] for group in groups}
    ]


def test_norms_and_biases_are_dense_and_not_decayed(known: tuple[nn.Module, set[str]]) -> None:
    model, _ = known
    for name, (role, choose, decay) in by_name(model, weight_decay=0.1).items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        norm = isinstance(module, NORMS) or type(module).__name__.endswith("Norm")
        assert (role == "norm") == norm
        if norm or attribute == "bias" or model.get_parameter(name).dim() < 2:
            assert (choose, decay) == (False, 0.0), name


def test_all_other_matrices_are_selected_from_and_decayed(known: tuple[nn.Module, set[str]]) -> None:
    model, heads = known
    found = by_name(model, weight_decay=0.1)
    weights = [
        f"{path}.weight" if path else "weight"
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding, transformers.pytorch_utils.Conv1D))
    ]
    assert weights
    for name in weights:
        if name in found and name not in heads:
            assert found[name][1:] == (True, 0.1), name


def test_embeddings_have_their_own_role() -> None:
    found = roles(gpt2("GPT2LMHeadModel"))
    assert {name for name, role in found.items() if role == "embedding"} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }


@pytest.mark.parametrize(
    ("build", "embedding", "head"),
    [
        (lambda: gpt2("GPT2LMHeadModel"), "transformer.wte.weight", "lm_head.weight"),
        (lambda: qwen("Qwen2ForCausalLM", tied=True), "model.embed_tokens.weight", "lm_head.weight"),
        (lambda: bert("BertForMaskedLM"), "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        (lambda: t5("T5ForConditionalGeneration"), "shared.weight", "lm_head.weight"),
        (tied_lm, "embed.weight", "head.weight"),
    ],
)
def test_tied_head_counts_as_embedding(build: Callable[[], nn.Module], embedding: str, head: str) -> None:
    model = build()
    found = by_name(model)
    assert found[embedding] == ("embedding", True, 0.0)
    assert head not in found
    assert head in param_groups(model).tied[embedding]


def test_what_leads_up_to_the_output_embeddings_is_not_head() -> None:
    assert roles(bert("BertForMaskedLM"))["cls.predictions.transform.dense.weight"] == "matrix"
    assert roles(roberta("RobertaForMaskedLM"))["lm_head.dense.weight"] == "matrix"
    assert roles(distilbert("DistilBertForMaskedLM"))["vocab_transform.weight"] == "matrix"


def test_pooler_inside_the_base_model_is_not_head() -> None:
    assert roles(bert("BertForSequenceClassification"))["bert.pooler.dense.weight"] == "matrix"


def test_stacked_experts_are_matrices() -> None:
    found = by_name(qwen_moe())
    assert found["model.layers.0.mlp.experts.gate_up_proj"] == ("matrix", True, 0.0)
    assert found["model.layers.0.mlp.gate.weight"] == ("matrix", True, 0.0)


def test_biases_of_stacked_experts_are_biases() -> None:
    experts = nn.Module()
    experts.up_proj = nn.Parameter(torch.zeros(4, 8, 16))
    experts.up_proj_bias = nn.Parameter(torch.zeros(4, 16))
    experts.position_bias = nn.Parameter(torch.zeros(8, 8))  # added to nothing here: a matrix that is called bias
    assert roles(experts) == {"up_proj": "matrix", "up_proj_bias": "bias", "position_bias": "matrix"}


def test_class_token_is_a_vector_but_a_layer_with_one_output_is_a_matrix() -> None:
    assert by_name(vit("ViTModel"))["embeddings.cls_token"] == ("vector", False, 0.0)
    assert roles(Net(gate=nn.Linear(8, 1), out=nn.Linear(8, 3)))["gate.weight"] == "matrix"


def test_norms_of_any_class_are_recognised() -> None:
    class HeadwiseNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 8))

    class LayerNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(8))

    class Standardize(nn.LayerNorm):
        pass

    norms = [
        Standardize(8),
        nn.GroupNorm(2, 8),
        nn.InstanceNorm1d(8, affine=True),
        nn.LayerNorm((4, 8)),
        nn.RMSNorm(8),
        HeadwiseNorm(),
    ]
    model = nn.Sequential(nn.Linear(8, 8), *norms, LayerNorm2d(), nn.Linear(8, 8))
    found = by_name(model, weight_decay=0.1)
    inside = {name for name in found if name.partition(".")[0] not in ("0", str(len(norms) + 2))}
    assert {found[name] for name in inside} == {("norm", False, 0.0)}


def test_scalars_and_vectors_are_dense() -> None:
    model = Net(body=nn.Linear(8, 8), out=nn.Linear(8, 3))
    model.scale = nn.Parameter(torch.tensor(1.0))
    model.gain = nn.Parameter(torch.ones(8))
    found = by_name(model, weight_decay=0.1)
    assert found["scale"] == found["gain"] == ("vector", False, 0.0)


# What is left out


def test_frozen_parameters_are_left_out_and_reported() -> None:
    model = bert("BertForSequenceClassification")
    model.bert.embeddings.requires_grad_(False)
    groups = param_groups(model)
    assert not any(name.startswith("bert.embeddings") for group in groups for name in group["param_names"])
    assert groups.frozen["bert.embeddings.word_embeddings.weight"] == 32 * 16
    assert "frozen: " in describe(groups)


def test_empty_parameters_are_left_out_and_reported() -> None:
    model = mlp()
    model.register_parameter("nothing", nn.Parameter(torch.empty(0, 4)))
    groups = param_groups(model)
    assert groups.empty == ["nothing"]
    assert "empty: nothing" in describe(groups)


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing to train.*requires_grad"):
        param_groups(mlp().requires_grad_(False))


def test_parameters_in_place_of_a_model_are_refused() -> None:
    with pytest.raises(TypeError, match="pass model"):
        param_groups(mlp().parameters())  # type: ignore[arg-type]


def test_negative_weight_decay_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight_decay must be at least 0, got -0\.1"):
        param_groups(mlp(), weight_decay=-0.1)


def test_lazy_modules_are_refused_until_they_have_run() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet"):
        param_groups(model)
    model(torch.zeros(1, 3))
    assert roles(model)["0.weight"] == "matrix"


# Wrappers


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: nn.DataParallel(torch.compile(model))])
def test_wrappers_change_nothing(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = roberta("RobertaForSequenceClassification")
    assert by_name(wrap(model)) == by_name(model)


@pytest.mark.usefixtures("process_group")
def test_ddp_changes_nothing() -> None:
    model = roberta("RobertaForSequenceClassification")
    assert by_name(nn.parallel.DistributedDataParallel(model)) == by_name(model)


def test_meta_device_changes_nothing() -> None:
    with torch.device("meta"):
        model = gpt2("GPT2LMHeadModel")
    assert by_name(model) == by_name(gpt2("GPT2LMHeadModel"))


def test_lora_adapters_are_matrices_and_the_frozen_base_is_left_out() -> None:
    config = peft.LoraConfig(r=1, target_modules="all-linear")
    groups = param_groups(peft.get_peft_model(llama("LlamaForCausalLM"), config))
    assert [group["role"] for group in groups] == ["weights"]
    assert all(".lora_" in name for name in groups[0]["param_names"])
    assert set(groups[0]["roles"]) == {"matrix"}
    assert len(groups.frozen) == len(list(llama("LlamaForCausalLM").parameters()))


def test_heads_that_peft_trains_in_full_are_heads() -> None:
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    found = roles(peft.get_peft_model(bert("BertForSequenceClassification"), config))
    heads = [name for name, role in found.items() if role == "head"]
    assert heads == ["base_model.model.classifier.modules_to_save.default.weight"]


def test_adapters_on_the_head_are_matrices() -> None:
    config = peft.LoraConfig(r=2, target_modules=["query", "classifier"])
    found = roles(peft.get_peft_model(bert("BertForSequenceClassification"), config))
    assert set(found.values()) == {"matrix"}
    assert any("classifier.lora_A" in name for name in found)


def test_the_layer_under_an_adapter_keeps_its_role() -> None:
    config = peft.LoraConfig(r=2, target_modules=["query", "classifier"])
    model = peft.get_peft_model(bert("BertForSequenceClassification"), config)
    model.base_model.model.classifier.base_layer.requires_grad_(True)
    found = roles(model)
    assert [name for name, role in found.items() if role == "head"] == ["base_model.model.classifier.base_layer.weight"]


# As parameter groups


def test_torch_takes_the_groups_as_they_are(known: tuple[nn.Module, set[str]]) -> None:
    optimizer = torch.optim.AdamW(param_groups(copy.deepcopy(known[0]), weight_decay=0.1), lr=1e-3)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert [group["role"] for group in optimizer.param_groups] == [group["role"] for group in param_groups(known[0])]


def test_groups_can_be_copied_and_pickled() -> None:
    groups = param_groups(tied_lm())
    for copied in (copy.deepcopy(groups), pickle.loads(pickle.dumps(groups))):
        assert describe(copied) == describe(groups)
        assert copied.tied == {"embed.weight": ["head.weight"]}


# Describe


def test_description_names_heads_and_ties(known: tuple[nn.Module, set[str]]) -> None:
    model, heads = known
    groups = param_groups(model)
    text = describe(groups)
    assert all(name in text for name in heads)
    assert ("tied: " in text) == bool(groups.tied)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text


def test_description_counts_weights_and_bytes() -> None:
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 10))
    lines = {line.split()[0]: line.split() for line in describe(param_groups(model)).splitlines() if line.split()}
    # 1 % of each of 250 chunks of 4 rows: 40 weights of 8 bytes; dense ones 4 bytes; AdamW 12
    assert lines["weights"][-6:] == ["1,000,000", "99.01", "%", "0.08", "0.04", "12"]
    assert lines["head"][-6:] == ["10,000", "0.99", "%", "0.04", "0.04", "0.12"]


def test_description_uses_what_the_groups_carry() -> None:
    class Falling:
        largest = 0.5

    groups = param_groups(mlp())
    for group in groups:
        group["density"] = Falling()
    assert "selected from, 50 %" in describe(groups)
    assert "selected from, 50 %" not in describe(param_groups(mlp()))
    assert "selected from, 5 %" in describe(param_groups(mlp()), density=0.05)


def test_description_takes_an_optimizers_groups() -> None:
    optimizer = torch.optim.AdamW(mlp().parameters())
    text = describe(optimizer.param_groups)
    assert "selected from, 1 %" in text
    assert "dense AdamW" in text


def test_roles_are_few_and_known(known: tuple[nn.Module, set[str]]) -> None:
    assert set(roles(known[0]).values()) <= {"matrix", "embedding", "head", "norm", "bias", "vector"}
    assert all(
        set(group) == {"params", "param_names", "roles", "role", "dense", "weight_decay"}
        for group in grouping.param_groups(known[0])
    )
