"""Patches of transformers' models: saved beside configuration and tokenizer, loaded in one line, kept by the Trainer.

```python
model = patches.load("base-model", "finetuned-patch")   # the finetuned model, bit for bit
model.save_pretrained("finetuned")                       # as a whole model
```
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import TrainerCallback

from nanoadam import delta
from nanoadam.delta.diffing import find_prefix
from nanoadam.delta.sources import Files, tensors_of

README = "README.md"


def load(
    base: str | Path,
    patch: str | Path,
    *,
    strength: float = 1.0,
    verify: bool = True,
    **options: Any,
) -> Any:
    """The finetuned model, from its base and its patch.

    Args:
        base: folder or hub id of the base model.
        patch: the folder that was saved with it, whose configuration says what the finetuned model is (its class, its
            number of labels); or the file alone, for a model that is of the base's own class.
        strength: as in `delta.apply`.
        verify: as in `delta.apply`.
        options: of `from_pretrained`: device_map, attn_implementation, revision, ...

    Raises:
        DeltaError: if the patch is damaged, or was made on another base.
        ValueError, OSError: as `from_pretrained`.
    """
    folder = Path(patch).expanduser()
    source: str | Path = folder if folder.is_dir() and (folder / "config.json").is_file() else base
    code = {key: options[key] for key in ("trust_remote_code", "revision") if key in options}
    config = transformers.AutoConfig.from_pretrained(str(source), **(code if source is base else {}))
    found = delta.Patch.load(folder, verify=verify)
    options = {"dtype": config.dtype or "auto", "ignore_mismatched_sizes": True} | options
    with _without_warnings():  # of the head that the base lacks: it is in the patch
        model = model_class(config).from_pretrained(str(base), config=config, **options)
    delta.apply(model, found, strength, verify=verify)
    return model


def model_class(config: Any) -> Any:
    """The class that a configuration was saved with; AutoModel where it does not say."""
    names = getattr(config, "architectures", None) or []
    known = getattr(transformers, names[0], None) if names else None
    return transformers.AutoModel if known is None else known


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("transformers.modeling_utils", "transformers.utils.loading_report")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def save(
    folder: Path,
    model: nn.Module,
    base: Mapping[str, Tensor],
    *,
    name: str,
    new: Iterable[str] = (),
    processor: Any = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> delta.Patch:
    """Write a finetuned model as a patch: `delta.safetensors`, configuration, tokenizer and a model card.

    Args:
        folder: there already.
        model: the finetuned model.
        base: what it started from (`delta.snapshot`).
        name: folder or hub id of the base model.
        new: tensors that the base's checkpoint does not have, drawn at random.
        processor: tokenizer or image processor.
        tensors: its state dict; by default what the model holds itself.

    Raises:
        DeltaError: if it cannot be written.
    """
    path = Path(name).expanduser()
    shown = path.name if path.exists() else name
    tuned, kind = model if tensors is None else tensors, type(model).__name__.removeprefix("FSDP")
    patch = delta.diff(base, tuned, name=shown, new=[each for each in new if each in base])
    if path.exists():  # so that it can be applied to the folder of a base that was saved without its head
        with contextlib.suppress(delta.DeltaError):
            patch = dataclasses.replace(patch, prefix=find_prefix(Files(path), tensors_of(tuned)))
    patch.save(folder / delta.FILE)
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.architectures = [kind]
        config.save_pretrained(str(folder))
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(str(folder))
    if processor is not None:
        processor.save_pretrained(str(folder))
    (folder / README).write_text(card(patch, kind), encoding="utf-8")
    return patch


def new_tensors(model: Any) -> list[str]:
    """Tensors of a model that its checkpoint did not have, or had in another shape: as `load_model` noted them."""
    return sorted(getattr(model, "nanoadam_new", ()))


def card(patch: delta.Patch, kind: str) -> str:
    """A model card for a patch, in Hugging Face's form."""
    about = delta.info(patch)
    hub = f'base_model: "{patch.base}"\n' if patch.base.count("/") == 1 else ""
    base, share = patch.base or "BASE", 100 * about["weights"] / max(1, about["of_weights"])
    rows = "\n".join(
        f"| {name} | {found['tensors']:,} | {found['weights']:,} | {found['bytes']:,} |"
        for name, found in about["kinds"].items()
        if found["tensors"]
    )
    versions = ", ".join(f"{key} {value}" for key, value in patch.notes.items())
    return f"""---
library_name: transformers
{hub}tags: ["nanoadam", "patch"]
---
# A finetune of {base}, as a patch

`{delta.FILE}` holds the weights that finetuning has changed, with their values: {share:.2f} % of the tensors that it
changed. Applied to {base} it makes the finetuned {kind} in every bit; it can be taken back in every bit.

## Use
```python
from nanoadam.finetuning import patches

model = patches.load("{base}", "PATH/OF/THIS/FOLDER")
model.save_pretrained("finetuned")  # as a whole model, if you want one
```
Or `nanoadam delta apply {base} PATH/OF/THIS/FOLDER finetuned`. `nanoadam delta info` says what is in it.

## What it holds
| | tensors | weights | bytes |
|---|---|---|---|
{rows}

`sparse`: single weights; `columns`: whole columns of a matrix; `dense`: all weights of a tensor; `new`: tensors that
the base does not have. Made with {versions}. Licence and limits are those of {base} and of the data.
"""


