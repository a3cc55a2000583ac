"""Every attack sells more hidden tokens than there were, and leaves the rest of the answer as it was."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify.coin.attacks import NAMES, Ids, Name, Thought, Tools, inflate, splits_of

VOCABULARY = {"a": 1, "b": 4, "ab": 5, "bb": 8, "abb": 9}
SPLITS = splits_of(VOCABULARY)
SPELLED = {token: text for text, token in VOCABULARY.items()}


def tools(said: list[Ids] | None = None) -> Tools:
    def say(prefix: Ids, count: int) -> Sequence[int]:
        if said is not None:
            said.append(prefix)
        return [77] * count

    def prolong(thought: Thought, hidden: int) -> Thought:
        return Thought(thought.prompt, (*thought.hidden, *[66] * (hidden - len(thought.hidden))), (1, 2))

    return Tools(100, SPLITS, say, lambda _, passage: sum(passage), prolong)


THOUGHTS = st.builds(
    Thought,
    st.lists(st.integers(0, 99), min_size=1, max_size=40).map(tuple),
    st.lists(st.integers(0, 99), min_size=1, max_size=80).map(tuple),
    st.lists(st.integers(0, 99), min_size=1, max_size=40).map(tuple),
)
INSERTING: list[Name] = [name for name in NAMES if name not in {"split", "prolong"}]


@pytest.mark.parametrize("name", INSERTING)
@given(thought=THOUGHTS, share=st.sampled_from([0.1, 0.5, 3.0]), seed=st.integers(0, 99))
def test_so_many_tokens_are_put_in_and_none_is_lost(name: Name, thought: Thought, share: float, seed: int) -> None:
    inflated = inflate(name, thought, share, tools(), Random(seed))
    assert len(inflated.hidden) == len(thought.hidden) + max(1, round(share * len(thought.hidden)))
    assert (inflated.prompt, inflated.visible) == (thought.prompt, thought.visible)
    rest = iter(inflated.hidden)
    assert all(token in rest for token in thought.hidden), "the true tokens are still there, in order"


@given(thought=THOUGHTS, seed=st.integers(0, 99))
def test_splits_say_the_same_in_more_tokens(thought: Thought, seed: int) -> None:
    inflated = inflate("split", thought, 3.0, tools(), Random(seed))
    assert spelled(inflated.hidden) == spelled(thought.hidden)
    assert not set(inflated.hidden) & {5, 8, 9}, "at 300 % whatever can be split is"


def spelled(tokens: Ids) -> str:
    return "".join(SPELLED.get(token, f"<{token}>") for token in tokens)


def test_every_way_to_write_a_token_as_two_is_known() -> None:
    assert splits_of({"a": 0, "b": 1, "ab": 2, "aba": 3, "x": 4}) == {2: [(0, 1)], 3: [(2, 0)]}


def test_the_adaptive_attack_takes_what_the_judge_likes_best() -> None:
    thought = Thought((1,) * 20, (2,) * 20, (3,) * 20)
    inflated = inflate("adaptive", thought, 0.5, tools(), Random(0))
    assert inflated.hidden.count(77) == 10, "the cheap model's passage has the highest sum"


def test_the_cheap_model_continues_what_stands_before() -> None:
    said: list[Ids] = []
    thought = Thought((1, 2, 3), (4, 5, 6, 7), (8,))
    inflate("resample", thought, 0.5, tools(said), Random(1))
    assert said[0][:4] == (1, 2, 3, 4)


def test_a_prolonged_thought_is_the_model_s_own() -> None:
    thought = Thought((1,), (4, 5, 6, 7), (8, 9))
    assert inflate("prolong", thought, 0.5, tools(), Random(0)) == Thought((1,), (4, 5, 6, 7, 66, 66), (1, 2))
