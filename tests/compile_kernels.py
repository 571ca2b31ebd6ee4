"""Compile every kernel for a GPU that need not be there; `test_compile.py` runs it without the interpreter.

`compile_kernels.py 80 90` compiles for these capabilities, with `--check` as far as Triton's own representation: there
the compiler has refused whatever it does not know.
"""

import contextlib
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanoadam.baselines import window_kernels
from nanoadam.delta import kernels as deltas
from nanoadam.ops import column_kernels, kernels, selection

POINTERS = {
    "table": "*i64",
    "addresses": "*i64",
    "block_rows": "*i32",
    "chunk_rows": "*i32",
    "changing": "*i64",
    "scratch": "*i16",
}
POINTERS |= dict.fromkeys(("corrections", "lr_pointer", "scale_pointer"), "*fp32")
NUMBERS = dict.fromkeys(("chunks", "key", "step"), "i32")
WINDOW = {"scratch": "*fp32", "tensor_of": "*i32", "factors": "*fp32", "owners": "*i16"}
WINDOW |= dict.fromkeys(("blocks", "row", "last", "filled", "number"), "i32")

LOOKED_UP = {"row": "*i64", "starts": "*i64", "order": "*i64", "gradient": "*bf16", "entries": "*fp32"}
OF_COLUMNS = {"memory": "*fp64", "scratch": "*i32"}

UPDATE = {"LR_POINTER": False, "SCALE_POINTER": True, "STEP_POINTER": False, "MAXIMIZE": False, "STOCHASTIC": True}
UPDATE |= {"WEIGHT_TYPE": tl.bfloat16, "STATE_TYPE": tl.bfloat16, "CHANNELS_LAST": False, "WIDE": False, "BLOCK": 1024}
SELECT = {"CRITERION": 0, "KEEP_ZEROS": False, "CARRY": True, "WEIGHT_TYPE": tl.bfloat16}
SELECT |= {"GRADIENT_TYPE": tl.bfloat16, "STATE_TYPE": tl.bfloat16, "CHANNELS_LAST": False}
SELECT |= {
    "ALIGNED": True,
    "SIFT": True,
    "CANDIDATES": 256,
    "KEPT": 64,
    "OLD_KEPT": 64,
    "PLACES": 4096,
    "SAMPLE": 512,
    "PART": 512,
}
GATHER = {
    "GRADIENT_TYPE": tl.bfloat16,
    "ENTRIES_TYPE": tl.float32,
    "ADD": True,
    "CHANNELS_LAST": True,
    "WIDE": True,
    "BLOCK": 1024,
}

TILE = {"TILE_COLUMNS": 16, "TILE_OUTPUTS": 64, "WIDE": False}
COLUMNS = {name: value for name, value in UPDATE.items() if name not in ("CHANNELS_LAST", "BLOCK")} | TILE
COLUMNS |= {"KEEP_ZEROS": False, "ENTRIES_TYPE": tl.bfloat16}
SUMS = {"TYPE": tl.bfloat16, "WIDE": False, "PART": 1024, "TILE_OUTPUTS": 16, "TILE_INPUTS": 128}
CHOOSE = {"CRITERION": 0, "KEEP_ZEROS": False, "CARRY": True, "BLOCK": 1024}

BLOCKS = {"BLOCK": 4096, "WIDE": False}
COMPRESS = BLOCKS | {"GRADIENT_TYPE": tl.bfloat16, "ALIGNED": True, "INTERPRETED": False}
MOVE = BLOCKS | {"WEIGHT_TYPE": tl.bfloat16, "STOCHASTIC": True}
LARGE = {"BLOCK": 256, "WIDE": True}

