"""The Activation-DiFR fingerprint: last hidden states projected onto a few orthonormal directions that a seed names.

    y = x Q,   x (M, H), Q (H, k) with Q^T Q = 1, y (M, k) in fp32

An orthonormal projection keeps distances up to the share of the space that it sees, so that two runs of one model stay
near each other and another model does not (DiFR, section on activation fingerprints). What is signed is y in fp16.

Q is the Q factor of a normal matrix, its signs chosen so that R has a positive diagonal: one matrix a seed. The normal
numbers come from Philox4x32-10 (:mod:`countersign.kernels.gumbel`) in a domain of their own, by Box and Muller.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from countersign.kernels.checks import FLOATS, check
from countersign.kernels.dispatch import Backend, choose
from countersign.kernels.gumbel import philox4x32
from countersign.kernels.native.library import Team
from countersign.kernels.native.product import Product

DOMAIN_FINGERPRINT = 1
MOST = 128
_LARGEST = float(np.finfo(np.float16).max)


@functools.lru_cache(maxsize=8)
def projection(seed: int, hidden: int, size: int) -> Tensor:
    """Q (hidden, size) fp32 on the CPU, not to be changed.

    Raises:
        ValueError: the size is not in 2 .. 128 or above ``hidden``, or the seed is no unsigned 64-bit integer.
    """
    if not 2 <= size <= min(MOST, hidden):
        raise ValueError(f"a fingerprint of {size} numbers: 2 to {MOST}, and at most the hidden size {hidden}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed} is not an unsigned 64-bit integer")
    place = np.arange(hidden * size, dtype=np.uint64)
    zero, domain = np.zeros(1, dtype=np.uint64), np.full(1, DOMAIN_FINGERPRINT, dtype=np.uint64)
    words = philox4x32((zero, place, domain, zero), (seed % (1 << 32), seed >> 32))
    radius, angle = ((word.astype(np.float64) + 0.5) * 2.0**-32 for word in words[:2])
    normal = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)
    q, r = np.linalg.qr(normal.reshape(hidden, size))
    return torch.from_numpy((q * np.sign(np.diag(r))).astype(np.float32))


def fingerprint(x: Tensor, q: Tensor, *, backend: Backend | None = None) -> Tensor:
    """From x (M, H) and q (H, k) fp32 to (M, k) fp32; a row's bits do not depend on the other rows.

    Raises:
        ValueError: a tensor has another shape, type, device or stride, or k is above 128; or the backend cannot compute
            it here.
    """
    check("x", x, ("M", "H"), FLOATS)
    check("q", q, (x.shape[1], "k"), (torch.float32,), x)
    if q.shape[1] > MOST:
        raise ValueError(f"q has {q.shape[1]} columns; a fingerprint has at most {MOST}")
    if choose(backend, x) == "triton":
        from countersign.kernels.triton import fingerprint as kernels

        return kernels.fingerprint(x, q)
    # Row by row: torch's product of many rows may sum in another order than that of one.
    return torch.stack([row.float() @ q for row in x]) if len(x) else q.new_empty(0, q.shape[1])


class Fingerprinter:
    """Fingerprints of one projection, rounded to fp16. ``team``: native threads that compute, else :func:`fingerprint`.

    Raises:
        ValueError: see :func:`projection`.
    """

    def __init__(self, seed: int, hidden: int, size: int, team: Team | None = None) -> None:
        self.seed, self.size = seed, size
        self._q = projection(seed, hidden, size)
        self._native = Product(team, self._q.T) if team is not None else None

    def __call__(self, states: Tensor) -> NDArray[np.float16]:
        """From states (M, H) to (M, k). What fp16 cannot hold becomes its largest number; NaN stays.

        A row's bits do not depend on the other rows.
        """
        if self._native is not None and states.dtype is torch.float32 and states.device.type == "cpu":
            found = self._native(states)
        else:
            self._q = self._q.to(states.device)
            found = fingerprint(states.contiguous(), self._q)
        # NumPy does this in a third of the time that torch takes for so few numbers.
        return found.cpu().numpy().clip(-_LARGEST, _LARGEST).astype(np.float16)
