"""Rotary position embedding in the half-split form of Llama checkpoints (RoFormer, Su et al. 2021, section 3.4).

(x_i, x_{i+D/2}) -> (x_i cos - x_{i+D/2} sin, x_{i+D/2} cos + x_i sin)     angle = position * frequency_i
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates every head of every row.

    Args:
        x: (M, H, D).
        cos: (M, 1, D), the cosines twice.
        sin: (M, 1, D), the sines, the first half negated.
    """
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    # Products and sum stay apart: a fused multiply-add would round differently in vector and in scalar code.
    return (x * cos).add_(swapped.mul_(sin))