CASES = [
    (kernels.gather, GATHER, 4),
    (kernels.update, UPDATE | {"ENTRIES_TYPE": tl.float32}, 4),
    (
        kernels.update,
        UPDATE | {"ENTRIES_TYPE": tl.bfloat16, "CHANNELS_LAST": True, "STEP_POINTER": True, "WIDE": True},
        4,
    ),
    (kernels.update_dense, UPDATE | {"GRADIENT_TYPE": tl.bfloat16, "ALIGNED": True}, 4),
    (kernels.update_dense, UPDATE | {"GRADIENT_TYPE": tl.float32, "ALIGNED": False, "WEIGHT_TYPE": tl.float32}, 4),
    (selection.select, SELECT, 1),
    (selection.select, SELECT | {"WEIGHT_TYPE": tl.float32, "ALIGNED": False, "CARRY": False}, 1),
    (selection.select, SELECT | {"CRITERION": 2, "KEEP_ZEROS": True}, 1),
    (
        selection.select,
        SELECT | {"CRITERION": 3, "CHANNELS_LAST": True, "SIFT": False, "CANDIDATES": 1024, "KEPT": 512},
        2,
    ),
    (kernels.row_entries, {"WIDE": False, "BLOCK": 128, "TOKENS": 16}, 4),
    (column_kernels.gather, TILE | {"GRADIENT_TYPE": tl.bfloat16, "ENTRIES_TYPE": tl.float32, "ADD": True}, 4),
    (column_kernels.update, COLUMNS, 4),
    (column_kernels.update, COLUMNS | {"WIDE": True, "KEEP_ZEROS": True, "WEIGHT_TYPE": tl.float32}, 4),
    (column_kernels.sums, SUMS, 4),
    (column_kernels.choose, CHOOSE, 4),
    (column_kernels.choose, CHOOSE | {"CRITERION": 2, "KEEP_ZEROS": True, "CARRY": False}, 4),
    (column_kernels.carry, {"STATE_TYPE": tl.bfloat16, "BLOCK": 256}, 4),
    (window_kernels.compress, COMPRESS, 8),
    (window_kernels.compress, COMPRESS | LARGE | {"GRADIENT_TYPE": tl.float32, "ALIGNED": False}, 1),
    (window_kernels.move_few, MOVE | {"ENTRIES": 512}, 1),
    (window_kernels.move_all, MOVE | {"LANES": 64}, 8),
    (window_kernels.move_all, MOVE | LARGE | {"LANES": 256, "WEIGHT_TYPE": tl.float32}, 1),
]


PATCH_NUMBERS = {"numel": "i64", "count": "i64", "bits": "i32", "low_size": "i64"}
PATCH_POINTERS = dict.fromkeys(("table", "within", "out", "changes", "starts", "sizes", "blocks"), "*i64")
PATCH_POINTERS |= {"block_rows": "*i32", "damaged": "*i32", "empty": "*i32", "counts": "*i32", "positions": "*i32"}
PATCH_POINTERS |= {"before": "*i16", "after": "*i16", "gaps": "*u8", "low": "*u8"}

PATCHES = [
    (deltas.hash_words, {"PARTS": 32, "ALIGNED": True}, 8),
    (deltas.hash_words, {"PARTS": 32, "ALIGNED": False}, 8),
    *[
        (kernel, {"KIND": kind, "TYPE": type_, "WIDE": wide} | more, 8)
        for kernel, more in ((deltas.inspect, {"HASHED": True}), (deltas.write, {}))
        for kind, type_, wide in ((0, tl.int16, False), (0, tl.uint8, True), (1, tl.int32, False), (1, tl.int64, True))
    ],
    (deltas.inspect, {"KIND": 2, "TYPE": tl.int16, "WIDE": False, "HASHED": False}, 8),
    (deltas.write, {"KIND": 2, "TYPE": tl.int16, "WIDE": False}, 8),
    (deltas.count_changed, {"BLOCK": 4096}, 8),
    (deltas.list_changed, {"BLOCK": 4096}, 8),
    (deltas.measure, {"BLOCK": 1024}, 4),
    (deltas.encode, {"BLOCK": 1024}, 4),
    (deltas.collect, {"TYPE": tl.int16, "BLOCK": 1024}, 4),
]


class Checked(Exception):
    """The compiler has taken the kernel."""


class Check(ASTSource):
    def make_ir(self, *args, **options):
        super().make_ir(*args, **options)
        raise Checked


def types_of(kernel):
    if kernel.module == deltas.__name__:
        return PATCH_POINTERS | PATCH_NUMBERS
    known = POINTERS | NUMBERS | (WINDOW if "tensor_of" in kernel.arg_names else {})
    known |= OF_COLUMNS if kernel.module == column_kernels.__name__ else {}
    known |= LOOKED_UP if kernel is kernels.row_entries else {}
    return known


def compile_all(capability: int, source: type[ASTSource]) -> None:
    for kernel, constants, warps in CASES + PATCHES:
        known = types_of(kernel)
        types = {name: "constexpr" if name in constants else known.get(name, "fp32") for name in kernel.arg_names}
        values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        if triton.__version__.startswith("3.2."):
            types = {name: kind for name, kind in types.items() if kind != "constexpr"}
            values = constants
        target = GPUTarget("cuda", capability, 32)
        with contextlib.suppress(Checked):
            triton.compile(source(kernel, types, values), target=target, options={"num_warps": warps})
        print(f"sm_{capability}", kernel.__name__)


if __name__ == "__main__":
    source = Check if "--check" in sys.argv else ASTSource
    for argument in sys.argv[1:]:
        if argument != "--check":
            compile_all(int(argument), source)
