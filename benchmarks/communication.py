"""More than one GPU: bytes and time per step, and memory, of replicas and shards beside DDP and FSDP2 with AdamW.

    python benchmarks/communication.py --gpus 2 --model llama-2-7b --checkpointing --json communication.json
    python benchmarks/communication.py --link 1gbit,100mbit --json links.json      # on CPU; as root, on Linux
    python benchmarks/communication.py --paper                                     # 8 to 1,024 GPUs, 7B to 405B weights

Every method runs in processes of its own, so that one that runs out of memory takes nobody along. Random weights, made
on the device, and random tokens. `--link` makes two network namespaces that a virtual cable of that speed connects
("machines"), and takes them away again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
from torch import Tensor, nn

import nanoadam
from nanoadam.chunks import layout
from nanoadam.comparing.shapes import llama

METHODS = "ddp,replicate:0.01,replicate:0.1,fsdp,fsdp-nanoadam:0.01"
LINK_METHODS = "ddp,replicate:0.01,replicate:0.1,fsdp,fsdp-nanoadam:0.01"
WARMUP, STEPS = 2, 5
_RESULT = "communication result: "
_HIDDEN, _LAYERS = 1536, 8  # of the model that goes over slow links: 18.9M weights


# Models ----------------------------------------------------------------------------------------------------


def _llama_config(name: str) -> dict[str, Any]:
    wide = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    wider = {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 48, "num_attention_heads": 64}
    tiny = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "tiny": {**tiny, "vocab_size": 128},
        "llama-2-7b": {},
        "llama-2-13b": wide,
        "codellama-34b": {**wider, "num_key_value_heads": 8},
    }[name]


MODELS = ("tiny", "llama-2-7b", "llama-2-13b", "codellama-34b", "layers")


class Layers(nn.Module):
    """Linear layers: many weights and little to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(_HIDDEN, _HIDDEN) for _ in range(_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x.square().mean()


def make(name: str, checkpointing: bool) -> tuple[nn.Module, Any]:
    """A model on the "meta" device, and its layers."""
    with torch.device("meta"):
        if name == "layers":
            model: Any = Layers()
            return model, model.layers
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(use_cache=False, attn_implementation="sdpa", **_llama_config(name))
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if checkpointing:  # transformers 5.23 renamed it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.train(), model.model.layers


@torch.no_grad()
def fill(model: Any, device: torch.device) -> None:
    """Draw weights where the model is: the same on every process that has the whole of it."""
    model.to_empty(device=device)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        part = getattr(parameter, "_local_tensor", parameter)
        part.fill_(1.0) if "norm" in name else part.normal_(0, 0.02)
    if hasattr(model, "config"):  # its one buffer was not in the weights
        with device:
            model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)


def batch_of(model: Any, size: int, sequence: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    if isinstance(model, Layers):
        return {"x": torch.randn(size, _HIDDEN, generator=generator).to(device)}
    tokens = torch.randint(5, model.config.vocab_size, (size, sequence), generator=generator).to(device)
    return {"input_ids": tokens, "labels": tokens}


# One process -----------------------------------------------------------------------------------------------


class Sent:
    """Bytes handed to collectives, as far as Python sees them."""

    def __init__(self) -> None:
        self.bytes = 0
        names = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_single", "reduce_scatter_single")
        for name in names:  # torch 2.13 has renamed them
            if hasattr(dist, name):
                setattr(dist, name, self._counting(getattr(dist, name)))

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            tensors = [value for value in (*args, *options.values()) if isinstance(value, Tensor)]
            self.bytes += max(value.nbytes for value in tensors)  # the whole, of which a ring sends (N - 1) / N
            return function(*args, **options)

        return counted


def prepare(
    method: str, model: Any, layers: Any, device: torch.device, sent: Sent
) -> tuple[Any, Any, Callable[[], int]]:
    """The model to call, its optimizer, and the bytes that it has sent so far."""
    kind, _, density = method.partition(":")
    options: dict[str, Any] = {"lr": 1e-5}
    nano = {**options, "density": float(density or 0.01), "mask_interval": 100}
    if kind.startswith("fsdp"):
        from torch.distributed.fsdp import fully_shard

        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
        fill(model, device)
        if kind == "fsdp":
            return (
                model,
                torch.optim.AdamW(model.parameters(), fused=device.type == "cuda", **options),
                lambda: sent.bytes,
            )
        return model, nanoadam.NanoAdam(_groups(model), **nano), lambda: sent.bytes
    fill(model, device)
    if kind == "alone":
        return model, nanoadam.NanoAdam(_groups(model), **nano, local=True), lambda: 0
    if kind == "replicate":
        optimizer = nanoadam.NanoAdam(_groups(model), **nano)
        replica = nanoadam.distributed.replicate(model, optimizer)
        return model, optimizer, lambda: replica.sent_bytes
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    def hook(state: Any, bucket: Any) -> Any:
        sent.bytes += bucket.buffer().nbytes
        return allreduce_hook(state, bucket)

    hook.__annotations__ = {}  # DDP looks at them, and they are strings here
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, hook)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda", **options)
    return wrapped, optimizer, lambda: sent.bytes


