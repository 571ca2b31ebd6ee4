"""Optimizers alone: one step on random tensors of a model's shapes, with its parts, its memory and its floor.

Example: python benchmarks/step.py --model bert-base,llama-2-7b --launches --json step.json
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
from torch import Tensor

from nanoadam import NanoAdam
from nanoadam.chunks import layout
from nanoadam.comparing.shapes import MODELS, Shapes, count

PEERS = ("adamw", "sgd", "bitsandbytes", "torchao")
SECTOR = 32  # bytes that a GPU moves at least, however few of them are wanted
COPY_BYTES = 2 * 2**30
BATCH_BYTES = 64 * 2**20  # of dense gradients that gradient release compacts together on a GPU


class Tensors:
    """A model's weights and dense gradients, all random; every optimizer works on the same ones."""

    def __init__(self, shapes: Shapes, device: torch.device, dtype: torch.dtype, channels_last: bool) -> None:
        torch.manual_seed(0)
        self.shapes, self.device, self.dtype = shapes, device, dtype

        def tensor(shape: tuple[int, ...], deviation: float) -> Tensor:
            four = channels_last and len(shape) == 4
            kind = torch.channels_last if four else torch.contiguous_format
            return torch.empty(shape, device=device, dtype=dtype, memory_format=kind).normal_(0, deviation)

        self.weights = [tensor(shape, 0.02).requires_grad_() for _, shape, _ in shapes]
        self.gradients = [tensor(shape, 1e-3) for _, shape, _ in shapes]
        self.dense = [parameter.dense for parameter in shapes]

    def give(self, *, selected: bool, dense: bool) -> None:
        """Set or take away `grad` of tensors that NanoAdam selects from, and of those that are dense for it."""
        for weight, gradient, is_dense in zip(self.weights, self.gradients, self.dense, strict=True):
            weight.grad = gradient if (dense if is_dense else selected) else None

    def groups(self) -> list[dict[str, Any]]:
        found = []
        for dense in (False, True):
            names = [parameter.name for parameter in self.shapes if parameter.dense == dense]
            weights = [weight for weight, is_dense in zip(self.weights, self.dense, strict=True) if is_dense == dense]
            found.append({"params": weights, "param_names": names, "dense": dense})
        return found

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(weight, gradient) of tensors that are selected from, last one first, as backward makes them."""
        rows = zip(self.weights, self.gradients, self.dense, strict=True)
        return [(weight, gradient) for weight, gradient, dense in rows if not dense][::-1]

    def batches(self) -> list[list[tuple[Tensor, Tensor]]]:
        """The same, as gradient release compacts them on a GPU."""
        found: list[list[tuple[Tensor, Tensor]]] = [[]]
        size = 0
        for weight, gradient in self.pairs():
            found[-1].append((weight, gradient))
            size += gradient.nbytes
            if size >= BATCH_BYTES:
                found.append([])
                size = 0
        return [batch for batch in found if batch]

    def numel(self, *, dense: bool) -> int:
        return sum(
            weight.numel() for weight, is_dense in zip(self.weights, self.dense, strict=True) if is_dense == dense
        )


# Floors: the bytes that cannot but be moved, over the bandwidth of a large copy --------------------------


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes read and written per second by a device-to-device copy."""
    size = COPY_BYTES if device.type == "cuda" else 2**24
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = common.median(common.device_ms, lambda: target.copy_(source), device, repeats, warmup=3)
    return 2 * size / (ms / 1e3)


def peer_bytes(peer: str, weights: int, itemsize: int) -> float:
    """Weight and gradient read, weight written; moments read and written."""
    moments = {"adamw": 4 * itemsize, "sgd": 0, "bitsandbytes": 4, "torchao": 4}[peer]
    return weights * (3 * itemsize + moments)


def nano_bytes(shapes: Shapes, density: float, itemsize: int, held: int) -> dict[str, float]:
    """For update, gather and refresh of the tensors that are selected from, bfloat16 moments, steady state.

    Scattered weights and gradients count by whole sectors, the share of them that holds a selected weight.
    """
    layouts = [layout(shape, density) for _, shape, dense in shapes if not dense]
    numel, selected = sum(cut.numel for cut in layouts), sum(cut.selected for cut in layouts)
    per_sector = SECTOR // itemsize
    touched = numel * itemsize * (1 - (1 - selected / max(numel, 1)) ** per_sector)
    return {
        "update": 2 * touched + selected * (2 + 2 + held + 8),  # index, entry step, gradient, moments twice
        "gather": touched + selected * (2 + held),
        "refresh": numel * itemsize + selected * 2 * (2 + 2 + 4),
    }


# Peers ---------------------------------------------------------------------------------------------------


