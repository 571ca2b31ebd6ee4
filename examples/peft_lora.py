"""LoRA adapters trained by NanoAdam: A and B are matrices that it selects from, the frozen base is left alone.

Runs in a few seconds and downloads nothing: python examples/peft_lora.py [--model NAME]
It is one process; a loop on several is examples/distributed_loop.py.
(needs pip install 'nanoadam[finetune]' peft)
"""

import argparse

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import nanoadam


def make_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=16, target_modules="all-linear")
    base = AutoModelForCausalLM.from_pretrained(name) if name else LlamaForCausalLM(config)
    return get_peft_model(base, lora)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="folder or hub id; default: a tiny one with random weights")
    return parser.parse_args()


def main() -> None:
    name = parse().model
    model = make_model(name)
    # B starts at zero, and zeros are the smallest weights: they are selected first. keep_zeros=True would never
    # select them, and the adapters would learn nothing.
    groups = nanoadam.param_groups(model)
    optimizer = nanoadam.NanoAdam(groups, lr=1e-2, density=0.25, mask_interval=10)
    print(nanoadam.describe(groups, density=0.25))
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}

    count = min(64, model.config.vocab_size)
    ids = torch.arange(count).repeat(2).unfold(0, 16, 4)[:24]  # counting: what comes next is plain
    for step in range(60):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == 59:
            print(f"step {step:2}  loss {loss.item():.3f}")

    after = dict(model.named_parameters())
    print(f"base unchanged: {all(torch.equal(value, after[name]) for name, value in base.items())}")


if __name__ == "__main__":
    main()
