"""Tokens reach the client with the text they complete, never with the beginning of a stop string."""

from hypothesis import given
from hypothesis import strategies as st

from countersign.services.router.answer import Answer
from countersign.v1.router_pb2 import Hidden, Token, Tokens, TokenSource
from countersign.verify.payload import HiddenMarkers
from countersign.verify.segments import Segmenter, segments_of


def play(pieces: list[str], stop: tuple[str, ...], cuts: set[int], position: int = 0) -> list[tuple[int, Token]]:
    """Commit and decode the pieces as tokens 0, 1, ..., a batch ending before each cut."""
    answer = Answer(stop=stop, position=position)
    out: list[tuple[int, Token]] = []
    batch: list[int] = []
    for index in range(len(pieces) + 1):
        if (index in cuts or index == len(pieces)) and batch:
            answer.committed(batch, accepted=len(batch) - 1)
            for run in answer.decoded([pieces[i] for i in batch], final=index == len(pieces)):
                assert isinstance(run, Tokens)
                out += [(run.position + i, token) for i, token in enumerate(run.tokens)]
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


def decoded(answer: Answer, pieces: list[str]) -> list[Token]:
    return [token for run in answer.decoded(pieces) if isinstance(run, Tokens) for token in run.tokens]


def test_text_that_may_begin_a_stop_string_is_held_until_it_is_settled() -> None:
    answer = Answer(stop=("\n\n",))
    answer.committed([1, 2], accepted=1)
    tokens = decoded(answer, ["x = 1", "\n"])
    assert [token.text for token in tokens] == ["x = 1"]
    assert tokens[0].source == TokenSource.TOKEN_SOURCE_DRAFT
    answer.committed([3], accepted=0)
    assert [token.text for token in decoded(answer, ["y"])] == ["\n", "y"]


BEGIN, END = 1, 2


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.sets(st.integers(0, 30)), st.integers(0, 30))
def test_of_hidden_tokens_only_the_number_goes_out_whoever_reads_from_wherever(
    ids: list[int], cuts: set[int], position: int
) -> None:
    markers = HiddenMarkers(BEGIN, END)
    answer = Answer(position=position, segmenter=Segmenter(markers))
    seen: list[str] = []
    for index, token in enumerate(ids):
        answer.committed([token], accepted=0)
        if index in cuts or index == len(ids) - 1:
            for run in answer.decoded([f"<{i}>" for i in answer.undecoded], final=index == len(ids) - 1):
                assert run.position == position + len(seen)
                if isinstance(run, Hidden):
                    assert run.tokens > 0
                    seen += ["hidden"] * run.tokens
                else:
                    seen += [token.text for token in run.tokens]
                    assert all(token.text == f"<{token.id}>" for token in run.tokens)
    kinds = [s.kind for s in segments_of([], ids, markers) for _ in range(s.tokens)]
    whole = ["hidden" if kind == "hidden" else f"<{token}>" for kind, token in zip(kinds, ids, strict=True)]
    assert seen == whole[position:]


def test_a_hidden_token_s_text_never_goes_out_with_a_visible_one() -> None:
    """Held text belongs to the token that it came with, also where it waits for a stop string."""
    answer = Answer(stop=("ab",), segmenter=Segmenter(HiddenMarkers(BEGIN, END)))
    answer.committed([BEGIN, 5, END, 6], accepted=0)
    visible = decoded(answer, ["", "secret a", "", "c"])
    assert [(token.id, token.text) for token in visible] == [(6, "c")]
