"""LoRA adapters trained by NanoAdam: A and B are matrices that it selects from, the frozen base is left alone.

Runs in a few seconds and downloads nothing: python examples/peft_lora.py (needs pip install 'nanoadam[finetune]' peft)
"""

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import nanoadam


def make_model() -> torch.nn.Module:
    """Instead of LlamaForCausalLM.from_pretrained(...)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=16, target_modules="all-linear")
    return get_peft_model(LlamaForCausalLM(config), lora)


def main() -> None:
    model = make_model()
    # B starts at zero, and zeros are the smallest weights: they are selected first. keep_zeros=True would never
    # select them, and the adapters would learn nothing.
    groups = nanoadam.param_groups(model)
    optimizer = nanoadam.NanoAdam(groups, lr=1e-2, density=0.25, mask_interval=10)
    print(nanoadam.describe(groups, density=0.25))
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}

    ids = torch.arange(64).repeat(2).unfold(0, 16, 4)[:24]  # counting: what comes next is plain
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
