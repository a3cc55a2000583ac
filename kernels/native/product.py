"""One packed weight as a program of its own: y = x W^T, a row's bits the same at any number of rows and threads."""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

from countersign.kernels.native.library import (
    BufferStruct,
    OpKind,
    OpStruct,
    ShapeStruct,
    StepStruct,
    Team,
    WeightKind,
    pack,
)


class Product:
    """x (M, K) fp32 to (M, N) fp32, with a weight (N, K) that is packed once. A team computes one thing at a time."""

    def __init__(self, team: Team, weight: Tensor) -> None:
        self._team = team
        self._weight = pack(team.library, weight, WeightKind.FP32)
        self._op = OpStruct(kind=OpKind.LINEAR, input=0, output=1, linear=self._weight.struct())
        self._buffers = (BufferStruct * 2)(BufferStruct(None, weight.shape[1]), BufferStruct(None, weight.shape[0]))
        self._step = StepStruct(buffers=self._buffers)
        self._at = ctypes.byref(self._step)
        shape = ShapeStruct(heads=1, kv_heads=1, buffers=2, ops=1)
        self._program = team.library.program_new(ctypes.byref(shape), ctypes.byref(self._op), team.handle)
        if not self._program:
            raise MemoryError("no memory for a product")
        weakref.finalize(self, team.library.program_free, self._program)

    def __call__(self, x: Tensor) -> Tensor:
        """Raises MemoryError."""
        out = torch.empty(len(x), self._weight.outputs)
        if not len(x):
            return out
        x = x.contiguous()
        self._buffers[0].data, self._buffers[1].data, self._step.rows = x.data_ptr(), out.data_ptr(), len(x)
        if self._team.library.program_run(self._program, self._at):
            raise MemoryError(f"no memory for a product of {len(x)} rows")
        return out
