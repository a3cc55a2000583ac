"""Partials merge to the attention over all their keys, and over the tree to the same bits however they are cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from countersign.kernels.merge import Node, combine, fold, merge, nodes_of, tree

ROWS, DIM = 5, 7


def partials(count: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random partials of ROWS rows, a third of them empty."""
    generator = torch.Generator().manual_seed(seed)
    outs = torch.randn((count, ROWS, DIM), generator=generator, dtype=torch.float64)
    lses = 2 * torch.randn((count, ROWS), generator=generator, dtype=torch.float64)
    empty = torch.rand((count, ROWS), generator=generator) < 1 / 3
    return outs.masked_fill(empty[..., None], 0).to(dtype), lses.masked_fill(empty, -torch.inf).to(dtype)


def reference(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """By softmax over the partials, in fp64; rows with none get out 0."""
    weights = torch.softmax(lses.double(), dim=0).nan_to_num(0)
    return (weights[..., None] * outs.double()).sum(0), torch.logsumexp(lses.double(), dim=0)


def check_equal(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


@given(st.integers(1, 40), st.integers(0, 10_000))
def test_both_orders_give_the_softmax_over_all_keys(count: int, seed: int) -> None:
    outs, lses = partials(count, seed)
    want = reference(outs, lses)
    for got in (merge(outs, lses), tree(outs, lses)):
        torch.testing.assert_close(got[0].double(), want[0], atol=2e-6, rtol=0)
        torch.testing.assert_close(got[1].double(), want[1], atol=2e-6, rtol=0)


def test_attention_over_pieces_of_the_keys_merges_to_attention_over_all() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn((n, DIM), generator=generator, dtype=torch.float64) for n in (ROWS, 50, 50))
    scores = q @ k.T
    parts = [(scores[:, a:b].softmax(-1) @ v[a:b], scores[:, a:b].logsumexp(-1)) for a, b in pairwise((0, 3, 20, 50))]
    outs, lses = (torch.stack(part) for part in zip(*parts, strict=True))
    for out, lse in (merge(outs, lses), tree(outs, lses)):
        torch.testing.assert_close(out, scores.softmax(-1) @ v)
        torch.testing.assert_close(lse, scores.logsumexp(-1))


@given(st.integers(0, 10_000))
def test_an_empty_partial_on_either_side_changes_no_bit(seed: int) -> None:
    outs, lses = partials(1, seed)
    empty = torch.zeros_like(outs[0]), torch.full_like(lses[0], -torch.inf)
    check_equal(combine(outs[0], lses[0], *empty), (outs[0], lses[0]))
    check_equal(combine(*empty, outs[0], lses[0]), (outs[0], lses[0]))


def test_only_empty_partials_give_out_0_and_lse_minus_infinity() -> None:
    outs, lses = torch.zeros(3, ROWS, DIM), torch.full((3, ROWS), -torch.inf)
    for result in (merge(outs, lses), tree(outs, lses)):
        check_equal(result, (outs[0], lses[0]))


def test_far_apart_partials_neither_overflow_nor_lose_the_larger() -> None:
    outs, lses = torch.ones(2, 1, DIM), torch.tensor([[3e4], [-3e4]])
    for result in (merge(outs, lses), tree(outs, lses)):
        check_equal(result, (outs[0], lses[0]))


def test_nan_in_one_row_stays_in_that_row() -> None:
    outs, lses = partials(4, 3)
    lses[2, 1] = torch.nan
    for result in (merge(outs, lses), tree(outs, lses)):
        assert result[1].isnan().tolist() == [False, True, False, False, False]


def test_bf16_outs_merge_in_fp32_and_fp64_stays() -> None:
    outs, lses = partials(3, 5)
    assert merge(outs.bfloat16(), lses)[0].dtype == torch.float32
    assert tree(outs.bfloat16(), lses)[0].dtype == torch.float32
    assert merge(*partials(3, 5, torch.float64))[0].dtype == torch.float64
    assert tree(*partials(3, 5, torch.float64))[1].dtype == torch.float64


@given(st.data(), st.integers(1, 70), st.integers(0, 10_000))
def test_any_cut_into_nodes_folds_to_the_bits_of_the_tree(data: st.DataObject, count: int, seed: int) -> None:
    outs, lses = partials(count, seed)
    cuts = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=5))})
    given_count = data.draw(st.sampled_from([None, count]))
    nodes = [node for first, end in pairwise(cuts) for node in nodes_of(first, end, given_count)]
    leaves = {i: {Node(0, i): (outs[i], lses[i])} for i in range(count)}
    folded = {}
    for node in data.draw(st.permutations(nodes)):
        inside = {k: v for i in range(node.first, min(node.last + 1, count)) for k, v in leaves[i].items()}
        folded[node] = fold(inside)
    check_equal(fold(folded), tree(outs, lses))


