"""NanoAdam under transformers' Trainer: with the Trainer's defaults the same numbers as in a plain loop."""

import copy
import shutil
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate.utils import AutocastKwargs
from transformers import Trainer, TrainerCallback, TrainingArguments

import nanoadam
import tiny
from crossed import crossed
from nanoadam import callback
from nanoadam.callback import NanoAdamCallback
from nanoadam.gradients import SelectedGradient

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

OPTIONS = {"lr": 1e-2, "density": 0.25, "mask_interval": 3, "seed": 1}


def rows(count: int = 24) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(4, 24, (6,), generator=generator),
            "attention_mask": torch.ones(6, dtype=torch.long),
            "labels": i % 2,
        }
        for i in range(count)
    ]


def arguments(folder: Path, **more: object) -> TrainingArguments:
    settings = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 1, "save_strategy": "no", "seed": 3,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **more})


def trainer(folder: Path, model=None, options=OPTIONS, callbacks=None, **more: object) -> Trainer:
    model = model or tiny.bert()
    return Trainer(
        model,
        arguments(folder, **more),
        train_dataset=rows(),
        optimizer_cls_and_kwargs=nanoadam.for_trainer(**options),
        callbacks=[NanoAdamCallback()] if callbacks is None else callbacks,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a, b) -> None:
    for name, value in weights(a).items():
        assert torch.equal(value, weights(b)[name]), name


def test_the_groups_are_those_of_param_groups(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    roles = [group["role"] for group in callback.unwrap(run.optimizer).param_groups]
    assert roles == [group["role"] for group in nanoadam.param_groups(run.model)]
    assert "head" in roles


def test_the_learning_rate_is_the_one_given_here(tmp_path: Path) -> None:
    run = trainer(tmp_path, lr_scheduler_type="constant", learning_rate=7.0)
    run.train()
    assert run.state.log_history[0]["learning_rate"] == OPTIONS["lr"]


def learning_rates(run: Trainer) -> list[float]:
    return [line["learning_rate"] for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    ("max_grad_norm", "accumulate", "autocast"),
    crossed([TrainingArguments.max_grad_norm, 0.05, 0.0], [1, 3], [False, True]),
)
def test_the_trainer_does_what_a_plain_loop_does(
    tmp_path: Path, accumulate: int, autocast: bool, max_grad_norm: float
) -> None:
    """Its batches are known from its steps, its learning rates from its log."""
    model = tiny.bert(dropout=0.0)
    twin = copy.deepcopy(model)
    seen: list[dict[str, torch.Tensor]] = []
    run = trainer(
        tmp_path,
        model,
        gradient_accumulation_steps=accumulate,
        bf16=autocast,
        max_steps=5,
        max_grad_norm=max_grad_norm,
    )
    run.model_accepts_loss_kwargs = False  # BERT takes what the Trainer passes, and then does not divide by it
    whole = run.training_step

    def training_step(model, inputs, count=None):
        seen.append({key: value.clone() for key, value in inputs.items()})
        return whole(model, inputs, count)

    run.training_step = training_step
    run.train()

    optimizer = nanoadam.NanoAdam(nanoadam.param_groups(twin), **OPTIONS)
    groups = [seen[i : i + accumulate] for i in range(0, len(seen), accumulate)]
    twin.train()
    norms = []
    for batches, lr in zip(groups, learning_rates(run), strict=True):
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = twin(**batch).loss
            (loss / len(batches)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(twin.parameters(), max_grad_norm or float("inf")).item())
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    assert_same(model, twin)
    assert [line["grad_norm"] for line in run.state.log_history if "loss" in line] == pytest.approx(norms, rel=1e-6)


def test_rate_decay_and_betas_come_from_training_arguments(tmp_path: Path) -> None:
    args = arguments(
        tmp_path, learning_rate=3e-3, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.99, adam_epsilon=1e-5,
        lr_scheduler_type="constant",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made = nanoadam.for_trainer(args=args, density=0.25, eps=1e-6)
    run = Trainer(tiny.bert(), args, train_dataset=rows(), optimizer_cls_and_kwargs=made)
    run.train()
    for group in callback.unwrap(run.optimizer).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.8, 0.99), 1e-6)
        assert group["weight_decay"] == (0.0 if group["role"] == "norms and biases" else 0.2)


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_rate_that_nobody_gave_is_named() -> None:
    with pytest.warns(UserWarning, match=r"it uses 0.0001, whatever .* args=training_args, or lr="):
        nanoadam.for_trainer(density=0.1)


