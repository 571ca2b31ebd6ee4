"""Our patches through vLLM's own classes, where its files are: an installed vllm, or an unpacked wheel on the path.

`pip install --no-deps --target DIR vllm` and PYTHONPATH=DIR will do: nothing of it is imported but the two files that
take sparse patches, and neither needs a GPU.
"""

import contextlib
import importlib.util
import queue
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from test_recorder import Tiny, make, step
from torch import nn

from nanoadam import delta
from nanoadam.delta.sync import SparseWeightPatch, weight_patches

SPEC = importlib.util.find_spec("vllm")
ROOT = Path(next(iter(SPEC.submodule_search_locations))) if SPEC and SPEC.submodule_search_locations else None
ENGINE = "distributed/weight_transfer/sparse_nccl_engine.py"

pytestmark = pytest.mark.skipif(ROOT is None or not (ROOT / ENGINE).is_file(), reason="vllm's files are not there")


def load(name, monkeypatch):
    """One file of vLLM under its own name, without the package around it."""
    spec = importlib.util.spec_from_file_location(name, ROOT.parent / (name.replace(".", "/") + ".py"))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def vllm(monkeypatch):
    """sparse_nccl_engine and checkpoint_weight_patch, with the parts that need a GPU or a server replaced."""
    for package in ("vllm", "vllm.config", "vllm.distributed", "vllm.distributed.weight_transfer",
                    "vllm.model_executor", "vllm.model_executor.model_loader"):  # fmt: skip
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for name, members in {
        "vllm.config.parallel": ["ParallelConfig"],
        "vllm.config.weight_transfer": ["WeightTransferConfig"],
        "vllm.distributed.weight_transfer.nccl_common": [
            "NCCLWeightTransferInitInfo",
            "build_worker_init_payload",
            "run_trainer_rendezvous",
            "worker_init_process_group",
            "trainer_init",
        ],
    }.items():
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member, type(member, (), {}))
        monkeypatch.setitem(sys.modules, name, module)
    load("vllm.distributed.weight_transfer.base", monkeypatch)
    loader = load("vllm.model_executor.model_loader.checkpoint_weight_patch", monkeypatch)
    return load("vllm.distributed.weight_transfer.sparse_nccl_engine", monkeypatch), loader


class Served(Tiny):
    """The tiny model with a loader in vLLM's manner: names of the checkpoint, copied into parameters."""

    def load_weights(self, weights):
        own = self.state_dict()
        for name, tensor in weights:
            with torch.no_grad():
                own[name].copy_(tensor)
        return {name for name, _ in weights}


class Packed(nn.Module):
    """Two of the checkpoint's matrices in one parameter, as vLLM packs q, k and v."""

    def __init__(self, q, k):
        super().__init__()
        self.qk = nn.Parameter(torch.cat([q, k]))

    def load_weights(self, weights):
        rows = {"q": self.qk[:4], "k": self.qk[4:]}
        with torch.no_grad():
            for name, tensor in weights:
                rows[name].copy_(tensor)
        return set(rows)


def test_the_fields_are_the_same(vllm):
    engine, _ = vllm
    theirs = {field.name: field.type for field in fields(engine.SparseWeightPatch)}
    ours = {field.name: field.type for field in fields(SparseWeightPatch)}
    assert list(theirs) == list(ours)
    assert theirs["full_shape"] == ours["full_shape"] == "tuple[int, ...]" or theirs["full_shape"] == tuple[int, ...]


def floating(patches):
    """vLLM's sparse patches are floating; counters go another way."""
    return [patch for patch in patches if patch.values.is_floating_point()]


def test_its_loader_makes_the_trainer_s_weights(vllm):
    _, loader = vllm
    model, server = Tiny(), Served()
    optimizer = make(model)
    recorder = delta.Recorder(model, optimizer)
    for i in range(20):
        step(model, optimizer, i)
        patches = floating(weight_patches(recorder.patch()))
        loader.load_checkpoint_weight_patches(
            server,
            [loader.CheckpointWeightPatch(p.name, p.full_shape, p.values.dtype, p.values, p.indices) for p in patches],
        )
        for name, weight in model.named_parameters():
            assert torch.equal(weight, server.get_parameter(name)), name


def test_its_loader_packs(vllm):
    _, loader = vllm
    base = {"q": torch.randn(4, 6), "k": torch.randn(4, 6)}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["q"][1, 2], tuned["k"][3, 5] = 7.0, -0.0
    model = Packed(**base)
    patches = weight_patches(delta.diff(base, tuned))
    loader.load_checkpoint_weight_patches(
        model,
        [loader.CheckpointWeightPatch(p.name, p.full_shape, p.values.dtype, p.values, p.indices) for p in patches],
    )
    assert torch.equal(model.qk, torch.cat([tuned["q"], tuned["k"]]))


class Wire:
    """What both engines call an NCCL communicator, in one process."""

    device = torch.device("cpu")

    def __init__(self, sends, wire):
        self.sends, self.wire = sends, wire

    def broadcast(self, tensor, src, stream):
        assert tensor.is_contiguous()  # NCCL would send what lies between
        if self.sends:
            self.wire.put(tensor.clone())
        else:
            tensor.copy_(self.wire.get(timeout=10))


def test_through_both_of_its_engines(vllm, monkeypatch):
    engine, _ = vllm
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *args, **options: None)
    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: contextlib.nullcontext())
    model, server = Tiny(), Served()
    optimizer = make(model)
    recorder = delta.Recorder(model, optimizer)
    wire, calls = queue.Queue(), []
    worker = engine.SparseNCCLWeightTransferEngine.__new__(engine.SparseNCCLWeightTransferEngine)
    worker.model, worker.model_update_group = server, Wire(False, wire)

    class Client:
        def start_weight_update(self):
            calls.append("start")

        def update_weights(self, info):
            worker.receive_weights(engine.SparseNCCLWeightTransferUpdateInfo(**info))

        def finish_weight_update(self, weight_version=None):
            calls.append("finish")

    trainer = engine.SparseNCCLTrainerWeightTransferEngine(client=Client())
    trainer.model_update_group = Wire(True, wire)
    for i in range(5):
        step(model, optimizer, i)
        trainer.send_weights(floating(weight_patches(recorder.patch())))
        for name, weight in model.named_parameters():
            assert torch.equal(weight, server.get_parameter(name)), name
    assert calls == ["start", "finish"] * 5
