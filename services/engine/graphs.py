"""Decode and verify steps as CUDA graphs: a small step's time on a GPU is that of launching its kernels one by one.

A graph's shapes and addresses are fixed. So a step of short chains is padded to a bucket, copied into that bucket's
buffer, and what was captured on it is replayed. Padding repeats what is there: the rows behind a chain's end are its
last token again, the sequences behind the batch's end are its first again. They write the K and V of those tokens
where these stand, and nobody reads their logits. Everything else runs as in :mod:`eager`: long chains, trees, models
with experts, and padded attention row by row, whose shapes depend on the numbers themselves.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from countersign.services.engine.config import Dtype, ModelConfig, Numerics
from countersign.services.engine.eager import EagerExecutor
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.ops import Choice
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.engine.step import SHORT, AfterLayer, Computed, Ids, Padding, Span, Step, staged
from countersign.services.engine.weights import DecoderWeights

MAX_ROWS = 256
"""The most rows of a graph, padding included. With more, arithmetic takes longer than launching it."""
MAX_KEYS = 1 << 18
"""The most keys that a graph reads in each layer, over its sequences and padding included."""
MAX_GRAPHS = 32
"""Graphs kept, the most recently used."""

_LEAST_KEYS = 256
_WARM_UPS = 2


class Captured(Protocol):
    """A computation on fixed buffers."""

    def replay(self) -> Computed:
        """Computes from what the buffers hold now; the result stands until the next replay of any."""


Capture: TypeAlias = Callable[[Callable[[], Computed]], Captured]


class Repeated:
    """The computation itself, called again: for devices without graphs."""

    def __init__(self, compute: Callable[[], Computed]) -> None:
        self.replay = compute


class CudaGraphs:
    """Captures into CUDA graphs, which take turns in one pool of memory."""

    def __init__(self, device: str) -> None:
        self._device, self._pool = torch.device(device), torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch leaves it so

    def __call__(self, compute: Callable[[], Computed]) -> Captured:
        """Runs ``compute`` a few times, so that libraries set themselves up, then captures it."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                compute()
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy KV blocks meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = compute()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return _CudaGraph(graph, result)


@dataclass(frozen=True, slots=True)
class _CudaGraph:
    graph: torch.cuda.CUDAGraph
    result: Computed

    def replay(self) -> Computed:
        self.graph.replay()
        return self.result