@given(st.integers(2, 40), st.sets(st.integers(0, 39)), st.integers(0, 10_000))
def test_leaves_that_are_missing_are_empty(count: int, missing: set[int], seed: int) -> None:
    outs, lses = partials(count, seed)
    kept = {Node(0, i): (outs[i], lses[i]) for i in range(count) if i not in missing}
    if not kept:
        return
    for i in missing & set(range(count)):
        outs[i], lses[i] = 0, -torch.inf
    check_equal(fold(kept), tree(outs, lses))


def test_the_tree_is_balanced_from_the_left_and_not_a_chain() -> None:
    outs, lses = partials(5, 11)
    pair = [combine(outs[i], lses[i], outs[i + 1], lses[i + 1]) for i in (0, 2)]
    check_equal(tree(outs, lses), combine(*combine(*pair[0], *pair[1]), outs[4], lses[4]))


@given(st.integers(0, 200), st.integers(0, 200), st.booleans())
def test_nodes_cover_their_run_once_in_order(first: int, length: int, at_the_end: bool) -> None:
    end = first + length
    nodes = nodes_of(first, end, end if at_the_end else None)
    covered = [leaf for node in nodes for leaf in range(node.first, node.last + 1)]
    assert [leaf for leaf in covered if leaf < end] == list(range(first, end))
    assert at_the_end or len(covered) == length
    # No fewer will do: two neighbours that could be one would be siblings.
    assert all(a.parent != b.parent for a, b in pairwise(nodes))
    assert len(nodes) <= 2 * max(1, length).bit_length()


@pytest.mark.parametrize(
    ("first", "end", "count", "nodes"),
    [
        (0, 8, None, [Node(3, 0)]),
        (8, 12, None, [Node(2, 2)]),
        (3, 7, None, [Node(0, 3), Node(1, 2), Node(0, 6)]),
        (0, 5, None, [Node(2, 0), Node(0, 4)]),
        (0, 5, 5, [Node(3, 0)]),
        (4, 7, 7, [Node(2, 1)]),
        (4, 7, 8, [Node(1, 2), Node(0, 6)]),
        (6, 11, 11, [Node(1, 3), Node(2, 2)]),
        (4, 4, 4, []),
    ],
)
def test_nodes_of_known_runs(first: int, end: int, count: int | None, nodes: list[Node]) -> None:
    assert nodes_of(first, end, count) == nodes


@pytest.mark.parametrize(("first", "end", "count"), [(-1, 2, None), (3, 2, None), (0, 3, 2)])
def test_a_run_that_is_none_is_refused(first: int, end: int, count: int | None) -> None:
    with pytest.raises(ValueError, match="are no run"):
        nodes_of(first, end, count)


