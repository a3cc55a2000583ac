"""However and whenever the supervisor ends, no process of its stack is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from countersign.services.runtime.errors import Unavailable
from countersign.services.runtime.stack import read_stack

PROGRAM = Path(__file__).with_name("stack_program.py")
WITHIN_S = 30.0
# The file that shows how far the start has come; the first is there before Python has read its first line.
MOMENTS = {"at once": ".", "nats starts": "logs/nats.log", "services start": "logs/kv.log", "running": "stack.json"}


def survivors(folder: Path) -> list[list[str]]:
    """Command lines of live processes that name the data folder: every process of the stack does."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if str(folder) in " ".join(command) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(command)
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextmanager
def program(folder: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(PROGRAM), str(folder), *flags]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left(tmp_path: Path, moment: str, number: signal.Signals) -> None:
    with program(tmp_path) as process:
        wait_until((tmp_path / MOMENTS[moment]).exists)
        process.send_signal(number)
        code = process.wait(WITHIN_S)
    wait_until(lambda: survivors(tmp_path) == [])
    if moment != "at once":
        assert code == (-signal.SIGKILL if number is signal.SIGKILL else 0)
        assert (tmp_path / "stack.json").exists() is (moment == "running" and number is signal.SIGKILL)


def test_ctrl_c_at_a_terminal_reaches_the_supervisor_only(tmp_path: Path) -> None:
    with program(tmp_path) as process:
        wait_until((tmp_path / "stack.json").exists)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(WITHIN_S) == 0
    assert survivors(tmp_path) == []
    logs = [path.read_text() for path in (tmp_path / "logs").iterdir()]
    assert len(logs) == 3
    assert not any("KeyboardInterrupt" in log for log in logs)


def test_a_second_signal_does_not_wait_for_what_does_not_stop(tmp_path: Path) -> None:
    with program(tmp_path, "deaf") as process:
        wait_until((tmp_path / "stack.json").exists)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: not any("kv" in command for command in survivors(tmp_path)))
        process.send_signal(signal.SIGINT)
        assert process.wait(WITHIN_S) == 0
    assert survivors(tmp_path) == []


def test_a_killed_stack_does_not_block_the_next(tmp_path: Path) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        with program(tmp_path) as process:
            wait_until(partial(runs, tmp_path, process.pid))
            process.send_signal(number)
            process.wait(WITHIN_S)
    wait_until(lambda: survivors(tmp_path) == [])


def runs(folder: Path, pid: int) -> bool:
    try:
        return read_stack(folder).pid == pid
    except Unavailable:
        return False
