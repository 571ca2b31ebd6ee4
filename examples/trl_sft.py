"""Supervised finetuning of a language model with TRL's SFTTrainer and NanoAdam.

Runs in a few seconds and downloads nothing: python examples/trl_sft.py [--model NAME]
On several processes: torchrun --nproc-per-node 2 examples/trl_sft.py
(needs pip install 'nanoadam[finetune]' trl; trl
is in none of nanoadam's extras: the test of this script is skipped without it)
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from trl import SFTConfig, SFTTrainer

import nanoadam
from nanoadam.callback import NanoAdamCallback

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def make_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Without a name: one token a word."""
    if name:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer
    words = ["<pad>", "<end>", "after", "comes", *NUMBERS]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>")


def make_model(name: str) -> PreTrainedModel:
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=14, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="folder or hub id; default: a tiny one with random weights")
    return parser.parse_args()


def main() -> None:
    name = parse().model
    pairs = [(NUMBERS[i], NUMBERS[(i + 1) % 10]) for i in range(10)] * 8
    rows = [{"prompt": f"after {before} comes", "completion": f" {after}"} for before, after in pairs]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            max_steps=60,
            per_device_train_batch_size=20,
            learning_rate=1e-2,
            logging_steps=15,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        trainer = SFTTrainer(
            make_model(name),  # a model's name works as well
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(name),
            optimizer_cls_and_kwargs=nanoadam.for_trainer(args=arguments, density=0.10, mask_interval=10),
            callbacks=[NanoAdamCallback()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    lines = trainer.state.log_history[:-1] if trainer.is_world_process_zero() else []
    for line in lines:
        print(f"step {line['step']:3}  loss {line['loss']:.3f}  touched {line['touched']:.1%}")


if __name__ == "__main__":
    main()
