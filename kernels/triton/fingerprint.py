"""The Triton form of :func:`countersign.kernels.fingerprint.fingerprint`: one program a row, products and sums in fp32.

A row of hidden states and Q are read once; with so few columns there is nothing for tensor cores to do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64


def fingerprint(x: Tensor, q: Tensor) -> Tensor:
    """See the reference."""
    out = torch.empty(len(x), q.shape[1], dtype=torch.float32, device=x.device)
    if out.numel():
        columns = triton.next_power_of_2(q.shape[1])
        _fingerprint[(len(x),)](x, q, out, x.shape[1], q.shape[1], BLOCK=BLOCK, COLUMNS=columns, num_warps=4)
    return out


@triton.jit
def _fingerprint(x, q, out, hidden, columns, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column, place = tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in range(0, hidden, BLOCK):
        at = start + place
        values = tl.load(x + row * hidden + at, mask=at < hidden, other=0).to(tl.float32)
        inside = (at < hidden)[:, None] & (column < columns)[None, :]
        sums += values[:, None] * tl.load(q + at[:, None] * columns + column[None, :], mask=inside, other=0)
    tl.store(out + row * columns + column, tl.sum(sums, axis=0), mask=column < columns)
