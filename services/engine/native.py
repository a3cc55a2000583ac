"""The decoder as one native call a step: a program of operations for :mod:`countersign.kernels.native`.

Same computation as :mod:`eager`, other bits. Here each operation gives a row the same bits at any number of rows by
the way it is computed, so that ``numerics`` has nothing to choose. ``bf16`` stores weights and cache in bf16 and
computes in fp32; ``int8`` stores weights in int8, one scale an output, and the cache in bf16.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from countersign.kernels.native import library as native
from countersign.kernels.native.library import BufferStruct, Epilogue, OpKind, OpStruct, Packed, WeightKind
from countersign.services.engine.config import Dtype, ModelConfig
from countersign.services.engine.errors import EngineError
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.rope import RotaryTable
from countersign.services.engine.sampling import Draws, records
from countersign.services.engine.step import AfterLayer, Computed, Span
from countersign.services.engine.weights import DecoderWeights, DenseMlp, LayerWeights, RoutedExperts

_KINDS: dict[Dtype, WeightKind] = {"fp32": WeightKind.FP32, "bf16": WeightKind.BF16, "int8": WeightKind.INT8}
# Hidden states, normed rows, qkv, attention's output, the MLP's inner rows, router logits, each choice's inner row and
# output, wanted rows, logits.
HIDDEN, _NORMED, QKV, ATTENDED, _INNER, _ROUTED, _CHOSEN, _MIXED, _WANTED, _LOGITS = range(10)


def refusal_of(config: ModelConfig) -> str:
    """Why native code cannot compute this model here; empty if it can."""
    if native.load() is None:
        return "this processor has no AVX2, or the C kernels were not built (no compiler at installation)"
    sizes = {
        "hidden_size": config.hidden_size,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
    }
    if config.experts is not None:
        sizes["the experts' intermediate_size"] = config.experts.intermediate_size
    odd = [f"{name} {size}" for name, size in sizes.items() if size % 16]
    if odd:
        return f"not a multiple of 16: {', '.join(odd)}"
    if config.head_dim > native.MAX_HEAD_DIM:
        return f"head_dim {config.head_dim} is above {native.MAX_HEAD_DIM}"
    return ""


@dataclass(slots=True)
class _Program:
    """Operations as they are written, and what they point to."""

    ops: list[OpStruct] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)
    weight_bytes: int = 0

    def add(self, kind: OpKind, layer: int, source: int, to: int, **fields: object) -> OpStruct:
        op = OpStruct(kind=kind, layer=layer, input=source, output=to, **fields)
        self.ops.append(op)
        return op

    def vector(self, values: Tensor | None) -> int | None:
        """The address of a vector in fp32, which is kept."""
        if values is None:
            return None
        kept = values.float().contiguous()
        self.kept.append(kept)
        self.weight_bytes += kept.nbytes
        return int(kept.data_ptr())

    def keep(self, packed: Packed) -> native.LinearStruct:
        self.kept.append(packed)
        self.weight_bytes += packed.bytes
        return packed.struct()


class Pool(Protocol):
    """Where K and V stand, of a :class:`PagedCache` or a rank's part of one."""

    @property
    def pool(self) -> Tensor: ...

    @property
    def tables(self) -> NDArray[np.int32]: ...


class Place(Protocol):
    """A sequence's row of the tables, and its length."""

    @property
    def row(self) -> int: ...

    @property
    def length(self) -> int: ...


