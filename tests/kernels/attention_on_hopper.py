"""Compiles the attention kernel for compute capability 9.0, which needs no GPU, and looks at what came out.

Run as a program, by test_attention.py, with TRITON_INTERPRET=0: one process either interprets Triton or compiles it.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from countersign.kernels.triton import attention

SHARED_MEMORY = 227 * 1024
POINTERS = {"lse": "*fp32"} | dict.fromkeys(("first", "base", "tables", "ancestors", "ranges"), "*i32")
ALIGNED = ("q", "keys", "values", "out", "lse", "first", "base", "tables", "ancestors", "ranges", "heads")


def compiled(head_dim: int, leaf: int, page: int, tree: bool) -> Any:
    """The kernel for bf16, 8 query heads a group, of one of the forms."""
    tile = attention._HOPPER[bool(leaf), True][(head_dim > 64) + (head_dim > 128)]
    kernel = attention._kernel
    names = kernel.arg_names
    constants: dict[str, Any] = {
        "GROUP": 8, "HEAD_DIM": head_dim, "PAGE": page, "WINDOW": 0, "LEAF": leaf, "TREE": tree, "RANGES": True,
        "ROWS": tile.rows, "KEYS": tile.keys, "DIM": head_dim, "WIDEN": False,
    }  # fmt: skip
    signature: dict[str, Any] = dict.fromkeys(names, "i32") | POINTERS | dict.fromkeys(constants, "constexpr")
    signature |= dict.fromkeys(("q", "keys", "values"), "*bf16") | {
        "out": "*fp32" if leaf else "*bf16",
        "scale": "fp32",
    }
    places: dict[tuple[int, ...], Any] = {(names.index(name),): value for name, value in constants.items()}
    aligned: list[tuple[int, ...]] = [(names.index(name),) for name in ALIGNED]
    for name, rank in (("q_strides", 3), ("key_strides", 4), ("value_strides", 4)):
        signature[name] = ("i32",) * (rank - 1) + ("constexpr",)
        places[names.index(name), rank - 1] = 1
        aligned += [(names.index(name), i) for i in range(rank - 1)]
    source = ASTSource(kernel, signature, places, {place: [["tt.divisibility", 16]] for place in aligned})
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def main() -> None:
    """Every kind of page, both forms, every head size in the table, and a tree."""
    whole = attention.WHOLE.value
    for head_dim, leaf, page, tree in (
        (128, 0, 16, False),
        (128, 0, whole, False),
        (128, 256, 16, True),
        (128, 256, 128, False),
        (256, 0, 64, False),
        (256, 256, 16, False),
        (64, 64, 16, False),
    ):
        built = compiled(head_dim, leaf, page, tree)
        what, code = f"head size {head_dim}, leaf {leaf}, page {page}, tree {tree}", built.asm["ptx"]
        if built.metadata.shared > SHARED_MEMORY:
            raise SystemExit(f"{what}: {built.metadata.shared} bytes of shared memory")
        if "wgmma.mma_async" not in code or "mma.sync" in code:
            raise SystemExit(f"{what}: not all products are on Hopper's tensor cores")
        # A tree's path is gathered slot by slot; all else goes 16 bytes at a time, past the registers.
        copies = re.findall(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", code)
        if not copies or (not tree and re.search(r"ld\.global(\.\w+)*\.b16", code)):
            raise SystemExit(f"{what}: keys or values are not copied 16 bytes at a time")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
