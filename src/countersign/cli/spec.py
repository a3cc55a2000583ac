"""``countersign spec``: check the TLA+ specifications."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from countersign.services.runtime.errors import FailedPrecondition, translated
from countersign.verify.spec.check import Check, Result, checks, perform, summary
from countersign.verify.spec.errors import SpecError
from countersign.verify.spec.manifest import load, specifications

KINDS = {
    "configuration": "models, and all their properties hold",
    "witness": "states that must be reachable",
    "mutant": "planted bugs, each with the property that it must break",
    "equivalent": "changes that break nothing",
}


def check(
    quick: Annotated[bool, typer.Option(help="Small models and all cheap mutants: within three minutes.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    only: Annotated[str | None, typer.Option(help="The configuration or mutant of this name.", metavar="NAME")] = None,
) -> None:
    """Model-check the protocols with TLC: they hold, they reach something, and each planted bug falls."""
    with translated(SpecError, FailedPrecondition, about="the specifications", reason="SPEC"):
        folders = sorted(file.parent for file in specifications().glob("*/manifest.toml"))
        todo = [one for folder in folders for one in checks(load(folder), quick=quick)]
    todo = [one for one in todo if only in {None, one.name}]
    if not todo:
        raise FailedPrecondition(f"there is nothing named {only!r}", reason="UNKNOWN_CHECK", help="leave --only out")
    begin = time.monotonic()
    results = _watched(todo)
    if json_:
        print(json.dumps(summary(results)))
    else:
        _print(results, time.monotonic() - begin)
    if not all(result.ok for result in results):
        raise typer.Exit(1)


def _watched(todo: list[Check]) -> list[Result]:
    """The results; on a terminal with a bar over the states."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("TLC", total=len(todo))
        return perform(
            todo, lambda done, states: bar.update(task, completed=done, description=f"TLC {states:,} states")
        )


def _print(results: list[Result], seconds: float) -> None:
    console = Console()
    for kind, title in KINDS.items():
        table = Table(box=None, pad_edge=False, show_header=kind == "configuration", title_justify="left")
        for name, align in (("", "left"), ("", "left"), ("states", "right"), ("depth", "right"), ("s", "right")):
            table.add_column(name, justify=align, no_wrap=True)  # type: ignore[arg-type]  # these are its literals
        for result in (one for one in results if one.check.kind == kind):
            sign = "[green]ok[/]" if result.ok else "[red]NO[/]"
            name = result.check.name + ("" if result.check.expected == "pass" else f"  [dim]{result.check.expected}[/]")
            table.add_row(sign, name, f"{result.states:,}", str(result.depth or ""), f"{result.seconds:.0f}")
        if table.rows:
            console.print(f"[bold]{title}[/]")
            console.print(table)
    for result in results:
        if not result.ok:
            console.print(f"\n{result.check.kind} {result.check.name}: {result.why}", markup=False, highlight=False)
    counts = summary(results)
    killed = sum(mutant["killed"] for mutant in counts["mutants"])
    console.print(
        f"{counts['states']:,} distinct states in models that hold; {killed} of {len(counts['mutants'])} planted bugs"
        f" fell; {seconds:.0f} s. {'All as expected.' if counts['ok'] else 'NOT as expected.'}",
        highlight=False,
    )
