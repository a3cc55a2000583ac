"""Tables that fit: where the terminal is narrow, the least important columns are left out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from countersign.cli.printable import in_one_line

GAP = 2
_UNCUT = 10_000
QUIET = "dim"
HEAD = "bold"
# By colours that stay apart for colour-blind readers, and never alone: a word always says the same.
GOOD, BAD, CARE = "green", "red", "yellow"

Cell = str | Text


@dataclass(frozen=True, slots=True)
class Column:
    """``rank``: 0 always stays, others go from the highest on where there is no room."""

    title: str
    rank: int = 0
    align: Literal["left", "right"] = "left"


def fitting(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int | None) -> Table:
    """The table within ``width`` cells; with all its columns where that is None. What is still too wide ends in "…"."""
    texts = [[cell if isinstance(cell, Text) else Text(in_one_line(cell)) for cell in row] for row in rows]
    shown = _shown(columns, texts, width)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style=HEAD, collapse_padding=True)
    for place in shown:
        column = columns[place]
        table.add_column(column.title, justify=column.align, no_wrap=True, overflow="ellipsis")
    for row in texts:
        table.add_row(*(row[place] for place in shown))
    return table


def named(name: str, about: str, style: str = "") -> Text:
    """A line of facts, and what they are about."""
    return Text.assemble((f"{name:<10}", HEAD), (in_one_line(about), style))


def room(console: Console) -> int | None:
    """How wide a line may be: no limit where nobody looks at a terminal."""
    return console.width if console.is_terminal else None


def show(console: Console, *parts: Table | Text) -> None:
    """Print, long lines folded; where there is no terminal nothing is cut or folded."""
    for part in parts:
        if console.is_terminal:
            console.print(part, overflow="fold", highlight=False)
            continue
        wide = Console(file=io.StringIO(), width=_UNCUT, color_system=None)
        with wide.capture() as captured:
            wide.print(part, soft_wrap=isinstance(part, Text), highlight=False)
        for line in captured.get().splitlines():
            print(line.rstrip(), file=console.file)


def _shown(columns: Sequence[Column], rows: Sequence[Sequence[Text]], width: int | None) -> list[int]:
    widths = [
        max([cell_len(column.title), *(row[place].cell_len for row in rows)]) for place, column in enumerate(columns)
    ]
    # A column that says nothing in any row is not missed.
    kept = [place for place, column in enumerate(columns) if not rows or any(row[place].plain for row in rows)]
    while width is not None and sum(widths[place] + GAP for place in kept) - GAP > width:
        least = max(kept, key=lambda place: (columns[place].rank, place))
        if columns[least].rank == 0:
            break
        kept.remove(least)
    return kept
