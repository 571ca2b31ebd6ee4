"""accelerate's loop, launched with several processes, is one process with all batches."""

import warnings

import pytest
import torch
from test_checkpoints import folder_for
from test_shards import OPTIONS, Wide, loss_of, weights

from nanoadam import param_groups
from nanoadam.distributed import prepare_ddp
from nanoadam.optimizer import NanoAdam

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytestmark = pytest.mark.timeout(400)  # the first one waits for several processes


def train(rank, plugin=None):
    """Accumulation, clipping and stepping are accelerate's."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), fsdp_plugin=plugin, gradient_accumulation_steps=2, mixed_precision="no"
    )
    model = Wide()
    opt = NanoAdam(param_groups(model), **OPTIONS)
    beside = prepare_ddp(model, opt) if plugin is None else None
    model, opt = accelerator.prepare(model, opt)
    for step in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, rank, step))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of the order of steps
                opt.step()
            opt.zero_grad()
    return weights(accelerator.unwrap_model(model)), beside


class Rows(torch.utils.data.Dataset):
    """The same rows on every process; the Trainer gives each its share."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return {"ids": torch.randint(0, 3, (5,), generator=torch.Generator().manual_seed(i), device="cpu")}


class WithLoss(Wide):
    """As the Trainer wants it."""

    def forward(self, ids, labels=None):
        return {"loss": super().forward(ids).float().square().mean()}


def trained(folder, **more):
    """By transformers' Trainer; the weights, and the bytes that replicas beside DDP have sent."""
    from transformers import Trainer, TrainingArguments

    import nanoadam

    arguments = TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        save_strategy="no", max_grad_norm=0.1, learning_rate=1e-2, lr_scheduler_type="constant", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), remove_unused_columns=False, dataloader_pin_memory=False, **more,
    )  # fmt: skip
    kinds = nanoadam.for_trainer(args=arguments, density=0.2, mask_interval=3, state_dtype=torch.float32)
    trainer = Trainer(WithLoss(), arguments, train_dataset=Rows(), optimizer_cls_and_kwargs=kinds)
    trainer.train()
    beside = [hook for hook in trainer.model._forward_pre_hooks.values() if hasattr(hook, "replica")]
    return weights(trainer.model), [hook.replica.sent_bytes for hook in beside]


def on_two(rank, size):
    end, beside = train(rank)
    return end, beside.replica.sent_bytes, trained(folder_for(rank, "trainer"))


def on_one(size):
    model = Wide()
    opt = NanoAdam(param_groups(model), **OPTIONS, local=True)
    for step in range(6):
        for rank in range(size):
            (loss_of(model, rank, step) / size / 2).backward()
        if step % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
            opt.zero_grad()
    return weights(model)


def test_accelerate_with_two_processes(two):
    (first, sent, _), (second, *_) = two
    assert torch.equal(first, second)
    torch.testing.assert_close(first, on_one(2), rtol=1e-4, atol=1e-4)
    selected = (
        sum(p.numel() for n, p in Wide().named_parameters() if p.dim() == 2 and "head" not in n) * OPTIONS["density"]
    )
    assert sent == pytest.approx(3 * 4 * selected, rel=0.02)


def test_the_trainer_with_two_processes_sends_selected_entries_only(two):
    (first, sent), (second, _) = (end[2] for end in two)
    assert torch.equal(first, second)
    selected = sum(p.numel() for n, p in Wide().named_parameters() if p.dim() == 2 and "head" not in n) * 0.2
    assert sent == [pytest.approx(4 * 4 * selected, rel=0.02)]
    assert not torch.equal(first, weights(WithLoss()))
