"""Become another program that dies with the parent: ``python -I -S launcher.py PARENT_PID PROGRAM [ARGUMENT ...]``.

Run as a script between fork and exec, not as ``preexec_fn``: that would run Python in a fork of a process with threads
(gRPC has some), where any lock may be held for ever. The request survives exec, so PROGRAM needs to know nothing of it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(arguments: list[str]) -> None:
    """Ask the kernel for SIGKILL at the parent's death, then exec. Exits 127 when PROGRAM cannot be run."""
    parent, command = int(arguments[0]), arguments[1:]
    # SIGKILL, not SIGTERM: with its supervisor gone, nobody is left to see that a slow shutdown ends.
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"launcher: prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        # The parent died before the request was made: the kernel will not send the signal any more.
        os._exit(1)
    try:
        os.execvp(command[0], command)  # noqa: S606  no shell is wanted, the arguments are the supervisor's own
    except OSError as error:
        print(f"launcher: {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
