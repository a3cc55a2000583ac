"""x W^T + b, the same bits for a row whatever rows stand beside it.

oneDNN's prepacked matrix product is the fastest on CPU at few rows, and on the machines tried gives a row the same
bits at any number of rows but one: at 1 row and a long inner dimension it splits the sum among threads. So the number
of rows is always one of ``ROW_COUNTS``, and packing a weight tries each of these counts once per shape. Where a count
differs, or torch has no oneDNN, the product is taken in fixed tiles of 16 rows.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_COUNTS = (4, 8, 16, 32, 64, 96, 128, 192, 256)
"""Row counts in use. More rows go through in slices of 256."""

_TILE = 16


class LinearMode(enum.Enum):
    """How a product is computed."""

    PREPACKED = "prepacked"
    TILED = "tiled"


class Linear(Protocol):
    """(M, in) to (M, out); M as :func:`padded_rows` gives it."""

    @property
    def mode(self) -> LinearMode: ...

    def __call__(self, x: Tensor) -> Tensor: ...


def padded_rows(rows: int) -> int:
    """The number of rows that a call with so many must have."""
    whole, rest = divmod(rows, ROW_COUNTS[-1])
    return whole * ROW_COUNTS[-1] + (ROW_COUNTS[bisect.bisect_left(ROW_COUNTS, rest)] if rest else 0)


class PrepackedLinear:
    """oneDNN's product with a weight reordered once into oneDNN's own blocked layout."""

    mode = LinearMode.PREPACKED

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        ops = torch.ops.mkldnn
        self._packed = ops._reorder_linear_weight(weight.contiguous(), ROW_COUNTS[-1])  # noqa: SLF001  no public name
        self._multiply = ops._linear_pointwise  # noqa: SLF001  no public name
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] <= ROW_COUNTS[-1]:
            return self._product(x)
        return torch.cat([self._product(part) for part in torch.split(x, ROW_COUNTS[-1])])

    def _product(self, x: Tensor) -> Tensor:
        product: Tensor = self._multiply(x, self._packed, self._bias, "none", [], "")
        return product


class TiledLinear:
    """torch's product in tiles of exactly 16 rows."""

    mode = LinearMode.TILED

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight.contiguous(), bias

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows % _TILE:
            x = F.pad(x, (0, 0, 0, -rows % _TILE))
        tiles = [F.linear(tile, self._weight, self._bias) for tile in torch.split(x, _TILE)]
        return torch.cat(tiles)[:rows]


class LinearPacker:
    """Packs a model's weights, trying each shape once. ``modes`` tells what was chosen, by (out, in)."""

    def __init__(self) -> None:
        self.modes: dict[tuple[int, int], LinearMode] = {}

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """A product with ``weight`` (out, in) and ``bias`` (out,), both of the dtype of the rows to come."""
        shape = (weight.shape[0], weight.shape[1])
        if self.modes.get(shape) is LinearMode.TILED or not has_prepacked(weight.dtype):
            self.modes[shape] = LinearMode.TILED
            return TiledLinear(weight, bias)
        packed = PrepackedLinear(weight, bias)
        if shape not in self.modes and not is_row_invariant(packed, shape[1], weight.dtype):
            self.modes[shape] = LinearMode.TILED
            return TiledLinear(weight, bias)
        self.modes[shape] = LinearMode.PREPACKED
        return packed


def has_prepacked(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN with the two operations used, for this dtype on this CPU."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it so
    if not available or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001  no public name


def is_row_invariant(linear: Callable[[Tensor], Tensor], inputs: int, dtype: torch.dtype) -> bool:
    """Whether rows keep their bits at every count of ``ROW_COUNTS``, at both ends of a batch."""
    most = ROW_COUNTS[-1]
    x = torch.randn(most, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = linear(x)
    return all(
        torch.equal(linear(x[first : first + rows]), whole[first : first + rows])
        for rows in ROW_COUNTS[:-1]
        for first in (0, most - rows)
    )
