"""y = x W^T + b in tiles of one size, every sum over K in one order: a row's bits do not depend on the other rows.

Libraries choose another kernel, or split the sum, for another number of rows ("Defeating nondeterminism in LLM
inference", Thinking Machines 2025). Here neither tile nor order ever depends on it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from countersign.kernels.checks import FLOATS, check
from countersign.kernels.dispatch import Backend, choose

TILE = 16
"""Rows of a product of the reference."""


def matmul_invariant(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend | None = None
) -> Tensor:
    """From x (M, K), weight (N, K) and bias (N,) of one type to (M, N) of that type, summed in fp32.

    Raises:
        ValueError: a tensor has another shape, type, device or stride; or the backend cannot compute it here.
    """
    check("x", x, ("M", "K"), FLOATS)
    check("weight", weight, ("N", x.shape[1]), (x.dtype,), x)
    if bias is not None:
        check("bias", bias, (weight.shape[0],), (x.dtype,), x)
    if choose(backend, x) == "triton":
        from countersign.kernels.triton import matmul_invariant as kernels

        return kernels.matmul_invariant(x, weight, bias)
    padded = F.pad(x, (0, 0, 0, -len(x) % TILE))
    tiles = [F.linear(tile, weight, bias) for tile in torch.split(padded, TILE)]
    return torch.cat(tiles)[: len(x)]
