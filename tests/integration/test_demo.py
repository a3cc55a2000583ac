"""`countersign demo` as a newcomer runs it: it succeeds, and when interrupted it leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

COMMAND = [str(Path(sys.executable).parent / "countersign"), "demo"]


def left_behind(marker: Path) -> list[str]:
    """Command lines of processes that name the folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if str(marker) in line:
            found.append(line)
    return found


def test_the_demo_completes_audits_refuses_and_compares(tmp_path: Path) -> None:
    result = subprocess.run(
        [*COMMAND, "--json"], capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads(result.stdout)
    assert list(summary) == [
        "prompts",
        "tokens",
        "tokens_per_pass",
        "accepted",
        "audits_passed",
        "tampered_refused",
        "drafting_off_identical",
        "seconds",
    ]
    assert summary["prompts"] == summary["audits_passed"] == 5
    assert summary["tampered_refused"] == 3
    assert summary["drafting_off_identical"] is True
    assert 0 < summary["accepted"] <= 1
    assert summary["tokens_per_pass"] > 1
    assert left_behind(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("delay", [0.3, 1.5, 4.0])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process_and_no_folder(
    tmp_path: Path, delay: float, signum: signal.Signals
) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    time.sleep(delay)  # the moments are arbitrary by intent: whatever runs then must end
    process.send_signal(signum)
    assert process.wait(60) != 0
    deadline = time.monotonic() + 10
    while left_behind(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_behind(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
