"""``countersign trace``: where one request's time went, from the spans that are kept on this machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from countersign.cli.generate import DEFAULT_DATA_DIR
from countersign.cli.operator import DataDir, Json
from countersign.cli.printable import in_one_line
from countersign.cli.spans import Node, RequestTrace, rounds, trace_of
from countersign.cli.tables import room, show
from countersign.cli.waterfall import waterfall
from countersign.services.runtime.errors import FailedPrecondition, NotFound
from countersign.services.runtime.telemetry import attributes as names
from countersign.services.runtime.telemetry.kept import FOLDER, read_spans


def trace(
    request: Annotated[str, typer.Argument(help="A request's id, or a trace's.", metavar="REQUEST")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    json_: Json = False,
) -> None:
    """Show the spans of one request as a waterfall; the stack need not run any more."""
    folder = data_dir / FOLDER
    if not any(folder.glob("*")):
        raise FailedPrecondition(
            f"no spans are kept in {folder}",
            reason="NOTHING_KEPT",
            help="run the stack with telemetry.spans=true and telemetry.kept_bytes above 0, as by default",
        )
    found = trace_of(read_spans(folder), request)
    if found is None:
        raise NotFound(
            f"no span of request {in_one_line(request)} is kept in {folder}",
            reason="NO_TRACE",
            help="spans are written some seconds after they end, kept as long as telemetry.kept_bytes lets them, "
            "and for a share of all requests where telemetry.sample is below 1",
        )
    if json_:
        print(json.dumps(facts(found)))
    else:
        console = Console()
        show(console, *waterfall(found, room(console)))


def facts(found: RequestTrace) -> dict[str, Any]:
    """What `--json` prints; times in milliseconds from the first span's begin."""
    start = found.start
    return {
        "request_id": found.request_id,
        "trace_id": found.trace_id,
        "started_unix_ms": start // 1_000_000,
        "duration_ms": round((max(root.end for root in found.roots) - start) / 1e6, 3),
        "spans": [_facts(node, start) for root in found.roots for node in root.walk()],
        "later": [_facts(node, start) for root in found.later for node in root.walk()],
        "linked": [_facts(node, start) for root in found.linked for node in root.walk()],
    }


def _facts(node: Node, start: int) -> dict[str, Any]:
    total = rounds(node)
    return {
        "name": node.name,
        "trace_id": node.trace_id,
        "span_id": node.span_id,
        "parent_span_id": node.parent_id,
        "kind": node.kind,
        "service": node.service,
        "instance": node.instance,
        "start_ms": round((node.start - start) / 1e6, 3),
        "duration_ms": round(node.seconds * 1e3, 3),
        "error": node.error,
        "attributes": dict(node.attributes),
        "rounds": None if total is None else {name: getattr(total, name) for name in total.__slots__},
        "events": [
            {"name": name, "at_ms": round((at - start) / 1e6, 3), "attributes": dict(values)}
            for at, name, values in node.events
            if name != names.ROUND
        ],
    }
