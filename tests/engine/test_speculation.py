"""Which proposals of a chain or tree a target's samples accept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.services.engine.errors import InvalidSpan
from countersign.services.engine.sampling import NOT_FINITE
from countersign.services.engine.speculation import Draft, walk


@pytest.mark.parametrize(
    ("draft", "emitted"),
    [([], [3]), ([3], [3, 4]), ([9], [3]), ([3, 4, 5], [3, 4, 5, 6]), ([3, 4, 9], [3, 4, 5]), ([3, 9, 5], [3, 4])],
)
def test_accepted_proposals_are_emitted_and_then_one_token_of_the_target(draft: list[int], emitted: list[int]) -> None:
    walked = walk(Draft(tuple(draft)), [3, 4, 5, 6][: len(draft) + 1])
    assert list(walked.token_ids) == emitted
    assert walked.path == tuple(range(len(emitted) - 1))
    assert walked.finite


TREE = Draft((3, 9, 4, 3, 7, 8), (-1, -1, 0, 1, 0, 2))


@pytest.mark.parametrize(
    ("sampled", "emitted", "path"),
    [
        ([5, 0, 0, 0, 0, 0, 0], (5,), ()),
        ([3, 5, 0, 0, 0, 0, 0], (3, 5), (0,)),
        ([3, 4, 0, 8, 0, 0, 6], (3, 4, 8, 6), (0, 2, 5)),
        ([3, 7, 0, 0, 0, 2, 0], (3, 7, 2), (0, 4)),
        ([9, 0, 3, 0, 1, 0, 0], (9, 3, 1), (1, 3)),
        # A token that is another node's child only.
        ([9, 0, 4, 0, 0, 0, 0], (9, 4), (1,)),
        ([4, 0, 0, 0, 0, 0, 0], (4,), ()),
    ],
)
def test_a_tree_is_walked_from_child_to_child(
    sampled: list[int], emitted: tuple[int, ...], path: tuple[int, ...]
) -> None:
    walked = walk(TREE, sampled)
    assert (walked.token_ids, walked.path) == (emitted, path)


def test_samples_that_are_not_reached_are_not_looked_at() -> None:
    bad = NOT_FINITE
    assert walk(Draft((3, 8)), [3, 4, bad]).token_ids == (3, 4)
    assert walk(TREE, [9, bad, 2, bad, bad, bad, bad]).token_ids == (9, 2)


def test_where_no_sample_could_be_taken_the_walk_ends_and_says_so() -> None:
    bad = NOT_FINITE
    for draft, sampled, emitted in (
        (Draft(), [bad], ()),
        (Draft((3, 4)), [3, bad, 5], (3,)),
        (Draft((3, 4)), [3, 4, bad], (3, 4)),
        (TREE, [3, 4, 1, bad, 1, 1, 1], (3, 4)),
    ):
        walked = walk(draft, sampled)
        assert walked.token_ids == emitted
        assert len(walked.path) == len(emitted)
        assert not walked.finite


def test_a_wrong_number_of_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="2 proposals need 3 samples, not 2"):
        walk(Draft((1, 2)), [1, 2])


@pytest.mark.parametrize(
    ("token_ids", "parents", "message"),
    [
        ((1, 2), (-1,), "a tree of 2 tokens has 1 parents"),
        ((1, 2), (-1, 1), "not stand before its child"),
        ((1, 2), (0, -1), "not stand before its child"),
        ((1, 2), (-1, -2), "not stand before its child"),
        ((1, 2, 2), (-1, 0, 0), "two siblings"),
        ((2, 2), (-1, -1), "two siblings"),
    ],
)
def test_a_draft_that_is_no_tree_is_refused(token_ids: tuple[int, ...], parents: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidSpan, match=message):
        Draft(token_ids, parents)


def test_a_chain_may_repeat_a_token_and_so_may_branches_of_a_tree() -> None:
    assert walk(Draft((5, 5)), [5, 5, 5]).token_ids == (5, 5, 5)
    assert Draft((5, 6, 5, 5), (-1, -1, 0, 1)).depths() == [0, 0, 1, 1]


@given(st.lists(st.integers(-1, 9), min_size=1, max_size=12), st.integers(0, 12), st.integers(-1, 6))
def test_what_is_cut_off_a_draft_is_the_end(picks: list[int], count: int, levels: int) -> None:
    parents = tuple(min(pick, index - 1) for index, pick in enumerate(picks))
    tree, chain = Draft(tuple(range(len(picks))), parents), Draft(tuple(range(len(picks))))
    assert tree.cut(count) == Draft(tree.token_ids[:count], parents[:count])
    assert chain.cut(count) == Draft(chain.token_ids[:count])
    assert len(chain.shallow(levels)) == max(0, min(levels, len(chain)))
    shallow = tree.shallow(levels)
    assert shallow == tree.cut(len(shallow))
    assert all(depth < levels for depth in shallow.depths())
    assert shallow == tree or tree.depths()[len(shallow)] >= levels
