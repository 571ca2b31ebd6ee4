"""Claims about `nanoadam.groups`: what is selected from, what is dense, in models as people have them."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from nanoadam import groups as grouping
from nanoadam.groups import describe, param_groups

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def bert(kind: str, **options: Any) -> nn.Module:
    return getattr(transformers, kind)(transformers.BertConfig(**SMALL, **options))


def roberta(kind: str) -> nn.Module:
    return getattr(transformers, kind)(transformers.RobertaConfig(**SMALL))


def distilbert(kind: str) -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=32, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=16
    )
    return getattr(transformers, kind)(config)


def vit(kind: str) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    return getattr(transformers, kind)(config)


def resnet(kind: str) -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    return getattr(transformers, kind)(config)


def opt(kind: str) -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=24,
        max_position_embeddings=16,
        word_embed_proj_dim=8,
    )
    return getattr(transformers, kind)(config)


def llama(kind: str, **options: Any) -> nn.Module:
    return getattr(transformers, kind)(transformers.LlamaConfig(**SMALL, **options))


def qwen(kind: str, *, tied: bool) -> nn.Module:
    config = transformers.Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=tied)
    return getattr(transformers, kind)(config)


def qwen_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt2(kind: str) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return getattr(transformers, kind)(config)


def t5(kind: str, *, tied: bool = True) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = getattr(transformers, kind)(config)
    if not tied:  # the config cannot say so any more
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def clip() -> nn.Module:
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 8,
        "patch_size": 4,
    }
    config = transformers.CLIPConfig(vision_config=vision, text_config={**SMALL, "num_hidden_layers": 1})
    return transformers.CLIPForImageClassification(config)


# The weights of the head, by the names that the model gives them.
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "bert-classification": (lambda: bert("BertForSequenceClassification"), {"classifier.weight"}),
    "bert-tokens": (lambda: bert("BertForTokenClassification"), {"classifier.weight"}),
    "bert-masked-lm": (lambda: bert("BertForMaskedLM"), set()),
    "bert-masked-lm-untied": (
        lambda: bert("BertForMaskedLM", tie_word_embeddings=False),
        {"cls.predictions.decoder.weight"},
    ),
    "bert-pretraining": (lambda: bert("BertForPreTraining"), {"cls.seq_relationship.weight"}),
    "bert-bare": (lambda: bert("BertModel"), set()),
    "roberta-classification": (
        lambda: roberta("RobertaForSequenceClassification"),
        {"classifier.dense.weight", "classifier.out_proj.weight"},
    ),
    "roberta-masked-lm": (lambda: roberta("RobertaForMaskedLM"), set()),
    "distilbert-classification": (
        lambda: distilbert("DistilBertForSequenceClassification"),
        {"pre_classifier.weight", "classifier.weight"},
    ),
    "distilbert-masked-lm": (lambda: distilbert("DistilBertForMaskedLM"), set()),
    "vit-classification": (lambda: vit("ViTForImageClassification"), {"classifier.weight"}),
    "vit-bare": (lambda: vit("ViTModel"), set()),
    "resnet-classification": (lambda: resnet("ResNetForImageClassification"), {"classifier.1.weight"}),
    "resnet-bare": (lambda: resnet("ResNetModel"), set()),
    "opt-causal-lm": (lambda: opt("OPTForCausalLM"), set()),
    "opt-classification": (lambda: opt("OPTForSequenceClassification"), {"score.weight"}),
    "llama-causal-lm": (lambda: llama("LlamaForCausalLM"), {"lm_head.weight"}),
    "llama-causal-lm-tied": (lambda: llama("LlamaForCausalLM", tie_word_embeddings=True), set()),
    "llama-classification": (lambda: llama("LlamaForSequenceClassification"), {"score.weight"}),
    "llama-questions": (lambda: llama("LlamaForQuestionAnswering"), {"qa_outputs.weight"}),
    "llama-bare": (lambda: llama("LlamaModel"), set()),
    "qwen-causal-lm": (lambda: qwen("Qwen2ForCausalLM", tied=False), {"lm_head.weight"}),
    "qwen-causal-lm-tied": (lambda: qwen("Qwen2ForCausalLM", tied=True), set()),
    "qwen-classification": (lambda: qwen("Qwen2ForSequenceClassification", tied=True), {"score.weight"}),
    "qwen-experts": (qwen_moe, {"lm_head.weight"}),
    "gpt2-causal-lm": (lambda: gpt2("GPT2LMHeadModel"), set()),
    "gpt2-classification": (lambda: gpt2("GPT2ForSequenceClassification"), {"score.weight"}),
    "gpt2-two-heads": (lambda: gpt2("GPT2DoubleHeadsModel"), {"multiple_choice_head.summary.weight"}),
    "gpt2-bare": (lambda: gpt2("GPT2Model"), set()),
    "t5": (lambda: t5("T5ForConditionalGeneration"), set()),
    "t5-untied": (lambda: t5("T5ForConditionalGeneration", tied=False), {"lm_head.weight"}),
    "t5-classification": (
        lambda: t5("T5ForSequenceClassification"),
        {"classification_head.dense.weight", "classification_head.out_proj.weight"},
    ),
    "t5-bare": (lambda: t5("T5Model"), set()),
    "clip-classification": (clip, {"classifier.weight"}),
}


class Net(nn.Module):
    """A plain module with these children; the forward pass does not matter here."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def cnn() -> nn.Module:
    return Net(conv1=nn.Conv2d(3, 8, 3), bn1=nn.BatchNorm2d(8), conv2=nn.Conv2d(8, 8, 3), fc=nn.Linear(8, 10))


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24), 2, enable_nested_tensor=False)


