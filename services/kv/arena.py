"""The RAM tier: blocks in shared memory that readers on the host map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from countersign.services.protocol.checksum import checksum
from countersign.services.runtime.extents import Extent, Extents
from countersign.services.runtime.shared_memory import Memory

PAGE = 4096


@dataclass(frozen=True, slots=True)
class Slot:
    """A block's room: its extents in order, the last perhaps longer than what is left of ``size``."""

    size: int
    extents: tuple[Extent, ...]

    def runs(self, start: int = 0, stop: int | None = None) -> list[Extent]:
        """Where the block's bytes from ``start`` up to ``stop`` lie."""
        stop = self.size if stop is None else stop
        found: list[Extent] = []
        at = 0
        for offset, length in self.extents:
            first, last = max(start, at), min(stop, at + length)
            if first < last:
                found.append((offset + first - at, last - first))
            at += length
        return found


class Arena:
    """Room for ``size`` bytes, given out in pages of 4 KiB by slot number: what is free, fits."""

    def __init__(self, name: str, size: int) -> None:
        self.memory = Memory(name, size)
        self._free = Extents(size // PAGE)
        self._slots: dict[int, Slot] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._slots

    @property
    def taken(self) -> int:
        """Bytes of room that are given out."""
        return self.memory.size - self._free.free * PAGE

    def take(self, number: int, size: int) -> None:
        """Room for a block of ``size`` bytes. Raises MemoryError when there is none, which the books rule out."""
        extents = self._free.take(-(-size // PAGE))
        self._slots[number] = Slot(size, tuple((first * PAGE, count * PAGE) for first, count in extents))

    def give(self, number: int) -> None:
        """The room comes back."""
        slot = self._slots.pop(number)
        self._free.give([(offset // PAGE, length // PAGE) for offset, length in slot.extents])

    def runs(self, number: int) -> list[Extent]:
        """Where the block lies."""
        return self._slots[number].runs()

    def views(self, number: int, start: int = 0, stop: int | None = None) -> list[memoryview]:
        """The block's bytes in place."""
        view = self.memory.view
        return [view[offset : offset + length] for offset, length in self._slots[number].runs(start, stop)]

    def write(self, number: int, start: int, data: bytes | memoryview) -> None:
        """Bytes of the block from ``start`` on."""
        at = 0
        for view in self.views(number, start, start + len(data)):
            view[:] = data[at : at + len(view)]
            at += len(view)

    def read(self, number: int, start: int = 0, stop: int | None = None) -> bytes:
        """A copy of the block's bytes."""
        return join(self.views(number, start, stop))

    def checksum(self, number: int) -> bytes:
        return checksum(self.views(number))

    def close(self) -> None:
        self.memory.close()


def join(views: Sequence[memoryview]) -> bytes:
    """One copy of them all."""
    return bytes(views[0]) if len(views) == 1 else b"".join(views)
