"""Every optimizer of the registry through the same claims; those whose library is missing are skipped."""

import copy
import importlib.util
import io
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nanoadam import baselines, param_groups
from nanoadam.baselines import BASELINES, builders

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Name, options, a learning rate that suits it; weights change sooner with a small rank or window.
CASES = {
    "nanoadam": ("nanoadam", {"density": 0.25, "mask_interval": 10}, 1e-2),
    "adamw": ("adamw", {}, 1e-2),
    "sgd": ("sgd", {}, 1e-1),
    "adafactor": ("adafactor", {}, 1e-1),
    "adamw8bit": ("adamw8bit", {}, 1e-2),
    "torchao": ("adamw8bit", {"backend": "torchao"}, 1e-2),
    "galore": ("galore", {"rank": 8, "update_interval": 4}, 1e-2),
    "apollo": ("apollo", {"rank": 8, "update_interval": 4}, 1e-2),
    "microadam": ("microadam", {}, 1e-2),
    "lora": ("lora", {}, 1e-2),
    "rslora": ("rslora", {}, 1e-2),
    "shira": ("shira", {}, 1e-2),
    "oft": ("oft", {}, 1e-2),
    "lora by nanoadam": ("lora", {"trainer": "nanoadam", "density": 0.25}, 1e-2),
}


def installed(package):
    """With what it needs: PEFT imports transformers."""
    return all(
        importlib.util.find_spec(each) for each in ([package, "transformers"] if package == "peft" else [package])
    )


@pytest.fixture(params=CASES)
def case(request):
    name, options, lr = CASES[request.param]
    for package in {BASELINES[name].package, options.get("backend")} - {None}:
        if not installed(package):
            pytest.skip(f"{package} is not installed")
    if options.get("backend") == "torchao":
        # It compiles its step, which takes longer than all other tests here together.
        with torch.compiler.set_stance("force_eager"):
            yield name, options, lr
    else:
        yield name, options, lr


