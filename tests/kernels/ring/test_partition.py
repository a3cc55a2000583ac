"""Every position has one owner, and zigzag shares causal work evenly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from countersign.kernels.ring.errors import LayoutError
from countersign.kernels.ring.partition import Range, Ranges, check_cut, contiguous, extend, join, zigzag

sizes = st.integers(1, 8)


def owners(held: tuple[Ranges, ...]) -> list[tuple[int, int]]:
    """(position, rank) of all, sorted."""
    return sorted((p, rank) for rank, mine in enumerate(held) for part in mine for p in range(part.first, part.end))


def imbalance(held: tuple[Ranges, ...], length: int) -> float:
    """The worst relative distance of a rank's rows' work or keys' work from the mean."""
    mean = length * (length + 1) / 2 / len(held)
    rows = [sum((p.first + 1 + p.end) * len(p) / 2 for p in mine) for mine in held]
    keys = [sum((2 * length + 1 - p.first - p.end) * len(p) / 2 for p in mine) for mine in held]
    return max(abs(work / mean - 1) for work in rows + keys)


@given(
    st.integers(0, 300), st.integers(0, 300), sizes, st.sampled_from([1, 4, 64]), st.sampled_from([zigzag, contiguous])
)
def test_each_position_has_one_owner_and_cells_are_not_split(
    first: int, length: int, size: int, align: int, cut: Callable[..., tuple[Ranges, ...]]
) -> None:
    held = cut(first, first + length, size, align)
    assert len(held) == size
    assert [p for p, _ in owners(held)] == list(range(first, first + length))
    cells: dict[int, set[int]] = {}
    for position, rank in owners(held):
        cells.setdefault(position // align, set()).add(rank)
    assert all(len(ranks) == 1 for ranks in cells.values())


@given(st.integers(1024, 200_000), sizes)
@example(1030, 8)
def test_zigzag_shares_the_work_of_rows_and_of_keys_within_1_percent(length: int, size: int) -> None:
    assert imbalance(zigzag(0, length, size), length) <= 0.01


def test_zigzag_stays_within_1_percent_for_all_lengths_just_above_1024() -> None:
    assert max(imbalance(zigzag(0, n, size), n) for n in range(1024, 1300) for size in range(1, 9)) <= 0.01


def test_contiguous_runs_are_not_balanced_which_the_measure_shows() -> None:
    assert imbalance(contiguous(0, 1024, 8), 1024) > 0.8


@given(st.integers(1, 200), sizes)
def test_cells_are_shared_like_tokens(cells: int, size: int) -> None:
    aligned = zigzag(0, 64 * cells, size, 64)
    assert [[(p.first // 64, p.end // 64) for p in mine] for mine in aligned] == [
        [(p.first, p.end) for p in mine] for mine in zigzag(0, cells, size)
    ]


def test_zigzag_of_known_lengths() -> None:
    assert zigzag(0, 8, 2) == ((Range(0, 2), Range(6, 8)), (Range(2, 6),))
    assert contiguous(0, 5, 2) == ((Range(0, 2),), (Range(2, 5),))
    assert zigzag(70, 200, 1, 64) == ((Range(70, 200),),)


@given(st.integers(0, 300), st.lists(st.integers(0, 200), max_size=4), sizes, st.sampled_from([1, 16, 64]))
def test_growing_keeps_every_owner_and_splits_no_cell(start: int, steps: list[int], size: int, align: int) -> None:
    held = zigzag(0, start, size, align)
    for step in steps:
        before, start = held, start + step
        held = extend(before, start, align)
        assert set(owners(before)) <= set(owners(held))
        assert check_cut(held) == start
        cells: dict[int, set[int]] = {}
        for position, rank in owners(held):
            cells.setdefault(position // align, set()).add(rank)
        assert all(len(ranks) == 1 for ranks in cells.values())


def test_ranges_that_overlap_or_leave_holes_are_refused() -> None:
    with pytest.raises(LayoutError, match="positions 4 to 5 are given twice"):
        join([Range(0, 6), Range(4, 8)])
    with pytest.raises(LayoutError, match="position 3 is held by no rank"):
        check_cut([(Range(0, 3),), (Range(5, 6),)])
    with pytest.raises(LayoutError, match="position 0 is held by no rank"):
        check_cut([(Range(2, 3),)])
    with pytest.raises(LayoutError, match="cannot grow to 2"):
        extend([(Range(0, 3),)], 2)
