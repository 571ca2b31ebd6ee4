"""Claims about `nanoadam.memory`: the paper's formulas, and what a model really takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from nanoadam import memory, text
from nanoadam.groups import param_groups
from nanoadam.optimizer import NanoAdam

LLAMA_2_7B = 6.275e9  # as appendix G counts it


def llama(dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        pad_token_id=0,
        **options,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def gb(number: int) -> str:
    return text.short(number / 1e9)


# Appendix G


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("adamw", {}, "25.1"),
        ("adamw", {"state_dtype": "float32"}, "50.2"),
        ("adamw8bit", {}, "12.55"),
        ("microadam", {"density": 0.01, "window": 10}, "5.65"),
        ("nanoadam", {"density": 0.01}, "0.3765"),
        ("nanoadam", {"density": 0.01, "carried": True}, "0.502"),
        ("sgd", {}, "0"),
        ("sgd", {"momentum": True}, "12.55"),
    ],
)
def test_states_are_the_papers(method: str, options: dict[str, Any], expected: str) -> None:
    assert gb(memory.estimate(method, params=LLAMA_2_7B, **options).state) == expected


def test_table_shows_the_papers_numbers() -> None:
    text = memory.render(memory.table(params=LLAMA_2_7B, density=0.01))
    states = {line.split("  ")[0]: line for line in text.splitlines()}
    for method, state in [
        ("AdamW, 16-bit states", "25.1"),
        ("AdamW 8-bit", "12.55"),
        ("MicroAdam, k=1 %, m=10", "5.65"),
        ("NanoAdam, k=1 %", "0.3765"),
    ]:
        assert state in states[method].split()
    assert "6,275,000,000 weights" in text


def test_a_bare_count_leaves_out_what_needs_shapes() -> None:
    methods = [row.method for row in memory.table(params=1000)]
    assert not any(method.startswith(("LoRA", "GaLore", "Adafactor")) for method in methods)
    assert any(row.method.startswith("LoRA") for row in memory.table(model=llama()))


def test_total_is_the_sum_of_its_parts() -> None:
    for row in memory.table(model=llama()):
        assert row.total == row.weights + row.gradients + row.held + row.transient + row.state
        assert json.loads(json.dumps(row.to_dict()))["total"] == row.total


# A model


def bytes_held(model: nn.Module, optimizer: NanoAdam) -> int:
    """Bytes of the moments, indices and entry steps of all parameters, without the few per tensor."""
    tensors = (t for p in model.parameters() for t in optimizer.state[p].values() if isinstance(t, Tensor))
    return sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1)


@pytest.mark.parametrize("density", [0.02, 0.1, 1.0])  # at least two columns
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("moments", ["carry", "reset"])
@pytest.mark.parametrize("granularity", ["weight", "column"])
def test_state_is_what_the_optimizer_holds(
    density: float, state_dtype: torch.dtype, moments: str, granularity: str
) -> None:
    model = llama()
    options = {"density": density, "state_dtype": state_dtype}
    groups = param_groups(model, granularity=granularity)
    optimizer = NanoAdam(groups, mask_interval=1, moments=moments, **options)
    expected = memory.estimate(model=model, carried=moments == "carry", granularity=granularity, **options).state
    assert bytes_held(model, optimizer) == expected
    for _ in range(2):  # the second step refreshes the selection
        model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bytes_held(model, optimizer) == expected


@pytest.mark.parametrize("granularity", ["weight", "column"])
def test_gradients_are_what_is_held_after_backward(granularity: str) -> None:
    model = llama()
    groups = param_groups(model, granularity=granularity)
    optimizer = NanoAdam(groups, density=0.1, grad_dtype=torch.float32)
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    expected = memory.estimate(model=model, density=0.1, grad_dtype="float32", granularity=granularity)
    assert optimizer.gradient_bytes() == expected.gradients + expected.held
    chosen = sum(optimizer.state[p]["exp_avg"].numel() for p in model.parameters() if "index" in optimizer.state[p])
    assert expected.held == 4 * chosen


def test_columns_have_no_gradient_in_transit_and_no_index_of_a_weight() -> None:
    model = llama()
    row = memory.estimate(model=model, density=0.1, carried=True, granularity="column")
    assert row.transient == 0
    assert row.formula == "4 k S (8 by weight) + 4 dense"  # the embedding is selected from by weight
    # A tied embedding is a head as well, whose layer computes all of its gradient.
    tied = memory.estimate(model=llama(tie_word_embeddings=True), density=0.1, granularity="column")
    assert tied.transient == 2 * 64 * 128
    assert memory.estimate(params=1000, density=0.1, granularity="column").state == 4 * 100
    rows = memory.table(params=1000, granularity="column")
    assert [row.formula for row in rows if row.method.startswith("NanoAdam")] == ["4 k S"]
    with pytest.raises(ValueError, match="granularity must be one of weight, column; got 'row'"):
        memory.estimate(params=10, granularity="row")


def test_heads_and_norms_are_counted_dense() -> None:
    model = llama()
    row = memory.estimate(model=model, density=0.01)
    dense = model.lm_head.weight.numel() + 5 * 128  # norms
    assert row.gradients == 2 * dense
    assert row.transient == 2 * model.model.layers[0].mlp.up_proj.weight.numel()
    assert row.formula == "6 k S + 4 dense"


def test_tied_weights_are_counted_once() -> None:
    tied, untied = llama(tie_word_embeddings=True), llama()
    assert (
        memory.estimate("adamw", model=untied).parameters - memory.estimate("adamw", model=tied).parameters == 64 * 128
    )


def test_frozen_weights_take_no_gradient_and_no_state() -> None:
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    row = memory.estimate("adamw", model=model)
    trained = row.parameters - 64 * 128
    assert (row.weights, row.gradients, row.state) == (2 * row.parameters, 2 * trained, 4 * trained)


def test_adamw_matches_torch() -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    held = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.dim())
    row = memory.estimate("adamw", model=model)
    assert row.state == held
    assert row.gradients == sum(
        p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None
    )


def test_lora_matches_peft() -> None:
    row = memory.estimate("lora", model=llama(), rank=4)
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert row.gradients == sum(p.numel() * p.element_size() for p in trained)
    assert row.state == 2 * row.gradients
    assert row.weights == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adafactor_matches_torch(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    held = sum(t.nbytes for s in optimizer.state.values() for name, t in s.items() if name != "step")
    assert memory.estimate("adafactor", model=model).state == held
    with pytest.raises(ValueError, match="Adafactor has a state for each row and column.*pass model="):
        memory.estimate("adafactor", params=1000)


def test_galore_keeps_a_projector_and_two_low_rank_moments() -> None:
    row = memory.estimate("galore", model=[("wide", (64, 256)), ("narrow", (4, 64)), ("bias", (10,))], rank=8)
    assert row.state == 2 * (8 * (64 + 2 * 256) + 4 * (4 + 2 * 64) + 2 * 10)


def test_shapes_alone_are_enough() -> None:
    model = llama(tie_word_embeddings=True)
    shapes = [(name, p.shape) for name, p in model.named_parameters()]
    assert memory.estimate(model=iter(shapes)) == memory.estimate(model=model)
    assert len(memory.table(model=iter(shapes))) == len(memory.table(model=model))


def test_dtype_of_the_weights_can_be_chosen() -> None:
    model = llama()
    assert (
        memory.estimate("adamw", model=model, weight_dtype=torch.float32).weights
        == memory.estimate("adamw", model=llama(torch.float32)).weights
    )
    assert memory.estimate("adamw", params=1000, weight_dtype="fp32").weights == 4000


# Configs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().config.save_pretrained(tmp_path)
    return tmp_path


def test_a_config_is_enough(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    assert all(p.device.type == "meta" for p in memory.from_config(folder).parameters())
    assert memory.table(model=str(folder)) == memory.table(model=llama())


def test_the_architecture_decides_on_the_head(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert type(memory.from_config(folder)).__name__ == "LlamaModel"
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]}))
    assert type(memory.from_config(folder)).__name__ == "LlamaForSequenceClassification"


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        memory.estimate(model=tmp_path)
    with pytest.raises(ValueError, match=r"there is no folder .*/missing"):
        memory.estimate(model=str(tmp_path / "missing"))


def test_without_network_a_hub_id_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"nobody/nothing.*Without network, pass a local folder"):
        memory.estimate(model="nobody/nothing")


def test_remote_code_is_never_run(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "configuration.py").write_text(f"open({str(ran)!r}, 'w')")
    config = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "configuration.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no model config could be read"):
        memory.estimate(model=folder)
    assert not ran.exists()


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either params= .* or model="),
        ({"params": 10, "model": [("w", (2, 2))]}, "and not both"),
        ({"params": 0}, "at least 1, got 0"),
        ({"params": float("nan")}, "at least 1, got nan"),
        ({"params": 10, "density": 0.0}, r"density must be in \(0, 1\], got 0\.0"),
        ({"params": 10, "density": 1.5}, r"density must be in \(0, 1\], got 1\.5"),
        ({"params": 10, "method": "adam"}, "method must be one of adamw, .*; got 'adam'"),
        ({"params": 10, "window": 0}, "window must be at least 1, got 0"),
        ({"params": 10, "grad_dtype": "float31"}, "dtype must be one of .*; got 'float31'"),
        ({"params": 10, "method": "lora"}, "LoRA works on linear layers, and there are none"),
        ({"params": 10, "method": "galore"}, "GaLore works on linear layers, and there are none"),
        ({"model": []}, "holds no weights"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory.estimate(**arguments)


# Text


def test_small_numbers_keep_their_digits() -> None:
    assert [text.short(x) for x in (0.3765, 25.1, 5.6475, 0.0, 100.0, 0.00004)] == [
        "0.3765",
        "25.1",
        "5.65",
        "0",
        "100",
        "0",
    ]


def test_units_fit_the_table() -> None:
    assert [text.unit(size)[0] for size in (2 * 10**9, 2 * 10**8, 2 * 10**4, 500)] == ["GB", "MB", "kB", "B"]


def test_counting_does_not_load_transformers() -> None:
    code = "import sys; from nanoadam import memory; memory.table(params=1e9); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_config_with_a_field_of_the_wrong_type_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"], "hidden_size": "x"}')
    with pytest.raises(ValueError, match="no model config could be read"):
        memory.estimate(model=tmp_path)
