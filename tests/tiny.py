"""Tiny models, tokenizers and data files, made on the spot: nothing is downloaded."""

import json
from pathlib import Path

import torch

WORDS = ["good", "bad", "fine", "poor", "film", "book", "the", "a", "very", "not", "is", "was", "great", "dull"]


def tokenizer(chat: bool = False):
    """One token a word; unknown words are [UNK]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<|user|>", "<|assistant|>", *WORDS]
    raw = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if not chat:
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="[SEP]", model_max_length=32, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    if chat:
        made.chat_template = (
            "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} "
            "{% if m['role'] == 'assistant' %}[SEP] {% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|> {% endif %}"
        )
    return made


def bert(labels: int = 2, dropout: float = 0.1, **options: object):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, num_labels=labels, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, **options,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def bert_folder(folder: Path) -> Path:
    """A pretrained encoder without a head, and its tokenizer."""
    bert().bert.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def causal_folder(folder: Path, chat: bool = False, tied: bool = False) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=2, eos_token_id=3, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder


def sentences(count: int, first: int = 0) -> list[dict[str, object]]:
    """A sentence with "good" or "bad" in it, and which."""
    rows: list[dict[str, object]] = []
    for i in range(first, first + count):
        label = ("bad", "good")[i * 7 % 3 % 2]
        rows.append({"text": f"the {WORDS[4 + i % 2]} is {label} {WORDS[8 + i % 6]}", "label": label})
    return rows


def jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
