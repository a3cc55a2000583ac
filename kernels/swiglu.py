"""SwiGLU: out = silu(gate) * up, silu(x) = x / (1 + exp(-x)), the same bits for an element wherever it stands.

torch's own silu computes the last elements of a row or of a thread's share with scalar code, whose exponential
differs in the last bit from the vector code's. ``torch.exp`` does not, and the other operations are exactly rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from countersign.kernels.checks import FLOATS, check
from countersign.kernels.dispatch import Backend, choose


def swiglu(gate_up: Tensor, *, backend: Backend | None = None) -> Tensor:
    """(M, 2 I), gate before up, to (M, I).

    Raises:
        ValueError: it is not fp32 or bf16, contiguous, of an even width; or the backend cannot compute it here.
    """
    check("gate_up", gate_up, ("M", "2 I"), FLOATS)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[1]} columns; gate and up are half of them each")
    if choose(backend, gate_up) == "triton":
        from countersign.kernels.triton import swiglu as triton_swiglu

        return triton_swiglu.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    denominator = torch.exp(torch.neg(gate)).add_(1)
    return torch.div(gate, denominator, out=denominator).mul_(up)
