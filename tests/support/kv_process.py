"""A kv service as a process that tests kill and start again over the same folder."""

from __future__ import annotations

import select
import shutil
import struct
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("kv_store_program.py")
START_S = 60.0


class KvProcess:
    """Runs from the start on; ``restored`` is how many blocks the last start found on disk."""

    def __init__(self, folder: Path, ram: int, disk: int, *, clock: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._clock = folder / "clock" if clock else None
        self.set_clock(0.0)
        self._arguments = [str(folder / "kv"), str(ram), str(disk), *([str(self._clock)] if self._clock else [])]
        self.address, self.restored = "", 0
        self.start()

    def set_clock(self, now: float) -> None:
        if self._clock is not None:
            mode = "r+b" if self._clock.exists() else "wb"  # the program has it mapped
            with self._clock.open(mode) as file:
                file.write(struct.pack("<d", now))

    def start(self) -> None:
        command = [sys.executable, str(PROGRAM), *self._arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_S)
        line = self.process.stdout.readline().split() if ready else []
        assert line, "the store did not start"
        self.address, self.restored = line[0], int(line[1])

    def kill(self) -> None:
        """SIGKILL, and wait until it is dead."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def restart(self, *, empty: bool = False) -> None:
        """Killed and started again; ``empty``: what the disk kept is thrown away."""
        self.kill()
        if empty:
            shutil.rmtree(self._arguments[0], ignore_errors=True)
        self.start()