class Tiny(nn.Module):
    """Matrices of 4096 weights: the fewest that 8-bit optimizers quantize."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.norm(self.first(x))))))


def adapted(name, model):
    small = {"block_size": 16} if name == "oft" else {"rank": 4}
    return baselines.ADAPTERS[name](model, **small) if name in baselines.ADAPTERS else model


def made(case, dtype=torch.float32, **more):
    name, options, lr = case
    model = adapted(name, Tiny().to(DEVICE, dtype))
    return model, baselines.make(name, model, more.pop("lr", lr), **options, **more)


def data(dtype, rows=64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 64, generator=generator)
    return x.to(DEVICE, dtype), (x[:, :4] * 2).argmax(1).to(DEVICE)


def train(model, optimizer, steps, dtype=torch.float32):
    x, y = data(dtype)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains(case, dtype):
    model, optimizer = made(case, dtype)
    losses = train(model, optimizer, 40, dtype)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_from_a_checkpoint_bit_for_bit(case, dtype):
    through, interrupted, resumed = (made(case, dtype) for _ in range(3))
    train(*interrupted, 5, dtype)
    file = io.BytesIO()
    torch.save({"model": interrupted[0].state_dict(), "optimizer": interrupted[1].state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed[0].load_state_dict(saved["model"])
    resumed[1].load_state_dict(saved["optimizer"])
    torch.manual_seed(3)  # as a run restores it
    train(*interrupted, 5, dtype)
    torch.manual_seed(3)
    train(*resumed, 5, dtype)
    assert not torch.equal(through[0].head.weight, resumed[0].head.weight)
    for name, weight in weights(interrupted[0]).items():
        assert torch.equal(weight, resumed[0].get_parameter(name)), name


def test_weight_decay_is_what_it_says(case):
    lr, decay = 1e-2, 0.5
    model, optimizer = made(case, lr=lr, weight_decay=decay)
    before = weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    kind = BASELINES[case[0]].decay
    shrunk = 1 - lr * decay * ((1 - 0.999) ** 0.5 / (1 - 0.9) if "bias correction" in kind else 1)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.dim() < 2:
            assert torch.equal(parameter, before[name]), name
            continue
        close = torch.isclose(parameter, before[name] * shrunk, rtol=1e-6, atol=0)
        if ("selected" in kind or "trainer" in case[1]) and "head" not in name:
            assert torch.equal(parameter[~close], before[name][~close])
            assert close.float().mean() >= 0.25
        else:
            assert close.all(), name


def test_gradients_of_several_backward_passes_add_up(case):
    results = []
    for passes in (1, 2):
        model, optimizer = made(case)
        x, y = data(torch.float32)
        for _ in range(3):
            optimizer.zero_grad()
            for part_x, part_y in zip(x.chunk(passes), y.chunk(passes), strict=True):
                (nn.functional.cross_entropy(model(part_x), part_y) / passes).backward()
            optimizer.step()
        results.append(model)
    drift = max((a - b).abs().max() for a, b in zip(*(weights(m).values() for m in results), strict=True))
    start = weights(made(case)[0])
    moved = max((weight - start[name]).abs().max() for name, weight in weights(results[0]).items())
    assert drift < 0.2 * moved


def test_a_scheduler_sets_its_learning_rate(case):
    model, optimizer = made(case)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)
    for i in range(3):
        before = weights(model)
        train(model, optimizer, 1)
        schedule.step()
        moved = any(not torch.equal(before[name], weight) for name, weight in weights(model).items())
        assert moved == (i < 2)


def test_the_head_has_a_rate_of_its_own(case):
    """A step at two rates is, tensor by tensor, the step at the one that is its own."""
    name, options, lr = case
    options = {**options, "stochastic_rounding": False} if name in ("nanoadam", "microadam") else options
    results = {}
    for key, rates in {"rest": {"lr": lr}, "head": {"lr": 3 * lr}, "both": {"lr": lr, "head_lr": 3 * lr}}.items():
        torch.manual_seed(2)
        model, optimizer = made((name, options, lr), **rates)
        before = weights(model)
        train(model, optimizer, 1)
        results[key] = {name: weight - before[name] for name, weight in weights(model).items()}
    heads = [key for key in results["both"] if "head" in key and results["head"][key].any()]
    assert len(heads) == 2
    for key, change in results["both"].items():
        assert torch.equal(change, results["head" if "head" in key else "rest"][key]), key
    assert not torch.equal(results["head"][heads[0]], results["rest"][heads[0]])


def test_a_scheduler_scales_the_heads_rate_and_a_checkpoint_keeps_it(case):
    lr = case[2]
    _, optimizer = made(case, head_lr=4 * lr)
    _, resumed = made(case, head_lr=lr / 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    resumed.load_state_dict(optimizer.state_dict())
    for group in (*optimizer.param_groups, *resumed.param_groups):
        assert float(group["lr"]) == pytest.approx((4 * lr if "head" in group["role"] else lr) / 2)


def test_it_takes_groups_like_the_model_and_is_made_by_a_trainer(case):
    name, options, lr = case
    factory, kwargs = baselines.for_trainer(name, lr, **options)
    ways = (
        lambda model: baselines.make(name, model, lr, **options),
        lambda model: baselines.make(name, param_groups(model), lr, **options),
        lambda model: factory()(model, **kwargs),  # what transformers' Trainer does
    )
    results = []
    for way in ways:
        model = adapted(name, Tiny().to(DEVICE))
        torch.manual_seed(0)
        train(model, way(model), 2)
        results.append(weights(model))
    assert all(torch.equal(result[key], weight) for result in results[1:] for key, weight in results[0].items())


def test_the_trainer_of_transformers_trains_with_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import tiny

    rows = [{**tiny.tokenizer()(row["text"]), "labels": i % 2} for i, row in enumerate(tiny.sentences(8))]
    model = tiny.bert()
    before = weights(model)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=transformers.DataCollatorWithPadding(tiny.tokenizer()),
        optimizer_cls_and_kwargs=baselines.for_trainer("microadam", 1e-2, density=0.1, weight_decay=0.1),
    )
    trainer.train()
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(inner, baselines.MicroAdam)
    assert not torch.equal(before["bert.pooler.dense.weight"].cpu(), model.bert.pooler.dense.weight.cpu())


# Equal treatment


def state_of(case, parameter_name):
    model, optimizer = made(case)
    train(model, optimizer, 1)
    return optimizer.state[model.get_parameter(parameter_name)]


def test_the_head_is_trained_in_full_where_the_method_can():
    shape = (4, 64)
    for name in ("galore", "apollo", "microadam", "nanoadam"):
        if BASELINES[name].package is None or installed(BASELINES[name].package):
            assert state_of(CASES[name], "head.weight")["exp_avg"].shape == shape, name


def test_bitsandbytes_keeps_the_state_of_dense_groups_in_32_bits():
    pytest.importorskip("bitsandbytes")
    groups = [{"params": [nn.Parameter(torch.ones(64, 64, device=DEVICE))], "dense": dense} for dense in (False, True)]
    optimizer = baselines.make("adamw8bit", groups, 1e-3)
    for group in groups:
        group["params"][0].grad = torch.ones(64, 64, device=DEVICE)
    optimizer.step()
    dtypes = [optimizer.state[group["params"][0]]["state1"].dtype for group in groups]
    assert dtypes == [torch.uint8, torch.float32]


def test_low_rank_methods_project_the_matrices_of_linear_layers_alone():
    pytest.importorskip("pytorch_optimizer")
    model = nn.Module()
    model.embedding, model.body = nn.Embedding(8, 64), Tiny()
    optimizer = baselines.make("galore", model, 1e-3)
    projected = [name for group in optimizer.param_groups if "rank" in group for name in group["param_names"]]
    assert sorted(projected) == ["body.first.weight", "body.second.weight"]
    assert next(group["rank"] for group in optimizer.param_groups if "rank" in group) == 256


def test_lora_trains_adapters_of_all_linear_layers_and_a_new_head():
    pytest.importorskip("peft")
    model = baselines.apply_lora(Tiny().bfloat16())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapters = [name for name in trained if "lora_" in name]
    assert len(adapters) == 4 and all(trained[name].dtype == torch.float32 for name in adapters)
    assert all(trained[name].shape in ((32, 64), (64, 32)) for name in adapters)
    assert sorted(name.rpartition(".")[2] for name in trained if "lora_" not in name) == ["bias", "weight"]
    assert all("head" in name for name in trained if "lora_" not in name)


def test_lora_freezes_the_output_embedding_of_a_language_model():
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = baselines.apply_lora(transformers.LlamaForCausalLM(config), rank=2)
    assert not any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="adapters already"):
        baselines.apply_lora(model)


@pytest.mark.parametrize("name", baselines.ADAPTERS)
def test_adapters_begin_as_the_model_and_are_merged_into_it(name):
    pytest.importorskip("peft")
    from nanoadam.baselines.adapters import merged, pretrained

    plain = Tiny().to(DEVICE)
    model = adapted(name, copy.deepcopy(plain))
    x, _ = data(torch.float32)
    torch.testing.assert_close(model(x), plain(x))
    assert pretrained(model).keys() == dict(plain.named_parameters()).keys()
    assert all(p.requires_grad == (n.startswith("head") or n not in dict(plain.named_parameters()))
               for n, p in _plain_names(model))  # fmt: skip
    train(model, baselines.make(name, model, 1e-2), 3)
    after = model(x)
    whole = merged(model)
    torch.testing.assert_close(whole(x), after, rtol=1e-4, atol=1e-4)
    assert dict(whole.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    moved = {n for n, p in whole.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    assert moved == {"first.weight", "second.weight", "head.weight", "head.bias"}


def _plain_names(model):
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace("base_layer.", "")
        if "original_module" not in plain:
            yield plain.replace("modules_to_save.default.", ""), parameter


def test_shira_has_as_many_weights_as_lora_and_chooses_them_by_its_seed():
    pytest.importorskip("peft")
    models = [baselines.apply_shira(Tiny(), rank=4, seed=seed) for seed in (0, 0, 1)]
    counts = [sum(p.numel() for n, p in m.named_parameters() if "shira_" in n) for m in models]
    assert counts == [2 * 4 * 128] * 3
    chosen = [next(m for n, m in model.named_modules() if n.endswith("first")).shira_indices["default"]
              for model in models]  # fmt: skip
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])


def test_rslora_scales_by_the_root_of_the_rank():
    pytest.importorskip("peft")
    for rank in (4, 16):
        layer = next(m for n, m in baselines.apply_rslora(Tiny(), rank=rank).named_modules() if n.endswith("first"))
        assert layer.scaling["default"] == pytest.approx(16 / rank**0.5)


# What can go wrong


@pytest.mark.parametrize("name", ["shira", "oft"])
def test_layers_that_an_adapter_does_not_know_are_named(name):
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2Model(transformers.GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match=rf"{name} works on nn.Linear layers, and h.0.attn.c_attn .* Conv1D"):
        baselines.ADAPTERS[name](model)
    with pytest.raises(ValueError, match="shira cannot be put into this model, try a smaller rank: .* rank 64"):
        baselines.apply_shira(Tiny(), rank=64)
    for method, option in (("lora", "rank"), ("rslora", "rank"), ("shira", "rank"), ("oft", "block_size")):
        with pytest.raises(ValueError, match=f"{method} needs a {option} of at least 1, got 0"):
            baselines.ADAPTERS[method](Tiny(), **{option: 0})


@pytest.mark.parametrize("name", [name for name, entry in BASELINES.items() if entry.package and entry.cpu])
def test_a_missing_library_is_named_with_the_command_that_installs_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, BASELINES[name].package, None)
    with pytest.raises(ImportError, match=r"pip install 'nanoadam\[baselines\]'"):
        baselines.ADAPTERS.get(name, lambda model: baselines.make(name, model, 1e-3))(Tiny())


def test_what_is_asked_wrongly_gets_a_sentence():
    with pytest.raises(ValueError, match="optimizer 'adam' is unknown: choose from nanoadam, adamw"):
        baselines.make("adam", Tiny(), 1e-3)
    with pytest.raises(ValueError, match="galore has no option 'density': it takes rank"):
        baselines.make("galore", Tiny(), 1e-3, density=0.1)
    with pytest.raises(ValueError, match="microadam has no option 'rank'"):
        baselines.for_trainer("microadam", 1e-3, rank=4, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"head_lr=0\.1 is for a model: for groups say param_groups\(model, head_lr"):
        baselines.make("adamw", param_groups(Tiny()), 1e-3, head_lr=0.1)
    with pytest.raises(ValueError, match="head_lr must be a finite number"):
        baselines.make("adamw", Tiny(), 1e-3, head_lr=-0.1)
    with pytest.raises(ValueError, match="backend must be"):
        baselines.make("adamw8bit", Tiny(), 1e-3, backend="apex")
    with pytest.raises(ValueError, match=r"apply_lora\(model\) first"):
        baselines.make("lora", Tiny(), 1e-3)
    with pytest.raises(ValueError, match="CUDA"):
        baselines.make("flashadamw", Tiny(), 1e-3)


@pytest.mark.parametrize(
    ("dtypes", "bits"),
    [(("float32",), None), (("bfloat16",), 24), (("bfloat16", "float32"), 24)],  # as flashoptim 0.1.4 takes them
)
def test_flashadamw_asks_for_master_bits_where_weights_lack_some(monkeypatch, dtypes, bits):
    asked = {}
    library = SimpleNamespace(FlashAdamW=lambda groups, **options: asked.update(options))
    monkeypatch.setitem(sys.modules, "flashoptim", library)
    on_gpu = torch.device("cuda")
    groups = [{"params": [SimpleNamespace(device=on_gpu, dtype=getattr(torch, name))]} for name in dtypes]
    builders.flashadamw(builders.Common(groups, None, 1e-3, (0.9, 0.999), 1e-8, 0.0))
    assert asked["master_weight_bits"] == bits


def test_limits_are_said():
    assert BASELINES["nanoadam"].limits == ("weight decay is decoupled, on selected weights",)
    assert "keeps all dense gradients until step()" in BASELINES["microadam"].limits
    assert "GPU only" in BASELINES["flashadamw"].limits
    assert "no accumulation with gradient release" in BASELINES["flashadamw"].limits
    assert "density" in BASELINES["nanoadam"].options and "window" in BASELINES["microadam"].options