def _groups(model: nn.Module) -> Any:
    """Of the layers every one is selected from; a language model's head is trained in full, as by default."""
    return nanoadam.param_groups(model, selected="layers" if isinstance(model, Layers) else ())


def interface_bytes() -> int | None:
    """Bytes that have left this "machine"."""
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    return int(Path(f"/sys/class/net/{name}/statistics/tx_bytes").read_text()) if name else None


def work(arguments: argparse.Namespace) -> None:
    """What each process does."""
    device = torch.device("cpu")
    if torch.cuda.is_available() and not arguments.cpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.set_num_threads(arguments.threads)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    sent = Sent()
    model, layers = make(arguments.model, arguments.checkpointing)
    called, optimizer, count = prepare(arguments.method, model, layers, device, sent)
    batch = batch_of(model, arguments.batch, arguments.sequence, device)
    times, bytes_, wire, parts = [], [], [], []
    for step in range(WARMUP + arguments.steps):
        if step == WARMUP:
            common.reset_peak(device)
        dist.barrier()
        before, left = count(), interface_bytes()
        common.sync(device)
        begun = time.perf_counter()
        output = called(**batch)
        (output if isinstance(output, Tensor) else output.loss).backward()
        common.sync(device)
        middle = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        common.sync(device)
        times.append(1e3 * (time.perf_counter() - begun))
        parts.append(1e3 * (middle - begun))
        bytes_.append(count() - before)
        wire.append(None if left is None else interface_bytes() - left)
    found = {
        "ms": statistics.median(times[WARMUP:]),
        "backward_ms": statistics.median(parts[WARMUP:]),
        "first_ms": times[0],
        "sent_bytes": statistics.median(bytes_[WARMUP:]),
        "wire_bytes": None if wire[-1] is None else statistics.median(wire[WARMUP:]),
        "peak_bytes": common.peak(device),
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "state_bytes": common.state_bytes(optimizer),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, found)
    if dist.get_rank() == 0:
        if found["peak_bytes"] is not None:
            found["peak_bytes"] = max(each["peak_bytes"] for each in everybody)
        print(_RESULT + json.dumps(found), flush=True)
    dist.destroy_process_group()


