"""What a layer computes with beside its sums: torch's own operations on padded tensors, or the kernels on the pages.

:class:`Padded` gathers each sequence's keys into a dense tensor and runs on any device that torch knows. :class:`Paged`
calls :mod:`countersign.kernels`, whose attention reads the pages where they are: Triton kernels on a GPU, elsewhere
their references.

With ``numerics: invariant`` every operation of either gives a row the same bits whatever stands beside it. Paged
attention then always splits a row's keys into leaves that fold along their fixed tree (ADR 9), in prefill too: one
softmax over all keys rounds otherwise, and a token's bits would depend on the form that computed it. ``fast`` splits
where rows are few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from countersign.kernels import attention, merge, padded_attention
from countersign.kernels.dispatch import Backend, choose
from countersign.kernels.matmul_invariant import matmul_invariant
from countersign.kernels.norm_rope import norm_rope, rms_norm
from countersign.kernels.rotary import rotate
from countersign.kernels.swiglu import swiglu
from countersign.services.engine.config import TORCH_DTYPES, Dtype, ModelConfig, Numerics
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.linear import Linear, LinearMode, LinearPacker
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.engine.rope import RotaryTable
from countersign.services.engine.step import (
    EXACT,
    FIXED,
    Call,
    Group,
    Padding,
    Span,
    Splitting,
    Step,
    plan,
    plan_paged,
)

Choice: TypeAlias = Literal["padded"] | Backend

LEAF = 256
"""Positions of a leaf of paged attention."""
FEW = 64
"""The most rows of a span whose keys ``fast`` splits."""
PARTIAL_BYTES = 1 << 28
"""The most memory of one call's partials, unless one tree needs more."""

HEAD_SIZES = range(16, 257)
"""Head sizes that paged attention computes."""


@dataclass(frozen=True, slots=True)
class Paths:
    """Which way each operation is computed here: the mode of each linear shape (out, in), and attention's path, None
    for torch's choice.
    """

    linear: Mapping[tuple[int, int], LinearMode]
    attention: padded_attention.Path | Backend | None


