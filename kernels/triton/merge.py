"""The Triton forms of :func:`countersign.kernels.merge.merge` and :func:`countersign.kernels.merge.tree`, in fp32.

One program merges some rows of some partials. What may be fused is written fused, so that the compiler rounds a pair in
the same way wherever it stands: the tree's bits do not depend on how many levels one launch folds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
MOST_LEVELS = 3
ROWS = 8


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """All N at once: outs (N, ..., D) and lses (N, ...), fp32 and contiguous, to (..., D) and (...).

    Raises:
        ValueError: a tensor is not so.
    """
    _check(outs, lses)
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    _merge[(triton.cdiv(lse.numel(), ROWS),)](
        outs, lses, out, lse, len(outs), lse.numel(),
        SIZE=outs.shape[-1], DIM=triton.next_power_of_2(outs.shape[-1]), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return out, lse


def tree(outs: Tensor, lses: Tensor, levels: int = MOST_LEVELS) -> tuple[Tensor, Tensor]:
    """The root over N leaves, ``levels`` (1 to 3) of the tree a launch; shapes as in :func:`merge`.

    Raises:
        ValueError: a tensor is not as :func:`merge` says.
    """
    _check(outs, lses)
    while len(outs) > 1:
        nodes, rows = triton.cdiv(len(outs), 1 << levels), lses[0].numel()
        out, lse = outs.new_empty(nodes, *outs.shape[1:]), lses.new_empty(nodes, *lses.shape[1:])
        _fold[(triton.cdiv(rows, ROWS), nodes)](
            outs, lses, out, lse, len(outs), rows,
            SIZE=outs.shape[-1], DIM=triton.next_power_of_2(outs.shape[-1]), ROWS=ROWS, LEVELS=levels, num_warps=4,
        )  # fmt: skip
        outs, lses = out, lse
    return outs[0], lses[0]


def _check(outs: Tensor, lses: Tensor) -> None:
    for name, tensor in (("outs", outs), ("lses", lses)):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype}, strides {tensor.stride()}; it must be fp32 and contiguous")


@triton.jit
def _load(leaf, outs, lses, leaves, rows, row, SIZE: tl.constexpr, DIM: tl.constexpr):
    """The partial (ROWS, DIM), (ROWS,) of a leaf; empty where there is none."""
    d = tl.arange(0, DIM)
    real = (row < rows) & (leaf < leaves)
    at = row + tl.cast(leaf, tl.int64) * rows
    out = tl.load(outs + at[:, None] * SIZE + d[None, :], mask=real[:, None] & (d < SIZE)[None, :], other=0)
    return out, tl.load(lses + at, mask=real, other=float("-inf"))


@triton.jit
def _store(out, lse, outs, lses, at, real, SIZE: tl.constexpr, DIM: tl.constexpr):
    d = tl.arange(0, DIM)
    tl.store(outs + at[:, None] * SIZE + d[None, :], out, mask=real[:, None] & (d < SIZE)[None, :])
    tl.store(lses + at, lse, mask=real)


@triton.jit
def _finish(out, total, shift):
    divisor = tl.where(total == 0, 1.0, total)
    lse = tl.where(total == 0, float("-inf"), tl.fma(tl.log2(divisor), LN_2, shift))
    return tl.div_rn(out, tl.broadcast_to(divisor[:, None], out.shape)), lse


@triton.jit
def _combine(a, b):
    a_out, a_lse = a
    b_out, b_lse = b
    largest = tl.maximum(a_lse, b_lse)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    a_weight, b_weight = tl.exp2((a_lse - shift) * LOG2_E), tl.exp2((b_lse - shift) * LOG2_E)
    return _finish(tl.fma(b_out, b_weight[:, None], a_out * a_weight[:, None]), a_weight + b_weight, shift)


@triton.jit
def _node(leaf, outs, lses, leaves, rows, row, LEVEL: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr):
    """The node of a level from its first leaf on, left half before right, at most LEVEL + 1 partials alive."""
    if LEVEL == 0:
        partial = _load(leaf, outs, lses, leaves, rows, row, SIZE, DIM)
    else:
        half: tl.constexpr = LEVEL - 1
        left = _node(leaf, outs, lses, leaves, rows, row, half, SIZE, DIM)
        right = _node(leaf + (1 << half), outs, lses, leaves, rows, row, half, SIZE, DIM)
        partial = _combine(left, right)
    return partial


@triton.jit(do_not_specialize=["leaves"])
def _fold(
    outs, lses, out, lse, leaves, rows,
    SIZE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    row, node = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    merged = _node(node << LEVELS, outs, lses, leaves, rows, row, LEVELS, SIZE, DIM)
    _store(merged[0], merged[1], out, lse, row + node.to(tl.int64) * rows, row < rows, SIZE, DIM)


@triton.jit(do_not_specialize=["leaves"])
def _merge(outs, lses, out, lse, leaves, rows, SIZE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    for i in range(leaves):
        at = row + tl.cast(i, tl.int64) * rows
        largest = tl.maximum(largest, tl.load(lses + at, mask=row < rows, other=float("-inf")))
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    merged, total = tl.zeros((ROWS, DIM), tl.float32), tl.zeros((ROWS,), tl.float32)
    for i in range(leaves):
        part, part_lse = _load(i, outs, lses, leaves, rows, row, SIZE, DIM)
        weight = tl.exp2((part_lse - shift) * LOG2_E)
        total += weight
        merged = tl.fma(part, weight[:, None], merged)
    merged, final = _finish(merged, total, shift)
    _store(merged, final, out, lse, row.to(tl.int64), row < rows, SIZE, DIM)
