"""What a forward pass refuses, and that a refusal changes nothing."""

from __future__ import annotations

import pytest
import torch

from countersign.services.engine.config import Rope
from countersign.services.engine.errors import ContextExceeded, InvalidSpan, OutOfPages
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, Span
from countersign.services.engine.rope import RotaryTable


def test_rows_of_logits_come_in_the_order_of_the_spans(model: Model) -> None:
    cache = PagedCache(model.config, "fp32", 256)
    spans = [
        Span(cache.sequence(), [1, 2, 3], 2),
        Span(cache.sequence(), list(range(20)), 0),
        Span(cache.sequence(), [4]),
    ]
    logits = model.forward(cache, spans)
    assert logits.shape == (3, model.config.vocabulary_size)
    assert logits.dtype is torch.float32
    assert [span.sequence.length for span in spans] == [3, 20, 1]
    alone = model.forward(cache, [Span(cache.sequence(), [4])])
    assert torch.equal(logits[2:], alone)


def test_no_logits_are_computed_when_none_are_wanted(model: Model) -> None:
    cache = PagedCache(model.config, "fp32", 256)
    assert model.forward(cache, [Span(cache.sequence(), [1, 2], 0)]).shape == (0, model.config.vocabulary_size)


def test_spans_that_make_no_sense_are_refused(model: Model) -> None:
    cache, other = PagedCache(model.config, "fp32", 64), PagedCache(model.config, "fp32", 64)
    sequence, closed = cache.sequence(), cache.sequence()
    closed.close()
    refused = {
        "at least one span": [],
        "given twice": [Span(sequence, [1]), Span(sequence, [2])],
        "closed or of another cache": [Span(closed, [1])],
        "of another cache": [Span(other.sequence(), [1])],
        "0 tokens": [Span(sequence, [])],
        "wants 2 rows": [Span(sequence, [1], 2)],
        "outside the vocabulary of 96": [Span(sequence, [1, 96])],
        "outside the vocabulary": [Span(sequence, [-1])],
    }
    for message, spans in refused.items():
        with pytest.raises(InvalidSpan, match=message):
            model.forward(cache, spans)
    assert sequence.length == 0
    assert cache.free_tokens == 64
    cache.check_integrity()


def test_a_sequence_may_fill_the_context_and_no_more(model: Model) -> None:
    cache = PagedCache(model.config, "fp32", 2048)
    sequence = cache.sequence()
    model.forward(cache, [Span(sequence, [1] * 1024)])
    with pytest.raises(ContextExceeded, match="1025 tokens does not fit the model's context of 1024"):
        model.forward(cache, [Span(sequence, [1])])


def test_a_full_cache_refuses_the_whole_pass_and_keeps_every_sequence(model: Model) -> None:
    cache = PagedCache(model.config, "fp32", 48)
    first, second = cache.sequence(), cache.sequence()
    model.forward(cache, [Span(first, [1] * 16), Span(second, [2] * 10)])
    with pytest.raises(OutOfPages) as full:
        model.forward(cache, [Span(first, [1]), Span(second, [2] * 7)])
    assert (full.value.needed, full.value.free) == (2, 1)
    assert (first.length, second.length, cache.free_tokens) == (16, 10, 16)
    cache.check_integrity()
    first.close()
    model.forward(cache, [Span(second, [2] * 7)])


def test_the_table_of_angles_grows_without_changing() -> None:
    table, grown = (RotaryTable(Rope(1e4), 8, torch.float32) for _ in range(2))
    positions = torch.arange(1000)
    before = table.rows(positions, 1000)
    grown.rows(torch.tensor([5000]), 5001)
    after = grown.rows(positions, 1000)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    angle = torch.tensor(5000.0)
    cos, sin = grown.rows(torch.tensor([5000]), 5001)
    assert torch.allclose(cos[0, 0, [0, 4]], torch.cos(angle).expand(2))
    assert torch.allclose(sin[0, 0, [0, 4]], torch.stack((-torch.sin(angle), torch.sin(angle))))
