"""A real auditor process, alone with a NATS server, that tests kill and start again over the same folder."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

START_S = 60.0


class AuditorProcess:
    """``python -m countersign.services.auditor``; runs from ``start`` on."""

    def __init__(self, folder: Path, nats: str, *settings: str) -> None:
        self.folder, self._log = folder, folder / "auditor.log"
        folder.mkdir(parents=True, exist_ok=True)
        pairs = [f"data_dir={folder}", f"nats.url={nats}", *settings]
        options = [item for pair in pairs for item in ("--set", pair)]
        self._command = [sys.executable, "-P", "-m", "countersign.services.auditor", *options]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Until it is ready."""
        begin = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(self._command, stdout=out, stderr=out)
        deadline = time.monotonic() + START_S
        while b'"message": "ready"' not in self._log.read_bytes()[begin:]:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"the auditor did not start:\n{self._log.read_text()}")
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL, and wait until it is dead. Does nothing when it has ended."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """As the supervisor does; its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(30)

    @property
    def log(self) -> str:
        """What it has said so far, over all its lives."""
        return self._log.read_text()
