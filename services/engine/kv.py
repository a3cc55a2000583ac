"""The paged KV cache: a pool of 16-token pages, shared by sequences that each hold a table of pages.

Pool: (pages, layers, 2, kv_heads, 16 * head_dim), so that a page is one contiguous block. For each page, layer and KV
head the K part is (head_dim, 16), transposed and after rotation, the V part (16, head_dim). Page 0 belongs to nobody
and stays zero: it pads short tables.

Sequences share pages after a fork, and through the prefix index (publish, adopt), which finds full pages by keys that
each name all tokens up to the page's end. A page that is shared or indexed is never written: ``reserve`` copies it
first. An indexed page that no sequence holds stays cached until its room is needed.

A hidden key's value is multiplied by 0, which keeps NaN as NaN, so a page is zeroed when it changes hands, and after
``reserve`` every slot behind the reserved ones is zero: one sequence's NaN never reaches another, nor a rejected
draft's what follows it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from countersign.services.engine.config import TORCH_DTYPES, Dtype, ModelConfig
from countersign.services.engine.errors import EngineError, InvalidBlock, InvalidSpan, OutOfPages
from countersign.services.engine.pages import PAGE_TOKENS, CacheStats, PageAllocator, pages_for


class Pages(Protocol):
    """What the pages hold. ``index`` is a page's place in its sequence, which says where it is kept."""

    homes: int

    def home(self, index: int) -> int:
        """Where the page at this place belongs."""

    def copy(self, index: int, source: int, target: int) -> None:
        """The same numbers in both."""

    def zero(self, index: int, page: int, place: int = 0) -> None:
        """The slots from ``place`` on."""

    def move(self, moves: Sequence[tuple[int, int, int, int]]) -> None:
        """One token each: (page, slot) to (page, slot)."""

    def export(self, index: int, page: int) -> bytes:
        """All of it."""

    def fill(self, index: int, page: int, data: bytes) -> None:
        """The same, the other way."""

    def is_clean(self) -> bool:
        """Whether page 0 is still zero."""

    def forget(self) -> None:
        """Nobody needs what any page holds."""


class LocalPages:
    """The pool, one tensor on a device."""

    homes = 1

    def __init__(self, config: ModelConfig, dtype: torch.dtype, pages: int, device: str) -> None:
        shape = (pages, config.layers, 2, config.kv_heads, PAGE_TOKENS * config.head_dim)
        if device == "cpu":
            # NumPy's zeros are mapped by the system on first touch, so that an idle cache costs no memory.
            zeros = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
            self.pool: Tensor = torch.from_numpy(zeros).view(dtype).view(shape)
        else:
            self.pool = torch.zeros(shape, dtype=dtype, device=device)
        self.keys = self.pool[:, :, 0].view(*shape[:2], config.kv_heads, config.head_dim, PAGE_TOKENS)
        self.values = self.pool[:, :, 1].view(*shape[:2], config.kv_heads, PAGE_TOKENS, config.head_dim)

    def home(self, index: int) -> int:  # noqa: ARG002  there is one place only
        return 0

    def copy(self, index: int, source: int, target: int) -> None:  # noqa: ARG002  as above
        self.pool[target] = self.pool[source]

    def zero(self, index: int, page: int, place: int = 0) -> None:  # noqa: ARG002  as above
        if place:
            self.keys[page, ..., place:].zero_()
            self.values[page, ..., place:, :].zero_()
        else:
            # A memset each; one index_fill_ for all pages takes more than twice as long.
            self.pool[page].zero_()

    def move(self, moves: Sequence[tuple[int, int, int, int]]) -> None:
        for source, source_place, page, place in moves:
            self.keys[page, ..., place].copy_(self.keys[source, ..., source_place])
            self.values[page, ..., place, :].copy_(self.values[source, ..., source_place, :])

    def export(self, index: int, page: int) -> bytes:  # noqa: ARG002  as above
        return self.pool[page].view(torch.uint8).cpu().numpy().tobytes()

    def export_layer(self, page: int, layer: int) -> bytes:
        return self.pool[page, layer].view(torch.uint8).cpu().numpy().tobytes()

    def fill(self, index: int, page: int, data: bytes) -> None:  # noqa: ARG002  as above
        target = self.pool[page]
        target.copy_(torch.frombuffer(bytearray(data), dtype=self.pool.dtype).view(target.shape))

    def is_clean(self) -> bool:
        return not bool(self.pool[0].any())

    def forget(self) -> None:
        """A page is zeroed when it is taken."""


