"""What a kernel writes to: Triton's interpreter cuts bf16 off where a GPU rounds, so there it writes fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def stored_as(x: Tensor) -> torch.dtype:
    """The type of an output that is to become one of x's type by ``.to(x.dtype)``."""
    return x.dtype if x.is_cuda else torch.float32
