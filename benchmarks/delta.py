"""Finetunes as patches: their size, and the time to make, save, apply, switch and send them, beside what is done today.

Examples:
    python benchmarks/delta.py --model llama-2-7b --json delta.json
    python benchmarks/delta.py --model llama-2-7b --sync --json delta_sync.json     (two GPUs)
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanoadam import NanoAdam, delta
from nanoadam.comparing.shapes import MODELS, Shapes, count
from nanoadam.delta import ops
from nanoadam.delta.sync import FolderChannel, GroupChannel, Receiver, Sender

LORA_RANK = 32
RATE = 1e-3


# What is measured on ---------------------------------------------------------------------------------------


def module(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A module with a model's parameters under their names, random, the same on every call."""
    torch.manual_seed(0)
    root = nn.Module()
    for name, shape, _ in shapes:
        path, _, own = name.rpartition(".")
        owner = root
        for part in path.split(".") if path else ():
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        weight = torch.empty(shape, device=device, dtype=dtype).normal_(0, 0.02)
        owner.register_parameter(own, nn.Parameter(weight))
    return root


class Training:
    """A model, its NanoAdam and gradients that stay: each `step` is one of training without forward and backward."""

    def __init__(self, options: argparse.Namespace, device: torch.device, *, head: str) -> None:
        self.shapes = MODELS[options.model]()
        self.model = module(self.shapes, device, common.DTYPES[options.dtype])
        parameters = dict(self.model.named_parameters())
        dense = {p.name for p in self.shapes if p.dense and not (head == "selected" and len(p.shape) > 1)}
        groups = [
            {"params": [p for name, p in parameters.items() if (name in dense) == is_dense], "dense": is_dense}
            for is_dense in (False, True)
        ]
        self.optimizer = NanoAdam(
            groups, lr=RATE, density=options.density, mask_interval=10**6, gradient_release=False, local=True
        )
        for parameter in parameters.values():
            parameter.grad = torch.empty_like(parameter).normal_(0, 1e-3)
        self.optimizer.step()

    def step(self) -> None:
        self.optimizer.step()

    def refresh(self) -> None:
        """Have the next step select anew, from weights of which a few have moved."""
        for group in self.optimizer.param_groups:
            group["refreshed_at"] = -1


def copied(model: nn.Module, device: torch.device | str | None = None) -> dict[str, Tensor]:
    return {name: tensor.detach().to(device, copy=True) for name, tensor in model.state_dict().items()}


def linears(shapes: Shapes) -> list[tuple[str, tuple[int, ...]]]:
    """What LoRA adapts: matrices but embeddings and heads."""
    return [(p.name, p.shape) for p in shapes if len(p.shape) == 2 and not p.dense and "embed" not in p.name]


# One device ------------------------------------------------------------------------------------------------


class Clock:
    """Medians of wall time until the device is done, in ms."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats, self.rows = device, repeats, []

    def __call__(self, what: str, work: Callable[[], Any], before: Callable[[], Any] | None = None) -> None:
        common.progress(what)
        ms = common.median(common.wall_ms, work, self.device, self.repeats, warmup=1, before=before)
        self.rows.append({"what": what, "ms": ms})


def one_device(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    training = Training(options, device, head=options.head)
    model, clock = training.model, Clock(device, options.repeats)
    weights = [p.detach() for p in model.parameters()]
    size = sum(w.nbytes for w in weights)
    clock("hash of every weight", lambda: ops.hash_all(weights))
    clock.rows[-1]["gb_per_s"] = size / clock.rows[-1]["ms"] / 1e6
    base = copied(model)
    sizes = record(training, clock)
    patch = made(training, base, clock)
    sizes |= files(patch, clock, Path(options.folder))
    sizes |= {"checkpoint_mb": size / 1e6, "lora_mb": lora_bytes(training.shapes, options) / 1e6}
    for parameter in model.parameters():
        parameter.grad = None
    model.load_state_dict(base)
    applying(model, base, patch, clock)
    peers(training.shapes, model, base, clock)
    peak = common.peak(device)
    return {"times": clock.rows, "sizes": sizes, "peak_gb": None if peak is None else peak / common.GB}


def record(training: Training, clock: Clock) -> dict[str, Any]:
    """A Recorder's patch of one step, with and without hashes, and of two with a refresh between them."""
    sizes = {}
    for verify in (True, False):
        recorder = delta.Recorder(training.model, training.optimizer, verify=verify)
        with_hashes = "" if verify else ", no hashes"
        clock(f"Recorder: patch of a step{with_hashes}", recorder.patch, training.step)
        if verify:
            training.step()
            patch = recorder.patch()
            sizes = {"step_weights": patch.count, "step_mb_in_memory": patch.nbytes / 1e6}

            def two() -> None:
                training.step()
                training.refresh()
                training.step()

            clock("Recorder: patch of two steps with a refresh between", recorder.patch, two)
        recorder.close()
    return sizes