def make_peer(peer: str, weights: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer that a name stands for.

    Raises:
        ImportError: if its package is not installed.
    """
    if peer == "adamw":
        return torch.optim.AdamW(weights, lr=1e-5, fused=True)
    if peer == "sgd":
        return torch.optim.SGD(weights, lr=1e-5, foreach=True)
    if peer == "bitsandbytes":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(weights, lr=1e-5, weight_decay=0.01)
    from torchao.optim import AdamW8bit

    return AdamW8bit(weights, lr=1e-5, weight_decay=0.01)


_NAMES = {
    "adamw": "AdamW fused",
    "sgd": "SGD",
    "bitsandbytes": "bitsandbytes AdamW8bit",
    "torchao": "torchao AdamW8bit",
}


class Bench:
    """One model's tensors, measured with one optimizer after the other."""

    def __init__(self, tensors: Tensors, options: argparse.Namespace, bandwidth: float) -> None:
        self.tensors, self.options, self.bandwidth = tensors, options, bandwidth
        self.device = tensors.device

    def floor_ms(self, size: float) -> float:
        return 1e3 * size / self.bandwidth

    def clocks(self, work: Callable[[], Any], before: Callable[[], Any] | None = None) -> dict[str, float]:
        """Of one call: the device's time, the host's until it returns, and both until the device is done."""
        repeats, warmup = self.options.repeats, self.options.warmup
        return {
            "device": common.median(common.device_ms, work, self.device, repeats, warmup, before),
            "host": common.median(common.host_ms, work, self.device, repeats, warmup, before),
            "wall": common.median(common.wall_ms, work, self.device, repeats, warmup, before),
        }

    def in_a_row(self, work: Callable[[], Any]) -> float:
        """Wall time of one of many calls with nothing between them."""

        def several() -> None:
            for _ in range(self.options.repeats):
                work()

        return common.wall_ms(several, self.device) / self.options.repeats

    def extra_bytes(self, work: Callable[[], Any]) -> int | None:
        """Memory that one call takes on top of what was there before and what it leaves."""
        common.free(self.device)
        before = common.allocated(self.device)
        common.reset_peak(self.device)
        work()
        high, after = common.peak(self.device), common.allocated(self.device)
        return None if high is None or before is None or after is None else high - max(before, after)

    def state_growth(self, before: int | None, optimizer: torch.optim.Optimizer) -> int:
        now = common.allocated(self.device)
        return common.state_bytes(optimizer) if before is None or now is None else now - before

    def peer(self, peer: str) -> dict[str, Any]:
        tensors = self.tensors
        common.free(self.device)
        tensors.give(selected=True, dense=True)
        before = common.allocated(self.device)
        optimizer = make_peer(peer, tensors.weights)
        optimizer.step()
        found: dict[str, Any] = {"method": _NAMES[peer], "state_bytes": self.state_growth(before, optimizer)}
        found["step_extra_bytes"] = self.extra_bytes(optimizer.step)
        found["ms"] = {"step": self.clocks(optimizer.step)}
        found["in_a_row_ms"] = self.in_a_row(optimizer.step)
        if self.options.launches:
            found["launches"] = {"step": common.launches(optimizer.step, self.device)}
        tensors.give(selected=True, dense=False)
        found["ms"]["update"] = self.clocks(optimizer.step)
        itemsize = tensors.dtype.itemsize
        weights = {"step": count(tensors.shapes), "update": tensors.numel(dense=False)}
        found["floor_ms"] = {part: self.floor_ms(peer_bytes(peer, n, itemsize)) for part, n in weights.items()}
        return found

    @torch.no_grad()
    def nanoadam(self, density: float) -> dict[str, Any]:
        tensors, options = self.tensors, self.options
        common.free(self.device)
        tensors.give(selected=False, dense=True)
        before = common.allocated(self.device)
        grad_dtype = common.DTYPES[options.grad_dtype]
        optimizer = NanoAdam(tensors.groups(), lr=1e-5, density=density, mask_interval=10**9, grad_dtype=grad_dtype)
        pairs, batches = tensors.pairs(), tensors.batches()
        drop = functools.partial(common.drop, pairs)
        common.take(optimizer, pairs)
        optimizer.step()
        drop()
        common.make_due(optimizer)
        optimizer.refresh()  # from the first refresh with moments on, every selected weight has an entry step
        found: dict[str, Any] = {"method": f"NanoAdam k = {100 * density:g} %", "density": density}
        found["state_bytes"] = self.state_growth(before, optimizer)

        def hold(*, dense: bool) -> None:  # taken up by all steps that follow, as nothing zeroes them
            optimizer.zero_grad()
            tensors.give(selected=False, dense=dense)
            common.take(optimizer, pairs)

        hold(dense=False)
        found["held_bytes"] = optimizer.gradient_bytes()
        hold(dense=True)
        step = {"extra": self.extra_bytes(optimizer.step)}
        step["ms"] = self.clocks(optimizer.step, lambda: hold(dense=True))  # held gradients made anew, as in training
        found["in_a_row_ms"] = self.in_a_row(optimizer.step)
        hold(dense=False)
        update = self.clocks(optimizer.step)
        if any(weight.grad is None for weight, _ in pairs):
            raise RuntimeError("gradients did not survive the steps: the update times are not valid")

        def gather_at_once() -> None:
            common.take(optimizer, pairs)

        def gather_in_batches() -> None:
            for batch in batches:
                common.take(optimizer, batch)

        def due() -> None:
            drop()
            common.perturb([weight for weight, _ in pairs], options.change)
            common.make_due(optimizer)

        def interval() -> None:  # one mask interval of the paper's GSM8K setting, without backward
            common.make_due(optimizer)
            for _ in range(options.interval):
                drop()
                gather_in_batches()
                optimizer.step()

        gather = self.clocks(gather_at_once, drop)
        batched = self.clocks(gather_in_batches, drop)
        refresh = self.clocks(optimizer.refresh, due)
        stayed = self._stayed(optimizer, pairs[len(pairs) // 2][0], due)
        hold(dense=True)
        loop = common.median(common.wall_ms, interval, self.device, 3, 1) / options.interval
        due()
        refresh_extra = self.extra_bytes(optimizer.refresh)
        found["ms"] = {
            "step": step["ms"],
            "update": update,
            "gather": gather,
            "gather_in_batches": batched,
            "refresh": refresh,
        }
        found["per_step_ms"] = {
            f"update + refresh / {m}": update["device"] + refresh["device"] / m for m in (options.interval, 100)
        }
        found["interval_loop_ms"] = loop
        found["step_extra_bytes"], found["refresh_extra_bytes"], found["stayed_selected"] = (
            step["extra"],
            refresh_extra,
            stayed,
        )
        sizes = nano_bytes(tensors.shapes, density, tensors.dtype.itemsize, grad_dtype.itemsize)
        found["floor_ms"] = {part: self.floor_ms(size) for part, size in sizes.items()}
        dense = peer_bytes("adamw", tensors.numel(dense=True), 2)
        found["floor_ms"]["step"] = self.floor_ms(sizes["update"] + dense)
        if options.launches:
            common.take(optimizer, pairs)
            found["launches"] = {"step": common.launches(optimizer.step, self.device)}
            drop()
            found["launches"]["gather"] = common.launches(gather_at_once, self.device)
            found["launches"]["gather_in_batches"] = common.launches(gather_in_batches, self.device)
            due()
            found["launches"]["refresh"] = common.launches(optimizer.refresh, self.device)
        return found

    @staticmethod
    def _stayed(optimizer: NanoAdam, weight: Tensor, due: Callable[[], None]) -> float:
        """Share of one tensor's selected weights that a refresh keeps."""
        before = optimizer.selected(weight)
        due()
        optimizer.refresh()
        return float((before & optimizer.selected(weight)).sum() / before.sum())


def measure(model: str, options: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    device = torch.device(options.device)
    shapes = MODELS[model]()
    tensors = Tensors(shapes, device, common.DTYPES[options.dtype], options.channels_last)
    bench = Bench(tensors, options, bandwidth)
    results: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    work: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (peer, lambda peer=peer: bench.peer(peer))
        for peer in options.peers  # type: ignore[misc]
    ]
    work += [
        (f"nanoadam {k:g}", lambda k=k: bench.nanoadam(k))
        for k in options.densities  # type: ignore[misc]
    ]
    for name, run in work:
        common.progress(f"{model}: {name}")
        try:
            results.append(run())
        except Exception as error:  # a peer that does not work here shall not take the others along
            if name in ("adamw", "sgd") or (name not in PEERS and not isinstance(error, torch.OutOfMemoryError)):
                raise
            skipped[name] = common.first_line(error)
            common.progress(f"{model}: {name} left out: {skipped[name]}")
        tensors.give(selected=False, dense=False)
        common.free(device)
    adamw = next((result for result in results if result["method"] == _NAMES["adamw"]), None)
    for result in results if adamw else ():
        reference, in_a_row = adamw["ms"], adamw["in_a_row_ms"]
        result["of_adamw"] = {
            "step, device": result["ms"]["step"]["device"] / reference["step"]["device"],
            "step, wall": result["ms"]["step"]["wall"] / reference["step"]["wall"],
            "step, in a row": result["in_a_row_ms"] / in_a_row,
            "update, device": result["ms"]["update"]["device"] / reference["update"]["device"],
        }
        for part, ms in result.get("per_step_ms", {}).items():
            result["of_adamw"][part] = ms / reference["update"]["device"]
    return {"model": model, "weights": count(shapes), "tensors": len(shapes), "results": results, "skipped": skipped}


def render(found: dict[str, Any], options: argparse.Namespace, bandwidth: float) -> str:
    def gb(size: int | None) -> float | None:
        return None if size is None else size / common.GB

    rows = []
    for result in found["results"]:
        ms, floor, ratio = result["ms"], result["floor_ms"], result.get("of_adamw", {})
        per_step = list(result.get("per_step_ms", {}).values()) or [None, None]
        rows.append(
            [
                result["method"],
                ms["step"]["device"],
                ms["step"]["wall"],
                ms["step"]["host"],
                ratio.get("step, wall"),
                result["in_a_row_ms"],
                ms["update"]["device"],
                floor["update"],
                ratio.get("update, device"),
                *(ms.get(part, {}).get("device") for part in ("gather", "gather_in_batches")),
                ms.get("refresh", {}).get("device"),
                floor.get("refresh"),
                *per_step,
                gb(result["state_bytes"]),
                gb(result.get("held_bytes")),
                gb(result["step_extra_bytes"]),
            ]
        )
    header = ["ms, median", "step", "wall", "host", "of AdamW", "in a row"]
    header += [
        "update",
        "floor",
        "of AdamW",
        "gather",
        "batches",
        "refresh",
        "floor",
        f"m = {options.interval}",
        "m = 100",
        "state GB",
        "held GB",
        "extra GB",
    ]
    lines = [
        f"{found['model']}: {found['weights']:,} weights in {found['tensors']} tensors, {options.dtype}, "
        f"{options.device}, copies at {bandwidth / 1e12:.2f} TB/s",
        common.table(header, rows),
        *(f"left out: {name}: {reason}" for name, reason in found["skipped"].items()),
    ]
    for result in found["results"]:
        if any(result.get("launches", {}).values()):
            counts = ", ".join(f"{part} {number}" for part, number in result["launches"].items())
            lines.append(f"launches, {result['method']}: {counts}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/step.py --model bert-base,llama-2-7b --launches --json step.json",
    )
    add = parser.add_argument
    add("--model", default="bert-base", help=f"one or several of {', '.join(MODELS)} (default: %(default)s)")
    add("--peers", default="adamw,sgd,bitsandbytes", help=f"of {', '.join(PEERS)} (default: %(default)s)")
    add("--densities", default="0.001,0.01,0.1", help="of NanoAdam (default: %(default)s)")
    add("--dtype", default="bfloat16", choices=common.DTYPES, help="of weights (default: %(default)s)")
    add("--grad-dtype", default="float32", choices=common.DTYPES, help="of held gradients (default: %(default)s)")
    add("--channels-last", action="store_true", help="for 4-dimensional weights and their gradients")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--repeats", type=int, default=20, help="timed calls of each part (default: %(default)s)")
    add("--warmup", type=int, default=5, help="calls before them (default: %(default)s)")
    add("--interval", type=int, default=5, help="mask interval of the column beside m = 100 (default: %(default)s)")
    add("--change", type=float, default=0.01, help="relative noise on weights between refreshes (default: %(default)s)")
    add("--launches", action="store_true", help="count them; may slow down the host in what is measured after")
    add("--json", metavar="FILE", help='write the results there; "-" for stdout')
    options = parser.parse_args(arguments)
    models, options.peers = common.names(options.model), common.names(options.peers)
    unknown = [name for name in models if name not in MODELS] + [name for name in options.peers if name not in PEERS]
    if unknown or not models:
        parser.error(f"unknown {', '.join(map(repr, unknown)) or 'model'}: see --help for the names")
    for name in ("repeats", "warmup", "interval"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    try:
        options.densities = [float(part) for part in common.names(options.densities)]
    except ValueError:
        parser.error(f"--densities must be numbers with commas between, got {options.densities!r}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here: pass --device cpu")
    bandwidth = copy_bandwidth(torch.device(options.device), options.repeats)
    data: dict[str, Any] = {"benchmark": "step", "machine": common.machine(), "settings": vars(options)}
    data |= {"copy_bytes_per_second": bandwidth, "models": []}
    for model in models:
        try:
            found = measure(model, options, bandwidth)
        except ValueError as error:
            parser.error(common.first_line(error))
        data["models"].append(found)
        common.show(options.json, render(found, options, bandwidth))
        common.save(options.json, data, finished=model == models[-1])  # after each: a later failure loses nothing


if __name__ == "__main__":
    main()