def test_one_call_serves_models_that_are_made_later_and_several_trainers(tmp_path: Path) -> None:
    made = nanoadam.for_trainer(**OPTIONS)
    ends = []
    for _ in range(2):
        run = Trainer(
            model_init=lambda: tiny.bert(), args=arguments(tmp_path, max_steps=2), train_dataset=rows(),
            optimizer_cls_and_kwargs=made, callbacks=[NanoAdamCallback()],
        )  # fmt: skip
        run.train()
        ends.append(run.model)
    assert_same(*ends)


def test_an_adapter_made_before_training_is_trained(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny.bert()
    run = trainer(tmp_path, model, max_steps=2)
    run.model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
    before = weights(run.model)
    run.train()
    moved = {name for name, value in weights(run.model).items() if not torch.equal(value, before[name])}
    assert any("lora_B" in name for name in moved)
    assert all("lora" in name or "classifier" in name for name in moved)


def scale_loss(run: Trainer, scale: float, monkeypatch: pytest.MonkeyPatch) -> torch.amp.GradScaler:
    """The path of fp16, which accelerate opens on GPUs only, without autocast."""
    accelerator = run.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-117)
    accelerator.native_amp = True
    accelerator.autocast_handler = AutocastKwargs(enabled=False)
    monkeypatch.setattr(type(accelerator), "mixed_precision", "fp16")
    return accelerator.scaler


def test_loss_scaling_by_a_power_of_two_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trainer(tmp_path / "plain", max_grad_norm=0.3)
    plain.train()
    scaled = trainer(tmp_path / "scaled", max_grad_norm=0.3)  # which seeds dropout anew
    scale_loss(scaled, 2.0**10, monkeypatch)
    scaled.train()
    norms = [[line["grad_norm"] for line in run.state.log_history if "loss" in line] for run in (plain, scaled)]
    assert norms[0] == norms[1]
    assert_same(plain.model, scaled.model)


def test_a_step_that_overflows_is_skipped_and_the_scale_lowered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, max_steps=1, callbacks=[])
    scaler = scale_loss(run, 2.0**127, monkeypatch)
    for layer in run.model.modules():
        if isinstance(layer, torch.nn.LayerNorm):
            layer.weight.data.mul_(100.0)
    before = weights(run.model)
    run.train()
    assert scaler.get_scale() == 2.0**10
    assert all(torch.equal(value, before[name]) for name, value in weights(run.model).items())