class PagedCache:
    """KV for at least ``tokens`` tokens of a model of this configuration, in ``pages`` or a pool of its own.

    ``tables``: int32 (rows, columns); row ``sequence.row`` holds ``sequence.pages``, then zeros. A larger array takes
    its place when it is too small.
    """

    def __init__(
        self, config: ModelConfig, dtype: Dtype, tokens: int, device: str = "cpu", pages: Pages | None = None
    ) -> None:
        count = 1 + pages_for(tokens)
        self.dtype = TORCH_DTYPES[dtype]
        self._pages = pages or LocalPages(config, self.dtype, count, device)
        self._block = config.layers * 2 * config.kv_heads * PAGE_TOKENS * config.head_dim * self.dtype.itemsize
        self._count = count
        self.forget()

    def forget(self) -> None:
        """All sequences are closed and nothing is indexed: what the pages held is lost."""
        self._pages.forget()
        self.tables = np.zeros((16, 64), dtype=np.int32)
        self._free_rows = list(reversed(range(len(self.tables))))
        self._sequences: set[CachedSequence] = set()
        self._allocator = PageAllocator(self._count, self._pages.homes)

    @property
    def pool(self) -> Tensor:
        """(pages, layers, 2, kv_heads, 16 * head_dim), of a cache that has it here."""
        return self._local.pool

    @property
    def _local(self) -> LocalPages:
        if not isinstance(self._pages, LocalPages):
            raise EngineError("this cache's pages are kept by ranks; only they can read them")
        return self._pages

    def keys(self, layer: int) -> Tensor:
        """(pages, kv_heads, head_dim, 16), a view of the pool."""
        return self._local.keys[:, layer]

    def values(self, layer: int) -> Tensor:
        """(pages, kv_heads, 16, head_dim), a view of the pool."""
        return self._local.values[:, layer]

    @property
    def free_tokens(self) -> int:
        """Tokens that fit the pages which no sequence holds, free or cached."""
        return self._allocator.available * PAGE_TOKENS

    @property
    def block_bytes(self) -> int:
        """Size of one exported block."""
        return self._block

    def stats(self) -> CacheStats:
        """Pages and counts as of now."""
        return self._allocator.stats()

    def sequence(self) -> CachedSequence:
        """A new sequence of no tokens."""
        if not self._free_rows:
            rows = len(self.tables)
            self.tables = np.pad(self.tables, ((0, rows), (0, 0)))
            self._free_rows = list(reversed(range(rows, 2 * rows)))
        sequence = CachedSequence(self, self._free_rows.pop())
        self._sequences.add(sequence)
        return sequence

    def holds(self, sequence: CachedSequence) -> bool:
        """Whether the sequence is of this cache and not closed."""
        return sequence in self._sequences

    def reserve(self, lengths: Mapping[CachedSequence, int]) -> None:
        """Lets each sequence's slots be written, from its ``length`` on to so many tokens in all.

        They then lie in pages that it holds alone and that are not indexed; the slots behind them are zero; they
        themselves hold anything until they are written.

        Raises:
            OutOfPages: there are too few, cached ones included; nothing changed.
            InvalidSpan: a sequence is closed; nothing changed.
        """
        rest = []
        for sequence, length in lengths.items():
            if sequence.written <= length <= sequence.capacity:
                sequence.written = length
            else:
                rest.append((sequence, max(length, sequence.length)))
        if not rest:
            return
        needed = self._needed(rest)
        if needed > self._allocator.available:
            raise OutOfPages(needed, self._allocator.available)
        for sequence, length in rest:
            self._prepare(sequence, length)

    def _needed(self, lengths: Sequence[tuple[CachedSequence, int]]) -> int:
        """Pages to take, copies included."""
        needed = 0
        copied: Counter[int] = Counter()
        for sequence, length in lengths:
            if not self.holds(sequence):
                raise InvalidSpan("a closed sequence cannot grow")
            needed += max(0, pages_for(length) - len(sequence.pages))
            for page in sequence.tail:
                if self._allocator.shared(page, copied[page]):
                    copied[page] += 1
                    needed += 1
        return needed

    def _prepare(self, sequence: CachedSequence, length: int) -> None:
        """Copies, zeroes and appends as ``reserve`` promises."""
        pages = self._pages
        for page in sequence.tail:
            if self._allocator.shared(page):
                index = sequence.length // PAGE_TOKENS
                copy = self._allocator.take(pages.home(index))
                pages.copy(index, page, copy)
                self._assign(sequence, index, [copy])
                self._allocator.release([page])
        if length < sequence.written:
            first = length // PAGE_TOKENS
            for index, page in enumerate(sequence.pages[first : pages_for(sequence.written)], start=first):
                pages.zero(index, page, length % PAGE_TOKENS if index == first else 0)
        new = range(len(sequence.pages), pages_for(length))
        more = [self._allocator.take(pages.home(index)) for index in new]
        for index, page in zip(new, more, strict=True):
            pages.zero(index, page)
        self._assign(sequence, len(sequence.pages), more)
        sequence.written, sequence.capacity = length, len(sequence.pages) * PAGE_TOKENS

    def adopt(self, sequence: CachedSequence, keys: Sequence[bytes]) -> int:
        """Gives a sequence the longest run of indexed pages under these chained keys, of which its own are the first.

        Returns:
            the tokens that it then holds.

        Raises:
            InvalidSpan: the sequence is closed or does not end with a full page; nothing changed.
        """
        if sequence.length % PAGE_TOKENS or not self.holds(sequence):
            raise InvalidSpan(f"a sequence of {sequence.length} tokens, or a closed one, cannot adopt a prefix")
        sequence.truncate(sequence.length)
        found = self._allocator.adopt(keys, sequence.pages)
        if found:
            self._assign(sequence, len(sequence.pages), found)
            sequence.length = sequence.written = len(sequence.pages) * PAGE_TOKENS
            sequence.capacity = 0
        return sequence.length

    def publish(self, sequence: CachedSequence, keys: Sequence[bytes]) -> None:
        """Indexes the sequence's first full pages under these chained keys, one a page. For committed tokens only.

        Where a key is indexed already, the sequence (and who shares its page) moves to that page and its own is freed:
        the numbers are the same, one copy is enough, and every holder of a page still holds all indexed before it.

        Raises:
            InvalidBlock: there are more keys than full pages, or a page or key is indexed otherwise; nothing changed.
            InvalidSpan: the sequence is closed.
        """
        if not self.holds(sequence):
            raise InvalidSpan("a closed sequence has nothing to publish")
        if len(keys) > sequence.length // PAGE_TOKENS:
            raise InvalidBlock(f"block {len(keys) - 1} of a sequence of {sequence.length} tokens is not full")
        if not self._allocator.accepts(sequence.pages[: len(keys)], keys):
            raise InvalidBlock("a block is indexed under another key, or its key for another block")
        found = self._allocator.find(keys)
        for index, page in enumerate(found):
            self._replace(sequence, index, page)
        for index, key in enumerate(keys[len(found) :], start=len(found)):
            self._allocator.index(key, sequence.pages[index], sequence.pages[index - 1] if index else 0)

    def _replace(self, sequence: CachedSequence, index: int, page: int) -> None:
        """Puts an indexed page in the place of the sequence's own, for all that share that one."""
        own = sequence.pages[index]
        if own == page:
            return
        others = self._sequences if self._allocator.shared(own) else [sequence]
        for holder in [other for other in others if own in other.pages[index : index + 1]]:
            self._allocator.retain([page])
            self._assign(holder, index, [page])
            self._allocator.release([own])

    def compact(self, kept: Mapping[CachedSequence, tuple[int, Sequence[int]]]) -> None:
        """Of each sequence's speculative tokens, those in the slots from ``base`` on, keeps the nodes of one path.

        ``kept``: (base, path) a sequence; path[j] counts from base, and increases. The token in slot base + path[j]
        moves to slot base + j; base + len(path) tokens remain.

        Raises:
            InvalidSpan: a path leaves its sequence or does not increase, a page to change is shared or indexed, or the
                sequence is closed; nothing changed.
        """
        moves: list[tuple[int, int, int, int]] = []
        for sequence, (base, path) in kept.items():
            if base < 0 or any(a >= b for a, b in pairwise((-1, *path, sequence.length - base))):
                raise InvalidSpan(f"a sequence of {sequence.length} tokens cannot keep {list(path)} from {base} on")
            if not self.holds(sequence):
                raise InvalidSpan("a closed sequence keeps nothing")
            moved = ((base + node, base + place) for place, node in enumerate(path) if node > place)
            moves += [(*sequence.place(source), *sequence.place(target)) for source, target in moved]
        if any(self._allocator.shared(page) for _, _, page, _ in moves):
            raise InvalidSpan("a page that is shared or indexed cannot be compacted")
        # Paths increase, so that no target is a later source.
        self._pages.move(moves)
        for sequence, (base, path) in kept.items():
            sequence.truncate(base + len(path))

    def fork(self, source: CachedSequence) -> CachedSequence:
        """See :meth:`CachedSequence.fork`."""
        if not self.holds(source):
            raise InvalidSpan("a closed sequence cannot be forked")
        sequence = self.sequence()
        pages = source.pages[: pages_for(source.length)]
        self._allocator.retain(pages)
        self._assign(sequence, 0, pages)
        sequence.length, sequence.written = source.length, min(source.written, len(pages) * PAGE_TOKENS)
        source.capacity = 0
        return sequence

    def truncate(self, sequence: CachedSequence, length: int) -> None:
        """See :meth:`CachedSequence.truncate`."""
        if not 0 <= length <= sequence.length or not self.holds(sequence):
            raise InvalidSpan(f"a sequence of {sequence.length} tokens cannot be truncated to {length}")
        sequence.length = length
        kept = -(-length // PAGE_TOKENS)
        if kept < len(sequence.pages):
            surplus = sequence.pages[kept:]
            self.tables[sequence.row, kept : len(sequence.pages)] = 0
            del sequence.pages[kept:]
            self._allocator.release(surplus)
            sequence.written, sequence.capacity = min(sequence.written, kept * PAGE_TOKENS), 0
        elif length % PAGE_TOKENS and self._allocator.shared(sequence.pages[-1]):
            sequence.capacity = 0

    def close(self, sequence: CachedSequence) -> None:
        """See :meth:`CachedSequence.close`."""
        if self.holds(sequence):
            sequence.truncate(0)
            self._sequences.discard(sequence)
            self._free_rows.append(sequence.row)

    def export(self, index: int, page: int) -> bytes:
        """See :meth:`CachedSequence.export_block`."""
        return self._pages.export(index, page)

    def export_layer(self, page: int, layer: int) -> bytes:
        """See :meth:`CachedSequence.export_layer`."""
        return self._local.export_layer(page, layer)

    def fill(self, index: int, page: int, data: bytes) -> None:
        """See :meth:`CachedSequence.import_block`."""
        self._pages.fill(index, page, data)

    def check_integrity(self) -> None:
        """Reads tables and index, and of the pool page 0: for idle moments.

        Raises:
            EngineError: a page is lost or has wrong references, a page that is shared or indexed could be written, a
                table is wrong, an indexed page has lost its parent or would outlive it, or page 0 was written.
        """
        self._allocator.check(sequence.pages for sequence in self._sequences)
        for sequence in self._sequences:
            pages, row = sequence.pages, self.tables[sequence.row]
            if row[: len(pages)].tolist() != pages or row[len(pages) :].any():
                raise EngineError(f"row {sequence.row} of the KV cache's tables is not its sequence's pages")
            slots = len(pages) * PAGE_TOKENS
            if not sequence.length <= sequence.written <= slots or sequence.capacity not in {0, slots}:
                raise EngineError(f"a sequence of {sequence.length} tokens and {len(pages)} pages has wrong bounds")
            if sequence.capacity and any(map(self._allocator.shared, pages[sequence.length // PAGE_TOKENS :])):
                raise EngineError("a sequence could write a page that is shared or indexed")
        rows = [sequence.row for sequence in self._sequences] + self._free_rows
        if sorted(rows) != list(range(len(self.tables))) or self.tables[self._free_rows].any():
            raise EngineError("a row of the KV cache's tables is lost, has two owners, or is free and not empty")
        if not self._pages.is_clean():
            raise EngineError("the KV cache's page of zeros was written")

    def _assign(self, sequence: CachedSequence, start: int, pages: Sequence[int]) -> None:
        """Replaces or appends pages from ``start`` on, in the sequence and its row."""
        stop = start + len(pages)
        sequence.pages[start:stop] = pages
        columns = self.tables.shape[1]
        if stop > columns:
            self.tables = np.pad(self.tables, ((0, 0), (0, max(stop, 2 * columns) - columns)))
        self.tables[sequence.row, start:stop] = pages


class CachedSequence:
    """One sequence's tokens in the cache. Equal to itself only.

    ``length``: its tokens; whoever writes the slots that were reserved adds to it. ``pages``: the page of each 16
    slots. For the cache alone: ``written``, behind which all slots are zero, and ``capacity``, the tokens up to which
    slots are known to be writable, or 0.
    """

    __slots__ = ("_cache", "capacity", "length", "pages", "row", "written")

    def __init__(self, cache: PagedCache, row: int) -> None:
        self._cache = cache
        self.row = row
        self.pages: list[int] = []
        self.length = self.written = self.capacity = 0

    @property
    def tail(self) -> list[int]:
        """The page that the next token goes to, if there is one already."""
        first = self.length // PAGE_TOKENS
        return self.pages[first : first + 1]

    def place(self, slot: int) -> tuple[int, int]:
        """The slot's page, and its place there."""
        return self.pages[slot // PAGE_TOKENS], slot % PAGE_TOKENS

    def fork(self) -> CachedSequence:
        """A new sequence of the same tokens in the same pages; ``reserve`` copies the last one when it must.

        Raises:
            InvalidSpan: the sequence is closed.
        """
        return self._cache.fork(self)

    def truncate(self, length: int) -> None:
        """Keeps the first ``length`` tokens.

        Raises:
            InvalidSpan: there are fewer, or the sequence is closed.
        """
        self._cache.truncate(self, length)

    def compact(self, base: int, path: Sequence[int]) -> None:
        """:meth:`PagedCache.compact` of this sequence."""
        self._cache.compact({self: (base, path)})

    def close(self) -> None:
        """Gives all pages back, of which indexed ones stay cached; closing twice does nothing."""
        self._cache.close(self)

    def export_block(self, index: int) -> bytes:
        """K and V of tokens 16 index to 16 index + 15.

        Layout: a page's, (layers, 2, kv_heads, 16 head_dim): K as (head_dim, 16) after rotation, V as (16, head_dim);
        row-major, elements in the cache's dtype, little-endian.

        Raises:
            InvalidBlock: the block is not full.
            InvalidSpan: the sequence is closed.
        """
        if not self._cache.holds(self):
            raise InvalidSpan("a closed sequence has no blocks")
        if not 0 <= index < self.length // PAGE_TOKENS:
            raise InvalidBlock(f"block {index} of a sequence of {self.length} tokens is not full")
        return self._cache.export(index, self.pages[index])

    def export_layer(self, index: int, layer: int) -> bytes:
        """A layer's part of a block, whose parts laid end to end are the block. While a pass runs that fills the block,
        layer by layer, that of a layer which is done can be had already.

        Raises:
            InvalidBlock: no slots are reserved for the block.
            EngineError: the pages are kept by ranks.
        """
        if not 0 <= index < self.written // PAGE_TOKENS:
            raise InvalidBlock(f"block {index} is not among the {self.written} slots that are reserved")
        return self._cache.export_layer(self.pages[index], layer)

    def import_block(self, data: bytes) -> None:
        """Appends the 16 tokens of an exported block.

        Raises:
            InvalidBlock: the data has the wrong size, or the sequence does not end with a full block.
            OutOfPages: the cache is full.
            InvalidSpan: the sequence is closed.
        """
        if not self._cache.holds(self):
            raise InvalidSpan("the sequence is closed")
        if len(data) != self._cache.block_bytes:
            raise InvalidBlock(f"a block of this cache has {self._cache.block_bytes} bytes, not {len(data)}")
        if self.length % PAGE_TOKENS:
            raise InvalidBlock(f"a block cannot follow {self.length} tokens, which do not end with a full block")
        self._cache.reserve({self: self.length + PAGE_TOKENS})
        index = self.length // PAGE_TOKENS
        self._cache.fill(index, self.pages[index], data)
        self.length += PAGE_TOKENS
