"""Real stacks for tests: `countersign up` as a process, in a folder of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from countersign.services.runtime.config import FREE_PORTS
from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.stack import read_stack

START_S = 180.0
STOP_S = 30.0


@dataclass(frozen=True, slots=True)
class Running:
    """A stack that runs: where its router listens, its folder, the supervisor's process."""

    router: str
    nats: str
    data_dir: Path
    process: subprocess.Popen[bytes]


@contextmanager
def running_stack(data_dir: Path, *settings: str) -> Iterator[Running]:
    """`countersign up` on free ports, healthy; stopped at the end, as it should be, whatever happened to the test."""
    running = _start(data_dir, *settings)
    try:
        yield running
    finally:
        code = _stop(running)
    assert code == 0


def _start(data_dir: Path, *settings: str) -> Running:
    options = [item for setting in (*FREE_PORTS, *settings) for item in ("--set", setting)]
    command = [str(Path(sys.executable).parent / "countersign"), "up", "--data-dir", str(data_dir), *options]
    log = data_dir.parent / f"{data_dir.name}.up.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "NO_COLOR": "1"})
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            stack = read_stack(data_dir)
            return Running(stack.router, stack.nats, data_dir, process)
        except CountersignError:
            if process.poll() is not None:
                break
            time.sleep(0.1)  # the file appears when all is healthy
    process.kill()
    pytest.fail(f"the stack did not start:\n{log.read_text()}")


def _stop(running: Running) -> int:
    """Ask it to stop as Ctrl-C does; its exit code. One that does not within half a minute is killed."""
    running.process.send_signal(signal.SIGINT)
    try:
        return running.process.wait(STOP_S)
    finally:
        running.process.kill()
