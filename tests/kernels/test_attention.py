"""Paged attention against its equation, and one row's bits against its surroundings, on every backend."""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from countersign.kernels import attention, merge
from countersign.kernels.attention import Layout, attend
from countersign.kernels.dispatch import Backend

interpreter = pytest.importorskip("triton.runtime.interpreter")
# NumPy, in which Triton's interpreter computes, says so when it meets the NaN that these tests hide behind the mask.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


pytestmark = pytest.mark.usefixtures("dot_by_row")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: list[Backend] = ["reference", "triton"]
TREE = (-1, 0, 0, 1, 1, 2, -1, 6, 3, 8)
CHAIN = tuple(range(-1, 9))


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence: cached ones and new ones, a tree where ``parents`` are given."""

    base: int
    rows: int
    parents: tuple[int, ...] | None = None

    def path(self, row: int) -> list[int]:
        """The slots that a row sees, by position."""
        if self.parents is None:
            return list(range(self.base + row + 1))
        nodes = []
        while row >= 0:
            nodes.append(self.base + row)
            row = self.parents[row]
        return [*range(self.base), *reversed(nodes)]


@dataclass(frozen=True)
class Call:
    """The tensors of a call, and the same keys and values by sequence and slot, (K, Hkv, D) in fp64."""

    q: Tensor
    keys: Tensor
    values: Tensor
    layout: Layout
    plain: list[tuple[Tensor, Tensor]]
    spans: tuple[Span, ...]

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)

    def attend(self, backend: Backend, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = attend(self.q, self.keys, self.values, self.layout, scale=self.scale, backend=backend, **options)
        return out.cpu(), lse.cpu()


def call(
    *spans: Span,
    heads: tuple[int, int] = (4, 2),
    dim: int = 32,
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    seeds: tuple[int, ...] | None = None,
) -> Call:
    """A call on spans whose numbers depend on their seed and length alone. Pages are scattered, and every slot that no
    token stands in is NaN.
    """
    width = max(-(-(span.base + span.rows) // page) for span in spans) + 1
    order = torch.randperm(width * len(spans), generator=torch.Generator().manual_seed(9)) + 1
    tables = order.view(len(spans), width).int()
    keys = torch.full((len(order) + 1, heads[1], dim, page), math.nan, dtype=dtype)
    values = torch.full((len(order) + 1, heads[1], page, dim), math.nan, dtype=dtype)
    queries, plain = [], []
    for s, span in enumerate(spans):
        seed, total = (seeds or range(len(spans)))[s], span.base + span.rows
        q, k, v = (tokens(total, count, dim, 3 * seed + i, dtype) for i, count in enumerate((*heads, heads[1])))
        for slot in range(total):
            number = int(tables[s, slot // page])
            keys[number, :, :, slot % page], values[number, :, slot % page] = k[slot], v[slot]
        queries.append(q[span.base :])
        plain.append((k.double(), v.double()))
    layout = Layout(
        torch.tensor([0, *(span.rows for span in spans)]).cumsum(0).int().to(DEVICE),
        torch.tensor([span.base for span in spans]).int().to(DEVICE),
        tables.to(DEVICE),
        ancestors_of(spans).to(DEVICE) if any(span.parents for span in spans) else None,
    )
    return Call(torch.cat(queries).to(DEVICE), keys.to(DEVICE), values.to(DEVICE), layout, plain, spans)


def ancestors_of(spans: tuple[Span, ...]) -> Tensor:
    words = 1 + max(span.rows for span in spans) // 32
    rows = [[slot - span.base for slot in span.path(row)[span.base :]] for span in spans for row in range(span.rows)]
    bits = torch.zeros(len(rows), words, dtype=torch.int64)
    for row, path in enumerate(rows):
        for u in path:
            bits[row, u // 32] |= 1 << u % 32
    return bits.to(torch.int32)  # the top bit of a word is its sign


def tokens(count: int, heads: int, dim: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, heads, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected(given: Call, window: int | None, first: int, end: int) -> tuple[Tensor, Tensor]:
    """The equation over the positions [first, end), row by row, in fp64."""
    outs: list[Tensor] = []
    lses, q = [], given.q.double().cpu()
    for span, (k, v) in zip(given.spans, given.plain, strict=True):
        for row in range(span.rows):
            path = span.path(row)
            start = first if window is None else max(first, len(path) - window)
            slots = path[start:end] if start < len(path) else []
            group = q.shape[1] // k.shape[1]
            mine = (part[slots].repeat_interleave(group, dim=1) for part in (k, v))
            k_row, v_row = mine
            scores = given.scale * torch.einsum("hd,khd->hk", q[len(outs)], k_row)
            outs.append(torch.einsum("hk,khd->hd", torch.softmax(scores, 1), v_row))
            lses.append(torch.logsumexp(scores, 1))
    return torch.stack(outs), torch.stack(lses)


def assert_close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float = 2e-6) -> None:
    for name, a, b in zip(("out", "lse"), found, wanted, strict=True):
        assert torch.allclose(a.double(), b, rtol=0, atol=tolerance), (name, (a - b).abs().max())


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.isfinite(found[0]).all()
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


RAGGED = (Span(100, 7), Span(0, 40), Span(63, 1), Span(64, 0), Span(30, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 37])
@pytest.mark.parametrize(
    ("heads", "dim", "page"),
    [((4, 2), 32, 16), ((3, 3), 16, 32), ((8, 1), 48, 16), ((5, 1), 128, 64), ((2, 1), 256, 128)],
)
def test_ragged_chains_follow_the_equation(
    backend: Backend, window: int | None, heads: tuple[int, int], dim: int, page: int
) -> None:
    given = call(*RAGGED, heads=heads, dim=dim, page=page)
    assert_close(given.attend(backend, window=window), expected(given, window, 0, 1000))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 5, 66])
@pytest.mark.parametrize("base", [0, 61, 128])
def test_trees_follow_the_equation(backend: Backend, window: int | None, base: int) -> None:
    given = call(Span(base, 10, TREE), Span(7, 10, CHAIN), Span(base, 3, (-1, -1, -1)))
    assert_close(given.attend(backend, window=window), expected(given, window, 0, 1000))


@pytest.mark.parametrize("backend", BACKENDS)
def test_trees_of_more_than_one_word_follow_the_equation(backend: Backend) -> None:
    parents = tuple((i - 1) // 2 if i % 3 else i - 1 for i in range(75))
    given = call(Span(50, 75, parents), heads=(2, 1), dim=16)
    assert_close(given.attend(backend), expected(given, None, 0, 1000))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("parents", [None, TREE])
def test_each_leaf_is_the_equation_over_its_positions(
    backend: Backend, window: int | None, parents: tuple[int, ...] | None
) -> None:
    given = call(Span(190, 10, parents), Span(60, 10, parents))
    outs, lses = given.attend(backend, window=window, leaf=64)
    assert outs.shape == (4, 20, 4, 32)
    for i, partial in enumerate(zip(outs, lses, strict=True)):
        assert_close(partial, expected(given, window, 64 * i, 64 * i + 64))
    assert_close(merge.tree(outs, lses), expected(given, window, 0, 1000))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parents", [None, TREE])
@pytest.mark.parametrize("reach", [(0, 70), (65, 128), (3, 194), (195, 400), (50, 50)])
def test_a_range_attends_its_positions_only(
    backend: Backend, parents: tuple[int, ...] | None, reach: tuple[int, int]
) -> None:
    given = call(Span(190, 10, parents), Span(60, 10, parents))
    ranges = torch.tensor([reach, reach], dtype=torch.int32, device=DEVICE)
    given = replace(given, layout=replace(given.layout, ranges=ranges))
    assert_close(given.attend(backend), expected(given, None, *reach))
    assert_close(given.attend(backend, window=40), expected(given, 40, *reach))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_outside_the_range_are_never_read(backend: Backend) -> None:
    given = call(Span(190, 10))
    tables = given.layout.tables.clone()
    ranges = torch.tensor([[70, 130]], dtype=torch.int32, device=DEVICE)
    whole = replace(given, layout=replace(given.layout, ranges=ranges)).attend(backend)
    tables[:, :4], tables[:, 9:] = 0, 0  # page 0 is all NaN
    assert_same(replace(given, layout=replace(given.layout, ranges=ranges, tables=tables)).attend(backend), whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leaf", [None, 64])
def test_a_row_that_sees_nothing_gives_zero_and_minus_infinity(backend: Backend, leaf: int | None) -> None:
    given = call(Span(5, 3), Span(70, 2))
    ranges = torch.tensor([[32, 64], [0, 64]], dtype=torch.int32, device=DEVICE)
    out, lse = replace(given, layout=replace(given.layout, ranges=ranges)).attend(backend, leaf=leaf)
    out, lse = (out, lse) if leaf is None else (out[0], lse[0])
    assert (out[:3] == 0).all()
    assert (lse[:3] == -math.inf).all()
    assert torch.isfinite(lse[3:]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leaf", [None, 128])
def test_16_bit_types_err_no_more_than_twice_as_much_as_torch_in_that_type(
    backend: Backend, dtype: torch.dtype, leaf: int | None
) -> None:
    given = call(Span(150, 50), dim=64, dtype=dtype)
    out, lse = given.attend(backend, leaf=leaf, out_dtype=dtype if leaf is None else torch.float32)
    if leaf is not None:
        out, lse = merge.merge(out, lse)
    wanted, wanted_lse = expected(given, None, 0, 1000)
    k, v = (part.to(dtype).transpose(0, 1).repeat_interleave(2, 0) for part in given.plain[0])
    mask = torch.ones(50, 200, dtype=torch.bool).tril(150)
    scores = (given.scale * given.q.cpu().transpose(0, 1) @ k.transpose(1, 2)).masked_fill(~mask, -math.inf)
    same_type = (torch.softmax(scores, -1) @ v).transpose(0, 1)
    assert out.dtype == (dtype if leaf is None else torch.float32)
    assert (out - wanted).abs().max() <= 2 * (same_type - wanted).abs().max()
    assert torch.allclose(lse.double(), wanted_lse, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_row_does_not_see_may_be_nan(backend: Backend) -> None:
    """Its own sequence's later token, its siblings in a tree, and others in its tile."""
    given = call(Span(20, 10, TREE), Span(10, 12, tuple(range(-1, 11))), Span(10, 10, CHAIN))
    clean = given.attend(backend)
    chain, chain_clean = call(Span(20, 10)), call(Span(20, 10)).attend(backend)
    for broken in (math.nan, math.inf):
        for pool in ("keys", "values"):
            for case, fine, node in ((given, clean, 2), (chain, chain_clean, 7)):
                dirty = replace(case, **{pool: getattr(case, pool).clone()})
                number, slot = int(case.layout.tables[0, 1]), 20 + node - 16
                (dirty.keys[number, :, :, slot] if pool == "keys" else dirty.values[number, :, slot])[...] = broken
                found, sees = dirty.attend(backend), [20 + node in case.spans[0].path(row) for row in range(10)]
                blind = torch.tensor([*(not seen for seen in sees), *[True] * (len(case.q) - 10)])
                assert_same((found[0][blind], found[1][blind]), (fine[0][blind], fine[1][blind]))
                if pool == "values" or math.isnan(broken):
                    assert not torch.isfinite(found[0][~blind]).all(dim=-1).any()


