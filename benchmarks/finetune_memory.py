"""Finetuning as it is done: forward, backward and step of a transformers model, its time and its peak memory.

Random weights, made on the device in bfloat16, and random tokens: neither moves time or memory.

Example: python benchmarks/finetune_memory.py --model llama-2-7b --batch 1 --checkpointing --json memory.json
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import common
import torch
from torch import Tensor, nn

import nanoadam
from nanoadam.gradients import SelectedGradient, gradient_bytes

# (model, batch, checkpointing) -> method -> (peak GB, ms per iteration): measured by the project on an H200,
# sequence 512, torch 2.11, before the kernels were written.
PEERS_THEN = {
    ("llama-2-7b", 1, True): {
        "adamw": (54.0, 181),
        "sgd": (27.1, 174),
        "bitsandbytes": (41.0, 383),
        "torchao": (41.8, 347),
        "lora": (15.05, 313),
    },
    ("llama-2-7b", 8, False): {
        "adamw": (66.9, 381),
        "sgd": (40.0, 359),
        "bitsandbytes": (53.7, 541),
        "torchao": (53.7, 539),
        "lora": (52.4, 447),
    },
}
# (model, batch, checkpointing) -> method -> (largest peak GB, largest share of AdamW's time)
GOALS: dict[tuple[str, int, bool], dict[str, tuple[float, float | None]]] = {
    ("llama-2-7b", 1, True): {
        "nanoadam:0.01": (15.1, 1.0),
        "nanoadam:0.01+head": (14.4, None),
        "nanoadam:0.1": (19.5, None),
        "columns:0.01": (15.0, None),
        "columns:0.01+head": (14.3, None),
        "columns:0.1": (19.0, None),
    },
    ("llama-2-7b", 8, False): {
        "nanoadam:0.01": (41.0, 0.93),
        "columns:0.01": (35.5, 0.72),
        "columns:0.1": (38.0, 0.76),
    },
}
PEERS = ("adamw", "sgd", "lora", "shira", "bitsandbytes", "torchao")
OURS = {"nanoadam": "weight", "columns": "column"}
RANK = 32


def _llama(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(use_cache=False, attn_implementation="sdpa", **options)
        return LlamaForCausalLM(config)

    return make


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    widths = {"hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8192}
    config = OPTConfig(
        **widths, num_hidden_layers=24, num_attention_heads=32, use_cache=False, attn_implementation="sdpa"
    )
    return OPTForCausalLM(config)


def _bert(layers: int, hidden: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}
        config = BertConfig(**sizes, num_hidden_layers=layers, num_labels=2, attn_implementation="sdpa")
        return BertForSequenceClassification(config)

    return make


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_labels=2,
        attn_implementation="sdpa",
    )
    return ViTForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tiny": _llama(vocab_size=128, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4),
    "bert-base": _bert(12, 768),
    "bert-large": _bert(24, 1024),
    "vit-large": _vit,
    "opt-1.3b": _opt,
    "llama-3.2-3b": _llama(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "llama-2-7b": _llama(),  # the defaults of LlamaConfig
}


def build(name: str, device: torch.device, dtype: torch.dtype, *, checkpointing: bool) -> nn.Module:
    """A model whose weights are drawn on the device in their final dtype, so never held twice."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = MODELS[name]()
    finally:
        torch.set_default_dtype(before)
    if checkpointing:  # transformers 5.23 renamed it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.train()


def batch_of(model: nn.Module, name: str, size: int, sequence: int, device: torch.device) -> dict[str, Tensor]:
    """Random tokens or pixels; the tokens themselves as labels for language models, classes for the others."""
    classes = torch.randint(2, (size,), device=device)
    if name.startswith("vit"):
        pixels = torch.randn(size, 3, 224, 224, device=device, dtype=next(model.parameters()).dtype)
        return {"pixel_values": pixels, "labels": classes}
    tokens = torch.randint(5, model.config.vocab_size, (size, sequence), device=device)
    return {"input_ids": tokens, "labels": classes if name.startswith("bert") else tokens}


