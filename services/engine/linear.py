"""x W^T + b, the same bits for a row whatever rows stand beside it.

oneDNN's prepacked matrix product is the fastest on CPU at few rows, and on the machines tried gives a row the same
bits at any number of rows but one: at 1 row and a long inner dimension it splits the sum among threads. So the number
of rows is always one of ``ROW_COUNTS``, and packing a weight tries each of these counts once per shape. Where a count
differs, or there is no oneDNN, the product is taken in tiles of a fixed number of rows. ``numerics: fast`` takes
torch's product as it is.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from countersign.services.engine.config import Numerics

ROW_COUNTS = (4, 8, 16, 32, 64, 96, 128, 192, 256)
"""Row counts in use. More rows go through in slices of 256."""

_CPU_TILE = 16
# An accelerator reads the weights once a tile, and at 128 rows still waits for them: fewer rows would save no time.
_DEVICE_TILE = 128


class LinearMode(enum.Enum):
    """How a product is computed."""

    PREPACKED = "prepacked"
    TILED = "tiled"
    PLAIN = "plain"


class Linear(Protocol):
    """(M, in) to (M, out), any M above 0; copies nothing for an M that :func:`padded_rows` gives."""

    @property
    def mode(self) -> LinearMode: ...

    def __call__(self, x: Tensor) -> Tensor: ...


def padded_rows(rows: int) -> int:
    """The next number of rows that is in use."""
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
        rows = x.shape[0]
        x = _padded(x, padded_rows(rows))
        if len(x) <= ROW_COUNTS[-1]:
            return self._product(x)[:rows]
        return torch.cat([self._product(part) for part in torch.split(x, ROW_COUNTS[-1])])[:rows]

    def _product(self, x: Tensor) -> Tensor:
        product: Tensor = self._multiply(x, self._packed, self._bias, "none", [], "")
        return product


class TiledLinear:
    """torch's product in tiles of always the same number of rows."""

    mode = LinearMode.TILED

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight.contiguous(), bias
        self._tile = _CPU_TILE if weight.device.type == "cpu" else _DEVICE_TILE

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        x = _padded(x, -(-rows // self._tile) * self._tile)
        tiles = [F.linear(tile, self._weight, self._bias) for tile in torch.split(x, self._tile)]
        return torch.cat(tiles)[:rows]


class PlainLinear:
    """torch's product: a row's bits may depend on how many rows there are."""

    mode = LinearMode.PLAIN

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight.contiguous(), bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class LinearPacker:
    """Packs a model's weights, trying each shape once. ``modes`` tells what was chosen, by (out, in)."""

    def __init__(self, numerics: Numerics = "invariant") -> None:
        self._numerics = numerics
        self.modes: dict[tuple[int, int], LinearMode] = {}

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """A product with ``weight`` (out, in) and ``bias`` (out,), both of the dtype and device of the rows to come."""
        linear = self._pack(weight, bias, self.modes.get((weight.shape[0], weight.shape[1])))
        self.modes[weight.shape[0], weight.shape[1]] = linear.mode
        return linear

    def _pack(self, weight: Tensor, bias: Tensor | None, known: LinearMode | None) -> Linear:
        if self._numerics == "fast":
            return PlainLinear(weight, bias)
        if known is LinearMode.TILED or not has_prepacked(weight):
            return TiledLinear(weight, bias)
        packed = PrepackedLinear(weight, bias)
        if known is None and not is_row_invariant(packed, weight.shape[1], weight.dtype):
            return TiledLinear(weight, bias)
        return packed


def has_prepacked(weight: Tensor) -> bool:
    """Whether this torch has oneDNN with the two operations used, for this weight's dtype and device."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it so
    if weight.device.type != "cpu" or not available or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return weight.dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001  no public name


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


def _padded(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else F.pad(x, (0, 0, 0, rows - len(x)))
