"""The C code of this folder as Python sees it: the structures of ``library.h`` and the calls.

Built with the package for x86-64 with AVX2 and with AVX-512 (``setup.py``); :func:`load` picks what the CPU runs. Both
give the same bits. Elsewhere, or where no C compiler was at hand, there is no library and the engine takes torch.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import importlib.util
import mmap
import platform
import struct
import weakref
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

PANEL = 64
MAX_HEAD_DIM = 256
_HUGE_PAGE = 1 << 21


class WeightKind(enum.IntEnum):
    """How a packed weight's elements are stored."""

    FP32 = 0
    BF16 = 1
    INT8 = 2


class Epilogue(enum.IntEnum):
    """What becomes of a product: stored, added to what is there, or silu(gate) * up of its interleaved halves."""

    STORE = 0
    ADD = 1
    SWIGLU = 2


class OpKind(enum.IntEnum):
    """The operations of a program."""

    EMBED = 0
    NORM = 1
    LINEAR = 2
    ROTATE = 3
    ATTEND = 4
    TAKE = 5
    ROUTE = 6
    EXPERTS_UP = 7
    EXPERTS_DOWN = 8
    COMBINE = 9


class LinearStruct(ctypes.Structure):
    _fields_: ClassVar = [
        ("packed", c_void_p), ("scale", c_void_p), ("bias", c_void_p),
        ("kind", c_int32), ("outputs", c_int32), ("inputs", c_int32),
    ]  # fmt: skip


class OpStruct(ctypes.Structure):
    _fields_: ClassVar = [
        ("kind", c_int32), ("layer", c_int32), ("input", c_int32), ("output", c_int32),
        ("epilogue", c_int32), ("wanted_rows", c_int32),
        ("linear", LinearStruct), ("experts", POINTER(LinearStruct)), ("weight", c_void_p), ("key_weight", c_void_p),
        ("expert_count", c_int32), ("per_token", c_int32), ("normalised", c_int32), ("size", c_int32),
    ]  # fmt: skip


class ShapeStruct(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_int32) for name in (
            "heads", "kv_heads", "head_dim", "window", "kv_bf16", "buffers", "ops", "per_token", "expert_count",
        )),
        ("eps", c_float), ("scale", c_float),
        *((name, c_int64) for name in ("page_stride", "layer_stride", "half_stride", "head_stride")),
    ]  # fmt: skip


class BufferStruct(ctypes.Structure):
    _fields_: ClassVar = [("data", c_void_p), ("stride", c_int64)]


class StepStruct(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_int32) for name in ("rows", "wanted", "spans", "table_stride")),
        *((name, c_void_p) for name in (
            "token_ids", "parents", "is_tree", "span_first", "span_base", "span_table", "tables", "wanted_rows",
            "cos", "sin", "pool",
        )),
        ("buffers", POINTER(BufferStruct)), ("bad_layer", c_void_p),
    ]  # fmt: skip


_SAMPLING = struct.Struct("=ddQqQii")


def pack_sampling(
    temperature: float, top_p: float, seed: int, top_k: int, allowed: int = 0, position: int = 0
) -> bytes:
    """One row of a call to ``sample``: struct sampling. ``allowed``: the address of a mask, or 0."""
    return _SAMPLING.pack(temperature, top_p, seed, top_k, allowed, position, 0)


NOT_FINITE = -1
NOT_HERE = -2
MAX_TOP_K = 256