def made(training: Training, base: dict[str, Tensor], clock: Clock) -> delta.Patch:
    """What one step makes of the base, by comparing."""
    training.model.load_state_dict(base)
    training.step()
    clock("diff of two models on the device", lambda: delta.diff(base, training.model))
    return delta.diff(base, training.model)


def files(patch: delta.Patch, clock: Clock, folder: Path) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    sparse = [entry for entry in patch.values() if entry.kind == "sparse"]
    positions = sum(part.nbytes for e in sparse for name, part in e.parts.items() if name != "values")
    sizes["position_bytes_per_weight"] = positions / sum(entry.count for entry in sparse)
    sizes["bytes_per_weight"] = sum(entry.nbytes for entry in sparse) / sum(entry.count for entry in sparse)
    sizes["selected_mb"] = sum(entry.nbytes for entry in sparse) / 1e6
    sizes["dense_mb"] = sum(entry.nbytes for entry in patch.values() if entry.kind == "dense") / 1e6
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = Path(name) / "patch.safetensors"
        clock("save the patch (SHA-256 included)", lambda: patch.save(path))
        sizes["file_mb"] = path.stat().st_size / 1e6
        device = next(iter(patch.values())).values.device
        clock("load the patch to the device, SHA-256 checked", lambda: delta.Patch.load(path).to(device))
        clock("load the patch to the device, unchecked", lambda: delta.Patch.load(path, verify=False).to(device))
    return sizes


def applying(model: nn.Module, base: dict[str, Tensor], patch: delta.Patch, clock: Clock) -> None:
    def back() -> None:
        if delta.applying._undone.get(model):
            delta.revert(model, verify=False)

    host = patch.to("cpu")
    pinned = host.pin_memory() if torch.cuda.is_available() else None
    for verify in (True, False):
        checked = "checked" if verify else "unchecked"
        clock(f"apply from the device, {checked}", lambda v=verify: delta.apply(model, patch, verify=v), back)
        clock(f"apply from the host, {checked}", lambda v=verify: delta.apply(model, host, verify=v), back)
        if pinned is not None:
            clock(
                f"apply from the host's pinned memory, {checked}",
                lambda v=verify: delta.apply(model, pinned, verify=v),
                back,
            )
    clock("revert, checked", lambda: delta.revert(model), lambda: (back(), delta.apply(model, patch, verify=False)))
    back()
    switch = delta.Switch(model)
    switch.add("a", patch)
    switch.add("b", patch.to(next(iter(base.values())).device))
    turn = iter(range(10**9))
    clock("switch from one patch to another", lambda: switch.to("ab"[next(turn) % 2]))
    switch.to(None)


def lora_bytes(shapes: Shapes, options: argparse.Namespace) -> int:
    itemsize = common.DTYPES[options.dtype].itemsize
    return sum(LORA_RANK * sum(shape) * itemsize for _, shape in linears(shapes))


def adapters(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (
            torch.empty(shape[0], LORA_RANK, device=device, dtype=dtype).normal_(0, 1e-3),
            torch.empty(LORA_RANK, shape[1], device=device, dtype=dtype).normal_(0, 1e-3),
        )
        for name, shape in linears(shapes)
    }


def merge(model: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]], sign: float) -> None:
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, (up, down) in pairs.items():
            own[name].addmm_(up, down, alpha=sign)


def peers(shapes: Shapes, model: nn.Module, base: dict[str, Tensor], clock: Clock) -> None:
    """What is done today: a whole checkpoint, or an adapter merged in."""
    first = next(iter(base.values()))
    pairs = adapters(shapes, first.device, first.dtype)
    clock(f"LoRA r={LORA_RANK}: merge into the weights", lambda: merge(model, pairs, 1.0))
    clock(f"LoRA r={LORA_RANK}: unmerge (bits differ)", lambda: merge(model, pairs, -1.0))
    own = model.state_dict()
    clock("copy a whole model on the device", lambda: [own[n].copy_(t) for n, t in base.items()])
    if first.device.type == "cuda":
        host = {name: tensor.cpu() for name, tensor in base.items()}
        clock("copy a whole model from the host", lambda: [own[n].copy_(t) for n, t in host.items()])


# Two processes ---------------------------------------------------------------------------------------------


def two_devices(rank: int, options: argparse.Namespace, address: str, results: Any) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=address, rank=rank, world_size=2)
    rows = _trainer(options, device) if rank == 0 else _server(options, device)
    if rank == 0:
        results.put(rows)
    dist.barrier()
    dist.destroy_process_group()


METHODS = ("patch, checked", "patch, unchecked", "full broadcast", f"LoRA r={LORA_RANK}, merged anew")


def _timed(work: Callable[[], Any], before: Callable[[], Any], device: torch.device, repeats: int) -> float:
    def begin() -> None:
        before()
        common.sync(device)
        dist.barrier()

    return common.median(common.wall_ms, work, device, repeats, warmup=2, before=begin)


