"""Files: damaged in any way they are refused with a named error; written they are there whole or not at all."""

import dataclasses
import hashlib
import json
import os
import random
import re
import resource
import subprocess
import sys

import pytest
import torch
from cases import copy, same
from safetensors.torch import load_file, save_file

from nanoadam import delta
from nanoadam.delta import DeltaError, Patch, bits, files, format


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = {
        "sparse": torch.randn(100, 60, generator=generator).bfloat16(),
        "rare": torch.randn(300, 90, generator=generator),
        "columns": torch.randn(40, 30, generator=generator),
        "dense": torch.randn(25, generator=generator).half(),
        "flag": torch.zeros(3, dtype=torch.bool),
        "same": torch.ones(4),
    }
    tuned = copy(base)
    tuned["sparse"].view(-1)[torch.randperm(6000, generator=generator)[:400]] = 1.5
    tuned["rare"].view(-1)[torch.randperm(27000, generator=generator)[:70]] = 2.5
    tuned["columns"][:, [1, 17]] += 1
    tuned["dense"] += 1
    tuned["flag"][1] = True
    tuned["head"] = torch.randn(7, 5, generator=generator)
    return base, tuned


@pytest.fixture
def saved(tmp_path):
    base, tuned = state()
    path = tmp_path / "patch.safetensors"
    delta.diff(base, tuned, name="org/base").save(path)
    return base, tuned, path


def refused(path, base, **options):
    """The error of applying a damaged file; nothing has changed."""
    model = copy(base)
    with pytest.raises(DeltaError) as caught:
        delta.apply(model, path, **options)
    assert same(model, base)
    return str(caught.value)


# Damage


@pytest.mark.slow
def test_each_of_10_000_flipped_bits_is_found(saved):
    base, _, path = saved
    content, picker = bytearray(path.read_bytes()), random.Random(0)
    model = copy(base)
    for _ in range(10_000):
        at, bit = picker.randrange(len(content)), 1 << picker.randrange(8)
        content[at] ^= bit
        path.write_bytes(content)
        with pytest.raises(DeltaError):
            delta.apply(model, path)
        content[at] ^= bit
    assert same(model, base)


def test_the_tensors_hashes_find_what_no_seal_was_asked_for(saved):
    """A flip in what the patch holds, with the file's own hash made anew: the result's hash says so."""
    base, _, path = saved
    patch = Patch.load(path).to("cpu")
    picker, model = random.Random(1), copy(base)
    for _ in range(300):
        entry = patch[picker.choice(["sparse", "rare", "columns", "dense", "head"])]
        part = picker.choice(list(entry.parts))
        parts = {name: tensor.clone() for name, tensor in entry.parts.items()}
        raw = bits.flat(parts[part]).view(torch.uint8)
        raw[picker.randrange(raw.numel())] ^= 1 << picker.randrange(8)
        with pytest.raises(DeltaError, match=entry.name):
            delta.apply(model, Patch({**patch.entries, entry.name: dataclasses.replace(entry, parts=parts)}))
    assert same(model, base)


