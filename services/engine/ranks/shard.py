"""One step on one rank, in native code: layer by layer, with the attention over all ranks put in from outside."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from countersign.kernels.native.library import OpKind
from countersign.services.engine.native import ATTENDED, HIDDEN, QKV, NativeExecutor
from countersign.services.engine.ranks.plan import Ints, Rows, Task
from countersign.services.engine.step import Computed


@dataclass(frozen=True, slots=True)
class Place:
    """Where rows are: their sequence's row of the tables, and how many tokens stand before them."""

    row: int
    length: int


@dataclass(frozen=True, slots=True)
class ShardSpan:
    """Consecutive new tokens of one sequence; see :class:`countersign.services.engine.step.Span`."""

    sequence: Place
    token_ids: Sequence[int]
    logits: int
    parents: None = None


@dataclass(frozen=True, slots=True)
class ShardCache:
    """The pages of this rank. ``tables``: (spans, columns) int32, 0 for others' pages, which are not written."""

    pool: Tensor
    tables: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Partials:
    """outs (P, heads head_dim) fp32, weights times values; weights (P, 2 heads) fp32, of each head the largest score
    and the sum of the weights; see kernels/native/attention.h.
    """

    outs: Tensor
    weights: Tensor

    @staticmethod
    def empty(count: int, heads: int, head_dim: int) -> Partials:
        return Partials(torch.empty(count, heads * head_dim), torch.empty(count, 2 * heads))


class ShardStep:
    """Begins before the first layer. In each layer: ``queries``, ``attend`` as often as there are queries to answer,
    ``fold``; then ``computed``.
    """

    def __init__(
        self, executor: NativeExecutor, cache: ShardCache, rows: Sequence[Rows], token_ids: Sequence[Sequence[int]]
    ) -> None:
        """``token_ids``: of each of ``rows``."""
        self._executor, self._config, self._layer = executor, executor.config, 0
        self._cache = cache  # C reads the tables at their address
        spans = [
            ShardSpan(Place(one.span, one.positions.first), ids, one.wanted)
            for one, ids in zip(rows, token_ids, strict=True)
        ]
        self._rows = sum(one.count for one in rows)
        self._program = executor.bound(cache)
        self._prepared = executor.prepare(cache, spans)
        self._stops = [index for index, op in enumerate(executor.ops) if op.kind == OpKind.ATTEND]
        self._at = 0

    def queries(self) -> Tensor:
        """(rows, heads head_dim) of the layer, contiguous. The rows' K and V are then in the pages that are here."""
        self._run(self._stops[self._layer])
        width = self._config.heads * self._config.head_dim
        return self._buffer(QKV, (self._config.heads + 2 * self._config.kv_heads) * self._config.head_dim)[
            :, :width
        ].clone()

    def attend(self, task: Task, queries: Tensor, positions: Ints) -> Partials:
        """The partials of some rows, of whichever rank, over the keys that are here."""
        config = self._config
        found = Partials.empty(task.partials, config.heads, config.head_dim)
        if len(task.units):
            self._executor.library.attend_nodes(
                self._program,
                ctypes.byref(self._prepared.struct),
                self._layer,
                queries.data_ptr(),
                positions.ctypes.data,
                task.units.ctypes.data,
                len(task.units),
                found.outs.data_ptr(),
                found.weights.data_ptr(),
            )
        return found

    def fold(self, partials: Partials, parts: Ints, offsets: Ints) -> None:
        """Puts the results of all rows in place of the layer's attention."""
        if self._rows:
            width = self._config.heads * self._config.head_dim
            self._executor.library.fold_nodes(
                self._program,
                parts.ctypes.data,
                offsets.ctypes.data,
                self._rows,
                partials.outs.data_ptr(),
                partials.weights.data_ptr(),
                self._buffer(ATTENDED, width).data_ptr(),
                width,
            )
        self._at, self._layer = self._stops[self._layer] + 1, self._layer + 1

    def is_finite(self) -> bool:
        """Whether all hidden states after the layers so far are finite."""
        ops = self._executor.ops
        self._run(next(index for index in range(self._at, len(ops)) if ops[index].layer >= self._layer))
        return bool(torch.isfinite(self._buffer(HIDDEN, self._config.hidden_size)).all())

    def computed(self) -> Computed:
        """Of the rows wanted."""
        self._run(len(self._executor.ops))
        return self._prepared.computed

    def _run(self, end: int) -> None:
        if self._rows and self._at < end:
            step = ctypes.byref(self._prepared.struct)
            if self._executor.library.program_run_ops(self._program, step, self._at, end):
                raise MemoryError(f"no memory for a step of {self._rows} rows")
        self._at = end

    def _buffer(self, index: int, width: int) -> Tensor:
        if not self._rows:  # all rows are others': there may be no buffers yet
            return torch.empty(0, width)
        return self._executor.buffer(index)[: self._rows * width].view(self._rows, width)
