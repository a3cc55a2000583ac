"""The Triton forms of :mod:`countersign.kernels.norm_rope`: one program a row, or a head of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from countersign.kernels.triton.store import stored_as


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See the reference."""
    out = torch.empty(x.shape, dtype=stored_as(x), device=x.device)
    if out.numel():
        block = triton.next_power_of_2(x.shape[1])
        _rms_norm[(len(x),)](x, weight, out, x.shape[1], eps, BLOCK=block, num_warps=8 if block > 2048 else 4)
    return out.to(x.dtype)


def norm_rope(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """See the reference."""
    rows, heads, size = x.shape
    out = torch.empty(x.shape, dtype=stored_as(x), device=x.device)
    if out.numel():
        _norm_rope[(rows, heads)](
            x, x if weight is None else weight, cos, sin, out, heads, eps,
            HALF=size // 2, BLOCK=triton.next_power_of_2(size // 2), NORM=weight is not None, num_warps=1,
        )  # fmt: skip
    return out.to(x.dtype)


@triton.jit
def _rms_norm(x, weight, out, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    values = tl.load(x + row * size + column, mask=inside, other=0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, axis=0) / size + eps)
    normed = values * scale * tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * size + column, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rope(x, weight, cos, sin, out, heads, eps, HALF: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    at = (row * heads + head) * 2 * HALF + column
    low = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    high = tl.load(x + at + HALF, mask=inside, other=0).to(tl.float32)
    if NORM:
        mean = (tl.sum(low * low, axis=0) + tl.sum(high * high, axis=0)) / (2 * HALF)
        scale = 1 / tl.sqrt(mean + eps)
        of_head = weight + head * 2 * HALF + column
        low = low * scale * tl.load(of_head, mask=inside, other=0).to(tl.float32)
        high = high * scale * tl.load(of_head + HALF, mask=inside, other=0).to(tl.float32)
    c = tl.load(cos + row * HALF + column, mask=inside, other=0)
    s = tl.load(sin + row * HALF + column, mask=inside, other=0)
    tl.store(out + at, (low * c - high * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + HALF, (high * c + low * s).to(out.dtype.element_ty), mask=inside)
