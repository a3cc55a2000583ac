"""``countersign up``: the whole stack as local processes, until interrupted."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from countersign.services.runtime.supervisor import Event

_NAME_WIDTH = 10
_ADDRESS_WIDTH = 22
HINT = '; try: countersign generate "def quicksort("'


def up(
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.", metavar="FILE")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, such as target.dtype=bf16.", metavar="KEY=VALUE")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder for streams, logs and state (.countersign).", metavar="FOLDER")
    ] = None,
) -> None:
    """Run nats-server and all services here, restart what dies, stop everything on Ctrl-C (twice: without grace)."""
    overrides = list(set_ or [])
    if data_dir is not None:
        overrides.append(f"data_dir={data_dir}")
    try:
        asyncio.run(_run(config, overrides))
    except KeyboardInterrupt:
        return  # it came before the supervisor took the signal over: nothing was started


async def _run(file: Path | None, overrides: list[str]) -> None:
    # Imported here: the bus and gRPC take half a second that `countersign --help` need not pay.
    from countersign.services.runtime.config import load
    from countersign.services.runtime.supervisor import Supervisor
    from countersign.services.runtime.telemetry import logs

    settings = load(file, os.environ, overrides)
    logs.configure("supervisor", level=settings.telemetry.log_level, style=settings.telemetry.log_format)
    if settings.target.fault != "none":
        print(f"countersign: the target will CHEAT on purpose: target.fault={settings.target.fault}", file=sys.stderr)
    await Supervisor(settings, on_event=printer(_print, HINT)).run()


def printer(write: Callable[[str], None], hint: str = "") -> Callable[[Event], None]:
    """Turns events of a supervisor into lines; the router's first comes when all is healthy, and ends with ``hint``."""
    from countersign.services.runtime.keeper import Ended
    from countersign.services.runtime.supervisor import ROUTER, Complete

    complete = False

    def on_event(event: Event) -> None:
        nonlocal complete
        if isinstance(event, Complete):
            complete = True
            ready = f"ready in {event.after_s:.1f} s{hint}"
            write(f"{ROUTER:<{_NAME_WIDTH}} {event.router:<{_ADDRESS_WIDTH}} {ready}")
        elif isinstance(event, Ended):
            what = f"ended with code {event.code}, starts again in {event.restart_in_s:.1f} s; log: {event.log}"
            write(f"{event.name:<{_NAME_WIDTH}} {what}")
        elif event.name != ROUTER or complete:
            write(f"{event.name:<{_NAME_WIDTH}} {event.address}")

    return on_event


def _print(line: str) -> None:
    print(line, flush=True)