@pytest.mark.parametrize("nodes", [(Node(1, 0), Node(0, 1)), (Node(3, 0), Node(0, 2), Node(0, 3))])
def test_overlapping_nodes_are_refused(nodes: tuple[Node, ...]) -> None:
    with pytest.raises(ValueError, match="overlap"):
        fold({node: (torch.zeros(ROWS, DIM), torch.zeros(ROWS)) for node in nodes})


def test_nothing_to_merge_and_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        fold({})
    for function in (merge, tree):
        with pytest.raises(ValueError, match="N > 0"):
            function(torch.zeros(0, ROWS, DIM), torch.zeros(0, ROWS))
        with pytest.raises(ValueError, match="lses"):
            function(torch.zeros(2, ROWS, DIM), torch.zeros(3, ROWS))


@pytest.mark.parametrize("function", [torch.exp, torch.log])
def test_the_bits_of_an_element_do_not_depend_on_where_it_stands(function: Callable[[Tensor], Tensor]) -> None:
    """What the whole tree rests on."""
    x = torch.rand(10_007, generator=torch.Generator().manual_seed(7)) * 20 + 1e-3
    whole = function(x)
    for first in range(17):
        for count in (1, 3, 8, 15, 16, 17, 33, 1000):
            part = slice(first, first + count)
            assert torch.equal(function(x[part]), whole[part])
            assert torch.equal(function(x[part].clone()), whole[part])
    assert torch.equal(function(x[::7]), whole[::7])


@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, and no interpreter"
)
class TestTriton:
    @pytest.mark.parametrize("shape", [(1, 3, 2, 16), (2, 1, 1, 24), (7, 5, 3, 32), (37, 3, 4, 80), (64, 2, 4, 128)])
    def test_both_forms_follow_the_reference_and_the_tree_has_one_set_of_bits(self, shape: tuple[int, ...]) -> None:
        from countersign.kernels.triton import merge as triton_merge

        generator = torch.Generator().manual_seed(len(shape) + shape[0])
        outs, lses = torch.randn(shape, generator=generator), 3 * torch.randn(shape[:-1], generator=generator)
        empty = torch.rand(shape[:-1], generator=generator) < 0.3
        empty[:, 0, 0] = True
        device = "cuda" if torch.cuda.is_available() else "cpu"
        outs, lses = outs.masked_fill(empty[..., None], 0).to(device), lses.masked_fill(empty, -torch.inf).to(device)
        root = triton_merge.tree(outs, lses, 1)
        pairs = ((triton_merge.merge(outs, lses), merge(outs, lses)), (root, tree(outs, lses)))
        for found, wanted in pairs:
            for a, b in zip(found, wanted, strict=True):
                assert torch.allclose(a, b, rtol=0, atol=2e-6)
        assert (root[0][0, 0] == 0).all()
        assert root[1][0, 0] == -torch.inf
        for levels in (2, 3):
            for a, b in zip(triton_merge.tree(outs, lses, levels), root, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("form", ["merge", "tree"])
    def test_an_empty_partial_changes_no_bit(self, form: str) -> None:
        from countersign.kernels.triton import merge as triton_merge

        device = "cuda" if torch.cuda.is_available() else "cpu"
        out, lse = torch.randn(3, 2, 32, device=device), 20 * torch.randn(3, 2, device=device)
        for place in range(5):
            outs, lses = out.new_zeros(5, *out.shape), lse.new_full((5, *lse.shape), -torch.inf)
            outs[place], lses[place] = out, lse
            found = getattr(triton_merge, form)(outs, lses)
            assert torch.equal(found[0], out)
            assert torch.equal(found[1], lse)

    def test_partials_that_would_be_copied_or_rounded_are_refused(self) -> None:
        from countersign.kernels.triton import merge as triton_merge

        outs, lses = torch.randn(4, 2, 16), torch.randn(4, 2)
        with pytest.raises(ValueError, match="outs is"):
            triton_merge.merge(outs.transpose(0, 1), lses)
        with pytest.raises(ValueError, match="lses is"):
            triton_merge.tree(outs, lses.double())
