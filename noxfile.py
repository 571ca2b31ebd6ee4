"""The suite in other surroundings than those of `make test`: `nox --list` names them, `nox` runs them all.

    pip install nox
    nox -s without                     # each extra missing in turn, in the Python that runs nox
    nox -s strict                      # every warning is an error
    nox -s versions -p 3.12            # the oldest, a middle and the newest torch
    nox -s package                     # build, check, install into an empty environment

Interpreters that a machine lacks are skipped, and said to be. docs/compatibility.md has the last outcome.
"""

import os
import tempfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
TORCHES = ["2.6.0", "2.9.1", "2.13.0"]  # pyproject.toml promises 2.6 and newer
CORE = ["tests/ops", "tests/gradients", "tests/delta", "tests/analysis", "tests/baselines", "tests/test_optimizer.py"]

# Warnings that tests bring about on purpose: bare matrices, a checkpoint in one process, deprecated calls of torch.
MEANT = [
    "ignore:NanoAdam selects from all",
    "ignore:torch.distributed is disabled",
    "ignore:This overload of",
    "ignore:std()",
]

# What each extra brings; one that another brings as well is gone for both. Named as they are imported.
EXTRAS = {
    "triton": "triton",
    "cli": "typer,rich",
    "demo": "sklearn,scikit_learn,tomli_w",
    "finetune": "transformers,datasets,accelerate",  # the rest of it others bring too
    "sync": "zstandard",
    "baselines": "bitsandbytes,torchao,peft,pytorch_optimizer",
    "trl": "trl",
}


@nox.session(python=PYTHONS)
@nox.parametrize("torch", TORCHES)
def versions(session: nox.Session, torch: str) -> None:
    """All tests with one torch in one Python; arguments after -- go to pytest."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        lines = Path("constraints.txt").read_text().splitlines()
        constraints.write_text("\n".join(line for line in lines if not line.startswith(("torch==", "triton=="))))
        session.install("-c", str(constraints), f"torch=={torch}", "-e", ".[test]")
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "worksteal", *session.posargs)


@nox.session(venv_backend="none")
@nox.parametrize("extra", list(EXTRAS))
def without(session: nox.Session, extra: str) -> None:
    """What is left of the suite when an extra's packages cannot be imported."""
    paths = os.pathsep.join(["tests/without", "src"])
    hidden = {"PYTHONPATH": paths, "WITHOUT": EXTRAS[extra]}
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "worksteal", *session.posargs, env=hidden, external=True)


@nox.session(venv_backend="none")
def strict(session: nox.Session) -> None:
    """The core's tests with every warning an error, but for those that a library's own import makes."""
    session.run(
        "python",
        "-m",
        "pytest",
        "-n",
        "2",
        "--dist",
        "worksteal",
        "-W",
        "error",
        *(part for one in MEANT for part in ("-W", one)),
        *(session.posargs or CORE),
        external=True,
    )


@nox.session
def package(session: nox.Session) -> None:
    """Wheel and sdist: build, check, install into an empty environment, use."""
    session.install("build", "twine")
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--outdir", folder)
        built = [str(path) for path in Path(folder).iterdir()]
        session.run("twine", "check", "--strict", *built)
        wheel = next(path for path in built if path.endswith(".whl"))
        session.run("python", "-m", "venv", f"{folder}/empty")
        python = f"{folder}/empty/bin/python"
        session.run(python, "-m", "pip", "install", "-q", "-c", "constraints.txt", f"{wheel}[cli]", external=True)
        session.run(f"{folder}/empty/bin/nanoadam", "--help", external=True, silent=True)
        session.run(python, "examples/plain_loop.py", external=True)
