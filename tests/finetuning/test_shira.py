"""A patch as PEFT's SHiRA adapter is the finetuned model in every bit, or is refused."""

import copy

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from nanoadam import delta
from nanoadam.delta import DeltaError, bits
from nanoadam.finetuning import shira

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def llama(tied=False):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied))


def tuned_from(base, share=0.03, by=0.125):
    generator = torch.Generator().manual_seed(1)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            chosen = torch.rand(parameter.shape, generator=generator) < (share if parameter.dim() > 1 else 1.0)
            parameter[chosen] += by
    return tuned


def same(a, b):
    return all(bits.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_loads_the_finetuned_model(tmp_path, dtype):
    base = llama().to(dtype)
    tuned, before = tuned_from(base), copy.deepcopy(base)
    patch = delta.diff(base, tuned)
    done = shira.export(base, patch, tmp_path)
    assert same(base, before)
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert type(base.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert done.layers == 15  # 14 of the blocks, and the head
    assert done.inexact == 0
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    tokens = torch.randint(0, 64, (2, 8))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, tuned(tokens).logits)
    assert same(loaded.merge_and_unload(), tuned)


def test_a_classifier_with_biases(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=24, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    base = BertForSequenceClassification(config)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.bert.encoder.layer[0].attention.self.query.weight.view(-1)[::90] = 0.25
        tuned.bert.encoder.layer[0].intermediate.dense.weight.view(-1)[::80] = 0.25
        tuned.bert.encoder.layer[0].intermediate.dense.bias += 1
        tuned.classifier.weight += 1
    done = shira.export(base, delta.diff(base, tuned), tmp_path, exact=False)
    assert (done.layers, done.whole) == (1, 2)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    for (name, a), b in zip(loaded.state_dict().items(), tuned.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-7), name


def test_what_it_would_miss_is_refused(tmp_path):
    base, tuned = llama(), llama()
    with torch.no_grad():
        layer = tuned.model.layers[0].mlp.up_proj.weight.view(-1)
        layer[::50] = torch.inf
        base.model.layers[0].mlp.up_proj.weight.view(-1)[0] = -torch.inf
    patch = delta.diff(base, tuned)
    with pytest.raises(DeltaError, match="miss them"):
        shira.export(base, patch, tmp_path)


def test_what_it_cannot_hold_is_refused(tmp_path):
    base = llama(tied=True)
    with pytest.raises(DeltaError, match="tied"):
        shira.export(base, delta.diff(base, tuned_from(base)), tmp_path)
    base, tuned = llama(), llama()
    with torch.no_grad():
        tuned.model.norm.weight += 1
    with pytest.raises(DeltaError, match="no linear layer"):
        shira.export(base, delta.diff(base, tuned), tmp_path)