class TestBits:
    """One row's bits, whatever the call it is part of. Every comparison is ==."""

    @pytest.mark.parametrize("backend", BACKENDS)
    @settings(max_examples=12, deadline=None)
    @given(data=st.data())
    def test_neighbours_cuts_and_forms_change_nothing(self, backend: Backend, data: st.DataObject) -> None:
        heads, dim, page = data.draw(st.sampled_from([((4, 2), 32, 16), ((3, 1), 16, 64), ((8, 8), 24, 16)]))
        window = data.draw(st.sampled_from([None, 70, 9]))
        leaf = data.draw(st.sampled_from([None, 64, 128]))
        base, rows = data.draw(st.integers(0, 200)), data.draw(st.integers(2, 40))
        whole = call(Span(base, rows), heads=heads, dim=dim, page=page).attend(backend, window=window, leaf=leaf)
        cut, others = data.draw(st.integers(1, rows - 1)), data.draw(st.lists(st.integers(0, 90), max_size=2))
        # The same tokens, the first of them cached, between other sequences.
        before = [Span(other, 1 + other % 37) for other in others]
        spans, seeds = (*before, Span(base + cut, rows - cut), Span(5, 3)), (*(7 for _ in others), 0, 8)
        part = call(*spans, heads=heads, dim=dim, page=page, seeds=seeds).attend(backend, window=window, leaf=leaf)
        first = sum(span.rows for span in before)
        mine = tuple(tensor.narrow(-2 - i, first, rows - cut) for tensor, i in zip(part, (1, 0), strict=True))
        theirs = tuple(tensor.narrow(-2 - i, cut, rows - cut) for tensor, i in zip(whole, (1, 0), strict=True))
        if leaf is not None:
            # Longer neighbours add leaves, which are empty for these rows.
            count = len(theirs[0])
            assert (mine[0][count:] == 0).all()
            assert (mine[1][count:] == -math.inf).all()
            mine = tuple(tensor[:count] for tensor in mine)
        assert_same((mine[0], mine[1]), (theirs[0], theirs[1]))

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("base", [0, 20, 61, 127])
    @pytest.mark.parametrize("leaf", [None, 64])
    @pytest.mark.parametrize("window", [None, 30])
    def test_a_node_of_a_tree_has_the_bits_of_plain_decode(
        self, backend: Backend, base: int, leaf: int | None, window: int | None
    ) -> None:
        tree = call(Span(base, 10, TREE), heads=(2, 1))
        out, lse = tree.attend(backend, leaf=leaf, window=window)
        for node in (9, 7, 5, 0):
            path = [slot - base for slot in Span(base, 10, TREE).path(node)[base:]]
            plain = call(Span(base, len(path)), heads=(2, 1))
            # The path's tokens, one after another, as if only they had been decoded.
            for i, u in enumerate(path):
                (to, at), (source, slot) = (divmod(base + n, 16) for n in (i, u))
                to, source = (int(c.layout.tables[0, n]) for c, n in ((plain, to), (tree, source)))
                plain.keys[to, :, :, at] = tree.keys[source, :, :, slot]
                plain.values[to, :, at] = tree.values[source, :, slot]
            plain.q[-1] = tree.q[node]
            found, found_lse = plain.attend(backend, leaf=leaf, window=window)
            last = (found[..., -1, :, :], found_lse[..., -1, :])
            count = len(found) if leaf else 2
            wanted = (out[..., node, :, :], lse[..., node, :])
            assert_same(last, (wanted[0][:count], wanted[1][:count]))

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("split", [1, 3, 100])
    def test_the_split_changes_nothing(self, backend: Backend, split: int) -> None:
        given = call(Span(300, 2), Span(20, 3))
        assert_same(given.attend(backend, leaf=64, split=split), given.attend(backend, leaf=64))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_the_page_size_changes_nothing(self, backend: Backend) -> None:
        wanted = call(*RAGGED).attend(backend)
        for page in (32, 128, 256):
            assert_same(call(*RAGGED, page=page).attend(backend), wanted)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_range_of_whole_leaves_gives_the_same_leaves(self, backend: Backend) -> None:
        given = call(Span(250, 10, TREE))
        outs, lses = given.attend(backend, leaf=64)
        for first, end in ((0, 1), (1, 3), (3, 9)):
            ranges = torch.tensor([[64 * first, 64 * end]], dtype=torch.int32, device=DEVICE)
            part = replace(given, layout=replace(given.layout, ranges=ranges)).attend(backend, leaf=64)
            assert_same((part[0][first:end], part[1][first:end]), (outs[first:end], lses[first:end]))
            rest = [i for i in range(len(outs)) if not first <= i < end]
            assert (part[0][rest] == 0).all()
            assert (part[1][rest] == -math.inf).all()


