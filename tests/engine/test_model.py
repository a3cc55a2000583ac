"""What a forward pass refuses, and that a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from countersign.services.engine.config import Rope, YarnScaling
from countersign.services.engine.errors import ContextExceeded, InvalidSpan, OutOfPages
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Backend, Model, Span, load_model
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


def test_a_tree_is_bounded_by_its_depth_and_not_by_its_size(model: Model) -> None:
    cache = PagedCache(model.config, "fp32", 2048)
    sequence = cache.sequence()
    model.forward(cache, [Span(sequence, [1] * 1022, 0)])
    with pytest.raises(ContextExceeded, match="1025 tokens does not fit the model's context of 1024"):
        model.forward(cache, [Span(sequence, [1, 2, 3], 3, parents=[-1, 0, 1])])
    assert sequence.length == 1022
    assert model.forward(cache, [Span(sequence, [1, 2, 3, 4], 4, parents=[-1, 0, 0, -1])]).shape[0] == 4


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([-1], "2 tokens and 1 parents"),
        ([-1, 1], "token 1 of a tree has parent 1"),
        ([0, -1], "token 0 of a tree has parent 0"),
        ([-1, -2], "token 1 of a tree has parent -2"),
    ],
)
def test_parents_that_are_no_tree_are_refused(parents: list[int], message: str, model: Model) -> None:
    cache = PagedCache(model.config, "fp32", 64)
    with pytest.raises(InvalidSpan, match=message):
        model.forward(cache, [Span(cache.sequence(), [1, 2], 1, parents)])


def test_a_tree_has_at_most_256_tokens(model: Model) -> None:
    cache = PagedCache(model.config, "fp32", 1024)
    with pytest.raises(InvalidSpan, match="at most 256"):
        model.forward(cache, [Span(cache.sequence(), [1] * 257, 1, [-1] * 257)])
    assert model.forward(cache, [Span(cache.sequence(), [1] * 256, 1, [-1] * 256)]).isfinite().all()


def test_fast_numerics_pad_no_rows(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, plain = load_model(checkpoint, numerics="fast", backend="eager"), set(), F.linear

    def recorded(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows.add(len(x))
        return plain(x, weight, bias)

    monkeypatch.setattr(F, "linear", recorded)
    cache = PagedCache(model.config, "fp32", 64)
    model.forward(cache, [Span(cache.sequence(), [1, 2, 3, 4, 5, 6], 2)])
    assert rows == {6, 2}


def poisoned(folder: Path, backend: Backend, name: str, row: int) -> Model:
    """The model with a row of NaN in one of its matrices."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name][row] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    return load_model(folder, backend=backend)


@pytest.fixture
def routed_folder(build_model: Callable[..., Any], tmp_path: Path) -> Path:
    build_model("mixtral", 4, num_hidden_layers=3).save_pretrained(tmp_path)
    return tmp_path


def test_a_request_of_nan_touches_no_other_and_no_other_branch_of_its_tree(
    routed_folder: Path, backend: Backend
) -> None:
    model = poisoned(routed_folder, backend, "model.embed_tokens.weight", 95)
    cache = PagedCache(model.config, "fp32", 512)
    sequences = [cache.sequence() for _ in range(3)]
    model.forward(cache, [Span(sequence, [1, 2, 3], 0) for sequence in sequences])
    logits = model.forward(
        cache,
        [
            Span(sequences[0], [4]),
            Span(sequences[1], [95]),
            Span(sequences[2], [95, 4, 5, 95], 4, parents=[-1, -1, 1, -1]),
        ],
    )
    assert logits.isfinite().all(dim=1).tolist() == [True, False, False, True, True, False]
    plain = PagedCache(model.config, "fp32", 64)
    expected = model.forward(plain, [Span(plain.sequence(), [1, 2, 3, 4, 5], 2)])
    assert torch.equal(logits[[0, 3, 4]], expected[[0, 0, 1]])


@pytest.mark.parametrize(
    ("name", "row", "layer"),
    [
        ("model.embed_tokens.weight", 7, 0),
        ("model.layers.1.self_attn.o_proj.weight", 7, 1),
        ("model.layers.2.block_sparse_moe.gate.weight", 1, 2),
        ("lm_head.weight", 7, 3),
    ],
)
def test_the_layer_that_went_wrong_is_found(
    name: str, row: int, layer: int, routed_folder: Path, backend: Backend
) -> None:
    model = poisoned(routed_folder, backend, name, row)
    cache = PagedCache(model.config, "fp32", 512)
    sequence = cache.sequence()
    model.forward(cache, [Span(sequence, [1, 2], 0)])
    span = Span(sequence, [3, 7, 4], 3, parents=[-1, 0, 0])
    assert not model.forward(cache, [span]).isfinite().all()
    before = cache.pool.view(torch.int32).clone()
    assert model.first_bad_layer(cache, span) == layer
    assert torch.equal(cache.pool.view(torch.int32), before)
    assert sequence.length == 5
    cache.check_integrity()


def test_the_table_of_angles_grows_without_changing() -> None:
    table, grown = (RotaryTable(Rope(1e4), 8) for _ in range(2))
    positions = torch.arange(1000)
    before = table.rows(positions, 1000, torch.float32)
    grown.rows(torch.tensor([5000]), 5001, torch.float32)
    after = grown.rows(positions, 1000, torch.float32)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    angle = torch.tensor(5000.0)
    cos, sin = grown.rows(torch.tensor([5000]), 5001, torch.float32)
    assert torch.allclose(cos[0, 0, [0, 4]], torch.cos(angle).expand(2))
    assert torch.allclose(sin[0, 0, [0, 4]], torch.stack((-torch.sin(angle), torch.sin(angle))))


def test_the_table_is_two_plain_halves_that_stay_until_they_are_too_short() -> None:
    table = RotaryTable(Rope(100.0, YarnScaling(4.0, 32.0, 1.0, 1.25, 64, truncate=True)), 8)
    cos, sin = table.table(1000)
    assert cos.shape == sin.shape == (1024, 4)
    assert cos.dtype is sin.dtype is torch.float32
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert torch.allclose(cos**2 + sin**2, torch.tensor(1.25**2))
    assert table.table(1024)[0] is cos
    assert len(table.table(1025)[0]) == 2048
    assert len(table.table(9000)[0]) == 9000
