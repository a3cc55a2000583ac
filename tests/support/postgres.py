"""A PostgreSQL of this test run's own: Debian's binaries, a fresh folder, a socket in it and no port."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_START_S = 60.0


def binaries() -> Path:
    """Of the newest version that is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    return found[-1].parent


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of a server that runs inside."""
    programs, folder = binaries(), Path(tempfile.mkdtemp(prefix="countersign-pg-"))
    # The server refuses to run as root; Debian's package brings a user for it.
    user = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    os.chown(folder, user.pw_uid, user.pw_gid)
    options = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    log = (folder / "log").open("wb")
    try:
        make = [programs / "initdb", "--pgdata", folder / "data", "--auth=trust", "--username=auditor", "--no-sync"]
        subprocess.run(make, check=True, stdout=log, stderr=log, cwd="/", **options)  # type: ignore[call-overload]
        settings = [f"unix_socket_directories={folder}", "listen_addresses=", "fsync=off"]
        run = [programs / "postgres", "-D", folder / "data", *(part for line in settings for part in ("-c", line))]
        process = subprocess.Popen(run, stdout=log, stderr=log, cwd="/", **options)  # type: ignore[call-overload]
        try:
            _wait(programs, folder, process)
            yield f"postgresql+psycopg://auditor@/postgres?host={folder}"
        finally:
            process.send_signal(signal.SIGINT)  # "fast": does not wait for clients
            process.wait(30)
    finally:
        log.close()
        shutil.rmtree(folder)


def _wait(programs: Path, folder: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    ask = [str(programs / "pg_isready"), "-h", str(folder), "-U", "auditor", "-q"]
    while subprocess.run(ask, check=False).returncode != 0:
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"PostgreSQL did not start:\n{(folder / 'log').read_text()}")
        time.sleep(0.05)
