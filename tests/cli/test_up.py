"""``countersign up`` as people meet it. What a supervisor does is tested in tests/runtime."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from countersign.cli.up import HINT, printer
from countersign.services.runtime.config import FREE_PORTS
from countersign.services.runtime.keeper import Ended, Healthy
from countersign.services.runtime.nats_server import NatsServer
from countersign.services.runtime.stack import DataFolderLock
from countersign.services.runtime.supervisor import Complete

WITHIN_S = 60.0


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from countersign.cli.main import main; main()", "up", *arguments]


def failed(*arguments: str) -> str:
    """The one line that a failed start leaves on standard error."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=WITHIN_S, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("countersign: ")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def survivors(folder: Path) -> list[list[str]]:
    processes = [process.info for process in psutil.process_iter(["cmdline", "status"])]
    live = [info["cmdline"] or [] for info in processes if info["status"] != psutil.STATUS_ZOMBIE]
    return [each for each in live if str(folder) in " ".join(each)]


def test_one_line_a_service_and_the_routers_last_with_what_to_try() -> None:
    lines: list[str] = []
    show = printer(lines.append, HINT)
    show(Healthy("nats", "nats://127.0.0.1:41235"))
    show(Healthy("router", "127.0.0.1:7411"))
    show(Healthy("tokenizer", "127.0.0.1:40311"))
    show(Complete(router="127.0.0.1:7411", after_s=3.21))
    assert lines == [
        "nats       nats://127.0.0.1:41235",
        "tokenizer  127.0.0.1:40311",
        'router     127.0.0.1:7411         ready in 3.2 s; try: countersign generate "def quicksort("',
    ]


def test_a_service_that_ends_and_comes_back_is_told_with_its_log() -> None:
    lines: list[str] = []
    show = printer(lines.append)
    show(Complete(router="127.0.0.1:7411", after_s=3.21))
    show(Ended("router", code=-9, restart_in_s=0.2, log=Path("logs/router.log")))
    show(Healthy("router", "127.0.0.1:7411"))
    assert lines[1:] == [
        "router     ended with code -9, starts again in 0.2 s; log: logs/router.log",
        "router     127.0.0.1:7411",
    ]


def test_a_wrong_setting_is_one_line(tmp_path: Path) -> None:
    assert "target.dtype" in failed("--data-dir", str(tmp_path), "--set", "target.dtpye=bf16")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_configuration_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "stack.toml").write_text("[router]\nlisten = 5\n")
    assert "router.listen" in failed("--config", str(tmp_path / "stack.toml"))


def test_a_data_folder_in_use_is_one_line_with_its_owner(tmp_path: Path) -> None:
    lock = DataFolderLock(tmp_path)
    lock.acquire()
    assert f"process {os.getpid()}" in failed("--data-dir", str(tmp_path))
    lock.release()


async def test_a_taken_port_is_one_line_with_what_to_do(tmp_path: Path) -> None:
    async with NatsServer(tmp_path / "other") as server:
        line = failed("--data-dir", str(tmp_path / "stack"), "--set", f"nats.port={server.port}")
    assert f"port {server.port}" in line
    assert "nats.port" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_the_services_start_ends_well_and_leaves_no_process(
    tmp_path: Path, number: signal.Signals
) -> None:
    arguments = ["--data-dir", str(tmp_path), *(item for setting in FREE_PORTS for item in ("--set", setting))]
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until((tmp_path / "logs" / "router.log").exists)
        process.send_signal(number)
        output, errors = process.communicate(timeout=WITHIN_S)
    assert (process.returncode, errors) == (0, "")
    assert output.startswith("nats       nats://127.0.0.1:")
    assert survivors(tmp_path) == []