def test_release_changes_nothing_of_what_the_trainer_sees(tmp_path: Path) -> None:
    """At density 1, where the dense gradient is what is applied."""
    runs = []
    for released in (True, False):
        run = trainer(tmp_path, options={**OPTIONS, "density": 1.0, "gradient_release": released}, max_grad_norm=0.1)
        run.train()
        runs.append(run)
    norms = [[line["grad_norm"] for line in run.state.log_history if "loss" in line] for run in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for name, value in weights(runs[0].model).items():
        torch.testing.assert_close(value, weights(runs[1].model)[name], rtol=1e-3, atol=1e-5)


def test_reporting_integrations_see_what_is_added_if_the_callback_comes_first(tmp_path: Path) -> None:
    class Reporter(TrainerCallback):
        def on_log(self, *_: object, logs=None, **__: object) -> None:
            reported.append(dict(logs))

    for first in (True, False):
        reported: list[dict[str, float]] = []
        run = trainer(tmp_path, callbacks=[Reporter()], max_steps=2)
        if first:
            NanoAdamCallback().attach(run)
        else:
            run.add_callback(NanoAdamCallback())
        run.train()
        assert all(("density" in line and "touched" in line) == first for line in reported if "loss" in line)


def test_the_log_tells_density_touched_share_and_memory(tmp_path: Path) -> None:
    schedule = nanoadam.linear(0.5, 0.1, total_steps=6, interval=2)
    run = trainer(tmp_path, options={**OPTIONS, "density": schedule})
    run.train()
    lines = [line for line in run.state.log_history if "loss" in line]
    assert [line["density"] for line in lines] == [schedule(step) for step in range(6)]
    touched = [line["touched"] for line in lines]
    assert touched[0] == pytest.approx(0.5, abs=0.01)
    assert touched == sorted(touched)
    inner = callback.unwrap(run.optimizer)
    assert lines[-1]["memory_state"] == inner.state_bytes()
    assert lines[-1]["memory_weights"] >= sum(p.nbytes for p in run.model.parameters())
    dense = sum(p.nbytes for g in inner.param_groups if g["dense"] for p in g["params"])
    assert lines[-1]["memory_gradients"] > dense


def test_the_touched_share_is_the_share_of_weights_that_moved(tmp_path: Path) -> None:
    model = tiny.bert()
    before = weights(model)
    run = trainer(tmp_path, model, lr_scheduler_type="constant")
    run.train()
    names = [n for g in nanoadam.param_groups(model) if not g["dense"] for n in g["param_names"]]
    after = weights(model)
    moved = sum((after[n] != before[n]).sum().item() for n in names) / sum(before[n].numel() for n in names)
    touched = run.state.log_history[-2]["touched"]
    assert moved <= touched <= moved + 0.15  # embeddings of words that never came are selected, yet have no gradient


@pytest.mark.parametrize("at", [2, 4])
def test_a_resumed_run_ends_bit_for_bit_like_one_that_never_stopped(tmp_path: Path, at: int) -> None:
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=at, max_steps=9)
    whole.train()
    checkpoint = tmp_path / "again" / f"checkpoint-{at}"
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{at}", checkpoint)
    again = trainer(tmp_path / "again", max_steps=9)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert_same(whole.model, again.model)
    timeless = [
        [{k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k and k != "train_loss"}
         for line in run.state.log_history] for run in (whole, again)
    ]  # fmt: skip
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_the_schedule_scales_the_heads_rate_like_the_rest(tmp_path: Path, schedule: str) -> None:
    class Look(TrainerCallback):
        def on_step_begin(self, *_: object, optimizer=None, **__: object) -> None:
            seen.append([group["lr"] for group in optimizer.param_groups])

    seen: list[list[float]] = []
    run = trainer(
        tmp_path, options={**OPTIONS, "head_lr": 5e-2}, callbacks=[NanoAdamCallback(), Look()],
        lr_scheduler_type=schedule, warmup_steps=2,
    )  # fmt: skip
    run.train()
    roles = [group["role"] for group in callback.unwrap(run.optimizer).param_groups]
    assert roles == ["weights", "head", "norms and biases", "head norms and biases"]
    factors = [rates[0] / OPTIONS["lr"] for rates in seen]
    assert len(factors) == 6 and factors[:2] == [0.0, 0.5] and max(factors) == 1.0
    for factor, rates in zip(factors, seen, strict=True):
        expected = [factor * (5e-2 if "head" in role else OPTIONS["lr"]) for role in roles]
        assert rates == pytest.approx(expected)


