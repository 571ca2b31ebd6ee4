"""Everything that decides a finetuning run: the keys of its TOML file, which are its command line options as well."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoadam.text import nearest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

TASKS = (
    "text-classification", "multi-label-classification", "text-regression", "token-classification", "causal-lm",
    "image-classification",
)  # fmt: skip
OPTIMIZERS = (
    "nanoadam", "adamw", "sgd", "adafactor", "adamw8bit", "galore", "apollo", "microadam", "lora", "rslora", "shira",
    "oft", "flashadamw",
)  # fmt: skip
"""Those of `nanoadam.baselines`, by name: importing that takes torch, and the command's help does not."""

ADAPTERS = ("lora", "rslora", "shira", "oft")
"""Those of them that train adapters beside frozen weights."""

SCHEDULERS = ("linear", "cosine", "constant")
DENSITY_SCHEDULES = ("constant", "linear", "cosine")
DENSITY = (0.1, 0.04)
"""At the start and at the end, where nothing is given."""

AUTO = "auto"
"""What stands for a learning rate that is to be found."""

FOUND = ("task", "learning_rate", "density", "density_end")
"""Keys that are found where they are not given; a run's config.toml has them."""

SAVES = ("model", "delta", "both")
GRANULARITIES = ("weight", "column")
CRITERIA = ("smallest", "largest", "random", "gradient")


def _key(default: Any, words: str, section: str, choices: tuple[str, ...] = (), low: float | None = None) -> Any:
    about = {"help": words, "section": section, "choices": choices, "low": low}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True)
