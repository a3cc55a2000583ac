"""Attention over any number of ranks is the attention of one device, and in invariant mode has its bits."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_cases import CASES, LEAF, TREE, Batch, assemble, attend_as, layout_of
from torch import Tensor

from countersign.kernels.ring.errors import LayoutError
from countersign.kernels.ring.layout import Extent, Layout
from countersign.kernels.ring.partition import Range, contiguous, join
from countersign.kernels.ring.schedule import Schedule
from countersign.kernels.ring.streams import StreamTransport
from countersign.kernels.ring.threads import ThreadTransport, run_ranks

SIZES = (1, 2, 3, 4, 8)
WAYS = [(Schedule.TOKEN_RING, False), (Schedule.PASS_KV, False), (Schedule.GATHER_Q, False), (Schedule.GATHER_Q, True)]


def attend(
    batch: Batch,
    size: int,
    schedule: Schedule,
    *,
    leaf: int | None,
    replicated: bool = False,
    window: int | None = None,
    kind: type[ThreadTransport] = ThreadTransport,
) -> tuple[Tensor, Tensor]:
    return attend_with(batch, layout_of(batch, size, leaf, replicated, window), schedule, kind)


def attend_with(
    batch: Batch, layout: Layout, schedule: Schedule, kind: type[ThreadTransport] = ThreadTransport
) -> tuple[Tensor, Tensor]:
    results = run_ranks(layout.size, lambda transport: attend_as(transport, batch, layout, schedule), kind)
    return assemble(batch, results, layout.rows is None)


@functools.cache
def single(name: str, heads: int, kv_heads: int) -> tuple[Batch, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The batch, fp64 dense attention, and one rank's result in invariant mode."""
    batch = Batch.draw(CASES[name], heads, kv_heads)
    return batch, batch.expected(), attend(batch, 1, Schedule.TOKEN_RING, leaf=LEAF)


def check_close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=0)


def check_equal(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 1)], ids=["MHA", "GQA"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_over_ranks(size: int, name: str, heads: int, kv_heads: int) -> None:
    batch, want, alone = single(name, heads, kv_heads)
    for schedule, replicated in WAYS:
        got = attend(batch, size, schedule, leaf=LEAF, replicated=replicated)
        check_close(got, want)
        check_equal(got, alone)
        check_close(attend(batch, size, schedule, leaf=None, replicated=replicated), want)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 5, 16, 40])
def test_sliding_window(window: int, size: int) -> None:
    batch = Batch.draw((*CASES["chunked prefill"], Extent(50, 8, TREE), Extent(70, 1)), 4, 2)
    want, alone = batch.expected(window), attend(batch, 1, Schedule.TOKEN_RING, leaf=LEAF, window=window)
    for schedule, replicated in WAYS:
        got = attend(batch, size, schedule, leaf=LEAF, replicated=replicated, window=window)
        check_close(got, want)
        check_equal(got, alone)
        check_close(attend(batch, size, schedule, leaf=None, replicated=replicated, window=window), want)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from(WAYS), st.integers(1, 6), st.sampled_from([None, 4, 16]))
def test_any_batch(data: st.DataObject, way: tuple[Schedule, bool], size: int, leaf: int | None) -> None:
    def extent() -> Extent:
        cached, new = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 12))
        tree = data.draw(st.booleans())
        return Extent(cached, new, tuple(data.draw(st.integers(-1, i - 1)) for i in range(new)) if tree else None)

    batch = Batch.draw((*(extent() for _ in range(data.draw(st.integers(0, 3)))), Extent(3, 1)), 4, 2)
    got = attend(batch, size, way[0], leaf=leaf, replicated=way[1])
    check_close(got, batch.expected())
    if leaf:
        check_equal(got, attend(batch, 1, Schedule.TOKEN_RING, leaf=leaf))