@dataclass(frozen=True, slots=True)
class Bucket:
    """The shape of a graph: B chains of T rows, each over K keys."""

    batch: int
    queries: int
    keys: int

    @property
    def rows(self) -> int:
        """B T."""
        return self.batch * self.queries

    @property
    def sizes(self) -> list[int]:
        """Of its buffer's parts: token ids, positions, pages, offsets, wanted rows (each B T), table (B K/16)."""
        return [self.rows] * 5 + [self.batch * (self.keys // PAGE_TOKENS)]


@dataclass(frozen=True, slots=True)
class _Graph:
    """``kept``: what the graph reads at its address and others may replace."""

    buffer: Tensor
    captured: Captured
    kept: tuple[Tensor, Tensor]


class GraphedExecutor(EagerExecutor):
    """:class:`EagerExecutor` that replays graphs where it can. One step at a time."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        dtype: Dtype,
        numerics: Numerics,
        device: str = "cpu",
        ops: Choice | None = None,
    ) -> None:
        super().__init__(config, weights, dtype, numerics, device, ops)
        self._capture: Capture = CudaGraphs(device) if device.startswith("cuda") else Repeated
        self._fixed = config.experts is None and self._ops.fixed
        self._graphs: OrderedDict[Bucket, _Graph] = OrderedDict()
        self._cache: weakref.ref[PagedCache] | None = None

    @property
    def buckets(self) -> list[Bucket]:
        """Those captured, the least recently used first."""
        return list(self._graphs)

    @torch.inference_mode()
    def run(self, cache: PagedCache, spans: Sequence[Span], after_layer: AfterLayer | None = None) -> Computed:
        """As :meth:`EagerExecutor.run`. A graph is one piece: who asks after each layer gets none."""
        bucket = bucket_of(spans, self._ops.padding) if self._fixed and after_layer is None else None
        if bucket is None:
            return super().run(cache, spans, after_layer)
        values, wanted = lay_out(bucket, cache, spans)
        with self._current():
            graph = self._graph(cache, bucket, staged(values, self._device))
            # The copy to the buffer and these are the only work outside the graph.
            computed, rows = graph.captured.replay(), _parts(bucket, graph.buffer)[4][:wanted]
            return Computed(computed.logits.index_select(0, rows), computed.states.index_select(0, rows))

    def _graph(self, cache: PagedCache, bucket: Bucket, values: Tensor) -> _Graph:
        """The bucket's graph with these values in its buffer, captured if need be."""
        if self._cache is None or self._cache() is not cache:
            self._graphs.clear()
            self._cache = weakref.ref(cache)
        if graph := self._graphs.get(bucket):
            self._graphs.move_to_end(bucket)
            graph.buffer.copy_(values, non_blocking=True)
            return graph
        if len(self._graphs) >= MAX_GRAPHS:
            self._graphs.popitem(last=False)
        # Captured with a real step in the buffer: warming up writes K and V.
        buffer, angles = values.to(self._device), self._angles_up_to(bucket.keys)
        graph = _Graph(buffer, self._capture(partial(self._compute, cache, bucket, buffer)), angles)
        self._graphs[bucket] = graph
        return graph

    def _compute(self, cache: PagedCache, bucket: Bucket, buffer: Tensor) -> Computed:
        """Logits and states of all rows, from the buffer and without a word from the host."""
        token_ids, positions, pages, offsets, wanted, table = _parts(bucket, buffer)
        step = Step(
            rows=bucket.rows,
            token_ids=token_ids,
            positions=positions,
            end=bucket.keys,
            pages=pages,
            offsets=offsets,
            logits=bucket.rows,
            logit_rows=wanted,
        )
        step = self._ops.chains(step, bucket.batch, table)
        return self._computed(deque(self._hidden_states(cache, step), maxlen=1).pop())


def bucket_of(spans: Sequence[Span], padding: Padding) -> Bucket | None:
    """The smallest bucket that holds these spans; None if they are no short chains, or too many."""
    most = max(len(span.token_ids) for span in spans)
    if most > SHORT or any(span.parents is not None for span in spans):
        return None
    queries = padding.queries(_power_of_two(most))
    # With room for the rows behind a chain's end: paged attention walks on to their places.
    keys = max(_LEAST_KEYS, *(span.sequence.length + queries for span in spans))
    bucket = Bucket(_power_of_two(len(spans)), queries, padding.keys(_power_of_two(keys)))
    return bucket if bucket.rows <= MAX_ROWS and bucket.batch * bucket.keys <= MAX_KEYS else None


def lay_out(bucket: Bucket, cache: PagedCache, spans: Sequence[Span]) -> tuple[Ids, int]:
    """The bucket's buffer for these spans, and how many rows of logits are wanted."""
    counts, lengths, rows, logits = np.array(
        [(len(span.token_ids), span.sequence.length, span.sequence.row, span.logits) for span in spans]
    ).T
    token_ids = np.fromiter(itertools.chain.from_iterable(span.token_ids for span in spans), np.int64)
    starts = np.cumsum(counts) - counts
    depth = np.arange(bucket.queries)
    wanted = np.flatnonzero((depth >= (counts - logits)[:, None]) & (depth < counts[:, None]))
    chain = np.pad(np.arange(len(spans)), (0, bucket.batch - len(spans)))
    place = np.minimum(depth, counts[chain, None] - 1)
    positions = lengths[chain, None] + place
    table = np.zeros((bucket.batch, bucket.keys // PAGE_TOKENS), dtype=np.int64)
    known = cache.tables[rows[chain], : table.shape[1]]
    table[:, : known.shape[1]] = known
    pages = np.take_along_axis(table, positions // PAGE_TOKENS, axis=1)
    wanted_rows = np.pad(wanted, (0, bucket.rows - len(wanted)))
    parts = (token_ids[starts[chain, None] + place], positions, pages, positions % PAGE_TOKENS, wanted_rows, table)
    return np.concatenate([part.ravel() for part in parts]), len(wanted)


def _parts(bucket: Bucket, buffer: Tensor) -> tuple[Tensor, ...]:
    return torch.split(buffer, bucket.sizes)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