class TestLayout:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(
        ("queries", "keys", "causal"), [(40, 48, True), (64, 64, True), (5, 128, False), (33, 80, False)]
    )
    def test_dense_tensors_are_pages_of_their_own(
        self, backend: Backend, queries: int, keys: int, causal: bool
    ) -> None:
        q, k, v = (
            tokens(2 * n, 2, 32, seed, torch.float32).view(2, n, 2, 32) for seed, n in enumerate((queries, keys, keys))
        )
        layout, size = Layout.dense(2, queries, keys, causal=causal, device=DEVICE)
        pool = attention.pages(k.to(DEVICE), v.to(DEVICE), size)
        out, _ = attend(q.view(-1, 2, 32).to(DEVICE), *pool, layout, scale=0.2, backend=backend)
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if causal else None
        q, k, v = (part.double().transpose(1, 2) for part in (q, k, v))
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2).transpose(1, 2)
        assert torch.allclose(out.cpu().double().view(wanted.shape), wanted, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_views_of_the_engines_pool_are_taken_as_they_are(self, backend: Backend) -> None:
        given = call(Span(40, 3))
        pool = torch.zeros(len(given.keys), 3, 2, 2, 16 * 32, device=DEVICE)
        keys, values = pool[:, 1, 0].view(-1, 2, 32, 16), pool[:, 1, 1].view(-1, 2, 16, 32)
        keys.copy_(given.keys)
        values.copy_(given.values)
        assert_same(replace(given, keys=keys, values=values).attend(backend), given.attend(backend))

    def test_the_number_of_leaves_is_the_longest_sequences_or_what_the_host_says(self) -> None:
        given = call(Span(100, 29), Span(0, 5))
        assert given.layout.leaves(64) == 3
        assert replace(given.layout, longest=300).leaves(64) == 5
        assert replace(given.layout, longest=0).leaves(64) == 1

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_no_rows_give_no_rows(self, backend: Backend) -> None:
        assert call(Span(20, 0)).attend(backend)[0].shape == (0, 4, 32)

    @pytest.mark.parametrize(
        ("sizes", "message"), [((4, 100, True), "keys is 100"), ((32, 16, True), "at least as many")]
    )
    def test_dense_sizes_that_make_no_pages_are_refused(self, sizes: tuple[int, int, bool], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Layout.dense(1, *sizes[:2], causal=sizes[2])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"q": lambda q: q[0]}, "q has shape"),
    ({"q": lambda q: q.transpose(1, 2)}, "q has shape"),
    ({"q": lambda q: q[..., :8].contiguous()}, "q has shape"),
    ({"q": lambda q: q.int()}, "q has dtype"),
    ({"keys": lambda k: k.half()}, "keys has torch.float16"),
    ({"values": lambda v: v.to("meta")}, "values has torch.float32 on meta"),
    ({"keys": lambda k: k[0]}, "keys has shape"),
    ({"values": lambda v: v.repeat(1, 1, 2, 2)[:, :, ::2, ::2]}, "values has shape"),
    ({"values": lambda v: v[:, :, :12]}, "pages of 12"),
    ({"values": lambda v: v[:, :1].repeat(1, 3, 1, 1)}, "must divide"),
    ({"keys": lambda k: k[:, :, :16]}, "keys is"),
    ({"first": lambda t: t.long()}, "layout.first"),
    ({"first": lambda t: t[:-1]}, "layout.first"),
    ({"base": lambda t: t.repeat_interleave(2)[::2]}, "layout.base"),
    ({"tables": lambda t: t[0]}, "layout.tables"),
    ({"ancestors": lambda _: torch.zeros(4, 1, dtype=torch.int32)}, "layout.ancestors"),
    ({"ranges": lambda _: torch.zeros(2, 3, dtype=torch.int32)}, "layout.ranges"),
    ({"scale": 0.0}, "scale is"),
    ({"window": 0}, "window is"),
    ({"leaf": 48}, "leaf is"),
    ({"split": 2}, "split is"),
    ({"leaf": 64, "split": 0}, "split is"),
    ({"out_dtype": torch.bfloat16}, "out_dtype is"),
]
NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"first": lambda t: t + 1}, "layout.first must rise"),
    ({"first": lambda t: t.flip(0)}, "layout.first must rise"),
    ({"base": lambda t: -t - 1}, "layout.first must rise"),
    ({"tables": lambda t: t + 1000}, "layout.tables must name"),
    ({"tables": lambda t: t[:, :1].contiguous()}, "layout.tables has 1 pages"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"), REFUSED + (NUMBERS if DEVICE == "cpu" else []), ids=lambda value: str(value)[:40]
)
def test_what_a_kernel_does_not_take_is_refused_by_name(backend: Backend, change: dict[str, Any], message: str) -> None:
    given = call(Span(20, 3), Span(5, 2))
    tensors: dict[str, Any] = {"q": given.q, "keys": given.keys, "values": given.values}
    options: dict[str, Any] = {"scale": given.scale}
    layout = given.layout
    for name, value in change.items():
        if name in tensors:
            tensors[name] = value(tensors[name])
        elif hasattr(layout, name):
            tensor = value(getattr(layout, name))
            layout = replace(layout, **{name: tensor.to(DEVICE)})
        else:
            options[name] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        attend(**tensors, layout=layout, backend=backend, **options)