def test_a_truncated_file_is_refused(saved):
    base, _, path = saved
    content = path.read_bytes()
    for length in (0, 7, 8, 9, 100, len(content) // 2, len(content) - 33, len(content) - 32, len(content) - 1):
        path.write_bytes(content[:length])
        assert str(path) in refused(path, base)
        refused(path, base, verify=False)


def test_a_file_larger_than_its_header_says_is_refused(saved):
    base, _, path = saved
    path.write_bytes(path.read_bytes() + b"x")
    assert "should have" in refused(path, base)


def rewrite(path, change):
    """The file with another header, and a seal that fits."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    described = json.loads(header["__metadata__"][format.KEY])
    change(header, described)
    if format.KEY in header["__metadata__"]:
        header["__metadata__"][format.KEY] = json.dumps(described)
    text = json.dumps(header).encode()
    body = len(text).to_bytes(8, "little") + text + content[8 + length : -32]
    path.write_bytes(body + hashlib.sha256(body).digest())


CHANGES = {
    "version": (lambda h, d: d.update(version=2), "version 2"),
    "version is no number": (lambda h, d: d.update(version="1"), "version"),
    "field missing": (lambda h, d: d.pop("base"), "must have"),
    "field too many": (lambda h, d: d.update(more=1), "must have"),
    "not a patch": (lambda h, d: h["__metadata__"].pop(format.KEY), "no patch"),
    "twice": (lambda h, d: d["entries"].append(d["entries"][0]), "twice"),
    "renamed": (lambda h, d: d["entries"][0].update(name="other"), "missing"),
    "entry dropped": (lambda h, d: d["entries"].pop(0), "belongs to no tensor"),
    "kind": (lambda h, d: d["entries"][0].update(kind="magic"), "magic"),
    "dtype": (lambda h, d: d["entries"][0].update(dtype="F32"), "BF16"),
    "unknown dtype": (lambda h, d: d["entries"][0].update(dtype="F3"), "F3"),
    "shape": (lambda h, d: d["entries"][0].update(shape=[60, 100]), r"shape \[100, 60\]"),
    "negative shape": (lambda h, d: d["entries"][0].update(shape=[-1, 60]), "shape"),
    "huge count": (lambda h, d: d["entries"][0].update(count=2**70), "shape"),
    "count": (lambda h, d: d["entries"][0].update(count=399), "sparse"),
    "bits": (lambda h, d: d["entries"][0].update(bits=25), "bits"),
    "true": (lambda h, d: d["entries"][0].update(count=True), "count"),
    "hash": (lambda h, d: d["entries"][0].update(base="0x"), "hash"),
    "another base": (lambda h, d: d["entries"][0].update(base="0" * 16), "neither"),
    "another result": (lambda h, d: d["entries"][0].update(result="0" * 16), "announces"),
    "smaller dense": (lambda h, d: d["entries"][3].update(shape=[24], count=24), "dense"),
    "columns": (lambda h, d: d["entries"][2].update(count=79), "columns"),
    "notes": (lambda h, d: d.update(notes={"a": 1}), "notes"),
    "removed": (lambda h, d: d.update(removed=[1]), "removed"),
    "tied": (lambda h, d: d["entries"][0].update(tied=[1]), "tied"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_description_that_does_not_fit_is_refused(saved, name):
    base, _, path = saved
    change, words = CHANGES[name]
    rewrite(path, change)
    assert re.search(words, refused(path, base))


def test_names_that_stand_twice_in_the_header_are_refused(saved):
    base, _, path = saved
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode()
    twice = header.replace('{"__metadata__"', '{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"__metadata__"', 1)
    twice = twice.replace('"__metadata__":', '"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"__metadata__":', 1)
    path.write_bytes(len(twice.encode()).to_bytes(8, "little") + twice.encode() + content[8 + length :])
    assert "'x' stands twice" in refused(path, base)


def fuzzed(content, picker):
    """A damaged file: bytes changed, cut out, put in, moved."""
    damaged = bytearray(content)
    for _ in range(picker.choice([1, 1, 2, 8])):
        at = picker.randrange(len(damaged) or 1)
        if picker.random() < 0.5:
            at = at % 2000  # the header is where it hurts
        what = picker.randrange(6)
        if what == 0:
            damaged[at : at + 1] = bytes([picker.randrange(256)])
        elif what == 1:
            del damaged[at : at + picker.randrange(1, 40)]
        elif what == 2:
            damaged[at:at] = picker.randbytes(picker.randrange(1, 40))
        elif what == 3:
            damaged[at : at + 8] = picker.choice([0, 1, 2**31, 2**63 - 1, 2**64 - 1]).to_bytes(8, "little")
        elif what == 4:
            digits = picker.choice([b"0", b"-1", b"9" * 19, b"9" * 400, b"1e9", b"[" * 5000, b'"\\ud800"', b"\xff"])
            damaged[at : at + len(digits)] = digits
        else:
            other = picker.randrange(len(damaged) or 1)
            damaged[at : at + 16] = damaged[other : other + 16]
    return bytes(damaged)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_10_000_fuzzed_files_make_no_crash(saved):
    """Half of them with the seal left unread, so that everything behind it has to stand on its own."""
    base, _, path = saved
    content, picker, model = path.read_bytes(), random.Random(2), copy(base)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(10_000):
        damaged = fuzzed(content, picker)
        if damaged == content:
            continue
        path.write_bytes(damaged)
        try:
            undo = delta.apply(model, path, verify=i % 2 == 0)
        except DeltaError:
            assert same(model, base) if i % 97 == 0 else True
            continue
        assert i % 2, "a damaged file was applied although its seal was read"
        delta.apply(model, undo, verify=False)
    assert same(model, base)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_fuzzed_descriptions_make_no_crash(saved):
    """Any value in the place of any other, with a seal that fits."""
    base, _, path = saved
    content, picker, model = path.read_bytes(), random.Random(3), copy(base)
    odd = [None, True, -1, 0, 1, 2**31, 2**62, 2**80, 1.5, "", "x", "F32", [], {}, [[]], [1, 2], [2**40, 2**40], "\0"]

    def change(header, described):
        for _ in range(picker.choice([1, 2])):
            place = picker.choice([described, *described["entries"], *header.values()])
            key = picker.choice(list(place))
            place[key] = picker.choice(odd)

    for _ in range(1500):
        path.write_bytes(content)
        try:
            rewrite(path, change)
        except (TypeError, KeyError, AttributeError):  # the change left nothing to describe
            continue
        try:
            undo = delta.apply(model, path, verify=picker.random() < 0.5)
        except DeltaError:
            continue
        delta.apply(model, undo, verify=False)
        assert same(model, base)
    assert same(model, base)


def test_no_patch_and_no_file(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "plain.safetensors")
    for path, words in (
        (tmp_path / "plain.safetensors", "no patch"),
        (tmp_path / "nothing.safetensors", "cannot be read"),
        (tmp_path, "delta.safetensors"),
        (os.fspath(tmp_path) + "/\0", "cannot be read"),
    ):
        with pytest.raises(DeltaError, match=words):
            Patch.load(path)


# What a file is


def test_everything_comes_back(saved):
    base, tuned, path = saved
    patch, kept = delta.diff(base, tuned, name="org/base"), Patch.load(path)
    assert (kept.base, kept.notes, set(kept)) == ("org/base", patch.notes, set(patch))
    assert torch.equal(kept.untouched, patch.untouched)
    for name, entry in patch.items():
        other = kept[name]
        for field in ("kind", "dtype", "shape", "count", "bits", "base", "result", "tied"):
            assert getattr(entry, field) == getattr(other, field)
        for part, tensor in entry.parts.items():
            assert bits.equal(tensor, other.parts[part])
    assert {entry.kind for entry in patch.values()} == {"sparse", "columns", "dense", "new"}
    assert patch["rare"].bits > 0


def test_every_tensor_is_aligned_and_safetensors_reads_it(saved):
    _, _, path = saved
    file = files.SafeFile(path)
    assert all(item.begin % bits.DTYPES[item.dtype].itemsize == 0 for item in file.items.values())
    assert file.start % 8 == 0
    assert list(file.items)[-1] == files.SEAL
    loaded = load_file(path)
    assert set(loaded) == set(file.items)
    assert all(bits.equal(loaded[name], file.tensor(name)) for name in loaded)


def test_a_patch_lies_in_memory_only_when_it_is_read(saved):
    _, _, path = saved
    patch = Patch.load(path)
    content = bytearray(path.read_bytes())
    path.unlink()  # the open file stays
    assert patch.to("cpu")["dense"].values.numel() == 25
    path.write_bytes(content)


def test_pieces_are_written_like_wholes(tmp_path, monkeypatch):
    base, tuned = state()
    delta.diff(base, tuned).save(tmp_path / "whole.safetensors")
    monkeypatch.setattr(files, "_CHUNK", 100)
    delta.diff(base, tuned).save(tmp_path / "pieces.safetensors")
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "pieces.safetensors").read_bytes()
    model = copy(base)
    delta.apply(model, tmp_path / "pieces.safetensors")
    assert same(model, tuned)


# Writing


def test_what_cannot_be_written_leaves_the_old_file(saved, monkeypatch):
    base, tuned, path = saved
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DeltaError, match="No space left"):
        delta.diff(base, tuned).save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    with pytest.raises(DeltaError, match="cannot be written"):
        delta.diff(base, tuned).save(path.parent / "no" / "folder")
    with pytest.raises(DeltaError, match="cannot be written"):
        delta.diff(base, tuned, out=path.parent / "no" / "folder")


KILLER = """
import os, random, signal, sys, time, torch
from nanoadam import delta

torch.set_num_threads(1)  # threads do not survive a fork
path, picker = sys.argv[1], random.Random(0)
base = {"w": torch.zeros(400, 400), "d": torch.zeros(50_000)}
patches = []
for value in (1.0, 2.0):
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["w"].view(-1)[:: int(3 + value)] = value
    tuned["d"] += value
    patches.append(delta.diff(base, tuned))
patches[0].save(path)
for _ in range(100):
    child = os.fork()
    if not child:
        while True:
            for patch in patches[::-1]:
                patch.save(path)
    time.sleep(0.03 * picker.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    model = {name: tensor.clone() for name, tensor in base.items()}
    delta.apply(model, path)
    print(float(model["d"][0]), len(os.listdir(os.path.dirname(path))) - 1)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_kill_leaves_the_old_file_or_the_new_one_100_times(tmp_path):
    path = tmp_path / "patch.safetensors"
    done = subprocess.run([sys.executable, "-c", KILLER, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = [line.split() for line in done.stdout.splitlines()]
    assert len(seen) == 100
    assert {value for value, _ in seen} == {"1.0", "2.0"}
    assert int(seen[-1][1]) > 20  # many were killed while they wrote: what they had begun lies beside it
