"""What modules do on several processes is done once for all of them, since starting processes is what takes time.

A module says in `on_two(rank, size)` and `on_four(rank, size)` what, and what to remember of it: a dict.
"""

import importlib
import os
import time

import pytest
import torch

import processes


def _everything(rank, size, modules):
    return {name: getattr(importlib.import_module(name), function)(rank, size) for name, function in modules}


def _once(folder, name, make):
    """`make()`, or what another of pytest's workers has got from it."""
    result, lock = folder / f"{name}.pt", folder / f"{name}.lock"
    while not result.exists():
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            time.sleep(0.2)
            continue
        try:
            try:
                made = make()
            except Exception as error:  # nobody else has to find it out again
                made = RuntimeError(str(error))
            torch.save(made, folder / f"{name}.part")
            (folder / f"{name}.part").rename(result)
        finally:
            lock.unlink()
    found = torch.load(result, weights_only=False)
    if isinstance(found, Exception):
        raise found
    return found


def _ends(request, tmp_path_factory, size, function):
    collected = {item.module.__name__.rpartition(".")[2]: item.module for item in request.session.items}
    modules = [(name, function) for name, module in sorted(collected.items()) if hasattr(module, function)]
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    return _once(folder, function, lambda: processes.run(size, _everything, modules))


@pytest.fixture(scope="session")
def all_of_two(request, tmp_path_factory):
    return _ends(request, tmp_path_factory, 2, "on_two")


@pytest.fixture(scope="session")
def all_of_four(request, tmp_path_factory):
    return _ends(request, tmp_path_factory, 4, "on_four")


def _mine(request, ends):
    return [end[request.module.__name__.rpartition(".")[2]] for end in ends]


@pytest.fixture(scope="module")
def two(request, all_of_two):
    """What this module has got from each of two processes."""
    return _mine(request, all_of_two)


@pytest.fixture(scope="module")
def four(request, all_of_four):
    """And from each of four."""
    return _mine(request, all_of_four)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Four processes on two cores are slow."""
    for item in items:
        if "all_of_four" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
