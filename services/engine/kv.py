"""The paged KV cache: a pool of 16-token pages, shared by sequences that each hold a table of pages.

Pool: (layers, 2, pages, 16, kv_heads, head_dim), K before V, keys after rotation. Page 0 belongs to nobody and stays
zero: it pads short tables. A hidden key's value is multiplied by 0, which keeps NaN as NaN, so a page is zeroed when it
changes hands and when its tail is truncated: one sequence's NaN never reaches another, nor a draft's what follows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from countersign.services.engine.config import TORCH_DTYPES, Dtype, ModelConfig
from countersign.services.engine.errors import EngineError, InvalidBlock, InvalidSpan, OutOfPages

PAGE_TOKENS = 16


class PagedCache:
    """KV for at least ``tokens`` tokens of a model of this configuration."""

    def __init__(self, config: ModelConfig, dtype: Dtype, tokens: int) -> None:
        pages = 1 + pages_for(tokens)
        shape = (config.layers, 2, pages, PAGE_TOKENS, config.kv_heads, config.head_dim)
        self.dtype = TORCH_DTYPES[dtype]
        # NumPy's zeros are mapped by the system on first touch, so that an idle cache costs no memory.
        zeros = np.zeros(math.prod(shape) * self.dtype.itemsize, dtype=np.uint8)
        self.pool: Tensor = torch.from_numpy(zeros).view(self.dtype).view(shape)
        self._free = list(range(pages - 1, 0, -1))
        self._sequences: set[CachedSequence] = set()

    @property
    def free_tokens(self) -> int:
        """Tokens that the free pages hold."""
        return len(self._free) * PAGE_TOKENS

    @property
    def block_bytes(self) -> int:
        """Size of one exported block."""
        layers, kinds, _, *rest = self.pool.shape
        return layers * kinds * math.prod(rest) * self.dtype.itemsize

    def sequence(self) -> CachedSequence:
        """A new sequence of no tokens."""
        sequence = CachedSequence(self)
        self._sequences.add(sequence)
        return sequence

    def holds(self, sequence: CachedSequence) -> bool:
        """Whether the sequence is of this cache and not closed."""
        return sequence in self._sequences

    def reserve(self, lengths: Mapping[CachedSequence, int]) -> None:
        """Gives each sequence the pages for so many tokens in all.

        Raises:
            OutOfPages: there are too few; none was taken.
        """
        missing = {sequence: pages_for(length) - len(sequence.pages) for sequence, length in lengths.items()}
        needed = sum(count for count in missing.values() if count > 0)
        if needed > len(self._free):
            raise OutOfPages(needed, len(self._free))
        taken: list[int] = []
        for sequence, count in missing.items():
            pages = [self._free.pop() for _ in range(count)]
            sequence.pages.extend(pages)
            taken.extend(pages)
        if taken:
            self.pool.index_fill_(2, torch.tensor(taken), 0)

    def release(self, pages: Iterable[int]) -> None:
        """Takes pages back."""
        self._free.extend(pages)

    def forget(self, sequence: CachedSequence) -> None:
        """Takes all of a sequence's pages back and knows it no more."""
        self._sequences.discard(sequence)
        self.release(sequence.pages)

    def check_integrity(self) -> None:
        """Raises:
        EngineError: a page is lost, owned twice, or the page of zeros was written.
        """
        owned = [page for sequence in self._sequences for page in sequence.pages]
        if sorted(owned + self._free) != list(range(1, self.pool.shape[2])):
            raise EngineError("a page of the KV cache is lost or has two owners")
        for sequence in self._sequences:
            if len(sequence.pages) != pages_for(sequence.length):
                raise EngineError(f"a sequence of {sequence.length} tokens holds {len(sequence.pages)} pages")
        if bool(self.pool[:, :, 0].any()):
            raise EngineError("the KV cache's page of zeros was written")


class CachedSequence:
    """One sequence's tokens in the cache. Equal to itself only."""

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache
        self.length = 0
        self.pages: list[int] = []

    def truncate(self, length: int) -> None:
        """Keeps the first ``length`` tokens.

        Raises:
            InvalidSpan: there are fewer, or the sequence is closed.
        """
        if not 0 <= length <= self.length or not self._cache.holds(self):
            raise InvalidSpan(f"a sequence of {self.length} tokens cannot be truncated to {length}")
        kept = pages_for(length)
        self._cache.release(self.pages[kept:])
        del self.pages[kept:]
        if length < self.length and length % PAGE_TOKENS:
            self._cache.pool[:, :, self.pages[-1], length % PAGE_TOKENS :] = 0
        self.length = length

    def close(self) -> None:
        """Gives all pages back; closing twice does nothing."""
        if self._cache.holds(self):
            self._cache.forget(self)
            self.pages, self.length = [], 0

    def export_block(self, index: int) -> bytes:
        """K and V of tokens 16 index to 16 index + 15.

        Layout: (layers, 2, 16, kv_heads, head_dim), row-major, K before V, keys after rotation, elements in the cache's
        dtype, little-endian.

        Raises:
            InvalidBlock: the block is not full.
        """
        if not 0 <= index < self.length // PAGE_TOKENS:
            raise InvalidBlock(f"block {index} of a sequence of {self.length} tokens is not full")
        return self._cache.pool[:, :, self.pages[index]].contiguous().view(torch.uint8).numpy().tobytes()

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
        target = self._cache.pool[:, :, self.pages[-1]]
        target.copy_(torch.frombuffer(bytearray(data), dtype=self._cache.dtype).view(target.shape))
        self.length += PAGE_TOKENS


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE_TOKENS)
