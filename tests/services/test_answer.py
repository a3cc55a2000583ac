"""Tokens reach the client with the text they complete, never with the beginning of a stop string."""

from hypothesis import given
from hypothesis import strategies as st

from countersign.services.router.answer import Answer
from countersign.v1.router_pb2 import Token, TokenSource


def play(pieces: list[str], stop: tuple[str, ...], cuts: set[int], position: int = 0) -> list[tuple[int, Token]]:
    """Commit and decode the pieces as tokens 0, 1, ..., a batch ending before each cut."""
    answer = Answer(stop=stop, position=position)
    out: list[tuple[int, Token]] = []
    batch: list[int] = []
    for index in range(len(pieces) + 1):
        if (index in cuts or index == len(pieces)) and batch:
            answer.committed(batch, accepted=len(batch) - 1)
            tokens = answer.decoded([pieces[i] for i in batch], final=index == len(pieces))
            if tokens is not None:
                out += [(tokens.position + i, token) for i, token in enumerate(tokens.tokens)]
            batch = []
        batch.append(index)
    return out


words = st.lists(st.text("ab\n", max_size=4), min_size=1, max_size=12)


@given(words, st.sets(st.integers(0, 12)), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=2))
def test_the_joined_texts_are_the_answer_up_to_the_stop_however_it_is_cut(
    pieces: list[str], cuts: set[int], stops: list[str]
) -> None:
    out = play(pieces, tuple(stops), cuts)
    whole = "".join(pieces)
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole]
    expected = whole[: min(ends)[1]] if ends else whole
    assert "".join(token.text for _, token in out) == expected
    assert [position for position, _ in out] == list(range(len(pieces)))
    assert [token.id for _, token in out] == list(range(len(pieces)))


@given(words, st.sets(st.integers(0, 12)), st.integers(0, 12))
def test_a_reader_from_any_position_gets_the_tail_of_what_a_reader_from_the_start_gets(
    pieces: list[str], cuts: set[int], position: int
) -> None:
    whole = play(pieces, ("ab",), cuts)
    tail = play(pieces, ("ab",), set(range(13)), position)
    assert [(p, t.id, t.text) for p, t in tail] == [(p, t.id, t.text) for p, t in whole[position:]]


def test_text_that_may_begin_a_stop_string_is_held_until_it_is_settled() -> None:
    answer = Answer(stop=("\n\n",))
    answer.committed([1, 2], accepted=1)
    tokens = answer.decoded(["x = 1", "\n"])
    assert tokens is not None
    assert [token.text for token in tokens.tokens] == ["x = 1"]
    assert tokens.tokens[0].source == TokenSource.TOKEN_SOURCE_DRAFT
    answer.committed([3], accepted=0)
    tokens = answer.decoded(["y"])
    assert tokens is not None
    assert [(tokens.position + i, token.text) for i, token in enumerate(tokens.tokens)] == [(1, "\n"), (2, "y")]