class Rows(Protocol):
    """What a step must know of a :class:`Span`."""

    @property
    def sequence(self) -> Place: ...

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def logits(self) -> int: ...

    @property
    def parents(self) -> Sequence[int] | None: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step as C sees it, where its results will stand, and the arrays that it points to."""

    struct: native.StepStruct
    computed: Computed
    kept: tuple[object, ...]


class NativeExecutor:
    """A model's weights packed for this CPU. One step at a time."""

    name = "native"  # of its bits: receipts, audits (verify/difr/profile.py) and stored KV go by it
    layered = True

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        dtype: Dtype,
        threads: int,
        library: native.Library | None = None,
    ) -> None:
        library = library or native.load()
        if library is None:
            raise EngineError(refusal_of(config))
        self.config, self.library, self._kind = config, library, _KINDS[dtype]
        self._rotary = RotaryTable(config.rope, config.head_dim)
        self.team = native.Team(library, threads)
        self._program = _Program()
        self._write(weights)
        self._handle: int | None = None
        self._free: weakref.finalize[..., NativeExecutor] | None = None
        self._layout: object = None
        self._ops = (OpStruct * len(self._program.ops))(*self._program.ops)
        # Where each layer's operations end.
        self._layer_ends = [sum(op.layer <= layer for op in self._program.ops) for layer in range(config.layers)]
        self._rows = 0
        self._buffers: list[Tensor] = []
        self._structs = (BufferStruct * (_LOGITS + 1))()

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step of one row reads, all experts counted, the embedding's other rows not."""
        return self._program.weight_bytes

    def run(self, cache: PagedCache, spans: Sequence[Span], after_layer: AfterLayer | None = None) -> Computed:
        """Writes the K and V of the spans' tokens into the slots that are reserved for them."""
        if after_layer is not None:
            return self._step_by_layers(cache, spans, after_layer)
        return self._step(cache, spans, None)

    def run_layers(self, cache: PagedCache, spans: Sequence[Span], layers: int) -> None:
        """Writes the K and V of the spans' tokens in the first ``layers`` layers, as :meth:`run` does."""
        prepared = self.prepare(cache, spans)
        if self.library.program_run_ops(
            self.bound(cache), ctypes.byref(prepared.struct), 0, self._layer_ends[layers - 1]
        ):
            raise MemoryError(f"no memory for a step of {prepared.struct.rows} rows")

    def close(self) -> None:
        """Nothing to end: the weights go with this object."""

    def diagnose(self, cache: PagedCache, span: Span) -> int:
        """The first layer whose output for one of these tokens is not finite, as many as there are layers if only the
        logits are not.
        """
        bad = ctypes.c_int32(-1)
        self._step(cache, [span], ctypes.addressof(bad))
        return bad.value if 0 <= bad.value < self.config.layers else self.config.layers

    def draft(
        self, cache: PagedCache, spans: Sequence[Span], asks: Sequence[Draws], counts: Sequence[int], margin: float
    ) -> list[list[int]]:
        """Continues each span by up to ``counts`` tokens, each sampled and fed to the next pass, in one native call.

        A token whose score leads the next best by less than ``margin`` is the last. Slots for all but the last token
        are reserved.
        """
        rules, ends = records(asks), np.array(counts, dtype=np.int32)
        tokens = np.zeros((len(spans), max(counts)), dtype=np.int32)
        produced = np.zeros(len(spans), dtype=np.int32)
        prepared = self.prepare(cache, spans, max(counts))
        failed = self.library.draft(
            self.bound(cache),
            ctypes.byref(prepared.struct),
            rules,
            ends.ctypes.data,
            margin,
            tokens.ctypes.data,
            tokens.shape[1],
            produced.ctypes.data,
        )
        if failed:
            raise MemoryError("no memory for a draft")
        return [row[:count] for row, count in zip(tokens.tolist(), produced.tolist(), strict=True)]

    def _step(self, cache: PagedCache, spans: Sequence[Span], bad_layer: int | None) -> Computed:
        prepared = self.prepare(cache, spans, 0)
        prepared.struct.bad_layer = bad_layer
        if self.library.program_run(self.bound(cache), ctypes.byref(prepared.struct)):
            raise MemoryError(f"no memory for a step of {prepared.struct.rows} rows")
        return prepared.computed

    def _step_by_layers(self, cache: PagedCache, spans: Sequence[Span], after_layer: AfterLayer) -> Computed:
        """The same operations in the same order, with a word after each layer."""
        prepared = self.prepare(cache, spans)
        program, first = self.bound(cache), 0
        for layer, end in enumerate(self._layer_ends):
            if self.library.program_run_ops(program, ctypes.byref(prepared.struct), first, end):
                raise MemoryError(f"no memory for a step of {prepared.struct.rows} rows")
            after_layer(layer)
            first = end
        self.library.program_run_ops(program, ctypes.byref(prepared.struct), first, len(self.ops))
        return prepared.computed

    @property
    def ops(self) -> Sequence[OpStruct]:
        """The operations of a step, layer by layer."""
        return self._program.ops

    def buffer(self, index: int) -> Tensor:
        """One of the step's buffers, flat."""
        return self._buffers[index]

    def prepare(self, cache: Pool, spans: Sequence[Rows], beyond: int = 0) -> Prepared:
        """A step of these spans, which may go on for ``beyond`` tokens.

        All numbers stand in one array: what is asked of NumPy per step is most of what a step costs outside the model.
        """
        counts = [len(span.token_ids) for span in spans]
        first = [0, *itertools.accumulate(counts)]
        rows, base = first[-1], [span.sequence.length for span in spans]
        wanted = [row for span, end in zip(spans, first[1:], strict=True) for row in range(end - span.logits, end)]
        parts = (
            [token for span in spans for token in span.token_ids],
            first,
            base,
            [span.sequence.row for span in spans],
            wanted,
            *_trees(spans, counts),
        )
        numbers = np.array([number for part in parts for number in part], dtype=np.int32)
        address, offsets = numbers.ctypes.data, itertools.accumulate(map(len, parts), initial=0)
        token_ids, first_at, base_at, table, wanted_at, parents, is_tree, _ = (address + 4 * at for at in offsets)
        chains = not parts[-1]
        cos, sin = self._rotary.table(max(base, default=0) + max(counts, default=0) + beyond)
        self._fit(rows)
        logits = torch.empty(len(wanted), self.config.vocabulary_size)
        self._structs[_LOGITS] = BufferStruct(logits.data_ptr(), logits.shape[1])
        struct = native.StepStruct(
            rows,
            len(wanted),
            len(spans),
            cache.tables.shape[1],
            token_ids,
            None if chains else parents,
            None if chains else is_tree,
            first_at,
            base_at,
            table,
            cache.tables.ctypes.data,
            wanted_at,
            cos.data_ptr(),
            sin.data_ptr(),
            cache.pool.data_ptr(),
            self._structs,
            None,
        )
        return Prepared(struct, Computed(logits, self._states(len(wanted))), (numbers, cos, sin))

    def _states(self, rows: int) -> Tensor:
        """(rows, hidden) of the rows wanted, where the head reads them."""
        width = self.config.hidden_size
        return self._buffers[_WANTED][: rows * width].view(rows, width) if rows else torch.empty(0, width)

    def bound(self, cache: Pool) -> int:
        """The program for this cache's layout."""
        layout = (cache.pool.dtype, cache.pool.stride())
        if self._handle is None or self._layout != layout:
            if self._free is not None:
                self._free()
            config = self.config
            page, layer, half, head, _ = cache.pool.stride()
            shape = native.ShapeStruct(
                config.heads,
                config.kv_heads,
                config.head_dim,
                config.sliding_window or 0,
                cache.pool.dtype is torch.bfloat16,
                len(self._structs),
                len(self._ops),
                config.experts.per_token if config.experts is not None else 0,
                config.experts.count if config.experts is not None else 0,
                config.rms_eps,
                config.head_dim**-0.5,
                page,
                layer,
                half,
                head,
            )
            self._handle = int(self.library.program_new(ctypes.byref(shape), self._ops, self.team.handle))
            self._free = weakref.finalize(self, self.library.program_free, self._handle)
            self._layout = layout
        return self._handle

    def _fit(self, rows: int) -> None:
        """Buffers for so many rows."""
        if rows <= self._rows:
            return
        config = self.config
        self._rows = max(rows + rows // 2, 16)
        experts = config.experts
        # Rows of the choices stand one after another, `per_token` a token.
        choices, count, inner = (experts.per_token, experts.count, experts.intermediate_size) if experts else (0, 0, 0)
        sizes = (
            (1, config.hidden_size),
            (1, config.hidden_size),
            (1, (config.heads + 2 * config.kv_heads) * config.head_dim),
            (1, config.heads * config.head_dim),
            (1, config.intermediate_size),
            (1, count),
            (choices, inner),
            (choices, config.hidden_size),
            (1, config.hidden_size),
        )
        self._buffers = [torch.zeros(self._rows * each * width) for each, width in sizes]
        for index, (buffer, (_, width)) in enumerate(zip(self._buffers, sizes, strict=True)):
            self._structs[index] = BufferStruct(buffer.data_ptr(), width)

    def _write(self, weights: DecoderWeights) -> None:
        """The operations of a forward pass."""
        program, config = self._program, self.config
        hidden = config.hidden_size
        embedding = weights.embedding
        if self._kind is not WeightKind.FP32 and embedding.dtype is torch.bfloat16:
            table, kind = embedding.contiguous(), WeightKind.BF16
        else:
            table, kind = embedding.float().contiguous(), WeightKind.FP32
        program.kept.append(table)
        rows = native.LinearStruct(packed=table.data_ptr(), kind=kind, outputs=config.vocabulary_size, inputs=hidden)
        program.add(OpKind.EMBED, 0, HIDDEN, HIDDEN, linear=rows, size=hidden)
        for index, layer in enumerate(weights.layers):
            self._write_layer(index, layer)
        last, take = config.layers, {"wanted_rows": 1}
        program.add(OpKind.TAKE, last, HIDDEN, _WANTED, weight=program.vector(weights.norm), size=hidden, **take)
        program.add(OpKind.LINEAR, last, _WANTED, _LOGITS, linear=self._packed(weights.head), **take)

    def _write_layer(self, index: int, layer: LayerWeights) -> None:
        program, hidden = self._program, self.config.hidden_size
        norm, mlp_norm = program.vector(layer.attention_norm), program.vector(layer.mlp_norm)
        q_norm, k_norm = program.vector(layer.q_norm), program.vector(layer.k_norm)
        program.add(OpKind.NORM, index, HIDDEN, _NORMED, weight=norm, size=hidden)
        program.add(OpKind.LINEAR, index, _NORMED, QKV, linear=self._packed(layer.qkv, bias=layer.qkv_bias))
        program.add(OpKind.ROTATE, index, QKV, QKV, weight=q_norm, key_weight=k_norm)
        program.add(OpKind.ATTEND, index, QKV, ATTENDED)
        output = self._packed(layer.output)
        program.add(OpKind.LINEAR, index, ATTENDED, HIDDEN, linear=output, epilogue=Epilogue.ADD)
        program.add(OpKind.NORM, index, HIDDEN, _NORMED, weight=mlp_norm, size=hidden)
        if isinstance(layer.mlp, DenseMlp):
            gate_up = self._packed(layer.mlp.gate_up, gate_up=True)
            program.add(OpKind.LINEAR, index, _NORMED, _INNER, linear=gate_up, epilogue=Epilogue.SWIGLU)
            down = self._packed(layer.mlp.down)
            program.add(OpKind.LINEAR, index, _INNER, HIDDEN, linear=down, epilogue=Epilogue.ADD)
        else:
            self._write_experts(index, layer.mlp)

    def _write_experts(self, index: int, mlp: RoutedExperts) -> None:
        program, count = self._program, len(mlp.router)
        router = program.keep(native.pack(self.library, mlp.router, WeightKind.FP32))
        program.add(OpKind.LINEAR, index, _NORMED, _ROUTED, linear=router)
        sizes = {"expert_count": count, "per_token": mlp.per_token, "size": self.config.hidden_size}
        program.add(OpKind.ROUTE, index, _ROUTED, _ROUTED, normalised=mlp.normalised, **sizes)
        up = (native.LinearStruct * count)(*(self._packed(weight, gate_up=True) for weight in mlp.gate_up))
        down = (native.LinearStruct * count)(*(self._packed(weight) for weight in mlp.down))
        program.kept += [up, down]
        program.add(OpKind.EXPERTS_UP, index, _NORMED, _CHOSEN, experts=up, epilogue=Epilogue.SWIGLU, **sizes)
        program.add(OpKind.EXPERTS_DOWN, index, _CHOSEN, _MIXED, experts=down, **sizes)
        program.add(OpKind.COMBINE, index, _MIXED, HIDDEN, **sizes)

    def _packed(self, weight: Tensor, *, bias: Tensor | None = None, gate_up: bool = False) -> native.LinearStruct:
        return self._program.keep(native.pack(self.library, weight, self._kind, bias=bias, gate_up=gate_up))


def _trees(spans: Sequence[Rows], counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Parents by row, and which spans are trees; nothing if none is. A chain that was written as a tree is none."""
    if all(span.parents is None for span in spans):
        return [], []
    parents: list[int] = []
    is_tree: list[int] = []
    for span, count in zip(spans, counts, strict=True):
        chain = list(range(-1, count - 1))
        own = chain if span.parents is None else list(span.parents)
        parents += own
        is_tree.append(own != chain)
    return parents, is_tree
