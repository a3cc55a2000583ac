"""Which form of an op computes: its torch reference, or its Triton kernel."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Literal

from torch import Tensor

Backend = Literal["reference", "triton"]


def choose(backend: Backend | None, *tensors: Tensor) -> Backend:
    """``backend`` if one is named; else Triton for CUDA tensors where Triton is installed, the reference elsewhere.

    Raises:
        ValueError: Triton is named and cannot compute these: it is not installed, or they are on the CPU and
            TRITON_INTERPRET=1 is not set.
    """
    on_device = all(tensor.is_cuda for tensor in tensors)
    if backend is None:
        return "triton" if on_device and _installed() else "reference"
    if backend == "triton" and not _installed():
        raise ValueError("backend 'triton': Triton is not installed here; pip install triton")
    if backend == "triton" and not on_device and os.environ.get("TRITON_INTERPRET") != "1":
        devices = sorted({str(tensor.device) for tensor in tensors})
        raise ValueError(f"backend 'triton' computes on a GPU; the tensors are on {', '.join(devices)}")
    return backend


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