def test_a_range_that_reaches_into_a_tree_needs_the_pages_of_the_whole_tree() -> None:
    given = call(Span(30, 10, TREE))
    if DEVICE == "cpu":
        short = given.layout.tables[:, :2].contiguous()
        for end, refused in ((30, False), (31, True)):
            layout = replace(given.layout, tables=short, ranges=torch.tensor([[0, end]], dtype=torch.int32))
            with pytest.raises(ValueError, match="tables has 2 pages") if refused else contextlib.nullcontext():
                replace(given, layout=layout).attend("reference")


def test_triton_refuses_fp64_and_the_reference_takes_it() -> None:
    given = call(Span(20, 3))
    given = replace(given, q=given.q.double(), keys=given.keys.double(), values=given.values.double())
    assert_close(attend_wide(given), expected(given, None, 0, 100), 1e-12)
    with pytest.raises(ValueError, match="q has dtype"):
        given.attend("triton")


def attend_wide(given: Call) -> tuple[Tensor, Tensor]:
    out, lse = attention.reference(
        given.q, given.keys, given.values, given.layout, scale=given.scale, window=None, leaf=None
    )
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backend_that_is_named_runs(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    from countersign.kernels.triton import attention as triton_attention

    ran = []
    for name, module, function in (("reference", attention, "reference"), ("triton", triton_attention, "attend")):
        original = getattr(module, function)

        def spy(*args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            ran.append(name)
            return original(*args, **options)

        monkeypatch.setattr(module, function, spy)
    call(Span(3, 2)).attend(backend)
    assert ran == [backend]


def test_it_compiles_for_hopper_with_tensor_cores_and_wide_asynchronous_loads() -> None:
    """No GPU is needed to compile: what the interpreter cannot show, types and the instructions chosen, is seen so."""
    program = Path(__file__).with_name("attention_on_hopper.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
