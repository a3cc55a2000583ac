"""The same bits alone and in a batch, in any chunks, after imports, in decode, in verify and in trees; ==."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from countersign.kernels import padded_attention
from countersign.services.engine import linear
from countersign.services.engine.eager import EagerExecutor
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.linear import LinearMode
from countersign.services.engine.model import Backend, Model, Span, load_model
from countersign.services.engine.pages import PAGE_TOKENS

LENGTHS = (700, 530, 90, 33)
CHUNKS = st.sampled_from((1, 1, 2, 3, 5, 15, 16, 17, 33, 64, 100, 255, 256, 257, 300))


def tokens(index: int) -> list[int]:
    return torch.randint(0, 96, (LENGTHS[index],), generator=torch.Generator().manual_seed(index)).tolist()


@dataclass(frozen=True)
class Reference:
    """Each sequence computed alone in one piece: its logits, the states that the head takes, and its KV blocks."""

    model: Model
    logits: list[Tensor]
    states: list[Tensor]
    blocks: list[list[bytes]]


def reference(model: Model) -> Reference:
    logits: list[Tensor] = []
    states: list[Tensor] = []
    blocks = []
    for index, length in enumerate(LENGTHS):
        cache = PagedCache(model.config, model.dtype, length)
        sequence = cache.sequence()
        computed = model.compute(cache, [Span(sequence, tokens(index), length)])
        logits.append(computed.logits)
        states.append(computed.states.clone())
        blocks.append([sequence.export_block(i) for i in range(length // PAGE_TOKENS)])
    return Reference(model, logits, states, blocks)


@pytest.fixture(scope="module")
def references(
    model: Model, other_model: Model, routed_model: Model, backend: Backend, other_checkpoint: Path
) -> list[Reference]:
    """In fp32; of native code, which stores weights and cache otherwise, in bf16 and int8 as well."""
    models = [model, other_model, routed_model]
    if backend == "native":
        models += [load_model(other_checkpoint, dtype=dtype, backend=backend) for dtype in ("bf16", "int8")]
    return [reference(each) for each in models]


def eager(model: Model) -> EagerExecutor:
    assert isinstance(model.executor, EagerExecutor)
    return model.executor


@dataclass
class Runner:
    """One sequence on its way through a random schedule."""

    index: int
    sequence: CachedSequence
    seen: list[Tensor] = field(default_factory=list)

    def next_span(self, chunk: int, wrong: int) -> tuple[Span, int]:
        """The next tokens, and wrong ones behind them, as a verification of bad proposals has."""
        done = self.sequence.length
        right = tokens(self.index)[done : done + chunk]
        return Span(self.sequence, right + [7] * wrong, len(right) + wrong), len(right)


def run_schedule(ref: Reference, chosen: list[int], imports: list[int], chunks: Iterator[int]) -> None:
    cache = PagedCache(ref.model.config, ref.model.dtype, 4000)
    runners = [Runner(index, cache.sequence()) for index in chosen]
    for runner, count in zip(runners, imports, strict=True):
        for block in ref.blocks[runner.index][:count]:
            runner.sequence.import_block(block)
    while active := [runner for runner in runners if runner.sequence.length < LENGTHS[runner.index]]:
        planned = [runner.next_span(next(chunks), next(chunks) % 6) for runner in active]
        computed, counts = ref.model.compute(cache, [span for span, _ in planned]), [span.logits for span, _ in planned]
        logits, states = torch.split(computed.logits, counts), torch.split(computed.states, counts)
        for runner, (span, right), rows, below in zip(active, planned, logits, states, strict=True):
            first = runner.sequence.length - len(span.token_ids)
            assert torch.equal(rows[:right], ref.logits[runner.index][first : first + right])
            assert torch.equal(below[:right], ref.states[runner.index][first : first + right])
            runner.sequence.truncate(first + right)
    for runner in runners:
        full = LENGTHS[runner.index] // PAGE_TOKENS
        assert [runner.sequence.export_block(i) for i in range(full)] == ref.blocks[runner.index]
    cache.check_integrity()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(data=st.data(), which=st.integers(0, 59))
def test_logits_states_and_kv_are_the_same_bits_however_a_sequence_is_computed(
    references: list[Reference], data: st.DataObject, which: int
) -> None:
    which %= len(references)
    chosen = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
    imports = [data.draw(st.integers(0, LENGTHS[index] // PAGE_TOKENS)) for index in chosen]
    cycle = data.draw(st.lists(CHUNKS, min_size=3, max_size=12))
    if max(cycle) < 15:
        cycle.append(64)
    run_schedule(references[which], chosen, imports, itertools.cycle(cycle))


def test_decode_token_by_token_gives_the_bits_of_one_prefill(references: list[Reference]) -> None:
    run_schedule(references[1], [2, 3], [0, 0], iter([1, 0] * 1000))


def test_the_number_of_torchs_threads_changes_no_bit(references: list[Reference]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))
    try:
        again = reference(references[0].model)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, references[0].logits, strict=True))


def test_the_fallback_paths_are_taken_when_the_fast_ones_fail_their_tests_and_are_invariant_too(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = load_model(checkpoint, backend="eager")
    expected = fast.forward(cache := PagedCache(fast.config, "fp32", 100), [Span(cache.sequence(), tokens(2), 90)])
    monkeypatch.setattr(linear, "is_row_invariant", lambda *_: False)
    monkeypatch.setattr(padded_attention, "is_row_invariant", lambda *_: False)
    model = load_model(checkpoint, backend="eager")
    assert set(eager(model).paths.linear.values()) == {LinearMode.TILED}
    assert eager(model).paths.attention is padded_attention.Path.ROW_BY_ROW
    cache = PagedCache(model.config, "fp32", 1000)
    first, second = cache.sequence(), cache.sequence()
    whole = model.forward(cache, [Span(first, tokens(2), 90)])
    assert (whole - expected).abs().max() < 2e-4
    parts = [
        model.forward(cache, [Span(second, tokens(2)[a:b], b - a), Span(cache.sequence(), [5], 0)])
        for a, b in ((0, 50), (50, 51), (51, 56), (56, 90))
    ]
    assert torch.equal(torch.cat(parts), whole)
    tree = Tree(2, 60, [tokens(2)[60], 5, *tokens(2)[61:63]], [-1, -1, 0, 2])
    assert torch.equal(tree.run(model, cache, [])[[0, 2, 3]], whole[60:63])


def test_the_fast_paths_are_the_ones_in_use(checkpoint: Path) -> None:
    model = load_model(checkpoint, backend="eager")
    assert set(eager(model).paths.linear.values()) == {LinearMode.PREPACKED}
    assert eager(model).paths.attention is padded_attention.Path.FLASH_CPU


@dataclass(frozen=True)
class Tree:
    """Proposals behind the first ``base`` tokens of a sequence."""

    index: int
    base: int
    token_ids: list[int]
    parents: list[int]

    def path(self, node: int) -> list[int]:
        """The nodes from a root to this one."""
        return ([] if self.parents[node] < 0 else self.path(self.parents[node])) + [node]

    def grown(self, model: Model, cache: PagedCache) -> CachedSequence:
        sequence = cache.sequence()
        model.forward(cache, [Span(sequence, tokens(self.index)[: self.base], 0)])
        return sequence

    def run(self, model: Model, cache: PagedCache, beside: list[Span]) -> Tensor:
        """The logits of every node."""
        sequence = self.grown(model, cache)
        span = Span(sequence, self.token_ids, len(self.token_ids), self.parents)
        return model.forward(cache, [*beside, span])[sum(span.logits for span in beside) :]

    def decoded(self, model: Model) -> list[Tensor]:
        """The logits of every node, decoded token by token along the path to it, alone."""
        cache = PagedCache(model.config, model.dtype, 1024)
        sequence, rows = self.grown(model, cache), []
        for node in range(len(self.token_ids)):
            for step in self.path(node):
                row = model.forward(cache, [Span(sequence, [self.token_ids[step]])])
            rows.append(row[0])
            sequence.truncate(self.base)
        return rows


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Bushy, slim and chain-like ones, around the edges of pages and of attention's chunks of 64 and of 512 keys."""
    base = draw(st.sampled_from((1, 14, 16, 40, 60, 63, 64, 494, 500, 507, 511, 512, 513, 600)))
    size, reach = draw(st.integers(1, 14)), draw(st.sampled_from((1, 2, 5, 14)))
    parents = [draw(st.integers(max(-1, node - reach), node - 1)) for node in range(size)]
    return Tree(0, base, draw(st.lists(st.integers(0, 95), min_size=size, max_size=size)), parents)