class Library:
    """The loaded library."""

    def __init__(self, path: str, name: str) -> None:
        self.name = name
        calls = ctypes.CDLL(path)
        self.team_new = _call(calls.team_new, c_void_p, c_int32)
        self.team_free = _call(calls.team_free, None, c_void_p)
        self.program_new = _call(calls.program_new, c_void_p, POINTER(ShapeStruct), POINTER(OpStruct), c_void_p)
        self.program_free = _call(calls.program_free, None, c_void_p)
        self.program_run = _call(calls.program_run, c_int32, c_void_p, POINTER(StepStruct))
        self.program_run_ops = _call(calls.program_run_ops, c_int32, c_void_p, POINTER(StepStruct), c_int32, c_int32)
        self.attend_nodes = _call(
            calls.attend_nodes, None,
            c_void_p, POINTER(StepStruct), c_int32, c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_void_p,
        )  # fmt: skip
        self.fold_nodes = _call(
            calls.fold_nodes, None, c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_void_p, c_void_p, c_int64
        )
        self.pack = _call(calls.pack, None, c_void_p, c_void_p, c_int64, c_int64, c_int32, c_int32)
        self.sample = _call(
            calls.sample, None, c_void_p, c_void_p, c_void_p, c_int64, c_int32, c_int32, c_void_p, c_void_p
        )
        self.draft = _call(
            calls.draft,
            c_int32,
            c_void_p,
            POINTER(StepStruct),
            c_void_p,
            c_void_p,
            c_float,
            c_void_p,
            c_int32,
            c_void_p,
        )
        self.exponentials = _call(calls.exponentials, None, c_void_p, c_void_p, c_int64)


def _call(function: ctypes._NamedFuncPointer, result: type | None, *arguments: type) -> ctypes._NamedFuncPointer:
    function.restype, function.argtypes = result, list(arguments)
    return function


@functools.cache
def load(variant: str | None = None) -> Library | None:
    """The library for this CPU, or the variant named (``v3`` or ``v4``); None when there is none."""
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return None
    found = {"AVX512": "v4", "AVX2": "v3"}.get(torch.backends.cpu.get_cpu_capability())
    wanted = variant or found
    if wanted is None:
        return None
    spec = importlib.util.find_spec(f"countersign.kernels.native.x86_64_{wanted}")
    return Library(spec.origin, wanted) if spec is not None and spec.origin is not None else None


class Team:
    """Threads that compute together; one call at a time."""

    def __init__(self, library: Library, threads: int) -> None:
        self.library, self.threads = library, threads
        self.handle = library.team_new(threads)
        if not self.handle:
            raise MemoryError("no memory for a team of threads")
        weakref.finalize(self, library.team_free, self.handle)


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight (outputs, inputs) in panels of 64 outputs, its scales (int8) and bias."""

    data: Tensor
    scale: Tensor | None
    bias: Tensor | None
    kind: WeightKind
    outputs: int
    inputs: int

    @property
    def bytes(self) -> int:
        """Bytes that a product reads."""
        return sum(tensor.nbytes for tensor in (self.data, self.scale, self.bias) if tensor is not None)

    def struct(self) -> LinearStruct:
        """As C sees it; valid while this object lives."""
        return LinearStruct(
            self.data.data_ptr(),
            None if self.scale is None else self.scale.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            self.kind,
            self.outputs,
            self.inputs,
        )


def pack(
    library: Library, weight: Tensor, kind: WeightKind, *, bias: Tensor | None = None, gate_up: bool = False
) -> Packed:
    """Lays out a weight (outputs, inputs) of any floating type. ``gate_up``: its halves are wanted 16 rows in turn.

    int8: symmetric, one fp32 scale an output, largest magnitude 127.
    """
    outputs, inputs = weight.shape
    scale = None
    if kind is WeightKind.INT8:
        scale = (weight.float().abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        rows = (weight.float() / scale[:, None]).round().to(torch.int8)
        if gate_up:
            scale = scale.view(2, -1, 16).transpose(0, 1).reshape(-1)
    else:
        rows = weight.to(torch.float32 if kind is WeightKind.FP32 else torch.bfloat16)
    rows = rows.contiguous()
    padded = -(-outputs // (PANEL // 2)) * (PANEL // 2)
    data = aligned(padded * inputs * rows.element_size())
    library.pack(rows.data_ptr(), data.data_ptr(), outputs, inputs, kind, gate_up)
    return Packed(
        data,
        None if scale is None else scale.contiguous(),
        None if bias is None else bias.float().contiguous(),
        kind,
        outputs,
        inputs,
    )


def aligned(size: int) -> Tensor:
    """(size,) uint8 zeros, in huge pages where the system has them: a step reads all weights, and few pages help."""
    if size < _HUGE_PAGE:
        return torch.zeros(size + 64, dtype=torch.uint8)[:size]
    area = mmap.mmap(-1, size + 4096)  # prefetches run past the end
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8, count=size)
