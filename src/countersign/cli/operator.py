"""What the operator's commands share: how they find a stack, and their way of putting things."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from countersign.services.runtime.bus import Bus

CONNECT_S = 5.0

DataDir = Annotated[Path, typer.Option(help="Data folder of the running stack.", metavar="FOLDER")]
Nats = Annotated[str, typer.Option(help="The stack's NATS, in place of a data folder.", metavar="URL")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@asynccontextmanager
async def connected(data_dir: Path, nats: str, command: str) -> AsyncIterator[Bus]:
    """The bus of the stack that runs on ``data_dir``, or at ``nats``.

    Raises:
        Unavailable: reason NO_STACK or BUS_UNREACHABLE.
    """
    from countersign.services.runtime.bus import Bus
    from countersign.services.runtime.stack import read_stack

    bus = await Bus.connect(nats or read_stack(data_dir).nats, f"countersign {command}", timeout=CONNECT_S)
    try:
        yield bus
    finally:
        await bus.close()


def duration(seconds: float) -> str:
    """In the unit that a person would take: 430 µs, 3.14 ms, 1.24 s, 42 s, 2 m 03 s, 5 h 10 m, 3 d 4 h."""
    if seconds < 0 or not math.isfinite(seconds):
        return "–"
    for scale, unit, end in ((1e6, "µs", 999.5e-6), (1e3, "ms", 0.9995), (1.0, "s", 9.995)):
        if seconds < end:
            return f"{_three(seconds * scale)} {unit}"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours == 0:
        return f"{minutes} m {int(seconds) % 60:02} s"
    return f"{hours} h {minutes % 60:02} m" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def amount(value: float) -> str:
    """A number as short as it stays true: 0.42, 9.1, 812, 12.4 k, 3.1 M."""
    if not math.isfinite(value):
        return "–"
    for scale, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= scale:
            return f"{_three(value / (1e3 if unit == ' k' else scale))}{unit}"
    return str(int(value)) if value == int(value) else _three(value)


def size(count: float) -> str:
    """Bytes: 812 B, 3.1 MB."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return f"{_three(count / scale)} {unit}"
    return f"{int(count)} B"


def share(part: float, whole: float) -> str:
    """62 %; a dash where there is no whole."""
    return f"{100 * part / whole:.0f} %" if whole > 0 else "–"


def counted(count: float, noun: str) -> str:
    """1 request, 2 requests."""
    return f"{amount(count)} {noun}" if count == 1 else f"{amount(count)} {noun}s"


def moment(unix_ms: float) -> str:
    """In this machine's time zone, to the second."""
    return datetime.fromtimestamp(unix_ms / 1000, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _three(value: float) -> str:
    """About three digits."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
