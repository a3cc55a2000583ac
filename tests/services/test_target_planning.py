"""Where an answer ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.services.engine.text import Tokenizer
from countersign.services.target.stopping import Stopper
from countersign.v1.sampling_pb2 import FinishReason
from countersign.verify.testing import END_TOKEN, write_tiny_model

STOP, LENGTH = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return path


def test_an_answer_ends_at_the_first_end_token_stop_string_or_at_its_length(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    text = "if x:\n    return 1\n\nprint"
    tokens = tokenizer.encode(text, plain=True)
    whole = Stopper(frozenset({END_TOKEN}), 1000)
    assert whole.take(tokens) == (tokens, None)
    assert whole.take([END_TOKEN, 1]) == ([END_TOKEN], STOP)
    assert Stopper(frozenset(), 4).take(tokens) == (tokens[:4], LENGTH)
    stopper = Stopper(frozenset(), 1000, ("\n\n", "zzz"), tokenizer)
    taken, reason = stopper.take(tokens)
    assert reason == STOP
    assert tokenizer.decode(taken) == "if x:\n    return 1\n\n"


@given(st.lists(st.integers(1, 6), max_size=12))
def test_where_an_answer_ends_does_not_depend_on_how_many_tokens_a_pass_gave(folder: Path, cuts: list[int]) -> None:
    tokenizer = Tokenizer(folder)
    tokens = tokenizer.encode("naïve 🙂 text with a stop 🙂🙂 in it", plain=True)
    expected, _ = Stopper(frozenset(), 1000, ("🙂🙂",), tokenizer).take(tokens)
    stopper, taken, rest = Stopper(frozenset(), 1000, ("🙂🙂",), tokenizer), list[int](), tokens
    reason = None
    for cut in [*cuts, len(tokens)]:
        part, reason = stopper.take(rest[:cut])
        taken, rest = taken + part, rest[cut:]
        if reason is not None:
            break
    assert taken == expected
    assert reason == STOP
    assert len(taken) < len(tokens)
