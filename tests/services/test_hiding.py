from __future__ import annotations

import pytest

from countersign.services.engine.text import Tokenizer
from countersign.services.runtime.errors import FailedPrecondition
from countersign.services.target.hiding import markers
from countersign.v1.sampling_pb2 import HiddenMarkers
from countersign.verify.testing import END_TOKEN, write_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tiny_model(tmp_path_factory.mktemp("tiny")))


def test_markers_are_named_by_text_or_id(tokenizer: Tokenizer) -> None:
    (begin,) = tokenizer.encode("{", plain=True)
    assert markers("{ <|end|>", tokenizer) == HiddenMarkers(begin=begin, end=END_TOKEN)
    assert markers(f"{begin} {END_TOKEN}", tokenizer) == HiddenMarkers(begin=begin, end=END_TOKEN)
    assert markers("", tokenizer) is None


@pytest.mark.parametrize("setting", ["<think> </think>", "{ {", "{ 999", "257 {"])
def test_markers_that_are_no_two_tokens_are_refused_by_name(setting: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(FailedPrecondition, match="hidden_markers") as raised:
        markers(setting, tokenizer)
    assert raised.value.reason == "BAD_HIDDEN_MARKERS"
