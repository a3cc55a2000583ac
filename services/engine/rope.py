"""The angles of rotary embedding, position by position, with Llama 3's scaling of low frequencies."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from countersign.services.engine.config import Rope

_GROWTH = 1024


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """(head_dim / 2,) fp32, in the order of operations of the checkpoints' training code.

    Type ``llama3``: wavelengths above original / low_freq_factor are stretched by ``factor``, those under original /
    high_freq_factor stay, those between are blended (Llama 3.1's release).
    """
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.type == "default":
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    original, low, high = rope.original_context_length, rope.low_freq_factor, rope.high_freq_factor
    share = (original / wavelengths - low) / (high - low)
    blended = (1 - share) * frequencies / rope.factor + share * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / rope.factor, blended)
    return torch.where(wavelengths < original / high, frequencies, scaled)


class RotaryTable:
    """Cosines and sines for every position asked for so far, grown as sequences grow."""

    def __init__(self, rope: Rope, head_dim: int, dtype: torch.dtype) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim).numpy()
        self._dtype = dtype
        self._cos, self._sin = self._angles(_GROWTH)

    def rows(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (M, 1, head_dim), as :func:`countersign.kernels.rotary.rotate` takes them.

        Args:
            positions: (M,) int64.
            end: above the largest of them.
        """
        if end > len(self._cos):
            self._cos, self._sin = self._angles(max(end, 2 * len(self._cos)))
        return self._cos.index_select(0, positions)[:, None], self._sin.index_select(0, positions)[:, None]

    def _angles(self, positions: int) -> tuple[Tensor, Tensor]:
        # The angle is rounded to fp32 as in training; its cosine is not left to a vector library's last bit.
        angles = np.outer(np.arange(positions, dtype=np.float32), self._frequencies).astype(np.float64)
        cos, sin = torch.from_numpy(np.cos(angles)), torch.from_numpy(np.sin(angles))
        return torch.cat((cos, cos), dim=-1).to(self._dtype), torch.cat((-sin, sin), dim=-1).to(self._dtype)
