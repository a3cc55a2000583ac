"""RMS norm and rotary embedding of queries and keys, and RMS norm of hidden states.

    rms_norm(x) = x / sqrt(mean(x^2) + eps) * weight
    (x_i, x_{i+D/2}) -> (x_i cos - x_{i+D/2} sin, x_{i+D/2} cos + x_i sin)     RoFormer (Su et al. 2021), half-split

in fp32, stored in the type that came. A row's bits do not depend on the other rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from countersign.kernels.checks import FLOATS, check
from countersign.kernels.dispatch import Backend, choose


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: Backend | None = None) -> Tensor:
    """From x (M, H) and weight (H,) to (M, H).

    Raises:
        ValueError: a tensor has another shape, type, device or stride; or the backend cannot compute it here.
    """
    check("x", x, ("M", "H"), FLOATS)
    check("weight", weight, (x.shape[1],), (x.dtype,), x)
    if choose(backend, x) == "triton":
        from countersign.kernels.triton import norm_rope as kernels

        return kernels.rms_norm(x, weight, eps)
    return _normed(x.float(), weight, eps).to(x.dtype)


def norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, *, backend: Backend | None = None
) -> Tensor:
    """From x (M, heads, D) to the same, each head normed where there is a ``weight`` (heads, D), then rotated.

    Args:
        x: queries and keys of M tokens.
        weight: a head's own, such as the query norm's for the first heads and the key norm's for the rest.
        cos: (M, D/2) fp32, of each token's position.
        sin: (M, D/2) fp32.
        eps: of the norm.
        backend: see :func:`countersign.kernels.dispatch.choose`.

    Raises:
        ValueError: as :func:`rms_norm`.
    """
    check("x", x, ("M", "heads", "D"), FLOATS)
    rows, heads, size = x.shape
    if size % 2:
        raise ValueError(f"x has heads of {size}; rotation turns pairs")
    for name, angles in (("cos", cos), ("sin", sin)):
        check(name, angles, (rows, size // 2), (torch.float32,), x)
    if weight is not None:
        check("weight", weight, (heads, size), (x.dtype,), x)
    if choose(backend, x) == "triton":
        from countersign.kernels.triton import norm_rope as kernels

        return kernels.norm_rope(x, weight, cos, sin, eps)
    wide = x.float() if weight is None else _normed(x.float(), weight, eps)
    low, high = wide.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
