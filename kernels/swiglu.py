"""SwiGLU: out = silu(gate) * up, silu(x) = x / (1 + exp(-x)), the same bits for an element wherever it stands.

torch's own silu computes the last elements of a row or of a thread's share with scalar code, whose exponential
differs in the last bit from the vector code's. ``torch.exp`` does not, and the other operations are exactly rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """(M, 2 I), gate before up, to (M, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    denominator = torch.exp(torch.neg(gate)).add_(1)
    return torch.div(gate, denominator, out=denominator).mul_(up)
