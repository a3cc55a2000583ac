"""``countersign bench NAME``: measure, print, keep the rows (DESIGN.md section 12).

A benchmark is a module ``benchmarks/NAME.py`` of the checkout with ``async def run(quick: bool) -> list[Row]``, and
perhaps ``def plot(rows: list[Row], folder: Path) -> list[Path]``, which draws and names what it drew.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from countersign.services.runtime.config import FREE_PORTS, Config
from countersign.services.runtime.config import load as load_config
from countersign.services.runtime.errors import NotFound

CHECKOUT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. ``bar`` is what an issue asks for, ``met`` whether it was reached; ``ratio`` is to the peer."""

    bench: str
    case: str
    metric: str
    value: float
    unit: str
    n: int
    bar: str | None = None
    met: bool | None = None
    peer: str | None = None
    ratio: float | None = None


def bench(
    name: Annotated[str, typer.Argument(help="Which: a module of benchmarks/.", metavar="NAME")],
    quick: Annotated[bool, typer.Option(help="End within a minute on two cores; keeps no rows.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the rows as JSON lines.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw pictures into this folder.", metavar="DIR")] = None,
) -> None:
    """Run one benchmark of this checkout."""
    module = load(name)
    if plot is not None and not hasattr(module, "plot"):
        raise NotFound(f"benchmark {name!r} draws nothing", reason="NO_PICTURE", help="leave --plot out")
    rows = asyncio.run(module.run(quick))
    lines = "".join(json.dumps(stamped(row)) + "\n" for row in rows)
    if not quick:
        results = CHECKOUT / "benchmarks" / "results"
        results.mkdir(exist_ok=True)
        with (results / f"{name}.jsonl").open("a") as file:
            file.write(lines)
    if plot is not None:
        plot.mkdir(parents=True, exist_ok=True)
        for file in module.plot(rows, plot):
            print(f"drew {file}", file=sys.stderr)
    if json_:
        sys.stdout.write(lines)
    else:
        Console().print(_table(rows))


def stack_config(folder: Path | str, *settings: str) -> Config:
    """A stack of a benchmark: on free ports, and no audit beside what is measured."""
    quiet = (f"data_dir={folder}", *FREE_PORTS, "auditor.share=0")
    return load_config(None, os.environ, [*quiet, *settings])


def load(name: str) -> Any:
    """The module ``benchmarks/NAME.py``. Raises NotFound with those there are."""
    folder = CHECKOUT / "benchmarks"
    file = folder / f"{name}.py"
    if not name.isidentifier() or not file.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.py"))) or "none: run from a checkout"
        raise NotFound(f"there is no benchmark {name!r}", reason="UNKNOWN_BENCHMARK", help=f"known are: {known}")
    spec = importlib.util.spec_from_file_location(f"countersign_bench_{name}", file)
    if spec is None or spec.loader is None:
        raise NotFound(f"{file} cannot be loaded", reason="UNKNOWN_BENCHMARK")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def call(name: str, function: str, *arguments: object) -> Any:
    """Calls a function of a benchmark: what a process of its own can be given, where the module has no name."""
    return getattr(load(name), function)(*arguments)


def stamped(row: Row) -> dict[str, object]:
    """The row as it is kept: what it has, and where and when it was measured."""
    given = {key: value for key, value in dataclasses.asdict(row).items() if value is not None}
    asked = ["git", "-C", str(CHECKOUT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {**given, "commit": commit or "unknown", "machine": machine, "when": when}


def _table(rows: list[Row]) -> Table:
    table = Table("case", "metric", "value", "unit", "n", "bar", "met")
    for row in rows:
        met = "" if row.met is None else "yes" if row.met else "NO"
        table.add_row(row.case, row.metric, f"{row.value:.4g}", row.unit, str(row.n), row.bar or "", met)
    return table
