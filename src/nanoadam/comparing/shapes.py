"""The parameters of well-known models, as (name, shape, dense) lists computed from their published configs.

`dense` marks what `nanoadam.param_groups` gives ordinary AdamW: vectors, and a newly initialised or untied head.
Names follow transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Parameter(NamedTuple):
    """One parameter of a model."""

    name: str
    shape: tuple[int, ...]
    dense: bool


Shapes = list[Parameter]


def _weight(name: str, *shape: int, dense: bool = False) -> Parameter:
    return Parameter(name, shape, dense or len(shape) < 2)


def _linear(name: str, inputs: int, outputs: int, *, bias: bool = True, dense: bool = False) -> Shapes:
    found = [_weight(f"{name}.weight", outputs, inputs, dense=dense)]
    return [*found, _weight(f"{name}.bias", outputs)] if bias else found


def _norm(name: str, width: int, *, bias: bool = True) -> Shapes:
    found = [_weight(f"{name}.weight", width)]
    return [*found, _weight(f"{name}.bias", width)] if bias else found


def bert(layers: int, hidden: int, intermediate: int, vocabulary: int = 30522, positions: int = 512) -> Shapes:
    """BertModel with its pooler (Devlin et al. 2019)."""
    found = [
        _weight("embeddings.word_embeddings.weight", vocabulary, hidden),
        _weight("embeddings.position_embeddings.weight", positions, hidden),
        _weight("embeddings.token_type_embeddings.weight", 2, hidden),
        *_norm("embeddings.LayerNorm", hidden),
    ]
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            found += _linear(f"{layer}.attention.self.{part}", hidden, hidden)
        found += _linear(f"{layer}.attention.output.dense", hidden, hidden)
        found += _norm(f"{layer}.attention.output.LayerNorm", hidden)
        found += _linear(f"{layer}.intermediate.dense", hidden, intermediate)
        found += _linear(f"{layer}.output.dense", intermediate, hidden)
        found += _norm(f"{layer}.output.LayerNorm", hidden)
    return found + _linear("pooler.dense", hidden, hidden)


def llama(
    layers: int, hidden: int, intermediate: int, vocabulary: int, *, heads: int, kv_heads: int, tied: bool
) -> Shapes:
    """LlamaForCausalLM (Touvron et al. 2023); a tied head is the embedding."""
    kv = hidden // heads * kv_heads
    found = [_weight("model.embed_tokens.weight", vocabulary, hidden)]
    for i in range(layers):
        layer = f"model.layers.{i}"
        for part, outputs in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden)):
            found += _linear(f"{layer}.self_attn.{part}", hidden, outputs, bias=False)
        for part in ("gate_proj", "up_proj"):
            found += _linear(f"{layer}.mlp.{part}", hidden, intermediate, bias=False)
        found += _linear(f"{layer}.mlp.down_proj", intermediate, hidden, bias=False)
        for part in ("input_layernorm", "post_attention_layernorm"):
            found += _norm(f"{layer}.{part}", hidden, bias=False)
    found += _norm("model.norm", hidden, bias=False)
    return found if tied else found + _linear("lm_head", hidden, vocabulary, bias=False, dense=True)


def opt(layers: int, hidden: int, intermediate: int, vocabulary: int = 50272, positions: int = 2048) -> Shapes:
    """OPTForCausalLM (Zhang et al. 2022), whose head is the embedding; two positions are offset."""
    found = [
        _weight("model.decoder.embed_tokens.weight", vocabulary, hidden),
        _weight("model.decoder.embed_positions.weight", positions + 2, hidden),
        *_norm("model.decoder.final_layer_norm", hidden),
    ]
    for i in range(layers):
        layer = f"model.decoder.layers.{i}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            found += _linear(f"{layer}.self_attn.{part}", hidden, hidden)
        found += _norm(f"{layer}.self_attn_layer_norm", hidden)
        found += _linear(f"{layer}.fc1", hidden, intermediate)
        found += _linear(f"{layer}.fc2", intermediate, hidden)
        found += _norm(f"{layer}.final_layer_norm", hidden)
    return found


def vit(
    layers: int, hidden: int, intermediate: int, *, image: int = 224, patch: int = 16, labels: int = 1000
) -> Shapes:
    """ViTForImageClassification (Dosovitskiy et al. 2021)."""
    tokens = (image // patch) ** 2 + 1
    found = [
        _weight("vit.embeddings.cls_token", 1, 1, hidden, dense=True),
        _weight("vit.embeddings.position_embeddings", 1, tokens, hidden),
        _weight("vit.embeddings.patch_embeddings.projection.weight", hidden, 3, patch, patch),
        _weight("vit.embeddings.patch_embeddings.projection.bias", hidden),
    ]
    for i in range(layers):
        layer = f"vit.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found += _linear(f"{layer}.attention.{part}", hidden, hidden)
        found += _norm(f"{layer}.layernorm_before", hidden)
        found += _norm(f"{layer}.layernorm_after", hidden)
        found += _linear(f"{layer}.mlp.fc1", hidden, intermediate)
        found += _linear(f"{layer}.mlp.fc2", intermediate, hidden)
    return found + _norm("vit.layernorm", hidden) + _linear("classifier", hidden, labels, dense=True)


def resnet(depths: tuple[int, ...], *, labels: int = 1000) -> Shapes:
    """ResNetForImageClassification with bottlenecks (He et al. 2016)."""

    def convolution(name: str, inputs: int, outputs: int, kernel: int) -> Shapes:
        return [
            _weight(f"{name}.convolution.weight", outputs, inputs, kernel, kernel),
            *_norm(f"{name}.normalization", outputs),
        ]

    found = convolution("resnet.embedder.embedder", 3, 64, 7)
    inputs = 64
    for i, depth in enumerate(depths):
        outputs = 256 * 2**i
        for j in range(depth):
            block = f"resnet.encoder.stages.{i}.layers.{j}"
            if inputs != outputs:
                found += convolution(f"{block}.shortcut", inputs, outputs, 1)
            middle = outputs // 4
            steps = ((inputs, middle, 1), (middle, middle, 3), (middle, outputs, 1))
            for k, (before, after, kernel) in enumerate(steps):
                found += convolution(f"{block}.layer.{k}", before, after, kernel)
            inputs = outputs
    return found + _linear("classifier.1", inputs, labels, dense=True)


MODELS: dict[str, Callable[[], Shapes]] = {
    "tiny": lambda: llama(2, 64, 172, 128, heads=4, kv_heads=2, tied=False),
    "minilm": lambda: bert(6, 384, 1536),
    "bert-base": lambda: bert(12, 768, 3072),
    "bert-large": lambda: bert(24, 1024, 4096),
    "opt-1.3b": lambda: opt(24, 2048, 8192),
    "vit-large": lambda: vit(24, 1024, 4096),
    "resnet-101": lambda: resnet((3, 4, 23, 3)),
    "llama-3.2-3b": lambda: llama(28, 3072, 8192, 128256, heads=24, kv_heads=8, tied=True),
    "llama-2-7b": lambda: llama(32, 4096, 11008, 32000, heads=32, kv_heads=32, tied=False),
}
"""Every model by the name that the programs take."""


def count(shapes: Shapes) -> int:
    """Weights in all."""
    return sum(math.prod(parameter.shape) for parameter in shapes)
