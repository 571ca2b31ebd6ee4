"""Compile every kernel for a GPU that need not be there; `test_compile.py` runs it without the interpreter."""

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanoadam.delta import kernels

NUMBERS = {"numel": "i64", "count": "i64", "bits": "i32", "low_size": "i64"}
POINTERS = dict.fromkeys(("table", "within", "out", "changes", "starts", "sizes", "blocks"), "*i64")
POINTERS |= {"block_rows": "*i32", "damaged": "*i32", "empty": "*i32", "counts": "*i32", "positions": "*i32"}
POINTERS |= {"before": "*i16", "after": "*i16", "gaps": "*u8", "low": "*u8"}

CASES = [
    (kernels.hash_words, {"PARTS": 32, "ALIGNED": True}, 8),
    (kernels.hash_words, {"PARTS": 32, "ALIGNED": False}, 8),
    *[
        (kernel, {"KIND": kind, "TYPE": type_, "WIDE": wide} | more, 8)
        for kernel, more in ((kernels.inspect, {"HASHED": True}), (kernels.write, {}))
        for kind, type_, wide in ((0, tl.int16, False), (0, tl.uint8, True), (1, tl.int32, False), (1, tl.int64, True))
    ],
    (kernels.inspect, {"KIND": 2, "TYPE": tl.int16, "WIDE": False, "HASHED": False}, 8),
    (kernels.write, {"KIND": 2, "TYPE": tl.int16, "WIDE": False}, 8),
    (kernels.count_changed, {"BLOCK": 4096}, 8),
    (kernels.list_changed, {"BLOCK": 4096}, 8),
    (kernels.measure, {"BLOCK": 1024}, 4),
    (kernels.encode, {"BLOCK": 1024}, 4),
    (kernels.collect, {"TYPE": tl.int16, "BLOCK": 1024}, 4),
]


def compile_all(capability: int) -> None:
    for kernel, constants, warps in CASES:
        known = POINTERS | NUMBERS
        types = {name: "constexpr" if name in constants else known[name] for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, types, places)
        triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        print(f"sm_{capability}", kernel.__name__)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        compile_all(int(argument))
