"""Which pages of a memory are free: whole runs where there are any, pieces where there are not, so that all fit."""

from __future__ import annotations

from collections.abc import Iterable

Extent = tuple[int, int]
"""First page, number of pages."""


class Extents:
    """``count`` pages, all free at first.

    A run that fits exactly is taken first, which is the rule where one size dominates; else the longest run is cut; and
    when none is long enough, a block is laid over several.
    """

    def __init__(self, count: int) -> None:
        self._starts: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._by_length: dict[int, set[int]] = {}
        self.free = 0
        if count:
            self._insert(0, count)
            self.free = count

    def take(self, count: int) -> list[Extent]:
        """``count`` pages. Raises MemoryError when so many are not free; nothing changed then."""
        if count > self.free:
            raise MemoryError(f"{count} pages wanted, {self.free} are free")
        taken: list[Extent] = []
        left = count
        while left:
            length = left if self._by_length.get(left) else max(self._by_length)
            first = next(iter(self._by_length[length]))
            self._delete(first, length)
            if length > left:
                self._insert(first + left, length - left)
            taken.append((first, min(length, left)))
            left -= taken[-1][1]
        self.free -= count
        return taken

    def give(self, extents: Iterable[Extent]) -> None:
        """These pages are free again."""
        for first, count in extents:
            self.free += count
            start, length = first, count
            if first in self._ends:
                before = self._ends[first]
                length += self._starts[before]
                self._delete(before, self._starts[before])
                start = before
            if start + length in self._starts:
                behind = start + length
                more = self._starts[behind]
                self._delete(behind, more)
                length += more
            self._insert(start, length)

    def _insert(self, first: int, count: int) -> None:
        self._starts[first] = count
        self._ends[first + count] = first
        self._by_length.setdefault(count, set()).add(first)

    def _delete(self, first: int, count: int) -> None:
        del self._starts[first], self._ends[first + count]
        same = self._by_length[count]
        same.remove(first)
        if not same:
            del self._by_length[count]
