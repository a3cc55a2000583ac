"""What an op takes: anything else is refused by name before a launch, never copied without a word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16)


def check(
    name: str, tensor: Tensor, shape: Sequence[int | str], dtypes: Sequence[torch.dtype], like: Tensor | None = None
) -> None:
    """Raises ValueError unless ``tensor`` is contiguous, of this shape (a str for any size), of one of these types, and
    where ``like`` is.
    """
    fits = len(tensor.shape) == len(shape) and all(
        isinstance(each, str) or each == size for each, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
        raise ValueError(f"{name} is {tuple(tensor.shape)}; it must be {wanted}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {' or '.join(map(str, dtypes))}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {like.device}")