def test_a_run_with_a_rate_for_the_head_resumes_bit_for_bit(tmp_path: Path) -> None:
    options = {**OPTIONS, "head_lr": 5e-2}
    whole = trainer(tmp_path / "whole", options=options, save_strategy="steps", save_steps=4, max_steps=9)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    again = trainer(tmp_path / "again", options=options, max_steps=9)
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-4"))
    assert_same(whole.model, again.model)
    rates = [[g["initial_lr"] for g in callback.unwrap(run.optimizer).param_groups] for run in (whole, again)]
    assert rates[0] == rates[1] == [1e-2, 5e-2, 1e-2, 5e-2]


def of_its_own(model, folder: Path, optimizer: nanoadam.NanoAdam, **more: object) -> Trainer:
    args = arguments(folder, **more)
    return Trainer(
        model, args, train_dataset=rows(), optimizers=(optimizer, None), callbacks=[NanoAdamCallback()]
    )  # fmt: skip


def test_another_models_optimizer_is_refused(tmp_path: Path) -> None:
    optimizer = nanoadam.NanoAdam(nanoadam.param_groups(tiny.bert()), **OPTIONS)
    with pytest.raises(ValueError, match="not the Trainer's model's"):
        of_its_own(tiny.bert(), tmp_path, optimizer).train()


def test_parameters_unfrozen_after_the_optimizer_was_made_are_named(tmp_path: Path) -> None:
    model = tiny.bert()
    model.bert.requires_grad_(False)
    optimizer = nanoadam.NanoAdam(nanoadam.param_groups(model), **OPTIONS)
    model.bert.encoder.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lacks \d+ parameters that are to be trained \('bert.encoder.layer.0"):
        of_its_own(model, tmp_path, optimizer).train()


def test_an_optimizer_whose_parameters_are_all_frozen_is_refused_without_the_callback_too(tmp_path: Path) -> None:
    model = tiny.bert()
    optimizer = nanoadam.NanoAdam(nanoadam.param_groups(model.bert), **OPTIONS)
    model.bert.requires_grad_(False)
    run = Trainer(model, arguments(tmp_path), train_dataset=rows(), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="parameters of this optimizer are frozen"):
        run.train()


def test_a_checkpoint_that_goes_on_with_other_options_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    again = trainer(tmp_path, options={**OPTIONS, "density": 0.5}, max_steps=4)
    with pytest.raises(ValueError, match=r"goes on with density=0.25 for group 0 .*, but this run was given 0.5"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_callback_refuses_another_optimizer(tmp_path: Path) -> None:
    run = Trainer(tiny.bert(), arguments(tmp_path), train_dataset=rows(), callbacks=[NanoAdamCallback()])
    with pytest.raises(ValueError, match=r"watches a NanoAdam, but this Trainer has AdamW"):
        run.train()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"density": 2.0}, ValueError, "density must be in"),
        ({"densty": 0.1}, TypeError, "no option 'densty'"),
        ({"lr": -1.0}, ValueError, "lr must be"),
        ({"head_lr": -1.0}, ValueError, "head_lr must be a finite number of at least 0, or None .*; got -1.0"),
        ({"max_grad_norm": 1.0}, TypeError, "no option 'max_grad_norm'"),
        ({"params": []}, TypeError, "no option 'params'"),
        ({"args": tiny.bert()}, TypeError, "takes no model any more"),
    ],
)
def test_a_bad_option_is_refused_at_once(options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        nanoadam.for_trainer(**options)


def test_gradients_are_cut_down_when_the_trainer_looks_at_them(tmp_path: Path) -> None:
    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: object, model=None, optimizer=None, **__: object) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    released = not group["dense"] and parameter.dim() > 1
                    assert isinstance(parameter.grad, SelectedGradient) == released
            looked.append(True)

    looked: list[bool] = []
    trainer(tmp_path, callbacks=[NanoAdamCallback(), Look()]).train()
    assert len(looked) == 6


def test_packed_bits_count_what_a_mask_counts() -> None:
    mask = torch.rand(5, 7) < 0.4
    assert callback._ones(callback._pack(mask)) == int(mask.sum())
