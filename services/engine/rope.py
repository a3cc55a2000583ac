"""The angles of rotary embedding, position by position, with the scalings that stretch a model's context."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from countersign.services.engine.config import LinearScaling, Llama3Scaling, Rope, YarnScaling

_GROWTH = 1024


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """(head_dim / 2,) fp32, in the order of operations of the checkpoints' training code."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    match rope.scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling():
            return _llama3(frequencies, rope.scaling)
        case YarnScaling():
            return _yarn(frequencies, rope.scaling, rope.theta)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Wavelengths above original / low_freq_factor are stretched, those under original / high_freq_factor stay, those
    between are blended.
    """
    wavelengths = 2 * math.pi / frequencies
    original, low, high = scaling.original_context_length, scaling.low_freq_factor, scaling.high_freq_factor
    share = (original / wavelengths - low) / (high - low)
    blended = (1 - share) * frequencies / scaling.factor + share * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < original / high, frequencies, scaled)


def _yarn(frequencies: Tensor, scaling: YarnScaling, theta: float) -> Tensor:
    """Dimensions that turn more than beta_fast times in the original context stay, those that turn less than beta_slow
    times are stretched, those between are blended by a ramp over the dimension.
    """
    size = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        return size * math.log(scaling.original_context_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # as the paper's code has it, against a division by zero
    stretched = torch.clamp((torch.arange(len(frequencies), dtype=torch.float32) - low) / (high - low), 0, 1)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)


class RotaryTable:
    """Cosines and sines for every position asked for so far, grown in doublings as sequences grow."""

    def __init__(self, rope: Rope, head_dim: int) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim).numpy()
        self._factor = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
        self._cos, self._sin = self._angles(_GROWTH)

    def table(self, end: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (P, head_dim / 2) fp32, contiguous on the CPU, P >= ``end``; YaRN's attention factor is
        multiplied in. The same tensors as long as they are long enough.
        """
        if end > len(self._cos):
            self._cos, self._sin = self._angles(max(end, 2 * len(self._cos)))
        return self._cos, self._sin

    def rows(self, positions: Tensor, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (M, 1, head_dim), as :func:`countersign.kernels.rotary.rotate` takes them.

        Args:
            positions: (M,) int64 on the CPU.
            end: above the largest of them.
            dtype: of the result.
        """
        cos, sin = (part.index_select(0, positions)[:, None] for part in self.table(end))
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)

    def _angles(self, positions: int) -> tuple[Tensor, Tensor]:
        # The angle is rounded to fp32 as in training; its cosine is not left to a vector library's last bit.
        angles = np.outer(np.arange(positions, dtype=np.float32), self._frequencies).astype(np.float64)
        cos, sin = torch.from_numpy(np.cos(angles) * self._factor), torch.from_numpy(np.sin(angles) * self._factor)
        return cos.float(), sin.float()
