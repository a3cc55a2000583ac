"""Tables and figures for people: at any width, whatever the cells hold."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from countersign.cli.operator import amount, counted, duration, share, size
from countersign.cli.printable import in_one_line
from countersign.cli.tables import Column, fitting, named, room, show

HOSTILE = "\x1b]0;x\x07[red]\u202eevil\x9b2J\r\n\ttab\u200b\x00"
COLUMNS = (Column("NAME"), Column("MUCH", 1, "right"), Column("LESS", 3), Column("EMPTY", 2))
ROWS = [["one", "1", "of no great use", ""], [HOSTILE, "22", "中中中", ""]]


def printed(width: int | None, *, terminal: bool = True) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width or 80, color_system=None)
    show(console, fitting(COLUMNS, ROWS, room(console)))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [4, 20, 30, 60, 100])
def test_a_table_is_never_wider_than_the_terminal(width: int) -> None:
    assert all(cell_len(line) <= width for line in printed(width))
    assert len(printed(width)) == 3


def test_the_least_important_columns_go_first_and_empty_ones_are_not_shown() -> None:
    heads = [printed(width)[0].split() for width in (100, 40, 12)]
    assert heads == [["NAME", "MUCH", "LESS"], ["NAME", "MUCH"], ["NAME"]]


def test_where_nobody_looks_nothing_is_cut() -> None:
    lines = printed(None, terminal=False)
    assert "of no great use" in lines[1]
    assert lines[0].split() == ["NAME", "MUCH", "LESS"]
    assert all(line == line.rstrip() for line in lines)


def test_no_cell_can_steer_the_terminal_be_markup_or_begin_a_line() -> None:
    text = "\n".join(printed(100))
    assert "[red]" in text
    assert all(line.isprintable() for line in text.splitlines())
    assert "\u202e" not in text
    assert in_one_line("plain é 中 text") == "plain é 中 text"
    assert named("x", HOSTILE).plain.isprintable()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 µs"),
        (0.00043, "430 µs"),
        (0.00314, "3.14 ms"),
        (0.9996, "1.00 s"),
        (1.24, "1.24 s"),
        (42, "42 s"),
        (59.6, "0 m 59 s"),
        (123, "2 m 03 s"),
        (18_600, "5 h 10 m"),
        (273_600, "3 d 4 h"),
        (-1, "–"),
        (float("nan"), "–"),
    ],
)
def test_a_time_has_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_are_short_and_true() -> None:
    numbers = (0, 1, 0.42, 9.13, 812, 9_999, 12_400, 3_100_000, 5e9, float("inf"))
    assert [amount(number) for number in numbers] == [
        "0", "1", "0.42", "9.13", "812", "9999", "12.4 k", "3.10 M", "5.00 G", "–"
    ]  # fmt: skip
    assert [size(number) for number in (0, 812, 3_100, 268_435_456, 5e9)] == [
        "0 B", "812 B", "3.10 kB", "268 MB", "5.00 GB"
    ]  # fmt: skip
    assert [counted(number, "request") for number in (0, 1, 2)] == ["0 requests", "1 request", "2 requests"]
    assert [share(1, 4), share(0, 4), share(1, 0)] == ["25 %", "0 %", "–"]
