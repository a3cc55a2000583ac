"""Lossy wires: how the numbers of a KV block travel and are stored in a byte each.

A row is one head's K or V of one layer over a block's tokens. ``int8`` and ``fp8`` (e4m3) store a row as its scale, a
little-endian fp32, and a byte a number: x is about scale · byte. Rows stand for themselves, so that a part of a block
is encoded as the whole would be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

WireName = Literal["fp8", "int8"]

_LARGEST = {"fp8": 448.0, "int8": 127.0}
_BYTES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Wire:
    """``row`` numbers of ``dtype`` share a scale. Blocks of another wire have other keys (``suffix``)."""

    name: WireName
    dtype: torch.dtype
    row: int

    @property
    def suffix(self) -> str:
        """What the name of the cache format ends in."""
        return f"/{self.name}"

    def size(self, block_bytes: int) -> int:
        """Bytes of a block of so many, once encoded."""
        return block_bytes // (self.row * self.dtype.itemsize) * (_SCALE_BYTES + self.row)

    def encode(self, data: bytes | memoryview) -> bytes:
        """Whole rows."""
        numbers = torch.frombuffer(bytearray(data), dtype=self.dtype).view(-1, self.row).float()
        scales = numbers.abs().amax(dim=1, keepdim=True) / _LARGEST[self.name]
        scaled = numbers / scales.clamp_min(torch.finfo(torch.float32).tiny)
        if self.name == "int8":
            scaled = scaled.round()
        rows = torch.cat([scales.view(torch.uint8), scaled.to(_BYTES[self.name]).view(torch.uint8)], dim=1)
        return rows.numpy().tobytes()

    def decode(self, data: bytes) -> bytes:
        """The rows again, as near as they were kept."""
        rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, _SCALE_BYTES + self.row)
        scales = rows[:, :_SCALE_BYTES].contiguous().view(torch.float32)
        numbers = rows[:, _SCALE_BYTES:].contiguous().view(_BYTES[self.name]).float() * scales
        return numbers.to(self.dtype).view(torch.uint8).numpy().tobytes()
