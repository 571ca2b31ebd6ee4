"""Patches under checkpoint names make of a checkpoint what the trainer would have saved."""

import copy

import pytest
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from nanoadam import delta
from nanoadam.delta.sync import apply_weight_patches, weight_patches
from nanoadam.finetuning.coordinates import coordinates

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2}  # fmt: skip

MODELS = {
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SMALL,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=12,
            head_dim=8,
            tie_word_embeddings=True,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)),
}


def checkpoint(model):
    """What save_pretrained writes, without its file."""
    state = {name: tensor.detach().clone() for name, tensor in delta.snapshot(model).items()}
    return {name: tensor.contiguous().clone() for name, tensor in revert_weight_conversion(model, state).items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_patches_of_a_checkpoint(name, share):
    torch.manual_seed(0)
    model = MODELS[name]().bfloat16()
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter[torch.rand(parameter.shape) < share] = 0.5
    served, wanted = checkpoint(model), checkpoint(tuned)
    patch = coordinates(model).patch(delta.diff(model, tuned))
    patches = weight_patches(patch)
    assert {each.name for each in patches} <= set(wanted)
    apply_weight_patches(served, patches)
    assert set(served) == set(wanted)
    assert all(torch.equal(served[key], wanted[key]) for key in wanted)


def test_fused_experts_are_taken_apart():
    pieces = coordinates(MODELS["mixtral"]()).pieces
    fused = [name for name, found in pieces.items() if len(found) > 1]
    assert fused
    assert all("experts" in name for name in fused)
    assert not coordinates(MODELS["llama"]()).pieces


def test_what_is_computed_is_refused(monkeypatch):
    import transformers.core_model_loading as loading

    monkeypatch.setattr(loading, "revert_weight_conversion", lambda model, state: {k: v * 2 for k, v in state.items()})
    with pytest.raises(delta.DeltaError, match="cannot be patched"):
        coordinates(MODELS["llama"]())
