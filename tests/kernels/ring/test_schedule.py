"""Plans: both ends of each message agree, what is moved is what the formulas say, and the choice follows the rule."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_cases import CASES, DIM, LEAF, TREE, Batch, attend_as, layout_of

from countersign.kernels.ring import traffic
from countersign.kernels.ring.errors import LayoutError
from countersign.kernels.ring.layout import Extent, Layout, count, lay_out
from countersign.kernels.ring.partition import Range, contiguous, zigzag
from countersign.kernels.ring.schedule import Message, Partials, Program, Schedule, choose, plan
from countersign.kernels.ring.threads import run_ranks
from countersign.kernels.ring.transport import Counted, Transport

RINGS = (Schedule.TOKEN_RING, Schedule.PASS_KV, Schedule.GATHER_Q)
HEADS, KV_HEADS = 4, 2


def measured(batch: Batch, layout: Layout, schedule: Schedule) -> list[Counted]:
    """Each rank's counters after a run over threads."""

    def run(transport: Transport) -> Counted:
        counted = Counted(transport)
        attend_as(counted, batch, layout, schedule)
        return counted

    return run_ranks(layout.size, run)


def shape_of(dtype: torch.dtype) -> traffic.Shape:
    return traffic.Shape(HEADS, KV_HEADS, DIM, dtype.itemsize)


def shared_prefix(cached: list[int], new: list[int], size: int) -> Layout:
    """Every rank has keys that every row sees; rows are cut by zigzag."""
    extents = [Extent(p, t) for p, t in zip(cached, new, strict=True)]
    held = [[contiguous(0, p, size)[rank] for p in cached] for rank in range(size)]
    return lay_out(extents, size, held=held)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(8, 40), st.integers(1, 30)), min_size=1, max_size=3),
    st.integers(1, 8),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_bytes_on_a_cached_prefix(sequences: list[tuple[int, int]], size: int, dtype: torch.dtype) -> None:
    layout = shared_prefix([p for p, _ in sequences], [t for _, t in sequences], size)
    batch, shape = Batch.draw(layout.extents, HEADS, KV_HEADS, dtype=dtype), shape_of(dtype)
    rows = [count(layout.rows_of(rank)) for rank in range(size)]
    if size > 1:
        # Ring leaves out new keys that no later row sees: only what all see is in the formula.
        for schedule, formula in ((Schedule.TOKEN_RING, traffic.token_ring), (Schedule.GATHER_Q, traffic.gather_q)):
            sent = [sum(one.sent.values()) for one in measured(batch, layout, schedule)]
            assert sent == [sum(formula(rows, rank, shape)) for rank in range(size)]
    everywhere = Layout(layout.extents, layout.keys, None, None)
    sent = [sum(one.sent.values()) for one in measured(batch, everywhere, Schedule.GATHER_Q)]
    assert sent == [traffic.replicated(sum(rows), size, shape)] * size


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(16, 200), min_size=1, max_size=2), st.integers(2, 8), st.sampled_from([None, 4]))
def test_bytes_of_causal_zigzag(lengths: list[int], size: int, leaf: int | None) -> None:
    lengths = [max(n, 2 * size * (leaf or 1)) for n in lengths]
    batch, shape = Batch.draw(tuple(Extent(0, n) for n in lengths), HEADS, KV_HEADS), shape_of(torch.float32)
    layout = layout_of(batch, size, leaf)
    cuts = [zigzag(0, n, size, leaf or 1) for n in lengths]
    for schedule in (Schedule.TOKEN_RING, Schedule.PASS_KV):
        counted = measured(batch, layout, schedule)
        for rank, one in enumerate(counted):
            if schedule is Schedule.TOKEN_RING:
                want = sum(sum(traffic.zigzag_token_ring(cut, rank, shape, leaf)) for cut in cuts)
            else:
                want = sum(traffic.zigzag_pass_kv(cut, rank, shape) for cut in cuts)
            assert sum(one.sent.values()) == want
            assert all(one.sent[peer] == counted[peer].received[rank] for peer in range(size))


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_bytes_of_equal_shares_are_those_published(size: int) -> None:
    """facts: Ring 2 (W-1)/W S Hkv D e; TokenRing (W-1)/W S Hq D e and (W-1)/W S Hq (4 D + 4); zigzag 0.75 of it."""
    shape, tokens = shape_of(torch.bfloat16), 48 * size
    share = (size - 1) * tokens // size
    for rank in range(size):
        assert traffic.token_ring([48] * size, rank, shape) == (share * HEADS * DIM * 2, share * HEADS * (4 * DIM + 4))
        assert traffic.pass_kv([48] * size, rank, shape) == 2 * share * KV_HEADS * DIM * 2
    cut = zigzag(0, tokens, size)
    sent = [traffic.zigzag_token_ring(cut, rank, shape) for rank in range(size)]
    assert sum(f for f, _ in sent) == 0.75 * size * share * shape.query
    assert sum(b for _, b in sent) == 0.75 * size * share * shape.partial
    assert sum(traffic.zigzag_pass_kv(cut, r, shape) for r in range(size)) == 0.75 * size * share * shape.key_value


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_ring_moves_all_keys_where_all_matter(size: int) -> None:
    """Each rank has one of the last rows, and the last rank their keys."""
    extent = Extent(16 * size, size)
    bounds = [*range(0, 16 * size, 16), extent.length]
    keys = tuple(((Range(a, b),),) for a, b in pairwise(bounds))
    rows = tuple(((Range(rank, rank + 1),),) for rank in range(size))
    layout = Layout((extent,), keys, rows, None)
    shape = shape_of(torch.float32)
    slots = [count(layout.slots_of(rank)) for rank in range(size)]
    counted = measured(Batch.draw((extent,), HEADS, KV_HEADS), layout, Schedule.PASS_KV)
    assert [sum(one.sent.values()) for one in counted] == [traffic.pass_kv(slots, r, shape) for r in range(size)]


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_zigzag_steps_are_of_equal_work(size: int) -> None:
    layout = lay_out([Extent(0, 64 * size)], size)
    for step in range(size):
        work = set()
        for rank in range(size):
            pieces = plan(Schedule.TOKEN_RING, layout, rank).steps[step].compute
            work.add(sum(len(piece.rows) * sum(map(len, piece.keys)) for piece in pieces))
        assert step == 0 or len(work) == 1


