"""The Triton form of :mod:`countersign.kernels.attention`.

A program owns one tile of query rows of one sequence and one key-value head: the tile's rows are (token, query head of
the group) pairs, so that a group reads each key once. It walks the key tiles by position: those that every row sees
whole need no mask; those at the edges do; of a tree, the tiles that reach behind the cached tokens are walked for each
token of the tile anew, its path gathered in the order of depth.

Bits: all three ways take the same operations in the same order on a tile, and a tile that a row does not see multiplies
its sums by exp2(0) = 1 and adds 0. The sizes of tiles come from the form, head size, type and architecture alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from countersign.kernels.attention import Layout

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = 1.4426950408889634
EVER = tl.constexpr(2**31 - 1)
"""Behind every slot."""
WHOLE = tl.constexpr(2**30)
"""The page size of tables with one page: its address then moves out of the loops."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows and keys of a tile, warps of a program, stages of its pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


# By (leaves, 16-bit): the tiles for head sizes up to 64, 128 and 256.
_HOPPER = {
    (False, True): (Tiles(128, 128, 8, 3), Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 2)),
    (True, True): (Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 8, 2)),
}
# Fits the 99 KiB of shared memory that every architecture from 8.0 on has.
_ANY = {
    (False, True): (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 1)),
    (True, True): (Tiles(16, 64, 4, 2), Tiles(16, 64, 4, 2), Tiles(16, 32, 4, 2)),
    (False, False): (Tiles(32, 32, 4, 2), Tiles(32, 16, 4, 1), Tiles(16, 16, 4, 1)),
    (True, False): (Tiles(16, 32, 4, 2), Tiles(16, 32, 4, 2), Tiles(16, 16, 4, 2)),
}


