"""Finetunes of transformers' models as patches: saved, loaded in one line, kept by the Trainer and gone on from."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

import nanoadam
import tiny
from nanoadam import delta
from nanoadam.delta import DeltaError, bits
from nanoadam.finetuning import patches

pytestmark = pytest.mark.filterwarnings("ignore")


def same(a, b):
    a, b = (model if isinstance(model, dict) else model.state_dict() for model in (a, b))
    return set(a) == set(b) and all(bits.equal(a[name], b[name]) for name in a)


def changed(model, seed=0):
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter[torch.rand(parameter.shape, generator=generator) < 0.05] = 0.25
    return tuned


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model_in_one_line(tmp_path, tied, dtype):
    base = tiny.causal_folder(tmp_path / "base", tied=tied)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    tuned = changed(model)
    (tmp_path / "patch").mkdir()
    patches.save(tmp_path / "patch", tuned, delta.snapshot(model), name=str(base), processor=tiny.tokenizer())
    loaded = patches.load(base, tmp_path / "patch")
    assert same(loaded, tuned)
    assert loaded.dtype == dtype
    loaded.save_pretrained(tmp_path / "whole")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=dtype), tuned)
    assert same(patches.load(base, tmp_path / "patch" / delta.FILE, dtype=dtype), tuned)
    assert same(patches.load(base, tmp_path / "patch", strength=0.0), model)
    names = {path.name for path in (tmp_path / "patch").iterdir()}
    assert {"delta.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert not any(name.startswith("model") for name in names)


def test_a_classifier_on_a_base_without_a_head(tmp_path):
    base = tiny.bert_folder(tmp_path / "base")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)
    tuned = changed(model)
    (tmp_path / "patch").mkdir()
    patch = patches.save(
        tmp_path / "patch", tuned, delta.snapshot(model), name=str(base), new=["classifier.weight", "classifier.bias"]
    )
    assert (patch["classifier.weight"].kind, patch.prefix, patch.base) == ("new", "bert.", "base")
    torch.manual_seed(2)  # the new head is drawn elsewhere: it comes from the patch
    assert same(patches.load(base, tmp_path / "patch"), tuned)
    delta.apply(base, tmp_path / "patch", out=tmp_path / "whole")  # the folder itself
    assert same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole"), tuned)


def test_another_base_is_refused(tmp_path):
    base = tiny.causal_folder(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    (tmp_path / "patch").mkdir()
    patches.save(tmp_path / "patch", changed(model), delta.snapshot(model), name="org/base")
    changed(model, seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(DeltaError, match="org/base"):
        patches.load(tmp_path / "other", tmp_path / "patch")


def test_the_card_says_what_it_is(tmp_path):
    base = tiny.causal_folder(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    (tmp_path / "patch").mkdir()
    patches.save(tmp_path / "patch", changed(model), delta.snapshot(model), name="org/base")
    text = (tmp_path / "patch" / "README.md").read_text()
    assert text.startswith("---\n")
    assert 'base_model: "org/base"' in text
    assert 'patches.load("org/base"' in text
    assert str(tmp_path) not in text


# The Trainer


def rows():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, 20, (32, 8), generator=generator)
    return Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens])


class PatchTrainer(patches.PatchCheckpoints, Trainer):
    pass


def trainer(cls, base, out, steps, callbacks=(), save_steps=3, **arguments):
    model = AutoModelForCausalLM.from_pretrained(base)
    options = {"max_steps": steps, "save_steps": save_steps, "per_device_train_batch_size": 4, "report_to": "none"}
    given = TrainingArguments(
        str(out), use_cpu=True, disable_tqdm=True, seed=0, max_grad_norm=0, **options, **arguments
    )
    return cls(
        model,
        given,
        train_dataset=rows(),
        optimizer_cls_and_kwargs=nanoadam.for_trainer(lr=1e-2, density=0.05, mask_interval=2),
        callbacks=list(callbacks),
    )


def test_checkpoints_hold_the_patch_and_go_on_bit_for_bit(tmp_path):
    base = tiny.causal_folder(tmp_path / "base")
    straight = trainer(PatchTrainer, base, tmp_path / "straight", 6)
    straight.keep_patches_of(str(base))
    straight.train()
    checkpoint = tmp_path / "straight" / "checkpoint-3"
    assert (checkpoint / delta.FILE).is_file()
    assert not list(checkpoint.glob("model*"))
    assert same(patches.load(base, tmp_path / "straight" / "checkpoint-6"), straight.model)
    again = trainer(PatchTrainer, base, tmp_path / "straight", 6)
    again.keep_patches_of(str(base))
    again.train(resume_from_checkpoint=str(checkpoint))
    assert same(again.model, straight.model)


def test_a_trainer_that_keeps_no_patches_is_as_it_was(tmp_path):
    base = tiny.causal_folder(tmp_path / "base")
    plain = trainer(PatchTrainer, base, tmp_path / "out", 3)
    plain.train()
    assert (tmp_path / "out" / "checkpoint-3" / "model.safetensors").is_file()
    trainer(PatchTrainer, base, tmp_path / "out", 4).train(resume_from_checkpoint=True)


def test_the_callback_writes_patches_without_a_copy_of_the_base(tmp_path):
    base = tiny.causal_folder(tmp_path / "base")
    callback = patches.PatchCallback("org/base")
    straight = trainer(Trainer, base, tmp_path / "out", 6, [callback])
    straight.train()
    loaded = patches.load(base, tmp_path / "out" / "delta")
    assert same(loaded, straight.model)
    assert json.loads((tmp_path / "out" / "delta" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    again = trainer(Trainer, base, tmp_path / "out", 6, [patches.PatchCallback(out=tmp_path / "again")])
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert same(again.model, straight.model)
    assert same(patches.load(base, tmp_path / "again"), straight.model)


def test_the_callback_refuses_a_checkpoint_without_a_patch(tmp_path):
    base = tiny.causal_folder(tmp_path / "base")
    trainer(Trainer, base, tmp_path / "out", 3).train()
    with pytest.raises(DeltaError, match=r"checkpoint-3 has no delta\.safetensors"):
        trainer(Trainer, base, tmp_path / "out", 6, [patches.PatchCallback()]).train(resume_from_checkpoint=True)