class Config:
    """A finetuning run.

    Raises:
        ValueError: for a value out of range; it names the key, the value and what may stand there.
    """

    model: str = _key("", "Local folder or hub id of a transformers model.", "model")
    task: str | None = _key(None, "What is learned; by default what data and model are for.", "model", TASKS)
    metric: str | None = _key(None, "What counts when runs are compared; by default the task's first.", "model")
    tokenizer: str | None = _key(None, "Folder or hub id of its tokenizer, if not the model's own.", "model")
    revision: str | None = _key(None, "Branch, tag or commit of a hub id.", "model")
    init_from_config: bool = _key(False, "Random weights: read the model's config only.", "model")
    new_head: bool = _key(False, "Replace the head that the model has.", "model")
    trust_remote_code: bool = _key(False, "Run Python code that comes with the model.", "model")
    allow_pickle: bool = _key(False, "Load pickled weights (pytorch_model.bin) where there are no others.", "model")
    dtype: str = _key("float32", "Of the weights.", "model", ("float32", "bfloat16"))

    train: str = _key("", "Training data: a file, an image folder, or hub-id[:config]@split.", "data")
    validation: str | None = _key(None, "Validation data, likewise; by default a share of the training data.", "data")
    validation_share: float = _key(0.1, "That share, split off at random.", "data", low=0.0)
    columns: tuple[str, ...] = _key((), "Column names of tables without a header.", "data")
    delimiter: str | None = _key(None, "Between the fields of a table; found by default.", "data")
    encoding: str | None = _key(None, "Of text files; UTF-8 or UTF-16 by default.", "data")
    text_column: str | None = _key(None, "The text, or the first of a pair; found by its name by default.", "data")
    pair_column: str | None = _key(None, "The second of a pair of texts.", "data")
    label_column: str | None = _key(None, "The label or the number; found by its name by default.", "data")
    image_column: str | None = _key(None, "The image: a path, or its bytes; found by its name by default.", "data")
    prompt_column: str | None = _key(None, "causal-lm: the prompt, which has no loss; A,B joins two columns.", "data")
    completion_column: str | None = _key(None, "causal-lm: the completion, which has.", "data")
    messages_column: str | None = _key(None, "causal-lm: a list of {role, content}; the last one is learned.", "data")
    max_length: int | None = _key(None, "Most tokens of a sequence; by default what the model takes.", "data", low=2)
    truncate: bool = _key(False, "Cut longer sequences instead of refusing them.", "data")
    packing: bool = _key(False, "causal-lm: put a batch's rows into one sequence, without padding.", "data")
    train_rows: int | None = _key(None, "Use so many rows, drawn at random; the same at every seed.", "data", low=1)
    validation_rows: int | None = _key(None, "Use so many rows, drawn likewise.", "data", low=1)

    retain: tuple[str, ...] = _key(
        (), "What must not be forgotten: a text (language models), pairs of texts, labelled texts or images.", "data"
    )

    optimizer: str = _key("nanoadam", f"Any of {', '.join(OPTIMIZERS)}.", "optimizer")
    optimizer_options: tuple[str, ...] = _key((), "Like galore.rank=64: METHOD.OPTION=VALUE.", "optimizer")
    learning_rate: float | None = _key(
        None, "At the top of the schedule; auto tries a few on the first batches.", "optimizer", low=0.0
    )
    head_learning_rate: float | None = _key(
        None, "Of the head alone, on the same schedule; by default learning_rate.", "optimizer", low=0.0
    )
    weight_decay: float = _key(0.0, "Decoupled (sgd: as in torch); not on norms and biases.", "optimizer", low=0.0)
    beta1: float = _key(0.9, "Decay of the first moment; momentum of sgd.", "optimizer", low=0.0)
    beta2: float = _key(0.999, "Decay of the second moment.", "optimizer", low=0.0)
    eps: float = _key(1e-8, "Added to the root of the second moment.", "optimizer", low=0.0)
    max_grad_norm: float | None = _key(None, "Clip gradients to this norm.", "optimizer", low=0.0)
    density: float | None = _key(
        None, "Share of the weights selected, at the start; by default 0.1 falling to 0.04.", "nanoadam", low=0.0
    )
    density_end: float | None = _key(None, "And at the end; by default density if that is given.", "nanoadam", low=0.0)
    density_schedule: str = _key("linear", "How to get there.", "nanoadam", DENSITY_SCHEDULES)
    density_interval: int | None = _key(
        None, "Steps between changes of density; by default an 8th of an epoch.", "nanoadam", low=1
    )
    mask_interval: int | None = _key(
        None, "Steps between selections; by default a 40th of an epoch. More than the run has: never again.",
        "nanoadam", low=1,
    )  # fmt: skip
    granularity: str = _key(
        "weight",
        "What is selected: weights one by one, or whole input columns of linear layers, which is faster.",
        "nanoadam",
        GRANULARITIES,
    )
    criterion: str | None = _key(
        None,
        "Which are selected; by default the smallest weights, and of whole columns the largest.",
        "nanoadam",
        CRITERIA,
    )
    keep_zeros: bool = _key(False, "Never select exact zeros: a pruned model stays pruned.", "nanoadam")
    moments: str = _key("carry", "Of weights that stay, at a new selection.", "nanoadam", ("carry", "reset"))
    state_dtype: str = _key("bfloat16", "Of the moments.", "nanoadam", ("bfloat16", "float32"))
    stochastic_rounding: bool = _key(True, "Of bfloat16 moments and weights.", "nanoadam")
    gradient_release: bool = _key(True, "Cut gradients down during backward.", "nanoadam")
    grad_dtype: str = _key(
        "float32", "Of held gradients; bfloat16 loses nothing of bfloat16 ones where accumulate is 1.",
        "nanoadam", ("float32", "bfloat16"),
    )  # fmt: skip
    log_touched: bool = _key(True, "Log the share selected at least once; costs time at each selection.", "nanoadam")

    freeze_norms: bool = _key(False, "Keep BatchNorm as it is: statistics, scale and shift.", "training")
    norm_momentum: float | None = _key(
        None, "Of BatchNorm: what the newest batch weighs in its statistics; by default the model's own.", "training",
        low=0.0,
    )  # fmt: skip
    epochs: float = _key(3.0, "Passes over the training data.", "training", low=0.0)
    max_steps: int | None = _key(None, "Stop after so many steps, whatever the epochs.", "training", low=1)
    batch_size: int = _key(16, "Rows per backward pass.", "training", low=1)
    accumulate: int = _key(1, "Backward passes per step.", "training", low=1)
    eval_batch_size: int = _key(32, "Rows per forward pass when evaluating.", "training", low=1)
    scheduler: str = _key("linear", "Of the learning rate.", "training", SCHEDULERS)
    warmup: float = _key(0.05, "Steps of warm-up, or below 1 their share of all steps.", "training", low=0.0)
    label_smoothing: float = _key(0.0, "Share of each label's weight that all classes get.", "training", low=0.0)
    autocast: str = _key("no", "Compute in another precision than the weights'.", "training", ("no", "bf16", "fp16"))
    checkpoint_activations: bool = _key(False, "Recompute activations in backward to save memory.", "training")
    seed: int = _key(0, "Of new weights, dropout, splits, order of data and rounding.", "training", low=0)
    best: bool = _key(False, "Keep the weights of the best evaluation instead of the last ones.", "output")
    eval_every: int | None = _key(None, "Steps between evaluations; by default an epoch.", "output", low=1)
    save_every: int | None = _key(None, "Steps between checkpoints; by default an epoch.", "output", low=1)
    save_model: bool = _key(True, "Write the finetuned model, and checkpoints on the way.", "output")
    save: str = _key(
        "model",
        "What that is: whole models; patches of the base, in checkpoints too; or both.",
        "output",
        SAVES,
    )
    keep_checkpoints: int = _key(1, "How many checkpoints to keep.", "output", low=1)
    log_every: int = _key(10, "Steps between lines of metrics.jsonl.", "output", low=1)
    samples: int = _key(8, "How many rows to show with what the model says of them.", "output", low=0)
    shard: bool = _key(
        False, "Under torchrun: spread weights, gradients and state over the processes (FSDP2).", "training"
    )
    device: str = _key("auto", "Where to compute.", "training", ("auto", "cpu"))
    threads: int | None = _key(
        None, "Of the CPU; by default as torch chooses, or a share of the cores under --jobs.", "training", low=1
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        hints = typing.get_type_hints(Config)
        for field in FIELDS.values():
            value = getattr(self, field.name)
            if field.name == "learning_rate" and value == AUTO:
                value = None
            value = _checked(field.name, value, hints[field.name])
            object.__setattr__(self, field.name, value)
            choices, low = field.metadata["choices"], field.metadata["low"]
            if choices and value is not None and value not in choices:
                raise ValueError(f"{field.name} {value!r} is unknown{nearest(str(value), choices)}")
            if low is not None and value is not None and not low <= value < float("inf"):
                raise ValueError(f"{field.name} must be at least {low:g}, got {value!r}")
        for name in ("model", "train"):
            if not getattr(self, name):
                raise ValueError(f"there is no {name}: give --{name}, or {name} = ... in the config file")
        if self.max_grad_norm == 0:
            raise ValueError("max_grad_norm must be positive, or left out for no clipping, got 0")
        if self.save != "model" and (self.optimizer in ADAPTERS or self.init_from_config):
            why = (
                "adapters are put into the weights when the run has ended"
                if self.optimizer in ADAPTERS
                else "random weights have no base"
            )
            raise ValueError(f"save {self.save!r} writes what has changed from the base, and {why}: leave it out")
        if self.label_smoothing >= 1:
            raise ValueError(f"label_smoothing must be below 1, got {self.label_smoothing}")
        for name in ("density", "density_end"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value!r}")
        if self.delimiter is not None:
            given = {"tab": "\t", "\\t": "\t"}.get(self.delimiter, self.delimiter)
            if len(given) != 1:
                raise ValueError(f"delimiter must be one character, or tab, got {self.delimiter!r}")
            object.__setattr__(self, "delimiter", given)
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be between 0 and 1, got {self.validation_share}")

    @property
    def densities(self) -> tuple[float, float | None]:
        """Density at the start, and at the end if it changes."""
        if self.density is not None:
            return self.density, self.density_end
        return DENSITY[0], DENSITY[1] if self.density_end is None else self.density_end

    def resolved(self) -> Config:
        """With whole paths where it names local files or folders, so that it can be run from anywhere."""

        def whole(name: str) -> str:
            path = Path(name).expanduser()
            return str(path.resolve()) if path.exists() else name

        names = ("model", "tokenizer", "train", "validation")
        local: dict[str, Any] = {name: whole(getattr(self, name)) for name in names if getattr(self, name)}
        return dataclasses.replace(self, **local, retain=tuple(map(whole, self.retain)))

    def to_toml(self) -> str:
        """Every key with its value and what it means; reading it gives the same config."""
        import tomli_w

        lines = ["# Run it again: nanoadam finetune config.toml"]
        section = ""
        for field in sorted(FIELDS.values(), key=lambda field: SECTIONS.index(field.metadata["section"])):
            if field.metadata["section"] != section:
                section = field.metadata["section"]
                lines += ["", f"[{section}]"]
            value = getattr(self, field.name)
            choices = f" One of: {', '.join(field.metadata['choices'])}." if field.metadata["choices"] else ""
            lines.append(f"# {field.metadata['help']}{choices}")
            shown = list(value) if isinstance(value, tuple) else value
            lines.append(f"# {field.name} =" if value is None else tomli_w.dumps({field.name: shown}).strip())
        return "\n".join(lines) + "\n"


FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(Config)}
SECTIONS = tuple(dict.fromkeys(field.metadata["section"] for field in FIELDS.values()))


