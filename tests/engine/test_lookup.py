from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from countersign.services.engine.lookup import Lookup


def test_what_followed_the_last_tokens_is_proposed_again() -> None:
    assert Lookup(3).propose([1, 2, 3, 4, 5, 6, 1, 2, 3], 2) == (4, 5)


def test_tokens_that_never_stood_here_before_propose_nothing() -> None:
    assert Lookup(3).propose([1, 2, 3, 4], 5) == ()


def test_a_sequence_shorter_than_the_run_proposes_nothing() -> None:
    assert Lookup(3).propose([1, 1], 5) == ()


def test_the_latest_occurrence_counts() -> None:
    assert Lookup(2).propose([1, 2, 3, 1, 2, 4, 1, 2], 1) == (4,)


def test_a_proposal_may_run_into_the_repetition_itself() -> None:
    assert Lookup(2).propose([7, 7, 7, 7], 4) == (7,)


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 4), st.data())
def test_growing_sequences_are_searched_as_whole_ones_are(tokens: list[int], size: int, data: st.DataObject) -> None:
    lookup, end = Lookup(size), 0
    while end < len(tokens):
        end += data.draw(st.integers(1, len(tokens) - end))
        known = tokens[:end]
        last = known[-size:]
        places = [i for i in range(end - size) if known[i : i + size] == last]
        expected = tuple(known[places[-1] + size :][:5]) if places else ()
        assert lookup.propose(known, 5) == expected
