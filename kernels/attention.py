"""Grouped-query attention over a paged KV cache that returns (out, lse); one row's bits depend on nothing beside it.

    s_mj = scale * q_m . k_j  for each key j that row m sees
    lse_m = log(sum_j exp(s_mj)),  out_m = sum_j exp(s_mj - lse_m) v_j

with q (M, Hq, D), keys (pages, Hkv, D, page), values (pages, Hkv, page, D), out (M, Hq, D), lse (M, Hq) in fp32,
natural log. Query head h reads key-value head h // (Hq / Hkv). A row that sees nothing gives out 0 and lse -inf. A row
that sees a NaN or an infinity is not finite; one that does not see it is untouched by it.

Keys are taken in the order of their *positions*, in tiles that start at multiples of the tile's size. A token of a
chain stands at the position that is its slot; a tree's nodes stand at base + depth wherever their slots are, so that
a node's sum over its path has the bits which a plain decode of the same tokens has.

Two forms: one online softmax over all keys (prefill), and, with ``leaf``, a normalised partial for each leaf of so many
positions, side by side (decode and verify, where rows are few and keys many; also the leaves of the canonical tree of
:mod:`countersign.kernels.merge`). The number of leaves never changes what a leaf gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from countersign.kernels import merge
from countersign.kernels.dispatch import Backend, choose

TILE = 64
"""Keys that the reference sums at once; every leaf is a multiple of it, and every Triton tile of a leaf divides it."""

_ROWS = 16
"""Rows of every tensor operation of the reference, so that a row's bits cannot depend on their number."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which keys each of the M rows of q sees. All tensors are int32, contiguous and on q's device.

    Row i of sequence s is its token at slot base[s] + i and sees the sequence's slots up to its own; or, of those from
    base[s] on, the ones that ``ancestors`` names.

    Attributes:
        first: (S + 1,) rows of sequence s are first[s] .. first[s + 1] - 1; first[0] = 0 and first[S] = M.
        base: (S,) tokens before the sequence's first row.
        tables: (S, P) pages of each sequence by slot; entries for slots that are not attended are never read.
        ancestors: (M, A) bit words. Bit u % 32 of word u // 32: the row sees its sequence's row u, which is an ancestor
            of it, or itself; ancestors stand before their descendants. None: chains.
        ranges: (S, 2) the half-open range of positions that is attended, as where the others are another rank's. None:
            all. In a tree, one that reaches behind base[s] needs the pages of all the tree's slots.
        longest: most slots of any sequence, new rows included, where the host knows it. Only its number of leaves
            needs it; None reads it back from the device.
    """

    first: Tensor
    base: Tensor
    tables: Tensor
    ancestors: Tensor | None = None
    ranges: Tensor | None = None
    longest: int | None = None

    @staticmethod
    def dense(
        batch: int, queries: int, keys: int, *, causal: bool, device: torch.device | str = "cpu"
    ) -> tuple[Layout, int]:
        """The layout of plain (B, S, H, D) tensors, and the page size to give :func:`pages`: the largest that fits.

        Raises:
            ValueError: keys are no multiple of 16, or fewer than the queries of a causal call.
        """
        size = keys & -keys
        if size < 16:
            raise ValueError(f"keys is {keys}; it must be a multiple of 16")
        if causal and keys < queries:
            raise ValueError(f"keys is {keys}; a causal call needs at least as many as its {queries} queries")

        def numbers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        first = numbers([i * queries for i in range(batch + 1)])
        tables = torch.arange(batch * keys // size, dtype=torch.int32, device=device).view(batch, -1)
        if causal:
            return Layout(first, numbers([keys - queries] * batch), tables, longest=keys), size
        # Rows that stand behind all keys see them all.
        ranges = numbers([0, keys] * batch).view(batch, 2)
        return Layout(first, numbers([keys] * batch), tables, ranges=ranges, longest=keys), size

    def leaves(self, leaf: int) -> int:
        """How many leaves of so many positions the longest sequence has; at least 1."""
        longest = self.longest
        if longest is None:
            longest = int((self.base + self.first.diff()).max())
        return max(1, -(-longest // leaf))


def pages(k: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Plain k and v (B, S, H, D) seen as pages of so many tokens: (pages, H, D, size) and (pages, H, size, D)."""
    batch, length, heads, dim = k.shape
    shape = (batch * length // size, size, heads, dim)
    return k.view(shape).permute(0, 2, 3, 1), v.view(shape).permute(0, 2, 1, 3)


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    leaf: int | None = None,
    split: int | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the rows, shapes as in the module's docstring; with ``leaf`` (N, M, Hq, D) and (N, M, Hq).

    Args:
        q: (M, Hq, D), fp32, fp16 or bf16 (the reference also takes fp64), D contiguous.
        keys: (pages, Hkv, D, page), a strided view; D or page contiguous; page a power of two from 16.
        values: (pages, Hkv, page, D), likewise.
        layout: who sees what.
        scale: of the scores, > 0.
        window: a row sees only the last so many positions, its own included; None: all.
        leaf: a multiple of 64: a partial for each of the N = layout.leaves(leaf) leaves, in fp32. A leaf of which a row
            sees nothing gives it out 0 and lse -inf. None: one softmax over all keys.
        split: leaves that one program computes one after another; changes the speed and no bits.
        out_dtype: fp32 or that of q.
        backend: None: :func:`countersign.kernels.dispatch.choose`.

    Raises:
        ValueError: an argument is not as said here; the message names it.
    """
    chosen = choose(backend, q, keys, values)
    _check_tensors(q, keys, values, chosen)
    _check_layout(q, keys, layout)
    _check_options(q, scale, window, leaf, split, out_dtype)
    if chosen == "reference":
        out, lse = reference(q, keys, values, layout, scale=scale, window=window, leaf=leaf)
        return out.to(out_dtype), lse
    from countersign.kernels.triton import attention

    return attention.attend(
        q, keys, values, layout, scale=scale, window=window, leaf=leaf, split=split, out_dtype=out_dtype
    )


def reference(
    q: Tensor, keys: Tensor, values: Tensor, layout: Layout, *, scale: float, window: int | None, leaf: int | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) by the equation: a partial for each tile of 64 positions, merged flat. In fp32, or fp64 where q is."""
    rows, heads, dim = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    leaves = 1 if leaf is None else layout.leaves(leaf)
    out = torch.zeros(leaves, rows, heads, dim, dtype=wide, device=q.device)
    lse = torch.full((leaves, rows, heads), -torch.inf, dtype=wide, device=q.device)
    for start in range(0, rows, _ROWS):
        # The last rows are padded by repeating the last one.
        part = torch.arange(start, start + _ROWS, device=q.device).clamp(max=rows - 1)
        view = _View.of(layout, part)
        used, end = min(_ROWS, rows - start), int(view.position.max()) + 1
        for i in range(leaves):
            positions = range(i * leaf, min((i + 1) * leaf, end), TILE) if leaf else range(0, end, TILE)
            tiles = [_tile(q[part].to(wide), keys, values, view, p, scale, window) for p in positions]
            if tiles:
                outs, lses = (torch.stack(parts) for parts in zip(*tiles, strict=True))
                merged = merge.merge(outs, lses, backend="reference")
                out[i, start : start + used], lse[i, start : start + used] = merged[0][:used], merged[1][:used]
    return (out[0], lse[0]) if leaf is None else (out, lse)


@dataclass(frozen=True, slots=True)
class _View:
    """What R rows see: ``position`` (R,), ``base`` (R, 1), ``table`` (R, P), ``range`` (R, 2) and, of trees, ``path``
    (R, U): the rows of the span that each sees, in their order, then the others.
    """

    position: Tensor
    base: Tensor
    table: Tensor
    range: Tensor | None
    path: Tensor | None

    @staticmethod
    def of(layout: Layout, rows: Tensor) -> _View:
        sequence = torch.searchsorted(layout.first, rows, right=True) - 1
        base, path = layout.base[sequence].long(), None
        if layout.ancestors is None:
            position = base + rows - layout.first[sequence]
        else:
            bits = layout.ancestors[rows].unsqueeze(-1) >> torch.arange(32, device=rows.device) & 1
            bits = bits.flatten(1)
            position, path = base + bits.sum(1) - 1, torch.sort(bits, dim=1, descending=True, stable=True).indices
        reach = None if layout.ranges is None else layout.ranges[sequence]
        return _View(position, base.unsqueeze(1), layout.tables[sequence].long(), reach, path)


def _tile(
    q: Tensor, keys: Tensor, values: Tensor, view: _View, start: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """The partial (R, Hq, D), (R, Hq) of the positions from ``start`` on, TILE of them."""
    rows, heads, dim = q.shape
    kv_heads, size = values.shape[1], values.shape[2]
    position = torch.arange(start, start + TILE, device=q.device).expand(rows, TILE)
    visible = position <= view.position.unsqueeze(1)
    if window is not None:
        visible &= position > view.position.unsqueeze(1) - window
    slot = position
    if view.path is not None:
        step = (position - view.base).clamp(0, view.path.shape[1] - 1)
        slot = torch.where(position < view.base, position, view.base + view.path.gather(1, step))
    if view.range is not None:
        visible &= (position >= view.range[:, :1]) & (position < view.range[:, 1:])
    slot = slot.where(visible, 0)
    page, within = view.table.gather(1, slot // size).where(visible, 0), slot % size
    k, v = keys[page, :, :, within].to(q.dtype), values[page, :, within].to(q.dtype)  # (R, TILE, Hkv, D)
    # An unseen NaN times a weight of 0 would be NaN.
    k, v = (part.where(visible[:, :, None, None], 0).transpose(1, 2) for part in (k, v))
    scores = scale * (q.view(rows, kv_heads, -1, dim) @ k.transpose(2, 3))
    scores = scores.where(visible[:, None, None], -torch.inf)
    largest = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - largest.masked_fill(largest == -torch.inf, 0))
    total = weights.sum(dim=-1, keepdim=True)
    out = (weights @ v) / total.masked_fill(total == 0, 1)
    return out.reshape(rows, heads, dim), (largest + torch.log(total)).reshape(rows, heads)


def _check_tensors(q: Tensor, keys: Tensor, values: Tensor, backend: Backend) -> None:
    if q.dim() != 3 or q.stride(-1) != 1 or not 16 <= q.shape[2] <= 256:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and strides {q.stride()}; it must be (M, Hq, D), D contiguous and 16 .. 256"
        )
    accepted = [torch.float32, torch.float16, torch.bfloat16, *([torch.float64] if backend == "reference" else [])]
    if q.dtype not in accepted:
        raise ValueError(f"q has dtype {q.dtype}; the {backend} backend takes {accepted}")
    for name, pool in (("keys", keys), ("values", values)):
        if pool.dtype != q.dtype or pool.device != q.device:
            raise ValueError(f"{name} has {pool.dtype} on {pool.device}; it must be as q: {q.dtype} on {q.device}")
        if pool.dim() != 4 or 1 not in pool.stride()[2:]:
            raise ValueError(
                f"{name} has shape {tuple(pool.shape)} and strides {pool.stride()}; it must have 4 dimensions, one "
                "of the last two contiguous"
            )
    count, kv_heads, size = values.shape[:3]
    if size < 16 or size & (size - 1):
        raise ValueError(f"values has pages of {size} tokens; a page must be a power of two from 16 on")
    if not kv_heads or q.shape[1] % kv_heads:
        raise ValueError(f"values has {kv_heads} heads; they must divide the {q.shape[1]} of q")
    if values.shape[3] != q.shape[2] or keys.shape != (count, kv_heads, q.shape[2], size):
        raise ValueError(
            f"keys is {tuple(keys.shape)} and values {tuple(values.shape)}; they must be (pages, Hkv, D, page) and "
            f"(pages, Hkv, page, D), with q's D, {q.shape[2]}"
        )


def _check_layout(q: Tensor, keys: Tensor, layout: Layout) -> None:
    sequences, rows = len(layout.base), len(q)
    shapes = {
        "first": (layout.first, (sequences + 1,)),
        "base": (layout.base, (sequences,)),
        "tables": (layout.tables, (sequences, -1)),
        "ancestors": (layout.ancestors, (rows, -1)),
        "ranges": (layout.ranges, (sequences, 2)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        fits = tensor.dim() == len(shape) and all(n in {-1, m} for n, m in zip(shape, tensor.shape, strict=True))
        if not fits or not tensor.is_contiguous() or tensor.dtype != torch.int32 or tensor.device != q.device:
            raise ValueError(
                f"layout.{name} is {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}; it must be contiguous, "
                f"{shape} (-1: any) of torch.int32 on {q.device}"
            )
    if q.device.type == "cpu":
        _check_numbers(rows, keys, layout)


def _check_numbers(rows: int, keys: Tensor, layout: Layout) -> None:
    """What only the numbers show; on a GPU looking at them would cost a synchronisation."""
    counts, tables = layout.first.diff(), layout.tables
    if layout.first[0] or layout.first[-1] != rows or (counts < 0).any() or (layout.base < 0).any():
        raise ValueError(f"layout.first must rise from 0 to the {rows} rows of q, and layout.base be >= 0")
    if tables.numel() and not (tables.amin() >= 0 and tables.amax() < len(keys)):
        raise ValueError(f"layout.tables must name pages 0 .. {len(keys) - 1}")
    end = layout.base + counts
    if layout.ranges is not None:
        last = layout.ranges[:, 1]
        # A tree's position may stand in any of its slots.
        whole = torch.zeros_like(last) if layout.ancestors is None else last > layout.base
        end = torch.minimum(end, last).where(whole == 0, end)
    if len(counts) and end.amax() > tables.shape[1] * keys.shape[3]:
        raise ValueError(
            f"layout.tables has {tables.shape[1]} pages of {keys.shape[3]}; {int(end.amax())} are attended"
        )


def _check_options(
    q: Tensor, scale: float, window: int | None, leaf: int | None, split: int | None, out_dtype: torch.dtype
) -> None:
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be > 0")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be >= 1 or None")
    if leaf is not None and (leaf < TILE or leaf % TILE):
        raise ValueError(f"leaf is {leaf}; it must be a multiple of {TILE} or None")
    if split is not None and (leaf is None or split < 1):
        raise ValueError(f"split is {split}; it must be >= 1, beside a leaf, or None")
    if out_dtype != torch.float32 and (leaf is not None or out_dtype != q.dtype):
        raise ValueError(f"out_dtype is {out_dtype}; it must be torch.float32, or without a leaf {q.dtype}")
