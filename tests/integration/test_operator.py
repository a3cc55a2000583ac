"""The operator's commands on a real stack: what they print of what has really happened."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from fcntl import ioctl
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from stacks import Running, running_stack

from countersign.client import Answer, Client

COMMAND = str(Path(sys.executable).parent / "countersign")
WITHIN_S = 60


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_stack(
        tmp_path_factory.mktemp("operated") / "data", "auditor.share=1", "auditor.checkpoint_s=0.2"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def answers(stack: Running) -> list[Answer]:
    """Three, all of their spans written."""

    async def ask() -> list[Answer]:
        async with Client(stack.router) as client:
            return [
                await client.complete(
                    "def f(", max_tokens=12 + number, ignore_eos=True, seed=1, request_id=f"asked-{number}"
                )
                for number in range(3)
            ]

    found = asyncio.run(ask())
    for answer in found:
        until(partial(traced, stack, answer.request_id))
    return found


def ran(stack: Running, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [COMMAND, *arguments, "--data-dir", str(stack.data_dir)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=WITHIN_S)


def countersign(stack: Running, *arguments: str, code: int = 0) -> str:
    done = ran(stack, *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def told(stack: Running, *arguments: str, code: int = 0) -> Any:
    return json.loads(countersign(stack, *arguments, "--json", code=code))


def traced(stack: Running, request_id: str) -> bool:
    """Whether each has written its spans of a request, the auditor too."""
    done = ran(stack, "trace", request_id, "--json")
    found = json.loads(done.stdout) if done.returncode == 0 else {"spans": [], "later": []}
    services = {span["service"] for span in found["spans"]}
    # An audit that begins as soon as the answer has ended is not among what came later.
    names = {span["name"] for span in (*found["spans"], *found["later"])}
    return {"router", "tokenizer", "target"} <= services and "audit" in names


def until(wanted: Callable[[], Any]) -> Any:
    """What it gives, once that is something."""
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        if found := wanted():
            return found
        time.sleep(0.2)
    pytest.fail("it has not come")


def on_terminal(stack: Running, width: int, *arguments: str, stop_after: bytes = b"") -> str:
    """What a terminal of this width is sent; with ``stop_after`` until that was seen, then Ctrl-C."""
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environ = {key: value for key, value in os.environ.items() if key not in {"COLUMNS", "LINES", "NO_COLOR"}}
    command = [COMMAND, *arguments, "--data-dir", str(stack.data_dir)]
    with subprocess.Popen(command, stdout=follower, stderr=follower, env={**environ, "TERM": "xterm"}) as process:
        os.close(follower)
        text = b""
        try:
            while data := os.read(leader, 65536):
                text += data
                if stop_after and stop_after in text:
                    process.send_signal(signal.SIGINT)
                    stop_after = b""
        except OSError:  # the other end is closed
            pass
        assert process.wait(WITHIN_S) == 0, text.decode(errors="replace")
    os.close(leader)
    return text.decode()


def test_status_knows_every_service_and_that_all_is_well(stack: Running) -> None:
    found = told(stack, "status")
    assert (found["well"], found["missing"]) == (True, [])
    services = sorted(each["service"] for each in found["instances"])
    assert services == ["auditor", "draft", "kv", "router", "sidecar", "target", "tokenizer"]
    assert {each["health"] for each in found["instances"]} == {"serving"}
    assert all(each["version"] and each["metrics_address"] for each in found["instances"])
    (model,) = found["models"]
    assert (model["name"], model["targets"], len(model["weights_sha256"])) == ("demo-target", 1, 64)
    assert found["nats"]["url"] == stack.nats
    assert "demo-target: fp32" in countersign(stack, "status")
    assert json.loads(countersign(stack, "status", "--json", "--nats", stack.nats))["well"]


def test_status_names_a_service_that_hangs(stack: Running) -> None:
    (tokenizer,) = [each for each in told(stack, "status")["instances"] if each["service"] == "tokenizer"]
    os.kill(tokenizer["pid"], signal.SIGSTOP)
    try:
        found = told(stack, "status", code=1)
        assert "there is no tokenizer that serves" in countersign(stack, "status", code=1)
    finally:
        os.kill(tokenizer["pid"], signal.SIGCONT)
    assert (found["well"], found["missing"]) == (False, ["tokenizer"])
    until(
        lambda: (
            subprocess.run([COMMAND, "status", "--nats", stack.nats], capture_output=True, check=False).returncode == 0
        )
    )


def test_receipts_are_listed_with_their_verdicts(stack: Running, answers: list[Answer]) -> None:
    found = until(lambda: _audited(stack, len(answers)))
    assert [row["request_id"] for row in found] == ["asked-2", "asked-1", "asked-0"]
    assert [row["output_tokens"] for row in found] == [14, 13, 12]
    assert {row["model"] for row in found} == {"demo-target"}
    assert all(row["trace_id"] for row in found)
    few = told(stack, "receipts", "--limit", "2", "--finish", "length", "--verdict", "pass", "--since", "1h")
    assert ([row["request_id"] for row in few["receipts"]], few["more"]) == (["asked-2", "asked-1"], True)
    assert told(stack, "receipts", "--verdict", "fail")["receipts"] == []
    assert countersign(stack, "receipts", "--finish", "length").count(" pass ") == 3


def _audited(stack: Running, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = told(stack, "receipts", "--finish", "length")["receipts"]
    return rows if [row["verdict"] for row in rows] == ["pass"] * count else []


def test_a_trace_shows_who_did_what_for_a_request(stack: Running, answers: list[Answer]) -> None:
    found = told(stack, "trace", "asked-1")
    assert found["request_id"] == "asked-1"
    (answer,) = [span for span in found["spans"] if span["name"] == "answer"]
    assert answer["rounds"]["tokens"] == 13
    text = countersign(stack, "trace", "asked-1")
    assert "13 tokens of a prompt of" in text
    assert "verdict pass" in text
    assert found["trace_id"] == told(stack, "trace", found["trace_id"])["trace_id"]


def test_top_counts_what_is_done_while_it_looks(stack: Running) -> None:
    async def busy() -> dict[str, Any]:
        async with Client(stack.router) as client:
            work = asyncio.create_task(
                client.complete("def g(", max_tokens=1900, ignore_eos=True, drafting="off", seed=1)
            )
            looked = await asyncio.to_thread(told, stack, "top", "--once", "--interval", "1")
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            return dict(looked)

    found = asyncio.run(busy())
    assert (found["processes"], found["telling"]) == (7, 7)
    assert found["whole"]["tokens_per_s"] > 0
    assert found["requests_open"] == 1
    assert [target["running"] for target in found["targets"]] == [1]
    assert "TOKENS/S" in countersign(stack, "top", "--once", "--interval", "0.2")


def test_top_on_a_terminal_ends_by_ctrl_c_as_it_should(stack: Running) -> None:
    text = on_terminal(stack, 100, "top", "--interval", "0.2", stop_after=b"TOKENS/S")
    assert "requests" in text
    assert "Traceback" not in text
    assert text.rstrip().endswith("\x1b[?1049l") or "\x1b[?1049l" in text, "the terminal is left as it was"


@pytest.mark.parametrize("command", [["status"], ["receipts"], ["trace", "asked-0"], ["top", "--once"]])
def test_each_command_keeps_to_the_terminals_width_and_is_plain_where_there_is_none(
    stack: Running, answers: list[Answer], command: list[str]
) -> None:
    from rich.cells import cell_len
    from rich.text import Text

    for width in (60, 120):
        lines = [Text.from_ansi(line).plain for line in on_terminal(stack, width, *command).splitlines()]
        assert max(map(cell_len, lines)) <= width
    assert "\x1b" not in countersign(stack, *command)


@pytest.mark.parametrize("command", ["status", "top", "receipts"])
def test_without_a_stack_each_says_what_to_do(tmp_path: Path, command: str) -> None:
    done = subprocess.run([COMMAND, command, "--data-dir", str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no stack runs on" in done.stderr
    assert "countersign up" in done.stderr
    done = subprocess.run(
        [COMMAND, command, "--nats", "nats://127.0.0.1:9"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "cannot connect to NATS" in done.stderr) == (1, True)
