"""GRPO by TRL, with a process of its own that generates and is kept in step by patches.

The trainer learns to say even numbers. Another process holds a copy of the model and generates with transformers'
continuous batching; after each step it gets the weights that NanoAdam has moved, through a folder, and checks the hash
of every tensor.

Runs in about a minute on a CPU and downloads nothing: python examples/rl_sync.py [--model NAME]
It starts its own second process; the trainer is one.
(needs pip install 'nanoadam[finetune]' trl)
"""

import argparse
import logging
import multiprocessing
import os
import tempfile

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is new there

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
    TrainerCallback,
)

import nanoadam
from nanoadam.delta import Recorder
from nanoadam.delta.sync import FolderChannel, Receiver, Sender

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
EVEN = set(NUMBERS[::2])
LENGTH = 8
STEPS = 30


def make_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Without a name: one token a word."""
    if name:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer
    words = ["<pad>", "<end>", "say", *NUMBERS]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", padding_side="left")


def make_model(name: str) -> PreTrainedModel:
    """The same weights in both processes."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


# The process that generates ---------------------------------------------------------------------------------


def serve(name: str, folder: str, requests, answers) -> None:
    """Answer lists of prompts, each time with the newest weights; None ends it."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    model, tokenizer = make_model(name).eval(), make_tokenizer(name)
    receiver = Receiver(model, FolderChannel(folder))
    sampling = GenerationConfig(
        max_new_tokens=LENGTH,
        do_sample=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    batching = ContinuousBatchingConfig(
        page_size=16, num_blocks=128, max_batch_tokens=512, return_logprobs=True, seed=0,
        allow_block_sharing=False,  # what was cached for a prefix is of older weights
    )  # fmt: skip
    while (prompts := requests.get()) is not None:
        while receiver.receive():
            pass
        found = model.generate_batch(prompts, sampling, batching, persistent_manager=True, warmup=False)
        order = sorted(found, key=lambda name: int(name.removeprefix("req_")))
        answers.put((receiver.version, [(found[name].generated_tokens, found[name].logprobs) for name in order]))


# The trainer ------------------------------------------------------------------------------------------------


class Sync(TrainerCallback):
    """Sends what each step has moved."""

    def __init__(self, sender: Sender) -> None:
        self.sender, self.sent = sender, []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.sent.append(self.sender.send().patch.coded().nbytes)


def reward(completions: list[str], **_) -> list[float]:
    """The share of even numbers among the words."""
    words = [text.split() for text in completions]
    return [sum(word in EVEN for word in said) / LENGTH for said in words]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="folder or hub id; default: a tiny one with random weights")
    return parser.parse_args()


def main() -> None:
    name = parse().model
    from trl import GRPOConfig, GRPOTrainer

    context = multiprocessing.get_context("spawn")
    requests, answers = context.SimpleQueue(), context.SimpleQueue()
    tokenizer, model, versions = make_tokenizer(name), make_model(name), []
    optimizer = nanoadam.NanoAdam(nanoadam.param_groups(model), lr=4e-3, density=0.05, mask_interval=5)

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        requests.put(prompt_ids)
        version, found = answers.get()
        versions.append((version, trainer.state.global_step))
        completion_ids, logprobs = zip(*found, strict=True)
        return {"prompt_ids": prompt_ids, "completion_ids": list(completion_ids), "logprobs": list(logprobs)}

    with tempfile.TemporaryDirectory() as folder:
        channel = FolderChannel(f"{folder}/updates")
        server = context.Process(target=serve, args=(name, f"{folder}/updates", requests, answers), daemon=True)
        server.start()
        sync = Sync(Sender(Recorder(model, optimizer), channel))
        trainer = GRPOTrainer(
            model,
            reward,
            args=GRPOConfig(
                f"{folder}/out",
                max_steps=STEPS,
                per_device_train_batch_size=32,
                num_generations=16,
                max_completion_length=LENGTH,
                beta=0.0,
                logging_steps=5,
                save_strategy="no",
                disable_tqdm=True,
                report_to="none",
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=Dataset.from_list([{"prompt": f"say {number}"} for number in NUMBERS]),
            processing_class=tokenizer,
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
            rollout_func=rollout,
            callbacks=[sync],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        requests.put(None)
        server.join(timeout=20)

    for line in trainer.state.log_history[:-1]:
        print(f"step {line['step']:3}  reward {line['reward']:.3f}")
    whole = sum(parameter.nbytes for parameter in model.parameters())
    print(f"each rollout had the weights of its step: {all(version == step for version, step in versions)}")
    print(f"bytes sent a step: {sum(sync.sent) / len(sync.sent):,.0f} of {whole:,}")


if __name__ == "__main__":
    main()
