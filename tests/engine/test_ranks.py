"""A step over ranks gives the bits of the plain native engine: ranks as threads, each with its part of the pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from countersign.kernels.ring.threads import run_ranks
from countersign.kernels.ring.transport import Counted, Transport
from countersign.services.engine.kv import LocalPages, PagedCache
from countersign.services.engine.model import Computed, Model, Span, load_model
from countersign.services.engine.native import NativeExecutor
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.engine.ranks.placement import LEAF, Placement
from countersign.services.engine.ranks.plan import SpanShape
from countersign.services.engine.ranks.rank import Rank, Result, Step, join

PAGES = 200
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 100},
    "qwen3": {"num_attention_heads": 6, "num_key_value_heads": 1},
    "mixtral": {},
}


@pytest.fixture(scope="module")
def folders(build_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint a family."""
    found = {}
    for seed, (family, changes) in enumerate(SHAPES.items()):
        found[family] = tmp_path_factory.mktemp(family)
        build_model(family, seed, **changes).save_pretrained(found[family])
    return found


class Both:
    """A model as the plain engine runs it, and over ranks; the same pages by number."""

    def __init__(self, folder: Path, ranks: int, unit: int, dtype: Any = "fp32", *, long: int = 1 << 30) -> None:
        self.plain = load_model(folder, dtype=dtype, backend="native")
        config = self.plain.config
        self.cache = PagedCache(config, self.plain.dtype, PAGES * PAGE_TOKENS)
        self.placement = Placement.of(ranks, config.context_length, unit)
        self.models: list[Model] = [load_model(folder, dtype=dtype, backend="native") for _ in range(ranks)]
        self.pages = [LocalPages(config, self.cache.dtype, 1 + PAGES, "cpu") for _ in range(ranks)]
        self.long = long
        self.sent: list[int] = []

    def compute(self, spans: list[Span], *, diagnose: bool = False) -> tuple[Computed, list[Result]]:
        """(what the plain engine gives, what the ranks gave)."""
        bases = [span.sequence.length for span in spans]
        computed = self.plain.compute(self.cache, spans)
        columns = max(len(span.sequence.pages) for span in spans)
        tables = self.cache.tables[[span.sequence.row for span in spans], :columns]
        shapes = [
            SpanShape(base, len(span.token_ids), span.logits, len(span.token_ids) >= self.long)
            for span, base in zip(spans, bases, strict=True)
        ]
        step = Step(shapes, [span.token_ids for span in spans], tables, diagnose)

        def run(transport: Transport) -> tuple[Result, int]:
            counted, executor = Counted(transport), self.models[transport.rank].executor
            assert isinstance(executor, NativeExecutor)
            rank = Rank(executor, self.pages[transport.rank], self.placement, counted, 20.0)
            return rank.run(step), sum(counted.sent.values())

        results = run_ranks(self.placement.ranks, run)
        self.sent = [sent for _, sent in results]
        return computed, [result for result, _ in results]


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def same(found: Computed, expected: Computed) -> None:
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.states, expected.states)


@pytest.mark.parametrize("long", [1, 1 << 30], ids=["shared-out", "replicated"])
@pytest.mark.parametrize(("ranks", "unit"), [(1, 64), (2, 64), (3, 128), (4, 64)])
@pytest.mark.parametrize("family", SHAPES)
def test_prefill_and_decode_over_ranks_have_the_plain_engines_bits(
    folders: dict[str, Path], family: str, ranks: int, unit: int, long: int
) -> None:
    both = Both(folders[family], ranks, unit, long=long)
    one, other = both.cache.sequence(), both.cache.sequence()
    both.compute([Span(one, tokens(300), 0)])
    for spans in (
        [Span(one, tokens(150, 1), 1), Span(other, tokens(70, 2), 1)],  # a cached prefix, and two at once
        [Span(one, tokens(1, 3), 1), Span(other, tokens(200, 4), 3)],  # a decode beside a prefill
        [Span(one, tokens(6, 5), 6), Span(other, tokens(1, 6), 1)],  # verification beside a decode
    ):
        computed, results = both.compute(spans)
        same(join(results), computed)


