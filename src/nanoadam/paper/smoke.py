"""Tiny random models and generated data, for runs that only show that an experiment works from end to end.

Nothing is downloaded. Rows are learnable (a word, a colour or a sum decides the label), so that a loss can fall.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanoadam.paper.answers import COMMONSENSE

_FIRST = (
    "good bad fine poor film book the a very not is was great dull Question: Answer: What plus ? #### correct answer"
)
_SECOND = "true false solution1 solution2 answer1 answer2 answer3 answer4 option1 option2 ### Instruction: Response:"
WORDS = [*_FIRST.split(), *_SECOND.split(), *map(str, range(20))]

SIDE = 32
"""Of images, pixels."""


def model(kind: str, folder: Path) -> Path:
    """A saved model with random weights, and its tokenizer or image processor.

    Args:
        kind: in `KINDS`.
        folder: for the model.
    """
    torch.manual_seed(0)
    made, processor = KINDS[kind]()
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def data(config: Mapping[str, Any], folder: Path, rows: int = 24) -> dict[str, str]:
    """`{"train", "validation"}`: generated files for the keys of a config, with the columns that it names.

    Args:
        config: keys of a config; its task, metric and columns decide what is generated.
        folder: for the files; made if it is not there.
        rows: for training; half as many for validation.

    Language models have their prompts from `questions`.
    """
    if config["task"] == "causal-lm":
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, count in (("train", rows), ("validation", rows // 2)):
        if config["task"] == "image-classification":
            files[split] = str(images(folder / f"{split}.npz", count, config.get("classes", 3)))
        else:
            files[split] = str(_texts(folder / f"{split}.jsonl", count, config))
    return files


def images(path: Path, count: int, classes: int) -> Path:
    """An npz file of images [count, 32, 32, 3], noise on the colour of their class."""
    noise = np.random.default_rng(count).integers(0, 60, (count, SIDE, SIDE, 3))
    labels = np.arange(count) % classes
    colour = np.stack([labels % 2, labels // 2 % 2, labels // 4 % 2], axis=1)
    np.savez(path, images=(noise + 190 * colour[:, None, None, :]).astype(np.uint8), labels=labels)
    return path


def _texts(path: Path, count: int, config: Mapping[str, Any]) -> Path:
    draw = random.Random(count)
    first, second = config.get("text_column") or "text", config.get("pair_column")
    lines = []
    for i in range(count):
        label = i % 2
        row: dict[str, Any] = {first: f"the {draw.choice(['film', 'book'])} is {['bad', 'good'][label]}"}
        if second:
            row[second] = f"the film was {draw.choice(['great', 'dull'])}"
        row[config.get("label_column") or "label"] = label + draw.random() if "regression" in config["task"] else label
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def questions(kind: str, count: int, test: str = "boolq") -> list[dict[str, Any]]:
    """Rows as those of GSM8K, or of LLM-Adapters' commonsense tests."""
    draw = random.Random(f"{test}{count}")
    rows = []
    for _ in range(count):
        if kind == "gsm8k":
            one, other = draw.randrange(10), draw.randrange(10)
            rows.append({"question": f"What is {one} plus {other} ?", "answer": f"#### {one + other}"})
        else:
            answer = draw.choice(COMMONSENSE[test][:2])
            rows.append({"instruction": f"Question: {answer} ?", "input": "", "answer": answer,
                         "output": f"the correct answer is {answer}"})  # fmt: skip
    return rows


# Models ----------------------------------------------------------------------------------------------------


def _tokenizer(single: str | None = None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {name: i for i, name in enumerate([*special, *WORDS])}
    raw: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if single is not None:
        raw.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="[SEP]", model_max_length=128,
    )  # fmt: skip


def _sizes() -> dict[str, Any]:
    return {
        "vocab_size": 4 + len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 3,
    }


def _bert() -> tuple[Any, Any]:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**_sizes(), intermediate_size=64)), _tokenizer("[CLS] $A [SEP]")


def _opt() -> tuple[Any, Any]:
    from transformers import OPTConfig, OPTModel

    return OPTModel(OPTConfig(**_sizes(), ffn_dim=64, word_embed_proj_dim=32)), _tokenizer("[CLS] $A [SEP]")


def _llama() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_sizes(), intermediate_size=64)), _tokenizer()


def _processor() -> Any:
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})


def _vit() -> tuple[Any, Any]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=SIDE, patch_size=8
    )
    return ViTModel(config), _processor()


def _resnet() -> tuple[Any, Any]:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return ResNetModel(config), _processor()


def _mobilenet() -> tuple[Any, Any]:
    from transformers import MobileNetV1Config, MobileNetV1ForImageClassification

    config = MobileNetV1Config(depth_multiplier=0.25, image_size=SIDE, classifier_dropout_prob=0.0)
    return MobileNetV1ForImageClassification(config), _processor()


KINDS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "bert": _bert,
    "opt": _opt,
    "llama": _llama,
    "vit": _vit,
    "resnet": _resnet,
    "mobilenet": _mobilenet,
}
"""What makes a model and its processor, by the name that recipes use."""