# The Trainer


class PatchCheckpoints:
    """For a Trainer, in front of it: checkpoints hold the patch instead of the weights.

    ```python
    class MyTrainer(PatchCheckpoints, Trainer): ...

    trainer = MyTrainer(model, ...)
    trainer.keep_patches_of("base-model")   # before training, while the weights are the base's
    ```
    A checkpoint goes on from the same base: make the model anew and resume as always.
    """

    patch_base: dict[str, Tensor] | None = None
    patch_name = ""
    patch_new: tuple[str, ...] = ()

    def keep_patches_of(self, name: str, base: dict[str, Tensor] | None = None, new: Iterable[str] = ()) -> None:
        """Save patches from now on.

        Args:
            name: of the base model.
            base: its weights; by default those that the model has now, copied to the host.
            new: as in `save`.
        """
        model: nn.Module = self.model  # type: ignore[attr-defined]
        self.patch_base = delta.snapshot(model) if base is None else base
        self.patch_name, self.patch_new = name, tuple(new)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.patch_base is None:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        if not self.args.should_save:  # type: ignore[attr-defined]
            return
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[attr-defined]
        folder.mkdir(parents=True, exist_ok=True)
        save(
            folder,
            self.model,  # type: ignore[attr-defined]
            self.patch_base,
            name=self.patch_name,
            new=self.patch_new,
            processor=getattr(self, "processing_class", None),
            tensors=state_dict,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / delta.FILE
        if not path.is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        delta.apply(self.model if model is None else model, path)  # type: ignore[attr-defined]


class PatchCallback(TrainerCallback):
    """Writes what training has changed as a patch: into each checkpoint, and at the end into a folder.

    It goes by NanoAdam's selections and keeps no copy of the base. A run that is resumed goes on from the patch in its
    checkpoint.

    Args:
        name: of the base model, for people.
        out: the folder; by default `delta` in the Trainer's output folder.
    """

    def __init__(self, name: str = "", out: str | Path | None = None) -> None:
        self.name, self.out = name, None if out is None else Path(out)
        self._recorder: delta.Recorder | None = None
        self._before: delta.Patch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch.

        Raises:
            DeltaError: if the optimizer is no NanoAdam, or the checkpoint to go on from has no patch.
        """
        from nanoadam.callback import unwrap

        self._before = None
        if state.global_step:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if not (folder / delta.FILE).is_file():
                raise delta.DeltaError(
                    f"{folder} has no {delta.FILE}: where the base is not known any more a patch cannot start. Use "
                    "delta.diff with the base model at the end"
                )
            self._before = delta.Patch.load(folder).to("cpu")
        self._recorder = delta.Recorder(kwargs["model"], unwrap(kwargs["optimizer"]), base=self.name)

    def patch(self) -> delta.Patch:
        """What has changed since the base."""
        assert self._recorder is not None
        patch = self._recorder.patch(reset=False)
        return patch if self._before is None else delta.compose(self._before, patch.to("cpu"))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the patch into the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self.patch().save(folder / delta.FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the patch with configuration, tokenizer and card."""
        if not state.is_world_process_zero:
            return
        folder = self.out or Path(args.output_dir) / "delta"
        folder.mkdir(parents=True, exist_ok=True)
        model, patch = kwargs["model"], self.patch()
        patch.save(folder / delta.FILE)
        if hasattr(model, "config"):
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(str(folder))
        processor = kwargs.get("processing_class")
        if processor is not None:
            processor.save_pretrained(str(folder))
        (folder / README).write_text(card(patch, type(model).__name__), encoding="utf-8")
        if self._recorder is not None:
            self._recorder.close()


__all__ = ["PatchCallback", "PatchCheckpoints", "card", "load", "new_tensors", "save"]
