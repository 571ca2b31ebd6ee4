"""Models as people have them, with the names of their heads, and what `param_groups` makes of each parameter."""

from collections.abc import Callable
from typing import Any

import pytest
import transformers
from torch import nn

from nanoadam.groups import param_groups

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
