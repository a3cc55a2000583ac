"""The Triton form of :func:`countersign.kernels.swiglu.swiglu`: fp32 arithmetic, one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from countersign.kernels.triton.store import stored_as

BLOCK = 1024


def swiglu(gate_up: Tensor) -> Tensor:
    """(M, 2 I) to (M, I)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=stored_as(gate_up), device=gate_up.device)
    if out.numel():
        _swiglu[(rows, triton.cdiv(width, BLOCK))](gate_up, out, width, BLOCK=BLOCK, num_warps=4)
    return out.to(gate_up.dtype)


@triton.jit
def _swiglu(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0).to(tl.float32)
    gated = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * width + column, gated.to(out.dtype.element_ty), mask=inside)
