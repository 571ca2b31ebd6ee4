"""NanoAdam under transformers' Trainer: its schedule, accumulation, clipping, checkpoints and logs.

Runs in a few seconds and downloads nothing: python examples/trainer.py [--model NAME]
On several processes: torchrun --nproc-per-node 2 examples/trainer.py
(needs pip install 'nanoadam[finetune]')
"""

import argparse
import tempfile

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

import nanoadam
from nanoadam.callback import NanoAdamCallback

STEPS = 80


def make_model(name: str) -> PreTrainedModel:
    if name:
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, num_labels=2
    )
    return BertForSequenceClassification(config)


def make_rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Sixteen tokens each; the label says whether token 7 is among them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 64, (count, 16), generator=generator)
    ids[::2, 3] = 7
    return [{"input_ids": row, "labels": (row == 7).any().long()} for row in ids]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="folder or hub id; default: a tiny one with random weights")
    return parser.parse_args()


def main() -> None:
    name = parse().model
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=20,
            save_steps=40,
            disable_tqdm=True,
            report_to="none",
            use_cpu=True,
        )
        density = nanoadam.linear(0.10, 0.04, total_steps=STEPS, interval=20)
        trainer = Trainer(
            make_model(name),
            arguments,
            train_dataset=make_rows(256),
            optimizer_cls_and_kwargs=nanoadam.for_trainer(args=arguments, density=density, mask_interval=10),
        )
        NanoAdamCallback().attach(trainer)  # density, touched share and memory in the logs
        # Many classifiers take the Trainer's count of items and ignore it; without this, accumulated gradients add up
        # to a sum instead of a mean.
        trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    lines = trainer.state.log_history[:-1] if trainer.is_world_process_zero() else []
    for line in lines:
        print(
            f"step {line['step']:3}  loss {line['loss']:.3f}  density {line['density']:.2f}  "
            f"touched {line['touched']:.1%}  state {line['memory_state'] / 1e3:.0f} kB  "
            f"gradients {line['memory_gradients'] / 1e3:.0f} kB"
        )


if __name__ == "__main__":
    main()