@settings(max_examples=25)
@given(data=st.data(), ranks=st.integers(2, 4), unit=st.sampled_from([64, 128]), bf16=st.booleans())
def test_any_schedule_over_ranks_has_the_plain_engines_bits(
    folders: dict[str, Path], data: st.DataObject, ranks: int, unit: int, bf16: bool
) -> None:
    family = data.draw(st.sampled_from(list(SHAPES)))
    both = Both(
        folders[family], ranks, unit, "bf16" if bf16 else "fp32", long=data.draw(st.sampled_from([1, 20, 1000]))
    )
    sequences = [both.cache.sequence() for _ in range(data.draw(st.integers(1, 3)))]
    for turn in range(3):
        spans = []
        for number, sequence in enumerate(sequences):
            count = data.draw(st.sampled_from([0, 1, 5, 17, 64, 130, 200]))
            if count:
                spans.append(
                    Span(sequence, tokens(count, 10 * turn + number), data.draw(st.integers(0, min(count, 3))))
                )
        if spans:
            computed, results = both.compute(spans)
            same(join(results), computed)


def test_a_rank_writes_only_the_pages_that_it_keeps(folders: dict[str, Path]) -> None:
    both = Both(folders["llama"], 2, 64)
    sequence = both.cache.sequence()
    both.compute([Span(sequence, tokens(300), 0)])
    for rank, pages in enumerate(both.pages):
        written = {page for page in range(1, 1 + PAGES) if pages.pool[page].any()}
        own = {page for index, page in enumerate(sequence.pages) if both.placement.rank_of_page(index) == rank}
        assert written == own
        for page in own:
            assert torch.equal(pages.pool[page], both.cache.pool[page])


def test_queries_travel_round_the_ring_only_where_rows_are_shared_out(folders: dict[str, Path]) -> None:
    shared, replicated = (Both(folders["llama"], 4, 64, long=long) for long in (1, 1 << 30))
    for both in (shared, replicated):
        both.compute([Span(both.cache.sequence(), tokens(512), 0)])
    assert max(shared.sent) < min(replicated.sent) / 2


@pytest.mark.parametrize("long", [1, 1 << 30])
def test_what_a_rank_says_it_sent_is_what_left_it_and_queries_travel_only_on_the_ring(
    folders: dict[str, Path], long: int
) -> None:
    both = Both(folders["llama"], 4, 64, long=long)
    _, results = both.compute([Span(both.cache.sequence(), tokens(512), 0)])
    assert [result.sent.forward + result.sent.back for result in results] == both.sent
    config = both.plain.config
    row = config.heads * config.head_dim * 4
    # Each rank passes on the queries of all but the next one, once a layer; 512 rows are shared out evenly.
    forward = 3 * 512 // 4 * row * config.layers if long == 1 else 0
    assert [result.sent.forward for result in results] == [forward] * 4
    assert min(result.sent.back for result in results) > 0


def test_the_first_layer_that_is_not_finite_is_found_over_ranks(folders: dict[str, Path]) -> None:
    both = Both(folders["llama"], 2, 64)
    sequence = both.cache.sequence()
    _, results = both.compute([Span(sequence, tokens(100), 1)], diagnose=True)
    assert [result.bad_layer for result in results] == [-1, -1]
    for pages in both.pages:
        pages.pool[sequence.pages[0], 1] = np.nan if pages.pool[sequence.pages[0]].any() else 0
    _, results = both.compute([Span(sequence, tokens(1), 1)], diagnose=True)
    assert {result.bad_layer for result in results} == {1}


@pytest.mark.parametrize(("ranks", "unit"), [(0, 64), (2, 0), (2, 96), (2, 192)])
def test_a_placement_that_would_split_a_leaf_is_refused(ranks: int, unit: int) -> None:
    with pytest.raises(ValueError, match="times a power of two"):
        Placement(ranks, unit)


@given(ranks=st.integers(1, 9), unit=st.sampled_from([64, 128, 1024]), tokens=st.integers(1, 5000))
def test_every_position_has_one_rank_and_every_leaf_one_node(ranks: int, unit: int, tokens: int) -> None:
    placement = Placement(ranks, unit)
    owned = [
        position
        for rank in range(ranks)
        for run in placement.runs(rank, 0, tokens)
        for position in range(run.first, run.end)
    ]
    assert sorted(owned) == list(range(tokens))
    leaves = -(-tokens // LEAF)
    covered = [
        leaf
        for rank in range(ranks)
        for node in placement.nodes(rank, tokens)
        for leaf in range(node.first, node.last + 1)
    ]
    assert sorted(leaf for leaf in covered if leaf < leaves) == list(range(leaves))
