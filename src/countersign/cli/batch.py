"""``countersign batch``: a file of prompts against a running stack, each prefix computed once."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from countersign.cli.generate import ROUTER_VARIABLE, router_address
from countersign.services.runtime.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable

    from countersign.batch.folder import BatchFolder
    from countersign.batch.runner import BatchRunner, Progress


def batch(
    file: Annotated[Path, typer.Argument(help="Lines in OpenAI's batch format.", metavar="FILE.jsonl")],
    *,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; FILE.batch by default.", metavar="FOLDER")
    ] = None,
    at_once: Annotated[int, typer.Option(help="The most lines in flight.", min=1)] = 128,
    cache_tokens: Annotated[
        int, typer.Option(help="Tokens of KV in flight; 0 for twice what the target has.", min=0)
    ] = 0,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which a line fails.")] = None,
    patience: Annotated[float, typer.Option(help="Seconds to wait for a router that is full or away.")] = 60.0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    router: Annotated[
        str, typer.Option(help="Address of the router.", metavar="HOST:PORT", envvar=ROUTER_VARIABLE)
    ] = "",
    data_dir: Annotated[
        Path | None, typer.Option(help="Data folder of the stack to ask (.countersign).", metavar="FOLDER")
    ] = None,
) -> None:
    """Answer every line of a file, with a receipt each. Run again after an end of any kind, it goes on."""
    from countersign.batch.folder import BatchFolder
    from countersign.batch.lines import read_lines
    from countersign.batch.runner import BatchRunner
    from countersign.client import Client

    content = _content(file)
    lines = read_lines(content)
    address = router or router_address(data_dir)
    began = time.perf_counter()

    async def answer(folder: BatchFolder, changed: Callable[[Progress], None]) -> BatchRunner:
        async with Client(address) as client:
            runner = BatchRunner(
                client,
                folder,
                cache_tokens=cache_tokens,
                most=at_once,
                timeout=timeout,
                patience=patience,
                changed=changed,
            )
            await runner.run(lines)
            return runner

    with BatchFolder(output or file.with_name(f"{file.stem}.batch"), hashlib.sha256(content).hexdigest()) as folder:
        with _shown(len(lines)) as changed:
            progress = asyncio.run(answer(folder, changed)).progress
        _conclude(progress, folder, time.perf_counter() - began, json_=json_)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{file} cannot be read: {error.strerror}", reason="UNREADABLE_FILE") from None


@contextmanager
def _shown(lines: int) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=lines)
        yield lambda progress: bar.update(task, completed=progress.over, description=_figures(progress))


def _figures(progress: Progress) -> str:
    cached = progress.cached_prompt_tokens / max(progress.prompt_tokens, 1)
    parts = [f"{progress.output_tokens} tokens", f"{cached:.0%} of the prompts cached"]
    if progress.failed:
        parts.append(f"{progress.failed} errors")
    return " · ".join(parts)


def _conclude(progress: Progress, folder: BatchFolder, seconds: float, *, json_: bool) -> None:
    """Raises FailedPrecondition: reason LINES_FAILED."""
    if json_:
        files = {"output": str(folder.output), "errors": str(folder.errors)}
        print(json.dumps({**asdict(progress), **files, "seconds": round(seconds, 6)}))
    else:
        answers = f"{progress.completed} of {progress.lines} lines answered in {seconds:.1f} s"
        before = f" ({progress.before} before)" if progress.before else ""
        print(f"{answers}{before} · {_figures(progress)} · {folder.output}", file=sys.stderr)
    if progress.failed:
        raise FailedPrecondition(
            f"{progress.failed} of {progress.lines} lines have errors",
            reason="LINES_FAILED",
            help=f"see {folder.errors}; run again to try them again",
        )
