"""``countersign spec``: check the TLA+ specifications, and recorded runs against them."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.message import Message
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from countersign.cli.generate import DEFAULT_DATA_DIR
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.call import M
from countersign.services.runtime.errors import FailedPrecondition, translated
from countersign.services.runtime.stack import read_stack
from countersign.v1.sidecar_pb2 import GetRunRequest, GetRunResponse, StatusRequest, StatusResponse
from countersign.verify.spec.check import Check, Result, checks, perform, summary
from countersign.verify.spec.errors import SpecError
from countersign.verify.spec.manifest import load, names
from countersign.verify.spec.run import read_run
from countersign.verify.spec.trace import Verdict
from countersign.verify.spec.trace import replay as replayed

KINDS = {
    "configuration": "models, and all their properties hold",
    "witness": "states that must be reachable",
    "mutant": "planted bugs, each with the property that it must break",
    "equivalent": "changes that break nothing",
}


def check(
    quick: Annotated[bool, typer.Option(help="Small models and all cheap mutants: within three minutes.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    spec: Annotated[str | None, typer.Option(help="One specification: commit or cache.", metavar="NAME")] = None,
    only: Annotated[str | None, typer.Option(help="The configuration or mutant of this name.", metavar="NAME")] = None,
) -> None:
    """Model-check the protocols with TLC: they hold, they reach something, and each planted bug falls."""
    with translated(SpecError, FailedPrecondition, about="the specifications", reason="SPEC"):
        todo = [one for name in names() if spec in {None, name} for one in checks(load(name), quick=quick)]
    todo = [one for one in todo if only in {None, one.name}]
    if not todo and spec not in {None, *names()}:
        raise FailedPrecondition(
            f"there is no specification {spec!r}", reason="UNKNOWN_SPEC", help=f"there are: {', '.join(names())}"
        )
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


def replay(
    runs: Annotated[list[Path], typer.Argument(help="Recorded runs: files, or folders of them.", metavar="RUN")],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object a run.")] = False,
) -> None:
    """Have TLC explain recorded runs by the specification; name the first step that no behaviour explains."""
    files = [file for run in runs for file in (sorted(run.glob("*.jsonl")) if run.is_dir() else [run])]
    if not files:
        raise FailedPrecondition("there is no run here", reason="NO_RUN", help="record some: --set sidecar.record=true")
    rejected = 0
    for file in files:
        with translated(SpecError, FailedPrecondition, about=str(file), reason="SPEC"):
            verdict = replayed(read_run(file))
        rejected += not verdict.accepted
        print(_told(file, verdict, json_), flush=True)
    if rejected:
        raise typer.Exit(1)


def record(
    request_id: Annotated[str, typer.Argument(help="A request of the running stack.", metavar="REQUEST")],
    data_dir: Annotated[Path, typer.Option(help="Data folder of the stack.", metavar="FOLDER")] = DEFAULT_DATA_DIR,
) -> None:
    """Print a request's run as the sidecar has recorded it, for `spec replay`."""
    request = GetRunRequest(request_id=request_id)
    print(asyncio.run(_ask(data_dir, "GetRun", request, GetRunResponse)).run, end="")


def status(
    data_dir: Annotated[Path, typer.Option(help="Data folder of the stack.", metavar="FOLDER")] = DEFAULT_DATA_DIR,
) -> None:
    """What the sidecar of a running stack has seen, and what it found wrong: exit code 1 if anything."""
    seen = asyncio.run(_ask(data_dir, "Status", StatusRequest(), StatusResponse))
    for violation in seen.violations:
        print(f"{violation.property} falls in request {violation.request_id}: {violation.what}; {violation.evidence}")
    print(f"{seen.requests} requests, {seen.records} records, {seen.events} events, {seen.violation_count} violations")
    if seen.violation_count:
        raise typer.Exit(1)


async def _ask(data_dir: Path, method: str, request: Message, reply: type[M]) -> M:
    bus = await Bus.connect(read_stack(data_dir).nats, "countersign spec")
    try:
        return await bus.call("sidecar", method, request, reply, timeout=5.0)
    finally:
        await bus.close()


def _told(file: Path, verdict: Verdict, as_json: bool) -> str:
    if as_json:
        fields = ("accepted", "explained", "total", "first")
        return json.dumps({"run": str(file), **{name: getattr(verdict, name) for name in fields}})
    if verdict.accepted:
        return f"{file.name}: accepted, {verdict.total} steps"
    return f"{file.name}: REJECTED after {verdict.explained} of {verdict.total} steps: {verdict.first}"


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
