"""KV of text that was computed before, taken to other positions: after an edit, or of pieces put together anew.

Keys are kept rotated, so that one more rotation moves a key from position p to q, K' = R(q) R(p)^-1 K, and values stay
(Positional Integrity Encoding, arXiv 2407.03157). Positions are exact then; what the tokens had seen before them is
that of the old text, so that beyond the first layer both are approximate. With ``share`` above 0 that share of the
moved tokens is computed again, those whose values differ most at a check layer (CacheBlend, arXiv 2405.16444); all of
them give what a prefill gives.

The result is not a function of the tokens alone. That is right for a draft, which may be wrong, and for nothing whose
tokens are audited.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from countersign.services.engine.config import ModelConfig
from countersign.services.engine.errors import EngineError
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.model import Model
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.engine.rope import RotaryTable
from countersign.services.engine.step import Span

Places: TypeAlias = NDArray[np.int64]
Bits: TypeAlias = NDArray[np.bool_]
_Chunk: TypeAlias = tuple[str, tuple[int, ...]]

CHUNK = 32
"""Tokens that must be the same in a row."""
CHECK_LAYER = 1
"""The layer whose values are compared: at layer 0 they depend on the token alone."""
ROWS = 256
"""The most tokens of one pass."""


@runtime_checkable
class LayeredExecutor(Protocol):
    """An executor that can stop early."""

    def run_layers(self, cache: PagedCache, spans: Sequence[Span], layers: int) -> None:
        """Writes the K and V of the spans' tokens in the first ``layers`` layers."""


@dataclass(frozen=True, slots=True)
class Piece:
    """``length`` tokens at ``start`` of a source, which stand at ``at`` of the new text."""

    source: CachedSequence
    start: int
    at: int
    length: int

    @property
    def end(self) -> int:
        return self.at + self.length


@dataclass(frozen=True, slots=True)
class _Kept:
    """Tokens of a source, all with KV, of which the first ``exact`` are what a prefill gives."""

    tokens: Sequence[int]
    exact: int
    tenant: str

    def chunks(self) -> Iterator[tuple[_Chunk, int]]:
        """What it is found by, and where that begins."""
        for start in range(0, len(self.tokens) - CHUNK + 1, CHUNK):
            yield (self.tenant, tuple(self.tokens[start : start + CHUNK])), start


@dataclass(frozen=True, slots=True)
class _Place:
    """Stands for a sequence where new tokens begin inside it."""

    row: int
    length: int


class Library:
    """Sequences whose KV may be taken, each for its own tenant, the oldest first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[CachedSequence, _Kept] = OrderedDict()
        self._chunks: dict[_Chunk, tuple[CachedSequence, int]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, sequence: CachedSequence, tokens: Sequence[int], exact: int, tenant: str = "") -> None:
        """From now on its tokens are found, of which the first ``exact`` are exact."""
        kept = self._kept[sequence] = _Kept(tuple(tokens), exact, tenant)
        self._chunks |= {chunk: (sequence, start) for chunk, start in kept.chunks()}

    def drop(self) -> CachedSequence | None:
        """The oldest, which is found no more."""
        if not self._kept:
            return None
        sequence, kept = self._kept.popitem(last=False)
        for chunk, start in kept.chunks():
            if self._chunks.get(chunk) == (sequence, start):
                del self._chunks[chunk]
        return sequence

    def exact(self, pieces: Sequence[Piece]) -> int:
        """Of a text made of these pieces, how many of the first tokens have the KV of a prefill."""
        if not pieces or pieces[0].start or pieces[0].at:
            return 0
        return min(pieces[0].length, self._kept[pieces[0].source].exact)

    def pieces(self, tokens: Sequence[int], tenant: str = "") -> list[Piece]:
        """What of a text is there, in order, none overlapping: each grown from a chunk as far as it goes."""
        found: list[Piece] = []
        done = at = 0
        while at + CHUNK <= len(tokens):
            hit = self._chunks.get((tenant, tuple(tokens[at : at + CHUNK])))
            if hit is None:
                at += 1
                continue
            source, start = hit
            text = self._kept[source].tokens
            back = _common(reversed(tokens[done:at]), reversed(text[:start]))
            length = back + _common(iter(tokens[at:]), iter(text[start:]))
            found.append(Piece(source, start - back, at - back, length))
            done = at = found[-1].end
        return found


class Reuse:
    """Fills new sequences from those kept. ``reused``: tokens so far whose KV moved; ``recomputed``: of these, those
    computed again. ``most``: sequences kept.

    Raises:
        EngineError: a share is asked for, and the model's executor cannot stop at a layer.
    """

    def __init__(self, model: Model, cache: PagedCache, share: float = 0.0, most: int = 64) -> None:
        self._model, self._cache, self._share, self._most = model, cache, share, most
        self._library = Library()
        self._rotary = RotaryTable(model.config.rope, model.config.head_dim)
        self.reused = self.recomputed = 0
        if share and not isinstance(model.executor, LayeredExecutor):
            raise EngineError(f"the executor {model.executor.name} cannot stop at a layer: reuse without recomputing")

    def keep(self, sequence: CachedSequence, tokens: Sequence[int], exact: int, tenant: str = "") -> None:
        """The KV of its tokens may be taken from now on, the first ``exact`` being exact. It is this object's."""
        self._library.add(sequence, tokens, exact, tenant)
        if len(self._library) > self._most:
            self.drop()

    def drop(self) -> bool:
        """Gives up the oldest that is kept; False when there is none."""
        sequence = self._library.drop()
        if sequence is None:
            return False
        sequence.close()
        return True

    def fill(self, sequence: CachedSequence, tokens: Sequence[int], tenant: str = "") -> int | None:
        """Gives an empty sequence these tokens, or leaves it empty where nothing of them is there.

        Returns:
            of how many of the first the KV is exact; None for all.

        Raises:
            OutOfPages: they do not fit; nothing changed.
        """
        pieces = self._library.pieces(tokens, tenant)
        if not pieces:
            return None
        self._cache.reserve({sequence: len(tokens)})
        exact = self._library.exact(pieces)
        for piece in pieces:
            move(self._cache, self._model.config, self._rotary, sequence, piece)
        missing = np.ones(len(tokens), dtype=bool)
        for piece in pieces:
            missing[piece.at : piece.end] = False
        moved = ~missing
        moved[:exact] = False
        self.reused += int((~missing).sum())
        if self._share and moved.any():
            chosen = self._differing(sequence, tokens, moved)
            self.recomputed += len(chosen)
            missing[chosen] = True
        for spans in _passes(sequence, tokens, np.flatnonzero(missing)):
            self._model.executor.run(self._cache, spans)
        sequence.length = len(tokens)
        return exact if moved.any() and self._share < 1 else None

    def _differing(self, sequence: CachedSequence, tokens: Sequence[int], moved: Bits) -> Places:
        """Places to compute again: of those moved, the share whose values at the check layer change most."""
        executor = self._model.executor
        if not isinstance(executor, LayeredExecutor):
            raise EngineError("the executor cannot stop at a layer")
        layer = min(CHECK_LAYER, self._model.config.layers - 1)
        places = np.flatnonzero(moved)
        before = _values(self._cache, sequence, layer, places)
        for spans in _passes(sequence, tokens, np.arange(len(tokens))):
            executor.run_layers(self._cache, spans, layer + 1)
        change = (_values(self._cache, sequence, layer, places) - before).square().sum(dim=(1, 2))
        most = change.topk(math.ceil(self._share * len(places))).indices
        return places.take(most.cpu().numpy())


