"""Claims about what an iteration takes: the peak that was measured on a GPU, and nothing done to the model."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nanoadam import activations, memory
from nanoadam.activations import Handling

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


def measured(name):
    """(settings, method, peak) of each run of a file."""
    data = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    return [
        (run["settings"], row["given"], row["peak_bytes"]["after"])
        for run in data.get("runs", [data])
        for row in run["results"]
        if "+head" not in row["given"]
    ]


def estimated(model, settings, given):
    options = {"batch": settings["batch"], "sequence": settings["sequence"], "checkpointing": settings["checkpointing"]}
    if given == "lora":
        options["state_dtype"] = "bfloat16"
    if ":" in given:
        name, _, density = given.partition(":")
        options |= {"density": float(density), "carried": True, "grad_dtype": "bfloat16"}
        options["granularity"] = "column" if name == "columns" else "weight"
    return memory.estimate("nanoadam" if ":" in given else given, model=model, **options).total


def agree(name, only=""):
    import finetune_memory

    found = {}
    for settings, given, peak in measured(name):
        if only in settings["model"]:
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                with torch.device("meta"):
                    model = finetune_memory.MODELS[settings["model"]]()
            finally:
                torch.set_default_dtype(before)
            found[settings["model"], given] = estimated(model, settings, given) / peak - 1
    assert len(found) > 3
    assert max(map(abs, found.values())) < 0.05, found


def test_the_peak_is_the_one_that_was_measured():
    agree("columns_models", "bert-base")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["columns_models", "columns_b8", "columns_b1", "columns_long"])
def test_the_peak_is_the_one_that_was_measured_of_all_models(name):
    agree(name)


def peak(model, kind="dense", rows=4, **options):
    count = len(list(model.parameters()))
    return activations.peak(model, [Handling(kind)] * count, rows, 16, **options)


@pytest.fixture
def llama():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def test_more_rows_take_more_and_recomputing_takes_less(llama):
    assert peak(llama, rows=64) > 1.5 * peak(llama, rows=32) - activations.WORKSPACE
    assert peak(llama, rows=64, checkpointing=True) < peak(llama, rows=64)


def test_a_frozen_model_keeps_nothing_of_its_weights(llama):
    weights = sum(p.nbytes for p in llama.parameters())
    head = [Handling("dense" if name == "lm_head.weight" else "frozen") for name, _ in llama.named_parameters()]
    assert activations.peak(llama, head, 4, 16) < peak(llama) - weights / 2


def test_the_model_stays_as_it_was(llama):
    before = copy.deepcopy(llama.state_dict())
    llama.eval()
    peak(llama, checkpointing=True)
    assert not llama.training
    assert not llama.is_gradient_checkpointing
    assert all(p.device.type == "cpu" and p.grad is None and not p._post_accumulate_grad_hooks
               for p in llama.parameters())  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert all("forward" not in vars(module) for module in llama.modules())


def test_weights_of_another_dtype_take_half(llama):
    found = [peak(llama, rows=256, dtype=dtype) - activations.WORKSPACE for dtype in (torch.float32, torch.bfloat16)]
    assert 0.5 <= found[1] / found[0] < 0.75  # norms and the loss are in float32 all the same


KINDS = (
    "BertForSequenceClassification", "OPTForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration",
    "ViTForImageClassification",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_many_kinds_run(kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64, "ffn_dim": 64,
             "intermediate_size": 64, "word_embed_proj_dim": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "d_model": 32,
             "num_layers": 2, "d_kv": 16, "num_heads": 2, "d_ff": 64, "image_size": 32, "patch_size": 16,
             "decoder_start_token_id": 0}  # fmt: skip
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**sizes))

    def total(method, **options):
        return memory.estimate(method, model=model, batch=64, sequence=32, density=0.1, **options).total

    by_weight, adamw = total("nanoadam"), total("adamw", state_dtype="float32")
    assert total("nanoadam", granularity="column") < by_weight < adamw
    assert total("lora", rank=1) < adamw


def test_a_sequence_is_what_the_model_takes():
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                     vocab_size=64, max_position_embeddings=24)  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    every = [Handling("dense")] * len(list(model.parameters()))
    assert activations.peak(model, every, 256, None) == activations.peak(model, every, 256, 24)
    with pytest.raises(ValueError, match="it takes 24 tokens, and sequence is 25"):
        activations.peak(model, every, 2, 25)


def test_a_model_that_needs_data_is_refused_in_a_sentence(llama):
    llama.model.forward = lambda **_: torch.empty((), device="meta").item()
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be run without data"):
        peak(llama)
    with pytest.raises(ValueError, match="activations are of a model of transformers"):
        memory.estimate(model=nn.Linear(3, 3), batch=2)
    with pytest.raises(ValueError, match="activations are of a model"):
        memory.estimate(params=1e6, batch=2)