def _trainer(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    training = Training(options, device, head=options.head)
    _broadcast_all(training.model)
    times: dict[str, float] = {}
    sent: dict[str, float] = {}
    for verify in (True, False):
        recorder = delta.Recorder(training.model, training.optimizer, verify=verify)
        sender = Sender(recorder, GroupChannel())
        what = METHODS[0 if verify else 1]
        common.progress(what)
        times[what] = _timed(sender.send, training.step, device, options.repeats)
        training.step()
        sent[what] = recorder.patch(reset=False).nbytes / 1e6
        sender.send()
        recorder.close()
    for parameter in training.model.parameters():
        parameter.grad = None
    common.progress(METHODS[2])
    times[METHODS[2]] = _timed(lambda: _broadcast_all(training.model), lambda: None, device, options.repeats)
    sent[METHODS[2]] = sum(p.nbytes for p in training.model.parameters()) / 1e6
    common.progress(METHODS[3])
    flat = _flat_adapters(training.shapes, device, common.DTYPES[options.dtype])
    times[METHODS[3]] = _timed(lambda: (dist.broadcast(flat, 0), _barrier()), lambda: None, device, options.repeats)
    sent[METHODS[3]] = flat.nbytes / 1e6
    if options.folder_sync:
        times |= _through_a_folder(options, training, device)
    return {"sync_ms": times, "sent_mb": sent, "world": 2, "backend": dist.get_backend()}


def _server(options: argparse.Namespace, device: torch.device) -> None:
    shapes, dtype = MODELS[options.model](), common.DTYPES[options.dtype]
    model = module(shapes, device, dtype)
    _broadcast_all(model)
    for verify in (True, False):
        receiver = Receiver(model, GroupChannel(), verify=verify)
        _timed(receiver.receive, lambda: None, device, options.repeats)
        receiver.receive()
    _timed(lambda: _broadcast_all(model), lambda: None, device, options.repeats)
    base, flat = copied(model), _flat_adapters(shapes, device, dtype)
    own = model.state_dict()

    def adapt() -> None:
        dist.broadcast(flat, 0)
        with torch.no_grad():
            at = 0
            for name, shape in linears(shapes):
                sizes = [shape[0] * LORA_RANK, LORA_RANK * shape[1]]
                up, down = (part.view(-1) for part in flat[at : at + sum(sizes)].split(sizes))
                at += sum(sizes)
                torch.addmm(base[name], up.view(shape[0], -1), down.view(LORA_RANK, -1), out=own[name])
        _barrier()

    _timed(adapt, lambda: None, device, options.repeats)
    if options.folder_sync:
        for _ in range(options.repeats + 2):
            dist.barrier()


def _barrier() -> None:
    """Until the other one is done: what it had to do stands in its stream before this."""
    done = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(done)
    done.item()


def _broadcast_all(model: nn.Module) -> None:
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), 0)
    _barrier()


def _flat_adapters(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros(sum(LORA_RANK * sum(shape) for _, shape in linears(shapes)), device=device, dtype=dtype)


def _through_a_folder(options: argparse.Namespace, training: Training, device: torch.device) -> dict[str, float]:
    """The trainer's side of an update by file: what a server does with it is `load` and `apply` of one device."""
    for parameter in training.model.parameters():
        parameter.grad = torch.empty_like(parameter).normal_(0, 1e-3)
    training.step()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        sender = Sender(delta.Recorder(training.model, training.optimizer), FolderChannel(name, keep=2))
        return {"patch to a file": _timed(sender.send, training.step, device, options.repeats)}


# The program -----------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", choices=MODELS, help="whose shapes")
    parser.add_argument("--dtype", default="bfloat16", choices=common.DTYPES)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--head", default="dense", choices=("dense", "selected"), help="how an untied head is trained")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="on a CPU")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where files are written and read")
    parser.add_argument("--sync", action="store_true", help="two processes: two GPUs, or the CPU twice")
    parser.add_argument("--folder-sync", action="store_true", help="with --sync: through files too")
    parser.add_argument("--json", help="a file, or - for stdout")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    data: dict[str, Any] = {"benchmark": "delta", "machine": common.machine(), "options": vars(options)}
    data["weights"] = count(MODELS[options.model]())
    if options.sync:
        data |= sync(options)
        rows = [[what, ms, data["sent_mb"].get(what)] for what, ms in data["sync_ms"].items()]
        common.show(options.json, common.table(["a step's weights to a second device", "ms", "MB"], rows))
    else:
        device = torch.device(options.device)
        with torch.no_grad():
            data |= one_device(options, device)
        common.show(options.json, common.table(["", "ms"], [[row["what"], row["ms"]] for row in data["times"]]))
        common.show(options.json, common.table(["size", ""], [[key, float(v)] for key, v in data["sizes"].items()]))
    common.save(options.json, data)


def sync(options: argparse.Namespace) -> dict[str, Any]:
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{os.path.join(folder, 'rendezvous')}"
        torch.multiprocessing.spawn(two_devices, (options, address, results), nprocs=2)
        found: dict[str, Any] = results.get()
    return found


if __name__ == "__main__":
    main()