def move(cache: PagedCache, config: ModelConfig, rotary: RotaryTable, sequence: CachedSequence, piece: Piece) -> None:
    """Writes the piece's K, rotated to its new positions, and V into the sequence's slots, which must be reserved."""
    old, new = (np.arange(first, first + piece.length) for first in (piece.start, piece.at))
    source, target = _slots(piece.source, old), _slots(sequence, new)
    cos, sin = (part.to(cache.pool.device) for part in turn(rotary, torch.from_numpy(old), torch.from_numpy(new)))
    for layer in range(config.layers):
        keys, values = cache.keys(layer), cache.values(layer)
        k = keys[source[0], :, :, source[1]]
        first, second = k.double().chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        keys[target[0], :, :, target[1]] = turned.to(k.dtype)
        values[target[0], :, target[1]] = values[source[0], :, source[1]]


def turn(rotary: RotaryTable, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (N, 1, head_dim / 2) fp64, of what turns a key at ``old`` into one at ``new``: 1 and 0
    where these are equal. They come from the angles of both as they are rounded; YaRN's factor cancels.
    """
    table = rotary.table(int(torch.cat((old, new)).max()) + 1)
    (c0, s0), (c1, s1) = ([part[at].double() for part in table] for at in (old, new))
    scale = c0 * c0 + s0 * s0
    return ((c1 * c0 + s1 * s0) / scale)[:, None], ((s1 * c0 - c1 * s0) / scale)[:, None]


def _slots(sequence: CachedSequence, places: Places) -> tuple[Tensor, Tensor]:
    """Page and offset of each place."""
    pages = np.asarray(sequence.pages, dtype=np.int64)[places // PAGE_TOKENS]
    return torch.from_numpy(pages), torch.from_numpy(places % PAGE_TOKENS)


def _values(cache: PagedCache, sequence: CachedSequence, layer: int, places: Places) -> Tensor:
    """(N, kv_heads, head_dim) fp32, a copy."""
    pages, offsets = _slots(sequence, places)
    return cache.values(layer)[pages, :, offsets].float()


def _passes(sequence: CachedSequence, tokens: Sequence[int], places: Places) -> Iterator[list[Span]]:
    """The tokens at these places, in passes of at most ``ROWS``: a span for each run of neighbours. A pass writes the K
    and V of all its tokens before any attends, so that each sees those before it wherever they stand.
    """
    for first in range(0, len(places), ROWS):
        some = places[first : first + ROWS]
        runs = np.split(some, np.flatnonzero(np.diff(some) != 1) + 1)
        yield [
            Span(
                cast(CachedSequence, _Place(sequence.row, int(run[0]))),  # executors look at row and length only
                list(tokens[run[0] : run[-1] + 1]),
                0,
            )
            for run in runs
        ]


def _common(left: Iterator[int], right: Iterator[int]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
