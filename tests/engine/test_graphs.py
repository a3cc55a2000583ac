"""Replayed steps against the same steps computed as they are.

Without a GPU a step is captured by tracing its operations: like a CUDA graph, the trace keeps the addresses and shapes
it saw and asks the host nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from countersign.kernels import padded_attention
from countersign.services.engine import graphs
from countersign.services.engine.checkpoint import read_tensors
from countersign.services.engine.config import Numerics
from countersign.services.engine.graphs import Bucket, GraphedExecutor
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.model import Computed, Model, Span, load_model
from countersign.services.engine.weights import decoder_weights


class Traced:
    """A computation as the operations it consisted of when it was captured, and one place for its results."""

    def __init__(self, compute: Callable[[], Computed]) -> None:
        def tensors() -> tuple[Tensor, Tensor]:
            computed = compute()
            return computed.logits, computed.states

        self._graph: Any = make_fx(tensors)()
        self._result = Computed(*map(torch.empty_like, self._graph()))

    def replay(self) -> Computed:
        logits, states = self._graph()
        self._result.logits.copy_(logits)
        self._result.states.copy_(states)
        return self._result


def executor(model: Model) -> GraphedExecutor:
    assert isinstance(model.executor, GraphedExecutor)
    return model.executor


def graphed(folder: Path, numerics: Numerics, capture: graphs.Capture = Traced) -> Model:
    plain = load_model(folder, numerics=numerics, backend="eager")
    weights = decoder_weights(plain.config, read_tensors(folder))
    model = Model(plain.config, plain.digests, "fp32", GraphedExecutor(plain.config, weights, "fp32", numerics))
    executor(model)._capture = capture
    return model


@pytest.fixture(scope="module")
def pairs(checkpoint: Path, other_checkpoint: Path) -> dict[str, tuple[Model, Model]]:
    """Of each model and numerics, the executor that replays and the one that does not. The second has a window."""
    return {
        f"{name} {numerics}": (graphed(folder, numerics), load_model(folder, numerics=numerics, backend="eager"))
        for name, folder in (("plain", checkpoint), ("window", other_checkpoint))
        for numerics in ("invariant", "fast")
    }


class Side:
    """One model, its cache and its sequences."""

    def __init__(self, model: Model, lengths: Sequence[int], cache: PagedCache | None = None) -> None:
        self.model, self.cache = model, cache or PagedCache(model.config, "fp32", 6000)
        self.sequences = [self.cache.sequence() for _ in lengths]
        self.run([(index, prompt(index, length), 0) for index, length in enumerate(lengths)])

    def run(self, spans: Sequence[tuple[int, list[int], int]]) -> Tensor:
        """Spans are (sequence, token ids, rows of logits wanted)."""
        return self.model.forward(
            self.cache, [Span(self.sequences[index], token_ids, wanted) for index, token_ids, wanted in spans]
        )

    def blocks(self) -> list[bytes]:
        return [sequence.export_block(i) for sequence in self.sequences for i in range(sequence.length // 16)]


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(2, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def both(pair: tuple[Model, Model], lengths: Sequence[int]) -> tuple[Side, Side]:
    return Side(pair[0], lengths), Side(pair[1], lengths)


KeptCaches: TypeAlias = Callable[[str, Sequence[int]], AbstractContextManager[tuple[Side, Side]]]


@pytest.fixture(scope="module")
def kept_caches(pairs: dict[str, tuple[Model, Model]]) -> KeptCaches:
    """Sides on caches that stay the same, and so do the graphs captured on them."""
    caches: dict[Model, PagedCache] = {}

    @contextmanager
    def opened(name: str, lengths: Sequence[int]) -> Iterator[tuple[Side, Side]]:
        for model in pairs[name]:
            caches.setdefault(model, PagedCache(model.config, "fp32", 6000))
        ours, theirs = (Side(model, lengths, caches[model]) for model in pairs[name])
        try:
            yield ours, theirs
        finally:
            for sequence in (*ours.sequences, *theirs.sequences):
                sequence.close()

    return opened


@st.composite
def steps(draw: st.DrawFn) -> list[list[tuple[int, list[int], int]]]:
    """Decode and verify steps over some of four sequences, in any order."""
    found = []
    for _ in range(draw(st.integers(1, 6))):
        chosen = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
        counts = [draw(st.sampled_from((1, 1, 2, 5, 8, 16))) for _ in chosen]
        found.append([(i, prompt(n, n), draw(st.integers(0, n))) for i, n in zip(chosen, counts, strict=True)])
    return found


# Around the edges of pages, of buckets of 256 and 512 keys, and of a chunk of attention.
LENGTHS = st.lists(st.sampled_from((1, 15, 16, 40, 250, 255, 256, 500, 511, 512)), min_size=4, max_size=4)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, work=steps(), name=st.sampled_from(("plain", "window")))
def test_invariant_steps_have_the_same_bits_in_logits_and_kv(
    kept_caches: KeptCaches, lengths: list[int], work: list[list[tuple[int, list[int], int]]], name: str
) -> None:
    with kept_caches(f"{name} invariant", lengths) as (ours, theirs):
        for spans in work:
            assert torch.equal(ours.run(spans), theirs.run(spans))
        assert ours.blocks() == theirs.blocks()
        ours.cache.check_integrity()
        assert executor(ours.model).buckets


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, work=steps(), name=st.sampled_from(("plain", "window")))
def test_fast_steps_differ_by_rounding_only(
    kept_caches: KeptCaches, lengths: list[int], work: list[list[tuple[int, list[int], int]]], name: str
) -> None:
    with kept_caches(f"{name} fast", lengths) as (ours, theirs):
        for spans in work:
            torch.testing.assert_close(ours.run(spans), theirs.run(spans), rtol=1e-5, atol=5e-5)
        ours.cache.check_integrity()
        assert executor(ours.model).buckets


@pytest.mark.parametrize("name", ["plain invariant", "plain fast", "window fast"])
def test_greedy_tokens_agree_while_sequences_come_and_go_and_contexts_cross_buckets(
    pairs: dict[str, tuple[Model, Model]], name: str
) -> None:
    lengths = (200, 3, 470, 17, 90)
    told = []
    for side in both(pairs[name], lengths):
        last = {index: [index + 2] for index in range(len(lengths))}
        tokens: list[int] = []
        for step in range(120):
            present = [index for index in last if (step // 9) % (index + 2) != 1] or [0]
            logits = side.run([(index, last[index], 1) for index in present])
            for index, token in zip(present, logits.argmax(dim=-1).tolist(), strict=True):
                last[index] = [token]
                tokens.append(token)
        told.append(tokens)
    assert told[0] == told[1]
    assert len(set(told[0])) > 20
    buckets = executor(pairs[name][0]).buckets
    assert len({bucket.batch for bucket in buckets}) >= 3
    assert len({bucket.keys for bucket in buckets}) >= (1 if "invariant" in name else 2)


def test_a_bucket_is_captured_once_and_replayed_on_one_buffer(checkpoint: Path) -> None:
    captured: list[Traced] = []

    def capture(compute: Callable[[], Computed]) -> Traced:
        captured.append(Traced(compute))
        return captured[-1]

    side = Side(graphed(checkpoint, "fast", capture), (30, 31, 100))
    for _ in range(5):
        side.run([(0, [5], 1), (1, [6], 1), (2, [7], 1)])
    buffer = executor(side.model)._graphs[Bucket(4, 1, 256)].buffer
    side.run([(1, [6], 1), (2, [7], 1), (0, [5], 1)])
    assert executor(side.model)._graphs[Bucket(4, 1, 256)].buffer is buffer
    assert executor(side.model).buckets == [Bucket(4, 1, 256)]
    assert len(captured) == 1
    side.run([(0, [5, 6, 7, 8, 9], 5)])
    assert executor(side.model).buckets == [Bucket(4, 1, 256), Bucket(1, 8, 256)]


def test_logits_stay_after_the_next_replay(checkpoint: Path) -> None:
    side = Side(graphed(checkpoint, "fast"), (30,))
    first = side.run([(0, [5], 1)])
    kept = first.clone()
    side.run([(0, [9], 1)])
    assert torch.equal(first, kept)


def test_the_least_recently_used_graph_goes_first(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    side = Side(graphed(checkpoint, "fast"), (30,))
    for rows in (1, 2, 1, 4):
        side.run([(0, [5] * rows, rows)])
    assert [bucket.queries for bucket in executor(side.model).buckets] == [1, 4]
    plain = Side(load_model(checkpoint, numerics="fast", backend="eager"), (30,))
    for rows in (1, 2, 1, 4):
        plain.run([(0, [5] * rows, rows)])
    expected = plain.run([(0, [7, 8], 2)])
    torch.testing.assert_close(side.run([(0, [7, 8], 2)]), expected, rtol=1e-5, atol=5e-5)


def test_another_cache_gets_its_own_graphs(pairs: dict[str, tuple[Model, Model]]) -> None:
    model, plain = pairs["plain invariant"]
    expected = Side(plain, (40,)).run([(0, [5], 1)])
    first = Side(model, (40,))
    assert torch.equal(first.run([(0, [5], 1)]), expected)
    second = Side(model, (40,))
    before = first.cache.pool.clone()
    assert torch.equal(second.run([(0, [5], 1)]), expected)
    assert torch.equal(first.cache.pool, before)


def test_the_rotary_table_may_grow_under_a_captured_graph(build_model: Callable[..., Any], tmp_path: Path) -> None:
    build_model("llama", 5, max_position_embeddings=4096).save_pretrained(tmp_path)
    ours = Side(graphed(tmp_path, "invariant"), (30, 1500))
    theirs = Side(load_model(tmp_path, backend="eager"), (30, 1500))
    short = [(0, [5], 1)]
    for spans in (short, [(1, [6, 7], 2)], [(1, prompt(1, 700), 1)], [(1, [3], 1)], short):
        assert torch.equal(ours.run(spans), theirs.run(spans))


def test_long_chains_trees_and_crowds_run_without_a_graph(pairs: dict[str, tuple[Model, Model]]) -> None:
    model, plain = pairs["plain invariant"]
    for spans in ([(0, prompt(7, 17), 3)], [(i, [5] * 16, 1) for i in range(20)]):
        ours, theirs = both((model, plain), [30] * 20)
        before = executor(model).buckets
        assert torch.equal(ours.run(spans), theirs.run(spans))
        assert executor(model).buckets == before
    sides, before = both((model, plain), [30]), executor(model).buckets
    found = [
        side.model.forward(side.cache, [Span(side.sequences[0], [5, 6, 7], 3, parents=[-1, -1, 0])]) for side in sides
    ]
    assert torch.equal(*found)
    assert executor(model).buckets == before


def test_models_with_experts_and_attention_row_by_row_run_without_a_graph(
    routed_checkpoint: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed = graphed(routed_checkpoint, "fast")
    monkeypatch.setattr(padded_attention, "is_row_invariant", lambda *_: False)
    slow = graphed(checkpoint, "invariant")
    for model in (routed, slow):
        side = Side(model, (20,))
        assert side.run([(0, [5], 1)]).isfinite().all()
        assert executor(model).buckets == []


def test_a_prompt_in_long_chunks_has_the_numbers_of_one_in_fixed_pieces(
    checkpoint: Path, other_checkpoint: Path
) -> None:
    """Fast numerics take a long chunk whole: without a mask, or with one where a window of 40 cuts it."""
    for folder in (checkpoint, other_checkpoint):
        fast, fixed = (load_model(folder, numerics=each, backend="eager") for each in ("fast", "invariant"))
        sides = both((fast, fixed), (5, 1))
        for first, last in ((0, 600), (600, 637), (637, 640)):
            spans = [(0, prompt(3, 640)[first:last], 2), (1, [9], 1)]
            torch.testing.assert_close(sides[0].run(spans), sides[1].run(spans), rtol=1e-5, atol=1e-4)
        alone = both((fast, fixed), (5,))
        spans = [(0, prompt(4, 500), 7)]
        torch.testing.assert_close(alone[0].run(spans), alone[1].run(spans), rtol=1e-5, atol=1e-4)


def test_a_request_of_nan_touches_no_other(pairs: dict[str, tuple[Model, Model]]) -> None:
    ours, theirs = both(pairs["plain invariant"], (40, 50))
    poison(ours.cache, ours.sequences[1])
    poison(theirs.cache, theirs.sequences[1])
    spans = [(0, [5], 1), (1, [6, 7, 8], 3)]
    logits = ours.run(spans)
    assert torch.equal(logits[:1], theirs.run(spans)[:1])
    assert logits[0].isfinite().all()
    assert logits[1:].isnan().all()


def poison(cache: PagedCache, sequence: CachedSequence) -> None:
    cache.pool[sequence.pages[0]] = torch.nan
