"""Which positions of a sequence each rank holds.

In causal attention a row at position p sees p + 1 keys and a key at p is seen by S - p rows. Zigzag gives each rank
one chunk from the front and the chunk that mirrors it from the back, so that both its rows' work (Ring: queries stay)
and its keys' work (TokenRing: keys stay) are its fair share. Where 2W does not divide S the chunks' lengths are chosen
so that both stay within 1 % of it, for S >= 1024 tokens and W <= 8 ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from countersign.kernels.ring.errors import LayoutError


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Positions [first, end)."""

    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first

    def clip(self, first: int, end: int) -> Range:
        """The part inside [first, end), perhaps empty."""
        first = max(self.first, first)
        return Range(first, max(first, min(self.end, end)))


Ranges = tuple[Range, ...]


def join(ranges: Iterable[Range]) -> Ranges:
    """The same positions in order, without empty ranges, neighbours made one.

    Raises:
        LayoutError: two ranges overlap.
    """
    joined: list[Range] = []
    for part in sorted(part for part in ranges if len(part)):
        if joined and part.first < joined[-1].end:
            raise LayoutError(f"positions {part.first} to {min(part.end, joined[-1].end) - 1} are given twice")
        if joined and part.first == joined[-1].end:
            part = Range(joined.pop().first, part.end)  # noqa: PLW2901
        joined.append(part)
    return tuple(joined)


def contiguous(first: int, end: int, size: int, align: int = 1) -> tuple[Ranges, ...]:
    """Rank r holds the r-th of ``size`` runs of [first, end), equal to within one cell of ``align`` positions."""
    start = first // align
    cells = -(-end // align) - start
    bounds = [start + cells * rank // size for rank in range(size + 1)]
    return tuple(join([_positions(a, b, first, end, align)]) for a, b in pairwise(bounds))


def zigzag(first: int, end: int, size: int, align: int = 1) -> tuple[Ranges, ...]:
    """Rank r holds chunks r and 2 size - 1 - r of [first, end); boundaries between ranks at multiples of ``align``.

    The work is balanced in whole cells of ``align`` positions, over the range itself: what lies before ``first`` adds
    the same to every row.
    """
    start = first // align
    count = -(-end // align) - start
    low, high = 0, count
    held = []
    for rank in range(size):
        front, back = _chunks(low, high, count, size - rank)
        cells = ((low, low + front), (high - back, high))
        held.append(join(_positions(start + a, start + b, first, end, align) for a, b in cells))
        low, high = low + front, high - back
    return tuple(held)


def extend(held: Sequence[Ranges], end: int, align: int = 1) -> tuple[Ranges, ...]:
    """What each rank holds once a sequence cut as ``held`` has grown to [0, end): the begun cell of ``align`` positions
    stays with its owner, the rest is cut by zigzag.

    Raises:
        LayoutError: ``held`` is not [0, n) cut up, or n > end.
    """
    first = check_cut(held)
    if first > end:
        raise LayoutError(f"a sequence of {first} positions cannot grow to {end}")
    begun = min(end, -(-first // align) * align)
    grown = zigzag(begun, end, len(held), align)
    rest = ((Range(first, begun),) if any(part.end == first for part in mine) else () for mine in held)
    return tuple(join((*mine, *more, *new)) for mine, more, new in zip(held, rest, grown, strict=True))


def check_cut(held: Sequence[Ranges]) -> int:
    """The length n of the sequence that the ranks hold together.

    Raises:
        LayoutError: a position of [0, n) is held twice or by nobody.
    """
    whole = join(part for mine in held for part in mine)
    if len(whole) > 1 or (whole and whole[0].first):
        missing = whole[0].end if not whole[0].first else 0
        raise LayoutError(f"position {missing} is held by no rank, though later ones are")
    return whole[0].end if whole else 0


def _positions(a: int, b: int, first: int, end: int, align: int) -> Range:
    return Range(a * align, b * align).clip(first, end)


def _chunks(low: int, high: int, count: int, ranks: int) -> tuple[int, int]:
    """(front, back): the lengths to take from both ends of the cells [low, high) of ``count``, shared by ``ranks``.

    The fair share of what is left is (rows' work, keys' work) / ranks; of the lengths near length / (2 ranks) those
    are taken whose worse error is least. Doubled and times ``ranks``, all is in whole numbers.
    """
    length = high - low
    if ranks == 1:
        return length, 0
    rows = length * (low + 1 + high)
    keys = length * 2 * (count + 1) - rows
    near = range(max(0, length // (2 * ranks) - 1), length // (2 * ranks) + 3)
    candidates = []
    for front, back in product(near, near):
        if front + back <= length:
            mine = front * (2 * low + front + 1) + back * (2 * high - back + 1)
            other = (front + back) * 2 * (count + 1) - mine
            candidates.append((max(abs(ranks * mine - rows), abs(ranks * other - keys)), front, back))
    _, front, back = min(candidates)
    return front, back
