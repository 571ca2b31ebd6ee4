"""Servers follow a trainer in every bit; what is lost, repeated or foreign is noticed and changes nothing."""

import copy
import dataclasses
import queue
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import same
from test_recorder import Tiny, make, step

from nanoadam import delta
from nanoadam.delta import DeltaError, bits
from nanoadam.delta.sync import (
    Coordinates,
    FolderChannel,
    OutOfStep,
    Piece,
    Receiver,
    Sender,
    SparseWeightPatch,
    Update,
    apply_weight_patches,
    weight_patches,
)


class QueueChannel:
    """Updates within a process; `lose` drops the next one on the way."""

    def __init__(self):
        self.updates, self.lose, self.confirmed = queue.SimpleQueue(), False, 0

    def send(self, update):
        if not self.lose:  # what is sent is the model's own memory
            entries = {n: dataclasses.replace(e, parts={k: v.clone() for k, v in e.parts.items()})
                       for n, e in update.patch.items()}  # fmt: skip
            self.updates.put(dataclasses.replace(update, patch=dataclasses.replace(update.patch, entries=entries)))
        self.lose = False
        return self.confirmed >= 0

    def receive(self, version):
        return None if self.updates.empty() else self.updates.get()

    def confirm(self, version):
        self.confirmed = version

    def latest(self):
        return 0


@pytest.fixture
def pair():
    model = Tiny()
    server = copy.deepcopy(model)
    optimizer = make(model)
    channel = QueueChannel()
    return model, optimizer, server, Sender(delta.Recorder(model, optimizer), channel), Receiver(server, channel)


def test_a_server_follows(pair):
    model, optimizer, server, sender, receiver = pair
    for i in range(30):
        step(model, optimizer, i)
        sender.send()
        assert receiver.receive()
        assert receiver.version == sender.version == i + 1
        assert same(server.state_dict(), model.state_dict())
    assert not receiver.receive()
    assert delta.applying._undone.get(server) is None  # nothing is kept to take updates back


def test_a_lost_update_is_noticed_and_the_next_one_is_whole(pair):
    model, optimizer, server, sender, receiver = pair
    step(model, optimizer, 0)
    sender.channel.lose = True
    sender.send()
    before = copy.deepcopy(server.state_dict())
    step(model, optimizer, 1)
    sender.send()
    with pytest.raises(OutOfStep, match="update 2 follows 1, and the model has 0"):
        receiver.receive()
    assert same(server.state_dict(), before)
    step(model, optimizer, 2)
    sender.send()  # which learns by its answer that it was not followed
    with pytest.raises(OutOfStep, match="none that is known"):
        receiver.receive()
    step(model, optimizer, 3)
    assert sender.send().previous is None
    assert receiver.receive()
    assert same(server.state_dict(), model.state_dict())


def test_a_repeated_update_is_noticed(pair):
    model, optimizer, server, sender, receiver = pair
    step(model, optimizer, 0)
    update = sender.send()
    assert receiver.receive()
    assert not receiver.apply(update)
    assert receiver.version == 1
    assert same(server.state_dict(), model.state_dict())


def test_a_foreign_server_is_noticed(pair):
    model, optimizer, server, sender, receiver = pair
    with torch.no_grad():
        server.wide.weight[4999, 23] += 1
    before = copy.deepcopy(server.state_dict())
    for i in range(40):
        step(model, optimizer, i)
    sender.send()
    with pytest.raises(DeltaError, match=r"wide\.weight"):
        receiver.receive()
    assert same(server.state_dict(), before)
    assert receiver.version == -1
    sender.send()
    with pytest.raises(OutOfStep):
        receiver.receive()
    sender.send()
    assert receiver.receive()
    assert same(server.state_dict(), model.state_dict())


# Folders


@pytest.mark.parametrize("compress", [False, True])
def test_through_a_folder(tmp_path, compress):
    if compress:
        pytest.importorskip("zstandard")
    model = Tiny()
    server, late = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = make(model)
    sender = Sender(delta.Recorder(model, optimizer), FolderChannel(tmp_path, compress=compress))
    receiver = Receiver(server, FolderChannel(tmp_path))
    for i in range(6):
        step(model, optimizer, i)
        sender.send()
        assert receiver.receive()
        assert same(server.state_dict(), model.state_dict())
    assert not receiver.receive()
    follower = Receiver(late, FolderChannel(tmp_path))
    while follower.receive():
        pass
    assert same(late.state_dict(), model.state_dict())
    assert {path.suffix for path in tmp_path.iterdir()} == {".zst" if compress else ".safetensors"}