@settings(max_examples=40, deadline=None)
@given(
    chosen=st.lists(trees(), min_size=1, max_size=2), which=st.integers(0, 59), chunk=st.sampled_from((0, 1, 33, 300))
)
def test_a_trees_nodes_have_the_bits_of_plain_decode_along_their_paths(
    references: list[Reference], chosen: list[Tree], which: int, chunk: int
) -> None:
    which %= len(references)
    model = references[which].model
    cache = PagedCache(model.config, model.dtype, 4000)
    decoding, filling = cache.sequence(), cache.sequence()
    model.forward(cache, [Span(decoding, tokens(1)[:520], 0)])
    spans = [Span(tree.grown(model, cache), tree.token_ids, len(tree.token_ids), tree.parents) for tree in chosen]
    beside = [Span(decoding, tokens(1)[520:521]), *([Span(filling, tokens(3)[:1] * chunk, 0)] if chunk else [])]
    logits = model.forward(cache, [*spans, *beside])
    assert torch.equal(logits[-1], references[which].logits[1][520])
    for tree, span, rows in zip(chosen, spans, torch.split(logits[:-1], [span.logits for span in spans]), strict=True):
        assert torch.equal(rows, torch.stack(tree.decoded(model)))
        keep_longest(model, cache, tree, span.sequence)
    cache.check_integrity()


def keep_longest(model: Model, cache: PagedCache, tree: Tree, sequence: CachedSequence) -> None:
    """Accepts the path to the last node: what follows has the bits of a sequence without any tree."""
    path = tree.path(len(tree.token_ids) - 1)
    sequence.compact(tree.base, path)
    plain = tree.grown(model, cache)
    model.forward(cache, [Span(plain, [tree.token_ids[node] for node in path], 0)])
    after = model.forward(cache, [Span(sequence, [7]), Span(plain, [7])])
    assert torch.equal(after[0], after[1])
    assert sequence.length == tree.base + len(path) + 1


def test_a_tree_too_deep_for_one_attention_call_with_others_is_right(references: list[Reference]) -> None:
    tree = Tree(0, 500, [*tokens(0)[500:560], 3, 4], [*range(-1, 59), 20, 60])
    model = references[1].model
    logits = tree.run(model, PagedCache(model.config, "fp32", 1000), [])
    assert torch.equal(logits[:60], references[1].logits[0][500:560])
    assert torch.equal(logits[60:], torch.stack(tree.decoded(model)[60:]))
