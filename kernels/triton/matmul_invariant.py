"""The Triton form of :func:`countersign.kernels.matmul_invariant.matmul_invariant`.

One tile shape for all sizes, chosen by type alone; programs of a group share columns of W in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from countersign.kernels.triton.store import stored_as

GROUP = 8


def matmul_invariant(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See the reference."""
    (rows, inner), columns = x.shape, weight.shape[0]
    out = torch.empty(rows, columns, dtype=stored_as(x), device=x.device)
    tile = (64, 128, 64) if x.dtype == torch.bfloat16 else (32, 64, 32)
    if out.numel():
        grid = (triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1]),)
        _matmul[grid](
            x, weight, x if bias is None else bias, out, rows, columns, inner,
            M=tile[0], N=tile[1], K=tile[2], GROUP=GROUP, BIAS=bias is not None, WIDEN=not x.is_cuda,
            num_warps=4, num_stages=4,
        )  # fmt: skip
    return out.to(x.dtype)


@triton.jit
def _matmul(
    x, weight, bias, out, rows, columns, inner,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    program, across = tl.program_id(0), tl.cdiv(columns, N)
    group = program // (GROUP * across)
    first = group * GROUP
    height = tl.minimum(tl.cdiv(rows, M) - first, GROUP)
    row = (first + program % (GROUP * across) % height) * M + tl.arange(0, M)
    column = program % (GROUP * across) // height * N + tl.arange(0, N)
    k = tl.arange(0, K)
    x_at = x + row[:, None].to(tl.int64) * inner + k[None, :]
    w_at = weight + column[None, :].to(tl.int64) * inner + k[:, None]
    sums = tl.zeros((M, N), tl.float32)
    for start in range(0, inner, K):
        left = k + start < inner
        a = tl.load(x_at + start, mask=(row < rows)[:, None] & left[None, :], other=0)
        b = tl.load(w_at + start, mask=(column < columns)[None, :] & left[:, None], other=0)
        if WIDEN:  # the interpreter has no arithmetic in bf16
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    if BIAS:
        sums += tl.load(bias + column, mask=column < columns, other=0).to(tl.float32)[None, :]
    at = out + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])
