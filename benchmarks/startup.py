"""From nothing to a stack that answers: `countersign up` as a new process, until all services are healthy."""

from __future__ import annotations

import asyncio
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from countersign.cli.bench import Row
from countersign.services.runtime.config import FREE_PORTS
from countersign.services.runtime.errors import CountersignError, Unavailable
from countersign.services.runtime.stack import read_stack

PATIENCE_S = 120.0


async def run(quick: bool) -> list[Row]:
    """Median of 5 starts (quick: 2), models loaded and all; seconds of wall time from the command on."""
    times = [await _start() for _ in range(2 if quick else 5)]
    median = statistics.median(times)
    return [
        Row("startup", "six services", "command to all healthy, median", median, "s", len(times), "< 5", median < 5),
        Row("startup", "six services", "command to all healthy, slowest", max(times), "s", len(times)),
    ]


async def _start() -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).parent / "countersign"),
            "up",
            f"--data-dir={folder}",
            *(f"--set={setting}" for setting in FREE_PORTS),
            stdout=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not _complete(Path(folder)):
                    if process.returncode is not None:
                        raise Unavailable(f"countersign up ended with code {process.returncode}")
                    await asyncio.sleep(0.01)
            return time.perf_counter() - began
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGINT)
            await process.wait()


def _complete(folder: Path) -> bool:
    try:
        read_stack(folder)
    except CountersignError:
        return False
    return True