def test_a_folder_keeps_what_it_is_told_and_a_seed_helps_those_behind(tmp_path):
    model = Tiny()
    server, behind = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = make(model)
    sender = Sender(delta.Recorder(model, optimizer), FolderChannel(tmp_path, keep=3))
    receiver = Receiver(server, FolderChannel(tmp_path))
    for i in range(6):
        step(model, optimizer, i)
        sender.send()
        receiver.receive()
    assert len(list(tmp_path.iterdir())) == 3
    follower = Receiver(behind, FolderChannel(tmp_path))
    with pytest.raises(OutOfStep, match="begins with update 4, and the model has 0"):
        follower.receive()
    sender.reseed()
    assert follower.receive()
    assert follower.version == 7
    assert same(behind.state_dict(), model.state_dict())
    step(model, optimizer, 6)
    sender.send()
    assert follower.receive()
    while receiver.receive():
        pass
    assert same(server.state_dict(), model.state_dict())
    assert same(behind.state_dict(), model.state_dict())


def test_a_trainer_that_starts_again_seeds(tmp_path):
    model = Tiny()
    server = copy.deepcopy(model)
    optimizer = make(model)
    step(model, optimizer, 0)
    Sender(delta.Recorder(model, optimizer), FolderChannel(tmp_path)).send()
    receiver = Receiver(server, FolderChannel(tmp_path))
    step(model, optimizer, 1)  # never sent
    again = Sender(delta.Recorder(model, optimizer), FolderChannel(tmp_path))
    step(model, optimizer, 2)
    assert (again.send().previous, again.version) == (None, 2)
    while receiver.receive():
        pass
    assert (receiver.version, same(server.state_dict(), model.state_dict())) == (2, True)


def test_damaged_updates_in_a_folder(tmp_path):
    model = Tiny()
    server = copy.deepcopy(model)
    optimizer = make(model)
    sender = Sender(delta.Recorder(model, optimizer), FolderChannel(tmp_path))
    step(model, optimizer, 0)
    sender.send()
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-500] ^= 1
    path.write_bytes(content)
    receiver = Receiver(server, FolderChannel(tmp_path))
    with pytest.raises(DeltaError, match="damaged"):
        receiver.receive()
    path.unlink()
    delta.diff(model, server).save(path)
    with pytest.raises(DeltaError, match="does not say which update"):
        receiver.receive()
    path.unlink()
    (tmp_path / "update-000000001.safetensors.zst").write_bytes(b"no zstd at all")
    if pytest.importorskip("zstandard"):
        with pytest.raises(DeltaError, match="cannot be unpacked"):
            receiver.receive()


