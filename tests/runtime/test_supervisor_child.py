"""Child processes that end with us, alone and with what they started themselves."""

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from countersign.services.runtime.child import Child

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
DEAF = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]
# Starts a child of its own in its group, prints its id, and ends at once or sleeps.
PARENT = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); {end}"
# Starts a Child, prints its id once that runs its own program, and sleeps: the stand-in for a supervisor.
SUPERVISOR = """
import sys, time
from pathlib import Path
from countersign.services.runtime.child import Child
child = Child(["sh", "-c", "echo runs; exec sleep 60"], log=Path(sys.argv[1]))
while child.log_tail() != "runs":
    time.sleep(0.01)
print(child.pid, flush=True)
time.sleep(60)
"""


async def printed(child: Child, text: str = "") -> str:
    """What the child has written, once there is something and ``text`` is in it."""
    async with asyncio.timeout(20):
        while True:
            tail = child.log_tail()
            if tail and text in tail:
                return tail
            await asyncio.sleep(0.01)


def gone(pid: int, within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:  # dead; its new parent has yet to collect it
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


async def test_the_exit_code_is_the_programs(tmp_path: Path) -> None:
    child = Child([sys.executable, "-c", "raise SystemExit(7)"], log=tmp_path / "log")
    assert await child.wait() == 7
    assert child.exit_code == 7


async def test_a_program_that_is_not_there_says_so_in_the_log(tmp_path: Path) -> None:
    child = Child([str(tmp_path / "missing")], log=tmp_path / "log")
    assert await child.wait() == 127
    assert "missing: No such file or directory" in child.last_words()


async def test_a_child_that_listens_ends_by_sigterm(tmp_path: Path) -> None:
    child = Child(SLEEP, log=tmp_path / "log")
    await printed(child, "up")
    assert await child.stop(grace=30) == -signal.SIGTERM


async def test_a_child_that_does_not_listen_is_killed_after_the_grace(tmp_path: Path) -> None:
    child = Child(DEAF, log=tmp_path / "log")
    await printed(child, "up")
    assert await child.stop(grace=0.1) == -signal.SIGKILL


async def test_a_stop_that_is_cancelled_kills_at_once(tmp_path: Path) -> None:
    child = Child(DEAF, log=tmp_path / "log")
    await printed(child, "up")
    stop = asyncio.create_task(child.stop(grace=1000))
    await asyncio.sleep(0)
    stop.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stop
    async with asyncio.timeout(10):
        assert await child.wait() == -signal.SIGKILL


async def test_a_waiter_that_gives_up_leaves_the_child_running(tmp_path: Path) -> None:
    child = Child(SLEEP, log=tmp_path / "log")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(child.wait(), 0.01)
    assert child.exit_code is None
    child.kill()
    assert await child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("end", ["time.sleep(60)", "sys.exit(3)", "import os; os._exit(3)"])
async def test_what_a_child_started_in_its_group_ends_with_it(tmp_path: Path, end: str) -> None:
    child = Child([sys.executable, "-c", PARENT.format(end=end)], log=tmp_path / "log")
    grandchild = int((await printed(child)).splitlines()[0])
    await child.stop(grace=5) if "sleep" in end else await child.wait()
    assert await asyncio.to_thread(gone, grandchild)


async def test_a_child_leads_a_group_of_its_own_within_the_session_of_the_stack(tmp_path: Path) -> None:
    """A group for signals; the session for the CPU, in which priorities hold between the children."""
    code = "import os; print(os.getpgid(0) == os.getpid(), os.getsid(0))"
    child = Child([sys.executable, "-c", code], log=tmp_path / "log")
    await child.wait()
    assert child.last_words() == f"True {os.getsid(0)}"


async def test_the_kernel_kills_the_child_when_its_parent_is_killed(tmp_path: Path) -> None:
    supervisor = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SUPERVISOR, str(tmp_path / "log"), stdout=asyncio.subprocess.PIPE
    )
    assert supervisor.stdout is not None
    pid = int(await supervisor.stdout.readline())
    supervisor.kill()
    await supervisor.wait()
    assert await asyncio.to_thread(gone, pid)


async def test_a_launcher_whose_parent_died_before_it_could_ask_the_kernel_runs_nothing(tmp_path: Path) -> None:
    launcher = Path(sys.modules[Child.__module__].__file__ or "").with_name("launcher.py")
    not_our_pid = "1"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", str(launcher), not_our_pid, "touch", str(tmp_path / "ran")
    )
    assert await process.wait() == 1
    assert not (tmp_path / "ran").exists()


async def test_each_run_appends_to_the_log_under_a_header_and_the_tail_is_its_own(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "log"
    for word in ("first", "second"):
        child = Child(["echo", word], log=log)
        await child.wait()
    lines = log.read_text().splitlines()
    assert [line for line in lines if not line.startswith("----")] == ["first", "second"]
    assert [line.partition("start: ")[2] for line in lines[::2]] == ["echo first", "echo second"]
    assert child.log_tail() == "second"


async def test_the_tail_of_a_log_is_for_people_and_begins_with_a_whole_line(tmp_path: Path) -> None:
    record = {"time": "t", "level": "error", "service": "kv", "message": "failed", "blocks": 3}
    failed = record | {"exception": [{"exc_type": "ValueError", "exc_value": "why", "frames": []}]}
    told = "\n".join([json.dumps(record | {"filler": "x" * 70_000}), json.dumps(record), json.dumps(failed)])
    (tmp_path / "told").write_text(told)
    child = Child(["cat", str(tmp_path / "told")], log=tmp_path / "log")
    await child.wait()
    assert child.log_tail() == "t ERROR kv failed blocks=3\n" * 2 + "  ValueError: why"
    assert child.last_words() == "ValueError: why"


async def test_signals_to_a_child_that_has_ended_do_nothing(tmp_path: Path) -> None:
    child = Child(["true"], log=tmp_path / "log")
    await child.wait()
    child.terminate()
    child.kill()
    assert await child.stop(grace=1) == 0
    assert child.last_words() == "(it wrote nothing)"