@pytest.mark.parametrize("schedule", RINGS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("leaf", [None, LEAF])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_both_ends_of_every_message_agree(size: int, leaf: int | None, name: str, schedule: Schedule) -> None:
    layout = lay_out(CASES[name], size, leaf=leaf)
    programs = [plan(schedule, layout, rank) for rank in range(size)]
    for step in range(max(len(program.steps) for program in programs)):
        sent = {(r, m.peer, m.payload) for r, p in enumerate(programs) for m in p.steps[step].sends}
        received = {(m.peer, r, m.payload) for r, p in enumerate(programs) for m in p.steps[step].receives}
        assert sent == received
        assert all(sender != receiver for sender, receiver, _ in sent)
    for program in programs:
        check_each_piece_is_computed_once_and_comes_home(program)


def check_each_piece_is_computed_once_and_comes_home(program: Program) -> None:
    wanted = [piece for pieces in program.home for piece in pieces]
    assert len(set(wanted)) == len(wanted)
    there = [piece for step in program.steps for piece in step.compute if piece in set(wanted)]
    arrived = [piece for step in program.steps for message in step.receives for piece in partials(message)]
    assert sorted(map(repr, there + arrived)) == sorted(map(repr, wanted))


def partials(message: Message) -> tuple[object, ...]:
    return message.payload.pieces if isinstance(message.payload, Partials) else ()


def test_one_rank_computes_its_block_once_and_exchanges_nothing() -> None:
    for schedule in RINGS:
        steps = plan(schedule, lay_out([Extent(0, 50)], 1), 0).steps
        assert [(step.sends, step.receives, len(step.compute)) for step in steps] == [((), (), 1)]


def test_the_number_of_exchanges() -> None:
    layout = lay_out([Extent(64, 16)], 4)
    everywhere = lay_out([Extent(64, 16)], 4, replicated=True)
    waits = [
        sum(bool(step.sends or step.receives) for step in plan(schedule, one, 1).steps)
        for schedule, one in [*((s, layout) for s in RINGS), (Schedule.GATHER_Q, everywhere)]
    ]
    assert waits == [5, 3, 2, 1]


def test_the_choice_follows_the_rule() -> None:
    assert choose(1, 100_000, 32, 8) is Schedule.GATHER_Q
    assert choose(64, 0, 32, 32) is Schedule.GATHER_Q
    assert choose(8192, 0, 32, 32) is Schedule.TOKEN_RING
    assert choose(8192, 0, 64, 8) is Schedule.PASS_KV
    # GQA 8:1: T * 64 < 2 (P + T) * 8, so P > 3 T.
    assert choose(1000, 3000, 64, 8) is Schedule.PASS_KV
    assert choose(1000, 3001, 64, 8) is Schedule.TOKEN_RING


def test_layouts_that_cannot_be_are_refused() -> None:
    extent, whole = Extent(0, 40), ((Range(0, 40),),)
    with pytest.raises(LayoutError, match="the ranks hold 39 positions of sequence 0, which has 40"):
        Layout((extent,), (((Range(0, 39),),),), None, None)
    with pytest.raises(LayoutError, match="positions of sequence 0: position 20 is held by no rank"):
        Layout((extent,), (((Range(0, 20),),), ((Range(21, 40),),)), None, None)
    with pytest.raises(LayoutError, match="rows of sequence 0: positions 0 to 9 are given twice"):
        Layout((extent,), (whole, ((),)), (whole, ((Range(0, 10),),)), None)
    with pytest.raises(LayoutError, match="inside a leaf of 16"):
        Layout((extent,), (((Range(0, 20),),), ((Range(20, 40),),)), None, 16)
    with pytest.raises(LayoutError, match="every rank has these rows"):
        plan(Schedule.TOKEN_RING, lay_out([extent], 2, replicated=True), 0)
    with pytest.raises(LayoutError, match="neither may be negative"):
        Extent(-1, 3)
    for parents in ((-1, 1), (-1,), (-2, 0)):
        with pytest.raises(LayoutError, match="earlier new token"):
            Extent(4, 2, parents)


def test_a_tree_row_stands_at_its_depth() -> None:
    extent = Extent(10, 8, TREE)
    assert [extent.position(row) for row in range(8)] == [10, 11, 11, 12, 12, 12, 13, 14]
    assert extent.path(7) == [10, 12, 15, 16, 17]
    assert extent.length == 15