class Ops(Protocol):
    """The operations of a layer. M rows are a step's, M' with its padding.

    ``name`` stands for the way they round. ``fixed``: whether attention asks nothing of the host, so that a graph can
    hold it.
    """

    @property
    def name(self) -> str: ...

    @property
    def paths(self) -> Paths: ...

    @property
    def padding(self) -> Padding: ...

    @property
    def fixed(self) -> bool: ...

    def pack(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """The product with a weight that is where it shall stay."""

    def plan(self, cache: PagedCache, spans: Sequence[Span]) -> Step:
        """The spans laid out for :meth:`attend`."""

    def chains(self, step: Step, batch: int, table: Tensor) -> Step:
        """The step, of ``batch`` chains of as many rows each, with attention through ``table`` (batch * pages): made
        from tensors alone. The rows behind a chain's end have its last token's position.
        """

    def angles(self, table: RotaryTable, end: int) -> tuple[Tensor, Tensor]:
        """The cosines and sines of the positions below ``end`` at least, as :meth:`rotate` takes their rows."""

    def normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of (M', hidden)."""

    def rotate(self, qk: Tensor, weight: Tensor | None, angles: tuple[Tensor, Tensor]) -> Tensor:
        """(M, heads, head_dim), normed where there is a weight (heads, head_dim), then rotated."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
        """(M, heads, head_dim) to (M', heads head_dim), over a layer's keys and values in the cache."""

    def gate(self, gate_up: Tensor) -> Tensor:
        """SwiGLU, (rows, 2 I) to (rows, I)."""


def make_ops(choice: Choice | None, config: ModelConfig, dtype: Dtype, numerics: Numerics, device: str) -> Ops:
    """What is named; else Triton's kernels, on a GPU that has them and for a head size that they take, or torch."""
    if choice is None:
        takes = config.head_dim in HEAD_SIZES and choose(None, torch.empty(0, device=device)) == "triton"
        choice = "triton" if takes else "padded"
    if choice == "padded":
        return Padded(config, dtype, numerics, device)
    return Paged(config, numerics, device, choice)


class Padded:
    """Torch's own operations."""

    name = "eager"

    def __init__(self, config: ModelConfig, dtype: Dtype, numerics: Numerics, device: str) -> None:
        self._config, self._device, self._dtype = config, device, TORCH_DTYPES[dtype]
        self._packer = LinearPacker(numerics)
        path = None
        if numerics == "invariant":
            path = padded_attention.select_path(config.heads, config.kv_heads, config.head_dim, self._dtype, device)
        self.padding = replace(EXACT, fold=config.heads // config.kv_heads) if path is None else FIXED
        self.fixed = path is not padded_attention.Path.ROW_BY_ROW
        self.paths = Paths(self._packer.modes, path)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return self._packer.pack(weight, bias)

    def plan(self, cache: PagedCache, spans: Sequence[Span]) -> Step:
        return plan(cache, spans, self._config.sliding_window, self.padding, self._device)

    def chains(self, step: Step, batch: int, table: Tensor) -> Step:
        keys = len(table) // batch * PAGE_TOKENS
        folded = step.positions.view(batch, -1, 1).expand(-1, -1, self.padding.fold).flatten(1)
        mask = padded_attention.Mask.causal(folded, keys, self._config.sliding_window, self._dtype)
        return replace(step, groups=[Group(batch, keys, None, table, None, mask)])

    def angles(self, table: RotaryTable, end: int) -> tuple[Tensor, Tensor]:
        known = len(table.table(end)[0])
        cos, sin = table.rows(torch.arange(known), known, self._dtype)
        return cos.to(self._device), sin.to(self._device)

    def normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self._config.rms_eps)

    def rotate(self, qk: Tensor, weight: Tensor | None, angles: tuple[Tensor, Tensor]) -> Tensor:
        if weight is not None:
            qk = F.rms_norm(qk, (self._config.head_dim,), None, self._config.rms_eps) * weight
        return rotate(qk, *angles)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
        return _in_rows([self._attend_group(q, group, keys, values) for group in step.groups], step)

    def gate(self, gate_up: Tensor) -> Tensor:
        # On an accelerator an element's bits do not depend on where it stands, and fewer passes over memory are faster.
        if gate_up.device.type == "cpu":
            return swiglu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def _attend_group(self, q: Tensor, group: Group, keys: Tensor, values: Tensor) -> Tensor:
        """(M, heads, head_dim) to (B T, heads head_dim)."""
        q = q if group.rows is None else q.index_select(0, group.rows)
        fold = 1 if group.mask is None else self.padding.fold
        q = q.reshape(group.batch, -1, self._config.heads // fold, fold, self._config.head_dim)
        queries, q = q.shape[1], q.transpose(1, 2).flatten(2, 3)
        k = keys.index_select(0, group.pages).view(group.batch, -1, *keys.shape[1:]).permute(0, 2, 1, 4, 3)
        v = values.index_select(0, group.pages).view(group.batch, -1, *values.shape[1:]).transpose(1, 2)
        k, v = k.flatten(2, 3), v.flatten(2, 3)
        if group.tail is not None:
            k[group.tail.pieces, :, group.tail.places] = keys[group.tail.pages, :, :, group.tail.offsets]
            v[group.tail.pieces, :, group.tail.places] = values[group.tail.pages, :, group.tail.offsets]
        scale = self._config.head_dim**-0.5
        if group.mask is None:
            out = _attend_causal(q, k[:, :, : group.keys], v[:, :, : group.keys], scale)
        elif isinstance(self.paths.attention, padded_attention.Path):
            out, _ = padded_attention.attend(q, k, v, group.mask, scale=scale, path=self.paths.attention)
        else:
            out = padded_attention.attend_fast(q, k, v, group.mask, scale=scale)
        out = out.view(group.batch, -1, queries, fold, self._config.head_dim)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)


class Paged:
    """The kernels, computed by ``backend``."""

    padding = EXACT
    fixed = True

    def __init__(self, config: ModelConfig, numerics: Numerics, device: str, backend: Backend) -> None:
        self._config, self._device, self._backend = config, device, backend
        partials = PARTIAL_BYTES // (4 * config.heads * config.head_dim)
        self._splitting = Splitting(LEAF, None if numerics == "invariant" else FEW, partials)
        self._packer = None if numerics == "invariant" else LinearPacker(numerics)
        self._modes = {} if self._packer is None else self._packer.modes
        self.paths = Paths(self._modes, backend)
        self.name = f"paged-{backend}"

    def pack(self, weight: Tensor, bias: Tensor | None) -> Linear:
        if self._packer is not None:
            return self._packer.pack(weight, bias)
        self._modes[weight.shape[0], weight.shape[1]] = LinearMode.TILED
        return _KernelLinear(weight.contiguous(), bias, self._backend)

    def plan(self, cache: PagedCache, spans: Sequence[Span]) -> Step:
        return plan_paged(cache, spans, self._splitting, self._device)

    def chains(self, step: Step, batch: int, table: Tensor) -> Step:
        """A row behind a chain's end takes what its last token's row gives: its own place has no key."""
        queries, tables = step.rows // batch, table.view(batch, -1).int()
        positions = step.positions.view(batch, queries)
        first = torch.arange(0, step.rows + 1, queries, dtype=torch.int32, device=table.device)
        base = positions[:, 0].int().contiguous()
        layout = attention.Layout(first, base, tables, longest=tables.shape[1] * PAGE_TOKENS)
        take = None
        if queries > 1:
            take = (
                positions - positions[:, :1] + torch.arange(batch, device=table.device)[:, None] * queries
            ).flatten()
        return replace(step, calls=[Call(slice(0, step.rows), layout, self._splitting.leaf)], take=take)

    def angles(self, table: RotaryTable, end: int) -> tuple[Tensor, Tensor]:
        cos, sin = table.table(end)
        return cos.to(self._device), sin.to(self._device)

    def normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self._config.rms_eps, backend=self._backend)

    def rotate(self, qk: Tensor, weight: Tensor | None, angles: tuple[Tensor, Tensor]) -> Tensor:
        return norm_rope(qk.contiguous(), weight, *angles, self._config.rms_eps, backend=self._backend)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
        return _in_rows([self._attend(q[call.rows], keys, values, call) for call in step.calls], step)

    def gate(self, gate_up: Tensor) -> Tensor:
        return swiglu(gate_up, backend=self._backend)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """(rows, heads, head_dim) to (rows, heads head_dim)."""
        out, lse = attention.attend(
            q,
            keys,
            values,
            call.layout,
            scale=self._config.head_dim**-0.5,
            window=self._config.sliding_window,
            leaf=call.leaf,
            out_dtype=q.dtype if call.leaf is None else torch.float32,
            backend=self._backend,
        )
        if call.leaf is not None:
            out, _ = merge.tree(out, lse, backend=self._backend)
        return out.flatten(1).to(q.dtype)


@dataclass(frozen=True, slots=True)
class _KernelLinear:
    weight: Tensor
    bias: Tensor | None
    backend: Backend

    @property
    def mode(self) -> LinearMode:
        return LinearMode.TILED

    def __call__(self, x: Tensor) -> Tensor:
        return matmul_invariant(x, self.weight, self.bias, backend=self.backend)


def _in_rows(results: list[Tensor], step: Step) -> Tensor:
    result = results[0] if len(results) == 1 else torch.cat(results)
    return result if step.take is None else result.index_select(0, step.take)


def _attend_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of the last rows, those of ``q``, to all before them and themselves: [B, heads, rows, head_dim]."""
    rows, keys = q.shape[2], k.shape[2]
    mask: Tensor | None
    if q.is_cuda:
        # There this has kernels of its own. The module loads torch's compiler, which takes as long as torch itself.
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(rows, keys)
    else:
        mask = None if rows == keys else torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)
