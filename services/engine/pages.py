"""Who holds which pages of a KV cache. Knows no tensor."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from countersign.services.engine.errors import EngineError

PAGE_TOKENS = 16


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE_TOKENS)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Pages now (free, held by sequences, or cached: indexed and held by none) and counts since the start.

    ``hits`` and ``misses`` count the pages that ``adopt`` was asked for, ``evictions`` cached pages given up for room.
    """

    free: int
    used: int
    cached: int
    hits: int
    misses: int
    evictions: int


class PageAllocator:
    """Who holds each page, which pages are indexed under what key, and which goes next.

    Two sequences that share a page share all pages before it, so an indexed page has at least as many holders as its
    child; and a sequence gives its pages back last first. Hence a child always becomes unreferenced before its parent:
    the order of least recent use evicts children first by itself, and no indexed page outlives its parent.
    """

    def __init__(self, pages: int, homes: int = 1) -> None:
        """``homes``: page p has home (p - 1) % homes, and is taken first for what belongs there."""
        self._free = [list(range(1 + home, pages, homes))[::-1] for home in range(homes)]
        self._references = [0] * pages
        self._index: dict[bytes, int] = {}
        # Of each indexed page: its key, and the page before it in the chain, 0 for the first.
        self._indexed: dict[int, tuple[bytes, int]] = {}
        # Indexed pages that nobody holds, least recently used first.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._hits = self._misses = self._evictions = 0

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return sum(map(len, self._free)) + len(self._cached)

    def stats(self) -> CacheStats:
        """Pages and counts as of now."""
        used = len(self._references) - 1 - self.available
        free, cached = self.available - len(self._cached), len(self._cached)
        return CacheStats(free, used, cached, self._hits, self._misses, self._evictions)

    def shared(self, page: int, leaving: int = 0) -> bool:
        """Whether the page must not be written: it is indexed, or has two holders, ``leaving`` ones not counted."""
        return self._references[page] - leaving > 1 or page in self._indexed

    def take(self, home: int = 0) -> int:
        """A page for one sequence: a free one, of this home if there is one, else the least recently used cached one;
        one must be available.
        """
        if free := self._free[home] or max(self._free, key=len):
            page = free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            key, _ = self._indexed.pop(page)
            del self._index[key]
            self._evictions += 1
        self._references[page] = 1
        return page

    def retain(self, pages: Iterable[int]) -> None:
        """One more sequence holds these."""
        for page in pages:
            if not self._references[page]:
                del self._cached[page]
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One sequence less holds these; last first, for the order of eviction."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._indexed:
                self._cached[page] = None
            else:
                self._free[(page - 1) % len(self._free)].append(page)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest indexed chain under the first of these keys."""
        pages: list[int] = []
        for key in keys:
            page = self._index.get(key)
            if page is None or self._indexed[page][1] != (pages[-1] if pages else 0):
                break
            pages.append(page)
        return pages

    def adopt(self, keys: Sequence[bytes], own: Sequence[int] = ()) -> list[int]:
        """``find``, counted and retained: the pages behind ``own``, none if those are not the first that it finds. What
        is not there is counted once, for the first page.
        """
        pages = self.find(keys)
        pages = pages[len(own) :] if pages[: len(own)] == list(own) else []
        self._hits += len(pages)
        self._misses += 0 if own else len(keys) - len(pages)
        self.retain(pages)
        return pages

    def accepts(self, pages: Sequence[int], keys: Sequence[bytes]) -> bool:
        """Whether a sequence's pages can be indexed under these keys: none of either is already, but as one chain."""
        found = self.find(keys)
        rest = set(keys[len(found) :])
        if len(rest) < len(keys) - len(found) or rest & self._index.keys():
            return False
        known = dict(zip(pages, found, strict=False))
        return all(page not in self._indexed or known.get(page) == page for page in pages)

    def index(self, key: bytes, page: int, parent: int) -> None:
        """From now on the page is found under the key, after its parent (0: first of its chain)."""
        self._index[key] = page
        self._indexed[page] = (key, parent)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises:
        EngineError: these are not the tables of those who hold pages, or the index or its order is wrong.
        """
        held: Counter[int] = Counter()
        for pages in tables:
            held.update(pages)
            parents = [self._indexed[page][1] for page in pages if page in self._indexed]
            if (
                any(page not in self._indexed for page in pages[: len(parents)])
                or parents != [0, *pages][: len(parents)]
            ):
                raise EngineError("a sequence holds an indexed page without those before it")
        if sorted([*held, *chain.from_iterable(self._free), *self._cached]) != list(range(1, len(self._references))):
            raise EngineError("a page of the KV cache is lost, or both free and held")
        if any(held[page] != count for page, count in enumerate(self._references)):
            raise EngineError("a page of the KV cache has more or fewer references than holders")
        if {page: key for key, page in self._index.items()} != {page: key for page, (key, _) in self._indexed.items()}:
            raise EngineError("the prefix index and its pages differ")
        age = {page: place for place, page in enumerate(self._cached)}
        if not age.keys() <= self._indexed.keys():
            raise EngineError("a page is cached that is not indexed")
        for page, (_, parent) in self._indexed.items():
            if parent and parent not in self._indexed:
                raise EngineError(f"indexed page {page} has lost its parent {parent}")
            if parent in age and not (page in age and age[page] < age[parent]):
                raise EngineError(f"page {parent} would be evicted before its child {page}")
