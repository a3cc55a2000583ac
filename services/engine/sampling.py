"""Sampling of logits: the parameters, checked, and the kernel applied to torch rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from countersign.kernels import gumbel
from countersign.services.engine.errors import InvalidSampling, NonFiniteLogits


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; see :mod:`countersign.kernels.gumbel`.

    temperature: finite, at least 0; 0 is greedy. top_k: at least 0; 0 keeps all. top_p: above 0, at most 1; 1 keeps
    all. seed: unsigned 64-bit.

    Raises:
        InvalidSampling: one is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0, "temperature", self, "finite and at least 0"
        )
        _require(self.top_k >= 0, "top_k", self, "at least 0")
        _require(0 < self.top_p <= 1, "top_p", self, "above 0 and at most 1")
        _require(0 <= self.seed < 2**64, "seed", self, "an unsigned 64-bit integer")


def _require(holds: bool, name: str, sampling: Sampling, supported: str) -> None:
    if not holds:
        raise InvalidSampling(f"{name} is {getattr(sampling, name)}; it must be {supported}")


def sample(logits_row: Tensor, position: int, sampling: Sampling) -> int:
    """The token at absolute position ``position``, given the logits (V,) of the token before it.

    Raises:
        NonFiniteLogits: a logit is NaN or +infinity, or all are -infinity.
    """
    return _sample(_row(logits_row, position, 0), position, sampling)


def sample_rows(logits: Tensor, positions: Sequence[int], samplings: Sequence[Sampling]) -> list[int]:
    """:func:`sample` for each row of (R, V).

    Raises:
        NonFiniteLogits: as :func:`sample`; ``row`` says where.
    """
    rows = zip(logits, positions, samplings, strict=True)
    return [_sample(_row(row, position, i), position, sampling) for i, (row, position, sampling) in enumerate(rows)]


def perturbed(logits_row: Tensor, position: int, sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(ids that the mask leaves, rising; their scores z + T*G): what an audit compares.

    Raises:
        NonFiniteLogits: as :func:`sample`.
    """
    row = _row(logits_row, position, 0).astype(np.float64)
    return gumbel.perturbed(
        row,
        position,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )


def _row(logits: Tensor, position: int, index: int) -> NDArray[np.float32]:
    row: NDArray[np.float32] = logits.numpy()
    # max of a row with NaN is NaN; -infinity among others is a token ruled out, and all right.
    if not math.isfinite(row.max()):
        raise NonFiniteLogits(position, index)
    return row


def _sample(row: NDArray[np.float32], position: int, sampling: Sampling) -> int:
    if sampling.temperature == 0:
        return int(row.argmax())
    return gumbel.sample(
        row.astype(np.float64),
        position,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )
