"""Sampling of logits: the parameters, checked, and the kernel applied to torch rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from countersign.kernels import gumbel
from countersign.kernels.native import library as native
from countersign.services.engine.errors import InvalidSampling, NonFiniteLogits

NOT_FINITE = native.NOT_FINITE
Allowed: TypeAlias = NDArray[np.uint32]


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
    return _sample(_row(logits_row, position), position, sampling)


@dataclass(frozen=True, slots=True)
class Draws:
    """Tokens to draw from consecutive rows of logits for one request.

    positions: absolute, one a row. allowed: None, or one a row: None or a mask as :func:`allow` makes it.
    """

    positions: Sequence[int]
    sampling: Sampling
    allowed: Sequence[Allowed | None] | None = None


def allow(token_ids: Iterable[int], vocabulary_size: int) -> Allowed:
    """A mask that leaves these tokens: uint32 words, token i at bit i % 32 of word i // 32."""
    bits = np.zeros(-(-vocabulary_size // 32) * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def draw(logits: Tensor, asks: Sequence[Draws], team: native.Team | None = None) -> list[int]:
    """The token of each row, or NOT_FINITE where a logit is NaN or +infinity or no token is allowed.

    Args:
        logits: (R, V) fp32 on the CPU; masks are written into it.
        asks: R rows in all.
        team: computes; None for plain Python.
    """
    if team is None or not len(logits):
        return _draw_plainly(logits, asks)
    rows, size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int32)
    team.library.sample(
        team.handle, records(asks), logits.data_ptr(), logits.stride(0), rows, size, tokens.data_ptr(), None
    )
    drawn: list[int] = tokens.tolist()
    if native.NOT_HERE in drawn:
        rules = [(ask.sampling, position) for ask in asks for position in ask.positions]
        for row, (token, (sampling, position)) in enumerate(zip(drawn, rules, strict=True)):
            if token == native.NOT_HERE:
                drawn[row] = _sample(logits[row].numpy(), position, sampling)
    return drawn


def records(asks: Sequence[Draws]) -> bytes:
    """One record a row for the native library; the masks must outlive it."""
    packed = []
    for ask in asks:
        rule, masks = ask.sampling, ask.allowed or itertools.repeat(None)
        for position, mask in zip(ask.positions, masks, strict=False):
            allowed = 0 if mask is None else mask.ctypes.data
            packed.append(native.pack_sampling(rule.temperature, rule.top_p, rule.seed, rule.top_k, allowed, position))
    return b"".join(packed)


def _draw_plainly(logits: Tensor, asks: Sequence[Draws]) -> list[int]:
    drawn: list[int] = []
    for ask in asks:
        masks = ask.allowed or [None] * len(ask.positions)
        for position, mask in zip(ask.positions, masks, strict=True):
            row = logits[len(drawn)].numpy()
            if mask is not None:
                row[np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(row)] == 0] = -math.inf
            drawn.append(_sample(row, position, ask.sampling) if math.isfinite(row.max()) else NOT_FINITE)
    return drawn


def perturbed(logits_row: Tensor, position: int, sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(ids that the mask leaves, rising; their scores z + T*G): what an audit compares.

    Raises:
        NonFiniteLogits: as :func:`sample`.
    """
    row = _row(logits_row, position).astype(np.float64)
    return gumbel.perturbed(
        row,
        position,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )


def _row(logits: Tensor, position: int) -> NDArray[np.float32]:
    row: NDArray[np.float32] = logits.numpy()
    # max of a row with NaN is NaN; -infinity among others is a token ruled out, and all right.
    if not math.isfinite(row.max()):
        raise NonFiniteLogits(position)
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
