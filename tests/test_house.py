"""Arrows between the rooms of src/nanoadam point downwards, in no circle, as CONTRIBUTING.md draws them."""

import graphlib
import re
import subprocess
from pathlib import Path

import grimp
import pytest

# From the top. A room knows the rooms below it and none above.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("demo", "paper"),
    ("comparing",),
    ("finetuning",),
    ("reports",),
    ("analysis", "baselines", "callback", "delta"),
    ("trainer",),
    ("distributed",),
    ("memory", "optimizer"),
    ("slot_optimizer", "weights"),
    ("checks", "groups", "portable", "state"),
    ("columns", "gradients", "refresh", "roles", "slots"),
    ("ops", "schedules"),
    ("activations", "chunks", "shards", "text"),
)
ROOT = Path(__file__).parents[1]
EXTRAS = re.compile(r"nanoadam\.(__main__|cli|demo|paper|comparing|finetuning|reports|baselines|callback)\b")


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph(
        "nanoadam", cache_dir=None, include_external_packages=True, exclude_type_checking_imports=True
    )


def test_no_circle_of_imports(imports: grimp.ImportGraph) -> None:
    order = graphlib.TopologicalSorter(
        {
            _room_of_ops(name): {
                _room_of_ops(other) for other in imports.find_modules_directly_imported_by(name)
            } - {_room_of_ops(name)}
            for name in sorted(imports.modules)
        }
    )  # fmt: skip
    order.prepare()  # raises CycleError, which names the circle


def _room_of_ops(name: str) -> str:
    """The backends and what picks one are one room."""
    return "nanoadam.ops" if name.startswith("nanoadam.ops.") else name


def test_arrows_point_downwards(imports: grimp.ImportGraph) -> None:
    layers = [grimp.Layer(*rooms, independent=False) for rooms in LAYERS]
    rooms = {name.split(".")[1] for name in imports.modules if name.startswith("nanoadam.")}
    assert rooms <= {room for layer in LAYERS for room in layer}, "a new room needs its place in LAYERS"
    wrong = imports.find_illegal_dependencies_for_layers(layers, containers={"nanoadam"})
    assert not [f"{broken.importer} imports {broken.imported}" for broken in wrong]


def test_the_core_imports_torch_and_safetensors_only(imports: grimp.ImportGraph) -> None:
    """Triton and transformers are imported where they are used, by names that stand in strings or in functions."""
    allowed = {"torch", "safetensors", "triton", "numpy"}
    ours = [name for name in imports.modules if name.startswith("nanoadam") and not EXTRAS.match(name)]
    assert len(ours) > 15
    import sys

    used = {
        (name, other.partition(".")[0])
        for name in ours
        for other in imports.find_modules_directly_imported_by(name)
        if not other.startswith("nanoadam")
    }
    wrong = {pair for pair in used if pair[1] not in allowed | sys.stdlib_module_names}
    assert wrong <= {("nanoadam.weights", "transformers")}


def test_no_file_holds_the_marks_of_an_unfinished_merge():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    marks = ("<" * 7 + " ", ">" * 7 + " ")
    texts = [ROOT / name for name in files if Path(name).suffix in (".md", ".py", ".toml", ".yml", ".txt")]
    assert [str(path) for path in texts if path.is_file() and any(mark in path.read_text() for mark in marks)] == []