@dataclass(frozen=True)
class Method:
    """One way to finetune: `adamw`, ..., or NanoAdam with single weights or whole columns of a density."""

    name: str
    density: float | None = None
    head: bool = False  # select from the head as well

    @classmethod
    def parse(cls, text: str) -> Method:
        whole, plus, what = text.partition("+")
        name, _, density = whole.partition(":")
        if name in OURS and (not plus or what == "head"):
            return cls(name, float(density or 0.01), bool(plus))
        if name not in PEERS or density or plus:
            ours = ", ".join(f"{each}:DENSITY[+head]" for each in OURS)
            raise ValueError(f"optimizers are {', '.join(PEERS)}, {ours}; got {text!r}")
        return cls(name)

    def __str__(self) -> str:
        return self.name if self.density is None else f"{self.name}:{self.density:g}{'+head' * self.head}"

    def title(self, options: argparse.Namespace) -> str:
        if self.density is not None:
            columns = ", columns" if self.name == "columns" else ""
            return f"NanoAdam k = {100 * self.density:g} %{columns}{', head too' if self.head else ''}"
        adapters = f"r = {RANK}, {options.lora_dtype} adapters"
        names = {"adamw": "AdamW fused", "sgd": "SGD", "bitsandbytes": "bitsandbytes AdamW8bit"}
        adapted = {"lora": f"LoRA {adapters}", "shira": f"SHiRA {adapters}"}
        return {**names, **adapted, "torchao": "torchao AdamW8bit"}[self.name]

    def prepare(self, model: nn.Module, options: argparse.Namespace) -> nn.Module:
        """The model to train: with adapters for LoRA."""
        if self.name not in ("lora", "shira"):
            return model
        from peft import LoraConfig, ShiraConfig, get_peft_model

        config: LoraConfig | ShiraConfig = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear"
        )
        if self.name == "shira":
            linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            config = ShiraConfig(r=RANK, target_modules=[name for name in linear if name != "lm_head"])
        adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
        dtype = common.DTYPES[options.lora_dtype]
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        return adapted

    def optimizer(self, model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
        if self.density is not None:
            return nanoadam.NanoAdam(
                nanoadam.param_groups(
                    model,
                    granularity=OURS[self.name],
                    selected="lm_head" if self.head else (),
                ),
                lr=1e-5,
                density=self.density,
                mask_interval=options.mask_interval,
                grad_dtype=common.DTYPES[options.grad_dtype],
                release_bytes=options.release_bytes,
            )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.name == "sgd":
            return torch.optim.SGD(trained, lr=1e-5)
        if self.name == "bitsandbytes":
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(trained, lr=1e-5, weight_decay=0.01)
        if self.name == "torchao":
            from torchao.optim import AdamW8bit

            return AdamW8bit(trained, lr=1e-5, weight_decay=0.01)
        return torch.optim.AdamW(trained, lr=1e-5, fused=True)


def bytes_of(tensors: Sequence[Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def run(method: Method, options: argparse.Namespace) -> dict[str, Any]:
    """Train for some steps and say what that took."""
    device = torch.device(options.device)
    common.free(device)
    common.reset_peak(device)
    empty = common.allocated(device) or 0
    model = build(options.model, device, common.DTYPES[options.dtype], checkpointing=options.checkpointing)
    model = method.prepare(model, options)
    build_peak = common.peak(device)
    batch = batch_of(model, options.model, options.batch, options.sequence, device)
    common.reset_peak(device)
    optimizer = method.optimizer(model, options)
    parameters = list(model.parameters())
    is_nano = isinstance(optimizer, nanoadam.NanoAdam)
    found: dict[str, Any] = {
        "method": method.title(options),
        "given": str(method),
        "optimizer": method.name,
        "granularity": OURS.get(method.name),
        "head": "selected" if method.head else "dense",
        "density": method.density,
        "trained": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    }
    kinds: dict[str, int | None] = {"weights": bytes_of(parameters) + bytes_of(list(model.buffers()))}
    loss = torch.zeros(())

    def iteration(count_gradients: bool = False) -> None:
        nonlocal loss
        loss = model(**batch).loss
        loss.backward()
        loss = loss.detach()
        if options.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        if count_gradients:
            found_gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            dense = [gradient for gradient in found_gradients if not isinstance(gradient, SelectedGradient)]
            kinds["gradients"] = bytes_of(dense)
            kinds["held"] = sum(map(gradient_bytes, found_gradients)) - kinds["gradients"]
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(options.warmup):
        iteration()
    if is_nano:  # once moments are carried, every selected weight has an entry step: the state has its final size
        common.make_due(optimizer)
        iteration()
        common.make_due(optimizer)
        found["refresh_ms"] = common.wall_ms(optimizer.refresh, device)
    iteration(count_gradients=True)
    kinds["state"] = common.state_bytes(optimizer)
    between = common.allocated(device)
    warmup_peak = common.peak(device)
    common.reset_peak(device)
    times = [common.wall_ms(iteration, device) for _ in range(options.steps)]
    after_peak = common.peak(device)
    if after_peak is not None:
        known = sum(size for size in kinds.values() if size is not None)
        kinds["rest at peak"] = after_peak - empty - known
    if options.profile:
        found["kernels_ms"] = kernel_times(iteration, device)
    if options.timeline:
        loss = model(**batch).loss
        found["backward"] = backward_kernels(loss, device)
        loss = loss.detach()
        optimizer.zero_grad()
    found["finite"] = math.isfinite(loss.item())
    found["loss"] = loss.item() if found["finite"] else None
    found["ms"] = statistics.median(times)
    found["ms_with_refresh"] = found["ms"] + found.get("refresh_ms", 0.0) / options.mask_interval
    found["times_ms"] = times
    found["bytes"] = kinds
    found["peak_bytes"] = {"building": build_peak, "warm-up": warmup_peak, "after": after_peak}
    found["bytes_between_iterations"] = None if between is None else between - empty
    found["peak_bytes"]["training"] = None if after_peak is None else max(after_peak, warmup_peak)
    return found


KERNELS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "splitK", "gemv"),
    "attention": ("flash", "fmha", "attention", "cudnn"),
    "selected columns of inputs": ("indexSelect", "index_select"),
    "copies": ("Memcpy", "Memset"),
}
"""What a kernel is for, by parts of its name; the first that fits."""


def profiled(work: Callable[[], Any], device: torch.device) -> list[tuple[str, float, float]]:
    """What the device did: what each kernel is for (ours are Triton's), when it began and how long it took, in us."""
    from torch.profiler import ProfilerActivity, profile

    from nanoadam.ops import column_kernels, kernels, selection

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        work()
        torch.cuda.synchronize(device)
    ours = {name for module in (column_kernels, kernels, selection) for name in vars(module)}
    events = []
    for event in found.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
            continue
        kinds = (kind for kind, parts in KERNELS.items() if any(part in event.name for part in parts))
        kind = "NanoAdam" if event.name in ours else next(kinds, "elementwise and the rest")
        events.append((kind, event.time_range.start, event.device_time_total))
    return sorted(events, key=lambda event: event[1])


def kernel_times(iteration: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Milliseconds of the device in one iteration, by what they are for."""
    times: dict[str, float] = {}
    for kind, _, duration in profiled(iteration, device):
        times[kind] = times.get(kind, 0.0) + duration / 1000
    return times


def backward_kernels(loss: Tensor, device: torch.device, layers: int = 16) -> dict[str, Any]:
    """The kernels of one backward: in all, and one by one from its middle on, for one part of so many."""
    events = profiled(loss.backward, device)
    begin, end = events[0][1], max(start + duration for _, start, duration in events)
    first, last = begin + (end - begin) / 2, begin + (end - begin) * (0.5 + 1 / layers)
    shown = [(kind, round(start - first, 1), round(us, 1)) for kind, start, us in events if first <= start < last]
    return {"us": round(end - begin, 1), "shown_us": round(last - first, 1), "kernels": shown}


def render(results: list[dict[str, Any]], skipped: dict[str, str], options: argparse.Namespace) -> str:
    def gb(size: int | None) -> float | None:
        return None if size is None else size / common.GB

    case = (options.model, options.batch, options.checkpointing) if options.sequence == 512 else None
    then, goals = PEERS_THEN.get(case, {}), GOALS.get(case, {})
    adamw = next((result["ms"] for result in results if result["optimizer"] == "adamw"), None)
    rows = []
    for result in results:
        kinds, peaks = result["bytes"], result["peak_bytes"]
        noted = "-"
        if result["optimizer"] in then:
            noted = "then {} GB, {} ms".format(*then[result["optimizer"]])
        elif result["given"] in goals:
            most, share = goals[result["given"]]
            noted = f"goal {most:g} GB" + ("" if share is None else f", {share:g} of AdamW")
        rows.append(
            [
                result["method"],
                f"{result['ms']:.1f}",
                f"{result['ms_with_refresh']:.1f}",
                None if adamw is None else f"{result['ms_with_refresh'] / adamw:.3f}",
                result.get("refresh_ms"),
                *(None if size is None else f"{size / common.GB:.2f}" for size in (peaks["after"], peaks["training"])),
                *(gb(kinds.get(kind)) for kind in ("weights", "gradients", "held", "state", "rest at peak")),
                "yes" if result["finite"] else "NO",
                noted,
            ]
        )
    header = [
        "",
        "ms",
        "with refresh",
        "of AdamW",
        "refresh",
        "peak GB",
        "with warm-up",
        "weights",
        "gradients",
        "held",
    ]
    header += ["state", "rest", "finite", "beside"]
    lines = [
        f"{options.model}, {options.dtype}, batch {options.batch} x {options.sequence}, "
        f"{'with' if options.checkpointing else 'without'} checkpointing, median of {options.steps} iterations",
        common.table(header, rows),
        *(f"left out: {name}: {reason}" for name, reason in skipped.items()),
    ]
    profiled = [result for result in results if "kernels_ms" in result]
    if profiled:
        kinds = sorted({kind for result in profiled for kind in result["kernels_ms"]})
        rows = [[result["method"], *(result["kernels_ms"].get(kind) for kind in kinds)] for result in profiled]
        lines += ["", "milliseconds of the device in one iteration", common.table(["", *kinds], rows)]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/finetune_memory.py --model llama-2-7b --batch 1 --checkpointing "
        "--optimizers adamw,nanoadam:0.01,lora --json memory.json",
    )
    add = parser.add_argument
    add("--model", default="tiny", choices=MODELS, help="(default: %(default)s)")
    add("--batch", type=int, default=1, help="sequences in a batch (default: %(default)s)")
    add("--sequence", type=int, default=512, help="tokens in a sequence (default: %(default)s)")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="recompute activations")
    default = "adamw,sgd,lora,bitsandbytes,nanoadam:0.001,nanoadam:0.01,nanoadam:0.1"
    ours = "nanoadam:DENSITY (single weights), columns:DENSITY, either with +head to select from the head as well"
    add("--optimizers", default=default, help=f"of {', '.join(PEERS)}, {ours} (default: %(default)s)")
    add("--steps", type=int, default=20, help="timed iterations (default: %(default)s)")
    add("--warmup", type=int, default=4, help="iterations before them (default: %(default)s)")
    add("--dtype", default="bfloat16", choices=common.DTYPES, help="of the weights (default: %(default)s)")
    add("--grad-dtype", default="float32", choices=common.DTYPES, help="of held gradients (default: %(default)s)")
    add("--lora-dtype", default="bfloat16", choices=common.DTYPES, help="of the adapters (default: %(default)s)")
    add("--mask-interval", type=int, default=100, help="steps between refreshes (default: %(default)s)")
    add("--max-grad-norm", type=float, help="clip by torch's clip_grad_norm_ (default: no clipping)")
    add("--release-bytes", type=int, help="dense gradients that are compacted together (default: NanoAdam's)")
    add("--profile", action="store_true", help="say what the device's time goes to in one iteration more")
    add("--timeline", action="store_true", help="keep the kernels of a part of one backward, for a picture")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--json", metavar="FILE", help='write the results there; "-" for stdout')
    options = parser.parse_args(arguments)
    for name in ("batch", "sequence", "steps", "warmup", "mask_interval"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if (options.profile or options.timeline) and not options.device.startswith("cuda"):
        parser.error("--profile and --timeline are for GPUs")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here: pass --device cpu")
    return parser, options


def main(arguments: Sequence[str] | None = None) -> None:
    parser, options = parse(arguments)
    try:
        methods = [Method.parse(part) for part in common.names(options.optimizers)]
    except ValueError as error:
        parser.error(common.first_line(error))
    results: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    data: dict[str, Any] = {"benchmark": "finetune_memory", "machine": common.machine(), "settings": vars(options)}
    data |= {"results": results, "skipped": skipped}
    for method in methods:
        title = method.title(options)
        common.progress(title)
        try:
            results.append(run(method, options))
        except Exception as error:  # a peer that does not work here shall not take the others along
            if method.name not in ("lora", "bitsandbytes", "torchao") and not isinstance(error, torch.OutOfMemoryError):
                raise
            skipped[title] = common.first_line(error)
            common.progress(f"{title} left out: {skipped[title]}")
        common.free(torch.device(options.device))
        common.save(options.json, data, finished=method == methods[-1])
    common.show(options.json, render(results, skipped, options))


if __name__ == "__main__":
    main()