def _checked(name: str, value: Any, wanted: Any) -> Any:
    """The value as the type its key has, or a ValueError."""
    if isinstance(wanted, types.UnionType):
        if value is None:
            return None
        wanted = next(kind for kind in typing.get_args(wanted) if kind is not type(None))
    if typing.get_origin(wanted) is tuple:
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ValueError(f"{name} must be a list of strings, got {value!r}")
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        kinds = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
        raise ValueError(f"{name} must be {kinds[wanted]}, got {value!r}")
    return value


def read(path: Path, more: dict[str, tuple[str, ...]] | None = None) -> dict[str, Any]:
    """The keys of a TOML file, with or without their sections.

    Args:
        path: the file.
        more: sections and keys that are no part of a config but may stand there.

    Raises:
        ValueError: if there is no such file, it is no TOML, or has a key that does not exist.
    """
    if path.is_dir():
        raise ValueError(f"the config file {path} is a folder: pass the .toml file in it, or --resume {path} to go on")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no config file {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the config file {path} is no TOML: {error}") from error
    sections = (*SECTIONS, *(more or ()))
    keys = (*FIELDS, *(key for names in (more or {}).values() for key in names))
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            if key not in sections:
                raise ValueError(f"{path}: there is no section [{key}]{nearest(key, sections)}")
            found.update(value)
        else:
            found[key] = value
    for key in found:
        if key not in keys:
            raise ValueError(f"{path}: there is no key {key!r}{nearest(key, keys)}")
    return found


def of_run(out: Path, own: Mapping[str, Any] | None = None) -> Config:
    """The config of a run folder, with some keys as they are given here.

    Raises:
        ValueError: names the file, and where the values are that the run began with.
    """
    path = out / "config.toml"
    try:
        return Config(**{**read(path), **(own or {})})
    except ValueError as error:
        named = "" if str(path) in str(error) else f"{path}: "
        raise ValueError(
            f"{named}{error}; the values that the run began with stand in {out / 'manifest.json'} under settings: set "
            "them back, or begin anew with --out"
        ) from error
