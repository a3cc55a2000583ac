"""What a plan gives to whom: tokens, pages, and blocks that another computes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from countersign.services.engine.pages import PAGE_TOKENS, pages_for
from countersign.services.engine.queues import Entry


@dataclass(slots=True)
class Left:
    """What a plan has still to give, the chunks it has given, the blocks in them (index by key), who joins, and the
    blocks whose pages are taken into account for somebody.
    """

    tokens: int
    pages: int
    chunks: dict[str, int] = field(default_factory=dict)
    blocks: dict[bytes, int] = field(default_factory=dict)
    joining: list[str] = field(default_factory=list)
    counted: set[bytes] = field(default_factory=set)


def joins(entry: Entry, left: Left) -> bool:
    """Whether this pass computes for another the block it needs next, or a later one: those before that exist then."""
    # Behind half a page of its own it could not adopt. The last known token is always fed.
    if entry.computed % PAGE_TOKENS:
        return False
    keys, usable = entry.request.keys, (entry.known - 1) // PAGE_TOKENS
    first, end = entry.computed // PAGE_TOKENS, min(usable, len(keys))
    return first < end and any(first <= index < end and keys[index] == key for key, index in left.blocks.items())


def leading(entry: Entry, blocks: Container[bytes]) -> int:
    """How many of the pages that it could adopt are among these. Keys are chained: who has one has those before it."""
    keys, usable = entry.request.keys, (entry.known - 1) // PAGE_TOKENS
    return bisect_left(range(min(usable, len(keys))), True, key=lambda index: keys[index] not in blocks)


def grant(decodes: Sequence[Entry], wanted: Sequence[int], left: Left) -> dict[str, int]:
    """How many proposals each decode may use: cut evenly where tokens are short, for the last where pages are."""
    even, more = _even(wanted, left.tokens)
    granted = {}
    for entry, want in zip(decodes, wanted, strict=True):
        count = min(want, even)
        if want > even and more:
            count, more = count + 1, more - 1
        slots = -(entry.computed + 1) % PAGE_TOKENS
        if count > slots:
            pages = min(pages_for(count - slots), left.pages)
            left.pages -= pages
            count = min(count, slots + pages * PAGE_TOKENS)
        granted[entry.id] = count
    return granted


def _even(wanted: Sequence[int], tokens: int) -> tuple[int, int]:
    """The most that everybody may have, and how many of those who want more get one more."""
    for index, want in enumerate(sorted(wanted)):
        others = len(wanted) - index
        if want * others > tokens:
            return divmod(tokens, others)
        tokens -= want
    return max(wanted), 0