def test_a_bomb_is_not_unpacked(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    bomb = zstandard.ZstdCompressor().compress(bytes(50_000_000))
    (tmp_path / "update-000000001.safetensors.zst").write_bytes(bomb)
    with pytest.raises(DeltaError, match="more than 1000000 bytes"):
        FolderChannel(tmp_path, limit=1_000_000).receive(0)


# Groups

GROUP = """
import copy, sys, torch, torch.distributed as dist
sys.path[:0] = [{here!r}, {here!r} + "/.."]
from test_recorder import Tiny, make, step
from cases import same
from nanoadam import delta
from nanoadam.delta.sync import GroupChannel, OutOfStep, Receiver, Sender, group

torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=3)
group._BUCKET = 100_000  # several buckets, and parts larger than one
model = Tiny()
channel = GroupChannel()
if rank == 0:
    optimizer = make(model, local=True)  # the others have no gradients to exchange
    sender = Sender(delta.Recorder(model, optimizer), channel)
    for i in range(8):
        step(model, optimizer, i)
        update = sender.send()
        assert (update.previous is None) == (i == 5), i
        sums = [int(value) for value in delta.ops.hash_all([p.detach() for p in model.state_dict().values()])]
        for other in (1, 2):
            dist.send(torch.tensor([value - 2**63 for value in sums]), other)
else:
    receiver = Receiver(model, channel)
    for i in range(8):
        if rank == 2 and i == 4:
            receiver.version = 0  # it believes to have missed some
        try:
            receiver.receive()
        except OutOfStep:
            assert rank == 2 and i == 4
        sums = [int(value) - 2**63 for value in delta.ops.hash_all(list(model.state_dict().values()))]
        wanted = torch.empty(len(sums), dtype=torch.int64)
        dist.recv(wanted, 0)
        assert (wanted.tolist() == sums) == (not (rank == 2 and i == 4)), (rank, i)
dist.destroy_process_group()
print("done", rank)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_through_a_group_of_processes(tmp_path):
    """gloo; tests/gpu has the same with NCCL."""
    code = GROUP.format(here=str(Path(__file__).parent))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    for rank, process in enumerate(processes):
        out, error = process.communicate(timeout=100)
        assert process.returncode == 0, error[-2000:]
        assert f"done {rank}" in out


# vLLM's form


def test_the_fields_are_vllm_s():
    """SparseWeightPatch of vLLM 0.33, vllm/distributed/weight_transfer/sparse_nccl_engine.py."""
    fields = [field.name for field in dataclasses.fields(SparseWeightPatch)]
    assert fields == ["name", "indices", "values", "full_shape"]


def test_weight_patches_are_flat_and_contiguous_and_apply(pair):
    model, optimizer, server, sender, _ = pair
    for i in range(9):
        step(model, optimizer, i)
        patches = weight_patches(sender.recorder.patch())
        for patch in patches:
            assert patch.indices.dtype == torch.int32
            assert patch.indices.is_contiguous()
            assert patch.values.is_contiguous()
            assert len(patch.indices) == len(patch.values)
            assert (
                patch.full_shape == tuple(model.get_parameter(patch.name).shape) if "norm" not in patch.name else True
            )
        apply_weight_patches(server, patches)
        assert same(server.state_dict(), model.state_dict())
    columns = delta.diff({"w": torch.zeros(8, 9)}, {"w": torch.eye(9)[:8] * 0 + torch.tensor([0.0] * 8 + [1.0])})
    assert columns["w"].kind == "columns"
    (patch,) = weight_patches(columns)
    assert patch.indices.tolist() == list(range(8, 72, 9))


def test_patches_of_others_are_checked():
    def patch(**changes):
        given = {"name": "w", "indices": torch.tensor([1, 3], dtype=torch.int32), "values": torch.ones(2)}
        return SparseWeightPatch(**{**given, "full_shape": (2, 3), **changes})

    model = {"w": torch.zeros(2, 3), "v": torch.zeros(4)}
    wrong = [
        (patch(indices=torch.tensor([1, 3])), "int32"),
        (patch(indices=torch.tensor([3, 1], dtype=torch.int32)), "out of order"),
        (patch(indices=torch.tensor([1, 1], dtype=torch.int32)), "out of order"),
        (patch(indices=torch.tensor([1, 6], dtype=torch.int32)), "out of range"),
        (patch(indices=torch.tensor([-1, 3], dtype=torch.int32)), "out of range"),
        (patch(indices=torch.tensor([1], dtype=torch.int32)), "equally long"),
        (patch(values=torch.ones(4)[::2]), "contiguous"),
        (patch(values=torch.ones(2, dtype=torch.float16)), "float16"),
        (patch(full_shape=(3, 2)), r"shape \[2, 3\]"),
        (patch(full_shape=(1, 1)), "2 indices"),
        (patch(name="x"), "no tensor 'x'"),
    ]
    good = SparseWeightPatch("v", torch.tensor([0], dtype=torch.int32), torch.ones(1), (4,))
    for given, words in wrong:
        with pytest.raises(DeltaError, match=words):
            apply_weight_patches(model, [good, given])
        assert same(model, {"w": torch.zeros(2, 3), "v": torch.zeros(4)})
    with pytest.raises(DeltaError, match="twice"):
        apply_weight_patches(model, [patch(), patch()])


# Fused tensors


def fused_and_apart(generator):
    """A module's tensors, and the checkpoint's that they are made of: fused in rows, stacked and transposed."""
    q, k = (torch.randn(4, 6, generator=generator) for _ in range(2))
    experts = [torch.randn(5, 3, generator=generator) for _ in range(2)]
    module = {"qk": torch.cat([q, k]), "experts": torch.stack([e.T for e in experts]), "norm": torch.ones(3)}
    return module, {"q": q, "k": k, "e0": experts[0], "e1": experts[1], "layer_norm": torch.ones(3)}


PIECES = {
    "qk": [Piece("q", (4, 6), 0, (6, 1)), Piece("k", (4, 6), 24, (6, 1))],
    "experts": [Piece(f"e{i}", (5, 3), 15 * i, (1, 5)) for i in range(2)],
    "norm": [Piece("layer_norm", (3,), 0, (1,))],
}


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_fused_tensors_under_their_checkpoint_names(share):
    generator = torch.Generator().manual_seed(0)
    module, checkpoint = fused_and_apart(generator)
    tuned, tuned_checkpoint = copy.deepcopy((module, checkpoint))
    for name in ("qk", "experts", "norm"):
        chosen = torch.rand(tuned[name].shape, generator=generator) < share
        tuned[name][chosen] += 1
    tuned_checkpoint["q"], tuned_checkpoint["k"] = tuned["qk"].split(4)
    tuned_checkpoint["e0"], tuned_checkpoint["e1"] = (e.T for e in tuned["experts"])
    tuned_checkpoint["layer_norm"] = tuned["norm"]
    patch = Coordinates(PIECES).patch(delta.diff(module, tuned))
    apply_weight_patches(checkpoint, weight_patches(patch))
    assert all(torch.equal(checkpoint[name], tuned_checkpoint[name]) for name in checkpoint)


def test_pieces_that_do_not_make_up_a_tensor_are_refused():
    module, _ = fused_and_apart(torch.Generator().manual_seed(0))
    tuned = {**module, "qk": module["qk"].clone()}
    tuned["qk"][0, 0] += 1
    patch = delta.diff(module, tuned)
    for wrong in ([PIECES["qk"][0]], [PIECES["qk"][1]] * 2):
        with pytest.raises(DeltaError, match="qk"):
            Coordinates({"qk": wrong}).patch(patch)


def test_an_update_of_a_state_dict():
    server = {"w": torch.zeros(4)}
    receiver = Receiver(server)
    assert receiver.apply(Update(1, 0, delta.diff(server, {"w": torch.ones(4)})))
    assert bits.equal(server["w"], torch.ones(4))