# Several processes -----------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(
    arguments: argparse.Namespace, method: str, processes: int, hosts: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Run a method; what it found, or `error`. `hosts` are the commands that enter each process's "machine"."""
    options = [f"--{name}={getattr(arguments, name)}" for name in ("model", "batch", "sequence", "steps", "threads")]
    options += [f"--{name}" for name in ("checkpointing", "cpu") if getattr(arguments, name)]
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", f"--method={method}", *options]
    port, started = _free_port(), []
    for rank in range(processes):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if hosts:
            environment |= {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": f"nanoadam{rank}"}
        enter = list(hosts[rank]) if hosts else []
        started.append(
            subprocess.Popen(
                [*enter, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said, deadline = [], time.monotonic() + arguments.timeout
    try:
        said.extend(process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in started)
    except subprocess.TimeoutExpired:
        said.append(f"no end within {arguments.timeout} s")
    finally:
        for process in started:
            process.kill()
    for text in said:
        for line in text.splitlines():
            if line.startswith(_RESULT):
                return dict(json.loads(line.removeprefix(_RESULT)))
    errors = [line for text in said for line in text.splitlines() if "Error" in line or "no end" in line]
    return {"error": errors[0][-300:] if errors else "\n".join(said)[-300:]}


@contextlib.contextmanager
def cable(rate: str) -> Iterator[list[list[str]]]:
    """Two network namespaces and a cable between them; the commands that enter them."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    names = [f"nanoadam-{os.getpid()}-{end}" for end in range(2)]
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ends = [part for end in range(2) for part in ("peer",) * end + ("name", f"nanoadam{end}", "netns", names[end])]
        ip("link", "add", *ends[:4], "type", "veth", *ends[4:])
        for end, name in enumerate(names):
            enter = ("netns", "exec", name)
            ip("-n", name, "addr", "add", f"10.77.0.{end + 1}/24", "dev", f"nanoadam{end}")
            ip("-n", name, "link", "set", f"nanoadam{end}", "up")
            ip("-n", name, "link", "set", "lo", "up")
            shape = ["tc", "qdisc", "add", "dev", f"nanoadam{end}", "root", "tbf", "rate", rate, "burst", "256kb"]
            ip(*enter, *shape, "latency", "200ms")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


# On paper --------------------------------------------------------------------------------------------------

LINKS = {
    "NVLink, one host": (330e9, 4e-6, 8),
    "InfiniBand 400G": (50e9, 10e-6, 1024),
    "Ethernet 25G": (3.1e9, 40e-6, 1024),
}
"""Bytes per second that a GPU sends, seconds until the next one has heard of it, and how many GPUs it joins at most.

The speed of NVLink is measured (13.5 GB broadcast in 40.8 ms between two H200, docs/results/delta.md); the others are
nominal, as are the delays.
"""

PAPER = {
    "LLaMA-2-7B": (32, llama(32, 4096, 11008, 32000, heads=32, kv_heads=32, tied=False)),
    "LLaMA-3-70B": (80, llama(80, 8192, 28672, 128256, heads=64, kv_heads=8, tied=False)),
    "LLaMA-3-405B": (126, llama(126, 16384, 53248, 128256, heads=128, kv_heads=8, tied=False)),
}
"""Layers, and shapes."""
BUCKET = 25 << 20


def paper(gpus: int, link: str, model: str, density: float) -> dict[str, float]:
    """Seconds per step that collectives take, nothing overlapped, and GB that a GPU has to hold, activations aside.

    Sums go in buckets, around a ring or over a tree, whichever is sooner; FSDP2's parts of a layer go around a ring.
    """
    speed, delay, _ = LINKS[link]
    layers, shapes = PAPER[model]
    weights = sum(torch.Size(shape).numel() for _, shape, _ in shapes)
    dense = sum(torch.Size(shape).numel() for _, shape, is_dense in shapes if is_dense)
    selected = sum(layout(shape, density).selected for _, shape, is_dense in shapes if not is_dense)

    def summed(sent: float) -> float:
        buckets = max(1, math.ceil(sent / BUCKET))
        part = sent / buckets
        ring = 2 * (gpus - 1) * (part / gpus / speed + delay)
        tree = 2 * (part / speed + math.log2(gpus) * delay)
        return buckets * min(ring, tree)

    mine = 4 * selected + 2 * dense
    return {
        "ddp": summed(2 * weights),
        "replicate": summed(mine),
        "fsdp": 3 * (gpus - 1) * (2 * weights / gpus / speed + layers * delay),
        "ddp_gb": 8 * weights / 1e9,
        "replicate_gb": (2 * weights + 12 * selected + 6 * dense) / 1e9,
        "fsdp_gb": 8 * weights / gpus / 1e9,
        "fsdp_nanoadam_gb": (2 * weights + 12 * selected + 6 * dense) / gpus / 1e9,
        "sent_gb": mine / 1e9,
        "ddp_sent_gb": 2 * weights / 1e9,
    }


def on_paper(arguments: argparse.Namespace) -> None:
    rows = [
        {"model": model, "gpus": gpus, "link": link, "density": density, **paper(gpus, link, model, density)}
        for model in PAPER
        for link in LINKS
        for gpus in (8, 64, 256, 1024)
        if gpus <= LINKS[link][2]
        for density in (0.01, 0.1)
    ]
    header = ["model", "link", "GPUs", "density", "DDP s", "replicate s", "FSDP2 s", "GB DDP", "GB replicate"]
    header += ["GB FSDP2 AdamW", "GB FSDP2 NanoAdam"]
    keys = ("ddp", "replicate", "fsdp", "ddp_gb", "replicate_gb", "fsdp_gb", "fsdp_nanoadam_gb")
    lines = [[r["model"], r["link"], r["gpus"], r["density"], *(r[key] for key in keys)] for r in rows]
    common.show(arguments.json, common.table(header, lines))
    common.save(arguments.json, {"benchmark": "communication", "machine": common.machine(), "paper": rows})


# ----------------------------------------------------------------------------------------------------------


def render(results: Sequence[dict[str, Any]]) -> str:
    header = ["method", "model", "link", "peak GB", "ms", "backward ms", "first ms", "MB sent", "MB on the wire"]
    rows = []
    for r in results:
        if "error" in r:
            rows.append([r["method"], r["model"], r["link"] or "-", r["error"][:60], *[None] * 5])
            continue
        scaled = [r[key] and r[key] / by for key, by in (("peak_bytes", 1e9), ("ms", 1), ("backward_ms", 1))]
        scaled += [r[key] and r[key] / by for key, by in (("first_ms", 1), ("sent_bytes", 1e6), ("wire_bytes", 1e6))]
        rows.append([r["method"], r["model"], r["link"] or "-", *scaled])
    return common.table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, help="processes, a GPU each (default 2)")
    parser.add_argument("--model", default="llama-2-7b", help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--methods", default=METHODS, help=f"default {METHODS}; `alone:0.01` is one that sends nothing")
    parser.add_argument("--batch", type=int, default=1, help="of each process")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"that are timed, after {WARMUP} (default {STEPS})")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for a method")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--link", help="speeds of a cable between two machines of this computer: 1gbit,100mbit")
    parser.add_argument("--paper", action="store_true", help="the model of the cost on many GPUs")
    parser.add_argument("--json", help="write results to this file, or to stdout for -")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        work(given)
        return
    if given.paper:
        on_paper(given)
        return
    if given.link:
        given.cpu, given.model, given.batch = True, "layers", 4
    unknown = [name for name in common.names(given.model) if name not in MODELS]
    if unknown:
        parser.error(f"--model must be some of {', '.join(MODELS)}; got {unknown[0]!r}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # takes processes and namespaces away again
    results: list[dict[str, Any]] = []
    data = {"benchmark": "communication", "machine": common.machine(), "settings": vars(given), "results": results}
    models = common.names(given.model)
    for model in models:
        given.model = model
        for link in common.names(given.link or "") or [""]:
            with cable(link) if link else contextlib.nullcontext([]) as hosts:
                for method in common.names(given.methods):
                    found = launch(given, method, 1 if method.startswith("alone") else given.gpus, hosts)
                    results.append({"model": model, "method": method, "link": link, **found})
                    common.progress(f"{model} {method} {link}: {found.get('error', 'done')}")
                    common.save(given.json, data, finished=False)
    common.show(given.json, render(results))
    common.save(given.json, data)


if __name__ == "__main__":
    main()