@settings(max_examples=20, deadline=None)
@given(st.data(), st.integers(1, 5))
def test_a_row_has_the_same_bits_alone_in_any_chunk_and_over_any_cut(data: st.DataObject, size: int) -> None:
    """Prefill in one piece on one rank, against a chunk beside another sequence, leaves dealt out at will."""
    batch = Batch.draw((Extent(0, 90),), 4, 2)
    whole = attend(batch, 1, Schedule.TOKEN_RING, leaf=LEAF)
    first, end = sorted(data.draw(st.lists(st.integers(0, 90), min_size=2, max_size=2, unique=True)))
    owner = [data.draw(st.integers(0, size - 1)) for _ in range(0, end, LEAF)]
    other = Batch.draw((Extent(17, 9),), 4, 2, seed=5)
    part = Batch(
        (Extent(17, 9), Extent(first, end - first)),
        [other.q[0], batch.q[0][first:end]],
        [other.k[0], batch.k[0][:end]],
        [other.v[0], batch.v[0][:end]],
    )
    mine = [
        join(Range(i * LEAF, min(end, i * LEAF + LEAF)) for i, rank in enumerate(owner) if rank == holder)
        for holder in range(size)
    ]
    others = contiguous(0, 26, size, LEAF)
    layout = Layout(part.extents, tuple(zip(others, mine, strict=True)), None, LEAF)
    got = attend_with(part, layout, Schedule.GATHER_Q)
    check_equal((got[0][9:], got[1][9:]), (whole[0][first:end], whole[1][first:end]))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("cached", [10, 13, 15, 16, 31, 93])
def test_an_accepted_path_of_a_tree_has_the_bits_of_plain_decode(cached: int, size: int) -> None:
    extent = Extent(cached, 8, TREE)
    tree = Batch.draw((extent,), 8, 1)
    verified = attend(tree, size, Schedule.GATHER_Q, leaf=LEAF, replicated=True)
    path = [slot - cached for slot in extent.path(7)]
    keep = [*range(cached), *extent.path(7)]
    for depth, row in enumerate(path):
        at = cached + depth
        plain = Batch((Extent(at, 1),), [tree.q[0][[row]]], [tree.k[0][keep[: at + 1]]], [tree.v[0][keep[: at + 1]]])
        decoded = attend(plain, 1, Schedule.GATHER_Q, leaf=LEAF)
        check_equal((verified[0][[row]], verified[1][[row]]), decoded)


@pytest.mark.parametrize("leaf", [None, LEAF])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 1)])
def test_bf16_errs_at_most_twice_as_much_as_torch_does_in_bf16(heads: int, kv_heads: int, leaf: int | None) -> None:
    batch = Batch.draw(CASES["prefill"], heads, kv_heads, dtype=torch.bfloat16)
    want, theirs = batch.expected()[0], batch.expected(dtype=torch.bfloat16)[0]
    for schedule in (Schedule.TOKEN_RING, Schedule.PASS_KV, Schedule.GATHER_Q):
        out, _ = attend(batch, 4, schedule, leaf=leaf)
        assert out.dtype == torch.float32
        error, limit = (out.bfloat16().double() - want).abs(), (theirs.double() - want).abs()
        assert error.max() <= 2 * limit.max()
        assert error.square().mean() <= 4 * limit.square().mean()


def test_the_mode_without_leaves_has_other_bits_so_that_the_comparison_means_something() -> None:
    batch = Batch.draw(CASES["prefill"], 4, 2)
    outs = [attend(batch, size, Schedule.TOKEN_RING, leaf=None)[0] for size in (1, 2, 3)]
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[1], outs[2])


@pytest.mark.parametrize("name", ["prefill", "tree verify"])
def test_ranks_as_streams_give_what_ranks_as_threads_give(name: str) -> None:
    batch = Batch.draw(CASES[name], 4, 2)
    for schedule, replicated in WAYS:
        by_stream = attend(batch, 3, schedule, leaf=LEAF, replicated=replicated, kind=StreamTransport)
        check_equal(by_stream, attend(batch, 3, schedule, leaf=LEAF, replicated=replicated))


def test_rows_that_see_nothing_here_are_empty_and_change_nothing() -> None:
    """A rank that holds only the end of a sequence has nothing for the rows before."""
    extent = Extent(0, 40)
    batch = Batch.draw((extent,), 2, 2)
    keys = (((Range(0, 32),),), ((Range(32, 40),),), ((),))
    rows = (((Range(8, 40),),), ((),), ((Range(0, 8),),))
    for leaf in (None, 8):
        for schedule in (Schedule.TOKEN_RING, Schedule.PASS_KV, Schedule.GATHER_Q):
            check_close(attend_with(batch, Layout((extent,), keys, rows, leaf), schedule), batch.expected())


def test_wrong_tensors_are_refused_by_number() -> None:
    batch = Batch.draw((Extent(0, 40),), 2, 2)
    short = Batch(batch.extents, [batch.q[0][:39]], batch.k, batch.v)
    with pytest.raises(LayoutError, match="39 rows are given where the layout has 40"):
        attend(short, 1, Schedule.TOKEN_RING, leaf=None)