def tiles(leaves: bool, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """The configuration; it depends on nothing that differs between two calls of one model on one machine."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    kind = leaves, dtype.itemsize == 2
    table = _HOPPER if hopper and kind in _HOPPER else _ANY
    return table[kind][0 if head_dim <= 64 else 1 if head_dim <= 128 else 2]


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: int | None,
    leaf: int | None,
    split: int | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As the public function, which has checked the arguments."""
    rows, heads, head_dim = q.shape
    kv_heads, page = values.shape[1:3]
    tile = tiles(leaf is not None, head_dim, q.dtype, q.device)
    if layout.tables.shape[1] == 1 and page >= tile.keys:
        page = WHOLE.value
    shape = (1 if leaf is None else layout.leaves(leaf), rows, heads)
    # The interpreter knows no bf16: it gets fp32 from the kernel, and torch rounds.
    interpreted = not q.is_cuda
    out = torch.empty(*shape, head_dim, dtype=torch.float32 if interpreted else out_dtype, device=q.device)
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    split = split or max(1, 512 // (leaf or 512))
    sequences, group = len(layout.base), heads // kv_heads
    # Enough for every sequence's last tile to be partly filled; programs that are too many end at once.
    grid = (rows * group // tile.rows + sequences, kv_heads, -(-shape[0] // split))
    nothing = layout.base  # a pointer for what is not there
    _kernel[grid](
        q, keys, values, out, lse, layout.first, layout.base, layout.tables,
        nothing if layout.ancestors is None else layout.ancestors,
        nothing if layout.ranges is None else layout.ranges,
        q.stride(), keys.stride(), values.stride(),
        rows, heads, sequences, layout.tables.shape[1],
        0 if layout.ancestors is None else layout.ancestors.shape[1],
        shape[0], split, scale * LOG2_E,
        GROUP=group, HEAD_DIM=head_dim, PAGE=page, WINDOW=window or 0, LEAF=leaf or 0,
        TREE=layout.ancestors is not None, RANGES=layout.ranges is not None,
        ROWS=tile.rows, KEYS=tile.keys, DIM=triton.next_power_of_2(head_dim), WIDEN=interpreted,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if leaf is None:
        out, lse = out[0], lse[0]
    return out.to(out_dtype), lse


@triton.jit
def _sequence_of(tile, first, sequences, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The sequence that owns a tile of rows: s has its tiles from first[s] * GROUP // ROWS + s on."""
    before = 0
    for start in range(0, sequences, 128):
        s = start + tl.arange(0, 128)
        row = tl.load(first + s, mask=s < sequences, other=0)
        before += tl.sum(((row * GROUP // ROWS + s <= tile) & (s < sequences)).to(tl.int32))
    return before - 1


@triton.jit
def _step_of(depth, path, words):
    """The span's row at each depth of a path: the index of its depth-th set bit."""
    step, rank = tl.zeros_like(depth), 0
    for w in range(words):
        bits = (tl.load(path + w) >> tl.arange(0, 32)) & 1
        ranks = rank + tl.cumsum(bits)
        step += tl.sum((ranks[None, :] <= depth[:, None]).to(tl.int32), axis=1)
        rank += tl.sum(bits)
    return step


@triton.jit
def _depth_of(row, ancestors, words):
    """How many ancestors each row has in its span."""
    depth = tl.full(row.shape, -1, tl.int32)
    for w in range(words):
        word = tl.load(ancestors + row * words + w)
        depth += tl.sum((word[:, None] >> tl.arange(0, 32)[None, :]) & 1, axis=1)
    return depth


@triton.jit
def _tile(
    state, q, pool, table, start, slots, visible, live, read, scale,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    TOGETHER: tl.constexpr, MASKED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over the keys in ``slots`` (KEYS,). Where MASKED, ``read`` (KEYS,) of them have a
    page, ``live`` (KEYS,) count and ``visible`` (ROWS, KEYS) are seen. TOGETHER: all are in the page of slot ``start``.
    """
    acc, total, largest = state
    keys, values, key_strides, value_strides = pool
    d = tl.arange(0, DIM)
    real = d < HEAD_DIM
    if TOGETHER:
        page = tl.load(table if PAGE == WHOLE else table + start // PAGE)
    elif MASKED:
        page = tl.load(table + slots // PAGE, mask=read, other=0)
    else:
        page = tl.load(table + slots // PAGE)
    page, within = page.to(tl.int64), slots % PAGE
    # All of a page may be read, 16 bytes at once: a key that is not seen stays in its own column of the scores.
    keys += (page * key_strides[0] + within * key_strides[3])[None, :] + (d * key_strides[2])[:, None]
    values += (page * value_strides[0] + within * value_strides[2])[:, None]
    values += (d * value_strides[3])[None, :]
    k = tl.load(keys) if DIM == HEAD_DIM else tl.load(keys, mask=real[:, None], other=0)
    if MASKED:
        v = tl.load(values, mask=live[:, None] & real[None, :], other=0)
    else:
        v = tl.load(values) if DIM == HEAD_DIM else tl.load(values, mask=real[None, :], other=0)
    if WIDEN:
        k, v = k.to(tl.float32), v.to(tl.float32)
    scores = tl.dot(q, k, input_precision="ieee")
    if MASKED:
        # A value of NaN times another row's weight of 0 is NaN: so it moves to the scores of those who see it.
        finite = tl.abs(v) < float("inf")
        v = tl.where(finite, v, 0)
        broken = tl.min(finite.to(tl.int32), axis=1) == 0
        scores = tl.where(visible, tl.where(broken[None, :], float("nan"), scores), float("-inf"))
    # Kept times scale and rounded: a tile that does not raise it then gives exp2(0), whatever the compiler fuses.
    higher = tl.maximum(largest, tl.max(scores, axis=1) * scale)
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(tl.fma(scores, scale, -shift[:, None]))
    fade = tl.exp2(largest - shift)
    total = tl.fma(total, fade, tl.sum(weights, axis=1))
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, total, higher


@triton.jit
def _walk(
    state, q, pool, table, scale, position, start, end, first, stop,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    MASKED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The tiles of [start, end), of whose slots those in [first, stop) count where MASKED."""
    acc, total, largest = state
    column = tl.arange(0, KEYS)
    for at in range(start, end, KEYS):
        slots = at + column
        live, read, visible = None, None, None
        if MASKED:
            live = (slots >= first) & (slots < stop)
            # By the page, so that the compiler sees that neighbours have the same one.
            read = (slots // PAGE >= first // PAGE) & (slots // PAGE <= (stop - 1) // PAGE)
            visible = live[None, :] & (slots[None, :] <= position[:, None])
            if WINDOW:
                visible &= slots[None, :] > position[:, None] - WINDOW
        acc, total, largest = _tile(
            (acc, total, largest), q, pool, table, at, slots, visible, live, read, scale,
            HEAD_DIM, PAGE, DIM, PAGE >= KEYS, MASKED, WIDEN,
        )  # fmt: skip
    return acc, total, largest


@triton.jit
def _partial(
    out, lse, q, pool, table, scale, token, offset, position, base, bounds, reach, path, words, begin, end,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr, RANGES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Attends the positions [begin, end), multiples of KEYS, and stores the rows at ``offset``, -1: none.

    token (ROWS,) of each row in its span and its position; bounds: the tile's first and last token; reach: the
    range of positions that the sequence attends.
    """
    acc = tl.zeros((ROWS, DIM), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    low, high = bounds
    first_place, last_place = reach
    column = tl.arange(0, KEYS)

    # The tiles of [start, stop) are seen by some row, those of [whole, whole_stop) by every one and to their last key.
    start, whole = tl.maximum(begin, first_place), tl.maximum(begin, first_place)
    if TREE:
        stop = tl.minimum(tl.minimum(end, last_place), base // KEYS * KEYS)
        whole_stop = stop
    else:
        stop = tl.minimum(tl.minimum(end, last_place), base + high + 1)
        whole_stop = tl.minimum(stop, base + low + 1)
    if WINDOW:
        # A node is no deeper than its place in the span, and its depth is at least 0.
        start = tl.maximum(start, (base if TREE else base + low) - WINDOW + 1)
        whole = tl.maximum(whole, base + high - WINDOW + 1)
    start = start // KEYS * KEYS
    whole = tl.minimum((whole + KEYS - 1) // KEYS * KEYS, tl.maximum(start, (stop + KEYS - 1) // KEYS * KEYS))
    whole_stop = tl.maximum(whole_stop // KEYS * KEYS, whole)

    state = acc, total, largest
    if WINDOW or RANGES:
        state = _walk(
            state, q, pool, table, scale, position, start, whole, first_place, stop,
            HEAD_DIM, PAGE, WINDOW, KEYS, DIM, True, WIDEN,
        )  # fmt: skip
    state = _walk(
        state, q, pool, table, scale, position, whole, whole_stop, first_place, stop,
        HEAD_DIM, PAGE, WINDOW, KEYS, DIM, False, WIDEN,
    )  # fmt: skip
    acc, total, largest = _walk(
        state, q, pool, table, scale, position, whole_stop, stop, first_place, stop,
        HEAD_DIM, PAGE, WINDOW, KEYS, DIM, True, WIDEN,
    )  # fmt: skip
    if TREE:
        # Leaves before the tree skip it.
        for node in range(low, tl.where(base // KEYS * KEYS < end, high + 1, low)):
            mine = token == node
            deepest = tl.max(tl.where(mine, position, 0))
            ahead = tl.maximum(begin, base // KEYS * KEYS)
            if WINDOW:
                ahead = tl.maximum(ahead, (deepest - WINDOW + 1) // KEYS * KEYS)
            for at in range(ahead, tl.minimum(end, deepest + 1), KEYS):
                place = at + column
                live = (place >= first_place) & (place < tl.minimum(last_place, deepest + 1))
                if WINDOW:
                    live &= place > deepest - WINDOW
                slots = tl.where(place < base, place, base + _step_of(place - base, path + node * words, words))
                slots = tl.where(live, slots, 0)
                acc, total, largest = _tile(
                    (acc, total, largest), q, pool, table, at, slots, mine[:, None] & live[None, :], live, live, scale,
                    HEAD_DIM, PAGE, DIM, False, True, WIDEN,
                )  # fmt: skip

    d = tl.arange(0, DIM)
    stored = offset >= 0
    total = tl.where(total == 0, 1.0, total)  # of a row that sees nothing; its largest is -inf
    acc = acc / total[:, None]
    tl.store(
        out + offset[:, None] * HEAD_DIM + d[None, :],
        acc.to(out.dtype.element_ty),
        mask=stored[:, None] & (d < HEAD_DIM)[None, :],
    )
    tl.store(lse + offset, (largest + tl.log2(total)) * LN_2, mask=stored)


@triton.jit(do_not_specialize=["rows", "sequences", "leaves", "split"])
def _kernel(
    q, keys, values, out, lse, first, base, tables, ancestors, ranges,
    q_strides, key_strides, value_strides, rows, heads, sequences, pages, words, leaves, split, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, LEAF: tl.constexpr,
    TREE: tl.constexpr, RANGES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    # The last rows of a long prompt have the most keys, so they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    s = _sequence_of(tile, first, sequences, GROUP, ROWS)
    row = tl.load(first + s)
    flat = (tile - (row * GROUP // ROWS + s)) * ROWS
    count = tl.load(first + s + 1) - row
    if flat >= count * GROUP:
        return
    bounds = flat // GROUP, tl.minimum((flat + ROWS - 1) // GROUP, count - 1)
    flat += tl.arange(0, ROWS)
    # Rows behind the last do as the last does and are not stored.
    token = tl.minimum(flat // GROUP, count - 1)
    head = kv_head * GROUP + flat % GROUP
    base = tl.load(base + s)
    position = base + token
    path = ancestors + row * words
    if TREE:
        position = base + _depth_of(token, path, words)
    reach = (0, EVER)
    if RANGES:
        reach = (tl.load(ranges + 2 * s), tl.load(ranges + 2 * s + 1))
    d = tl.arange(0, DIM)
    at = (row + token).to(tl.int64)[:, None] * q_strides[0] + head[:, None] * q_strides[1] + d[None, :]
    queries = tl.load(q + at, mask=(d < HEAD_DIM)[None, :], other=0)
    if WIDEN:
        queries = queries.to(tl.float32)
    pool = (keys + kv_head * key_strides[1], values + kv_head * value_strides[1], key_strides, value_strides)
    table = tables + s * pages
    offset = (row + token).to(tl.int64) * heads + head
    if LEAF:
        z = tl.program_id(2)
        for leaf in range(z * split, tl.minimum(z * split + split, leaves)):
            place = tl.where(flat < count * GROUP, offset + leaf * (rows.to(tl.int64) * heads), -1)
            _partial(
                out, lse, queries, pool, table, scale, token, place, position, base, bounds, reach, path, words,
                leaf * LEAF, leaf * LEAF + LEAF,
                HEAD_DIM, PAGE, WINDOW, TREE, RANGES, ROWS, KEYS, DIM, WIDEN,
            )  # fmt: skip
    else:
        place = tl.where(flat < count * GROUP, offset, -1)
        _partial(
            out, lse, queries, pool, table, scale, token, place, position, base, bounds, reach, path, words, 0, EVER,
            HEAD_DIM, PAGE, WINDOW, TREE, RANGES, ROWS, KEYS, DIM, WIDEN,
        )  # fmt: skip