def tied_lm() -> nn.Module:
    model = Net(embed=nn.Embedding(32, 16), body=nn.Linear(16, 16), head=nn.Linear(16, 32, bias=False))
    model.head.weight = model.embed.weight
    return model


PLAIN: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "mlp": (mlp, {"4.weight"}),
    "cnn": (cnn, {"fc.weight"}),
    "one-matrix": (lambda: nn.Linear(8, 3), set()),
    "encoder-and-classifier": (lambda: Net(encoder=encoder(), classifier=nn.Linear(16, 3)), {"classifier.weight"}),
    "encoder-and-output": (lambda: Net(encoder=encoder(), output=nn.Linear(16, 3)), {"output.weight"}),
    "head-of-two-layers": (
        lambda: Net(encoder=encoder(), head=mlp()),
        {"head.0.weight", "head.2.weight", "head.4.weight"},
    ),
    "two-heads": (
        lambda: Net(encoder=encoder(), head=nn.Linear(16, 3), head_dist=nn.Linear(16, 3)),
        {"head.weight", "head_dist.weight"},
    ),
    "fc-that-is-not-last": (
        lambda: Net(conv=nn.Conv2d(3, 8, 3), fc=nn.Linear(8, 8), out=nn.Linear(8, 3)),
        {"out.weight"},
    ),
    "numbered-layers": (lambda: Net(fc1=nn.Linear(8, 16), fc2=nn.Linear(16, 16), fc3=nn.Linear(16, 3)), {"fc3.weight"}),
    "convolution-at-the-end": (lambda: Net(down=nn.Conv2d(3, 8, 3), up=nn.Conv2d(8, 3, 1)), {"up.weight"}),
    "list-of-layers": (lambda: Net(layers=nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 3)])), {"layers.1.weight"}),
    "stages": (
        lambda: Net(stem=nn.Sequential(nn.Conv2d(3, 8, 3)), top=nn.Sequential(nn.Flatten(), nn.Linear(8, 3))),
        {"top.1.weight"},
    ),
    "all-is-called-head": (lambda: Net(head=mlp()), {"head.4.weight"}),
    "bare-encoder": (encoder, set()),
    "bare-encoder-within": (lambda: Net(embed=nn.Embedding(32, 16), encoder=encoder(), norm=nn.LayerNorm(16)), set()),
    "recurrent": (lambda: Net(embed=nn.Embedding(32, 16), rnn=nn.LSTM(16, 16)), set()),
    "tied": (tied_lm, set()),
    "embedding-last": (lambda: Net(body=nn.Linear(16, 16), positions=nn.Embedding(8, 16)), set()),
    "lightning-like": (lambda: Net(model=Net(backbone=encoder(), head=nn.Linear(16, 3))), {"model.head.weight"}),
    "transformers-within": (lambda: Net(bert=bert("BertModel"), out=nn.Linear(16, 3)), {"out.weight"}),
    "transformers-alone-within": (
        lambda: Net(net=roberta("RobertaForSequenceClassification")),
        {"net.classifier.dense.weight", "net.classifier.out_proj.weight"},
    ),
    "bare-transformers-within": (lambda: Net(bert=bert("BertModel")), set()),
}

MODELS = {**ARCHITECTURES, **PLAIN}
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)


def by_name(model: nn.Module, **options: Any) -> dict[str, tuple[str, bool, float]]:
    """Per parameter: role, whether it is selected from, weight decay."""
    return {
        name: (role, not group["dense"], group["weight_decay"])
        for group in param_groups(model, **options)
        for name, role in zip(group["param_names"], group["roles"], strict=True)
    }


def roles(model: nn.Module, **options: Any) -> dict[str, str]:
    return {name: role for name, (role, _, _) in by_name(model, **options).items()}


def selected(model: nn.Module, **options: Any) -> set[str]:
    return {name for name, (_, choose, _) in by_name(model, **options).items() if choose}


@pytest.fixture(params=MODELS, scope="module")
def known(request: pytest.FixtureRequest) -> tuple[nn.Module, set[str]]:
    build, heads = MODELS[request.param]
    return build(), heads


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
