"""Run folders: made once, written all or nothing, with a manifest that says what ran where."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import nanoadam

PSEUDOCODE = "Zhou et al. 2025 (arXiv 2506.21374), Algorithm 1; in the code: nanoadam.optimizer.NanoAdam.step"


LOCK = ".lock"
"""The file in a run folder that is locked while somebody writes there."""


class RunError(ValueError):
    """A run cannot go on: one sentence that says why and what to do. The folder is as whole as it was."""


def prepare_folder(out: Path) -> None:
    """Make the run folder, or refuse one that holds anything.

    Raises:
        FileExistsError: `out` is a file or holds files: a run never overwrites another.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"the out folder {out} is a file: choose another name with --out")
    if out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        raise FileExistsError(f"the out folder {out} is not empty: choose another one with --out, or delete it first")
    out.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def new_folder(out: Path, derived: Sequence[str] = ()) -> Iterator[None]:
    """Make the run folder, and be alone in it while it is written. A run that is refused leaves none behind.

    That is, one that ends with bad input (ImportError, OSError or ValueError, but not RunError) while nothing stands
    there but what it was told.

    Args:
        out: new or empty.
        derived: folders in it whose content is made from what the run was told, and can be made again.

    Raises:
        FileExistsError: `out` is a file or holds files.
        RunError: another process has just begun to write there.
    """
    made, refused = not out.exists(), False
    prepare_folder(out)
    try:
        with alone(out):
            prepare_folder(out)  # that process may have come and gone meanwhile
            try:
                yield
            except (ImportError, OSError, ValueError) as error:
                if not isinstance(error, RunError) and _only_told(out, derived):
                    refused = True
                    with contextlib.suppress(OSError):
                        _clear(out)
                raise
    finally:
        if made and refused:
            with contextlib.suppress(OSError):  # somebody else has begun there
                out.rmdir()


_TOLD = {"config.toml", "recipe.toml", "manifest.json", LOCK}


def _only_told(out: Path, derived: Sequence[str]) -> bool:
    """Whether a folder holds nothing but settings: no line of metrics, no checkpoint, nothing that others put there."""
    files = (path for path in out.rglob("*") if not path.is_dir() or path.is_symlink())
    return all(
        path.name in _TOLD
        or path.relative_to(out).parts[0] in derived
        or (path.name == "metrics.jsonl" and not any(line.get("step") for line in read_lines(path)))
        for path in files
    )


def _clear(out: Path) -> None:
    for path in out.iterdir():
        if path.name != LOCK:  # still held: once it is gone, what lies there under this name is somebody else's
            shutil.rmtree(path) if path.is_dir() else path.unlink()


_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}  # without flock itself filelock has another way


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Nobody else writes into this run folder meanwhile. The lock of a process that was killed is gone with it.

    Where the file system has no locks (some network ones), a warning says so, and nobody is kept out.

    Raises:
        RunError: another process is writing there.
    """
    from filelock import FileLock, Timeout  # comes with the extra lab; before 3.30 it removes locks of others

    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"another process is writing to {out}: wait until it has ended, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{out} cannot be locked ({error}): see to it that no other process writes there", stacklevel=3)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (out / LOCK).unlink()  # before it is released: what the next one makes is a file of its own
        lock.release()


def write(path: Path, content: str | bytes) -> None:
    """All of it or nothing: a killed run leaves no half-written file under the final name."""
    with _named(path):
        _write(path, content)


def _write(path: Path, content: str | bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to fill, which takes its final name when it is complete and on the disk, or not at all."""
    staging = final.parent / f".{final.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    staging.mkdir(parents=True)
    try:
        yield staging
        publish(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(folder: Path, final: Path) -> None:
    """Give a complete folder its final name, once all of it is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    os.replace(folder, final)


def append(path: Path, record: dict[str, Any]) -> None:
    """One line of JSON at the end of a file, in one write; a line that was cut off before it stays alone."""
    with _named(path), path.open("a+b") as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """What the system says of a full disk does not say which file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(
            f"{path} could not be written ({error.strerror}): make room on the disk, then go on with --resume"
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; one that was cut off or damaged is left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def read_manifest(path: Path, remedy: str) -> dict[str, Any]:
    """A manifest.

    Raises:
        ValueError: if it is not what a run writes; ends with the remedy.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        why = "" if isinstance(content, dict) else "it holds no JSON object"
    except (ValueError, RecursionError) as error:
        why = str(error)
    if why:
        raise ValueError(f"{path} is damaged ({why}): {remedy}")
    found: dict[str, Any] = content
    return found


def finished(path: Path, names: Sequence[str]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The line of each run that is finished, by what names it; not of those that failed, which are tried again.

    Args:
        path: a JSONL file; it need not be there.
        names: the keys of a line that tell a run from all others.
    """
    lines = {tuple(line[name] for name in names): line for line in read_lines(path)}
    return {name: line for name, line in lines.items() if not line.get("failed")}


def environment(**hardware: Any) -> dict[str, Any]:
    """Code version, hardware (and what else is to be said of it) and the exact version of everything installed."""
    accelerator = None
    if torch.cuda.is_available():
        accelerator = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "code": {"version": nanoadam.__version__, "commit": commit()},
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerators": accelerator,
            **hardware,
        },
        "versions": {"python": platform.python_version(), **_installed()},
    }


@functools.cache
def _installed() -> dict[str, str]:
    return {d.name: d.version for d in sorted(metadata.distributions(), key=lambda d: d.name.lower())}


def commit() -> str | None:
    """The commit this code is from; None outside a checkout, with "+changes" where files differ from it."""
    here = Path(nanoadam.__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an installed copy may lie in somebody else's repository
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
