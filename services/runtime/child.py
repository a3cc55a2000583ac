"""A child process that leaves nothing behind, whichever of the two dies first and however."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path

from countersign.services.runtime.errors import Unimplemented
from countersign.services.runtime.telemetry.lines import readable

_LAUNCHER = Path(__file__).with_name("launcher.py")
_TAIL_BYTES = 64 << 10


class Child:
    """One run of a command, started at construction, its output appended to ``log`` under a header line.

    - When this process dies, the child is killed by the kernel (launcher.py). The kernel ties that to the *thread* that
      started the child, so construct it in a thread that lives as long as the child may: the event loop's.
    - The child leads a process group of its own: a terminal's Ctrl-C reaches this process only, which can then stop its
      children in order. When the child ends, what is left of its process group is killed. It is no session of its own:
      Linux shares the CPU out between sessions first (autogroup), so that a low priority within one yields to nobody
      outside of it.

    Raises:
        Unimplemented: not on Linux, where a parent's death cannot be passed on.
    """

    def __init__(self, command: Sequence[str], *, log: Path, environ: Mapping[str, str] | None = None) -> None:
        if not sys.platform.startswith("linux"):
            raise Unimplemented(f"local processes are supervised on Linux only, this is {sys.platform}")
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            output.write(f"---- {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} start: {shlex.join(command)}\n".encode())
            output.flush()
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environ,
                process_group=0,
            )
        self.pid = self._process.pid
        self._lock = threading.Lock()
        self._reaped = False
        self._exit: Future[int] = Future()
        self._exit.set_running_or_notify_cancel()  # a waiter that is cancelled must not cancel the exit of the process
        threading.Thread(target=self._reap, name=f"reap-{self.pid}", daemon=True).start()

    @property
    def exit_code(self) -> int | None:
        """None while it runs; -N when signal N ended it."""
        return self._exit.result() if self._exit.done() else None

    async def wait(self) -> int:
        """The exit code, once the process has ended. May be awaited from any event loop, any number of times."""
        return await asyncio.wrap_future(self._exit)

    def terminate(self) -> None:
        """Ask it to stop. Does nothing when it has ended."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End it and its process group at once. Does nothing when it has ended."""
        self._send(signal.SIGKILL, group=True)

    async def stop(self, grace: float) -> int:
        """Ask, wait ``grace`` seconds, then kill. Returns the exit code; when cancelled, kills at once."""
        self.terminate()
        try:
            await asyncio.wait_for(self.wait(), grace)
        except TimeoutError:
            pass
        finally:
            self.kill()
        return await self.wait()

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of what this run has written, for people."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = file.seek(max(self._log_start, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
        whole = text.splitlines()
        if begin > self._log_start and len(whole) > 1:
            del whole[0]  # its beginning is missing
        return "\n".join(readable(line) for line in whole[-lines:])

    def last_words(self) -> str:
        """The last line that says anything: of a Python traceback, the error; of a log record, what it says."""
        lines = [line.strip() for line in self.log_tail().splitlines()]
        return next((line for line in reversed(lines) if line), "(it wrote nothing)")

    def _send(self, number: signal.Signals, *, group: bool = False) -> None:
        # Under the lock, so that the id cannot have been freed and given to a stranger.
        with self._lock:
            if self._reaped:
                return
            if group:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)

    def _reap(self) -> None:
        # The dead leader is left unreaped at first: as long as it is, its group's id belongs to it.
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            os.killpg(self.pid, signal.SIGKILL)
            code = self._process.wait()
            self._reaped = True
        self._exit.set_result(code)
