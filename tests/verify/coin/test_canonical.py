from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from countersign.services.engine.text import Tokenizer
from countersign.verify.coin.attacks import Thought, Tools, inflate, splits_of
from countersign.verify.coin.canonical import Spelling, spelling

TEXT = "    def push(self, item):\n        self.items.append(item)\n        return len(self.items)\n" * 4


@pytest.fixture(scope="module")
def tokenizer(demo_models: dict[str, Path]) -> Tokenizer:
    return Tokenizer(demo_models["target"])


def test_text_as_the_tokenizer_writes_it_is_canonical(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, plain=True)
    assert spelling(tokenizer, ids) == Spelling(len(ids), len(ids))


def test_a_tenth_more_tokens_for_the_same_text_is_noted(tokenizer: Tokenizer) -> None:
    ids = tuple(tokenizer.encode(TEXT, plain=True))
    tools = Tools(4096, splits_of(tokenizer.vocabulary()), lambda *_: [], lambda *_: 0.0, lambda one, _: one)
    split = inflate("split", Thought((1,), ids, (2,)), 0.1, tools, Random(0)).hidden
    assert tokenizer.decode(split) == tokenizer.decode(ids)
    found = spelling(tokenizer, split)
    assert (found.tokens, found.needed) == (len(ids) + round(0.1 * len(ids)), len(ids))
    assert found.doubtful


def test_one_odd_spelling_among_many_is_what_sampling_does() -> None:
    assert not Spelling(200, 199).doubtful
    assert not Spelling(200, 210).doubtful, "bytes that are no text need more tokens to write out again"
    assert Spelling(200, 180).doubtful
