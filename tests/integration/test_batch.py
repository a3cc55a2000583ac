"""`countersign batch` over a real stack: every line once, with its receipt, whatever happens on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from stacks import Running

from countersign.client import Client
from countersign.verify.audit import audit
from countersign.verify.keys import load_public

COMMAND = [sys.executable, "-c", "from countersign.cli.main import main; main()", "batch"]
DEADLINE_S = 120


def write_batch(file: Path, lines: int, max_tokens: int = 8) -> list[dict[str, Any]]:
    """Prompts that begin alike in two levels, in an order that goes from one to another."""
    bodies = []
    for number in range(lines):
        head = "".join(f"def helper_{number % 4}_{k}(x, y):\n    return x * {k} + y\n\n\n" for k in range(6))
        prompt = f"import math\nimport os\n\n\n{head}def answer_{number}("
        bodies.append({"prompt": prompt, "max_tokens": max_tokens, "temperature": number % 2 / 2})
    write_lines(file, bodies)
    return bodies


def write_lines(file: Path, bodies: list[dict[str, Any]]) -> None:
    lines = [
        {"custom_id": f"line/{number}", "method": "POST", "url": "/v1/completions", "body": body}
        for number, body in enumerate(bodies)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def start(stack: Running, file: Path, *options: str) -> subprocess.Popen[str]:
    command = [*COMMAND, str(file), "--json", *options]
    environment = {**os.environ, "CS_ROUTER": stack.router}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(stack: Running, file: Path, *options: str, code: int = 0) -> dict[str, Any]:
    process = start(stack, file, *options)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, err
    summary: dict[str, Any] = json.loads(out)
    return summary


def output_of(file: Path) -> list[dict[str, Any]]:
    """The whole lines that stand."""
    output = file.with_name("in.batch") / "output.jsonl"
    text = output.read_text() if output.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for(file: Path, lines: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while len(output_of(file)) < lines:
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_each_line_gets_the_tokens_it_gets_alone_and_a_receipt_and_prefixes_are_computed_once(
    stack: Running, tmp_path: Path
) -> None:
    bodies = write_batch(tmp_path / "in.jsonl", 24)
    summary = run(stack, tmp_path / "in.jsonl")
    assert (summary["completed"], summary["failed"], summary["groups"]) == (24, 0, 4)
    # Of what an oracle saves only the pages that a fork cuts, at most 15 tokens a line, are computed again.
    assert summary["cached_prompt_tokens"] >= summary["shared_tokens"] - 24 * 15
    found = {entry["custom_id"]: entry["response"]["body"] for entry in output_of(tmp_path / "in.jsonl")}
    assert len(found) == 24
    key = load_public(stack.data_dir / "keys" / "receipts.pub")
    async with Client(stack.router) as client:
        for number, body in enumerate(bodies):
            ours = found[f"line/{number}"]
            alone = await client.complete(**body, seed=ours["countersign"]["seed"])
            assert ours["choices"][0]["text"] == alone.text
            receipt = (tmp_path / "in.batch" / ours["countersign"]["receipt"]).read_bytes()
            assert audit(receipt, trusted_keys=[key], reference=None, levels=["form", "count"]).verdict == "pass"
    again = run(stack, tmp_path / "in.jsonl")
    assert (again["before"], again["completed"], again["output_tokens"]) == (24, 0, 0)
    assert len(output_of(tmp_path / "in.jsonl")) == 24


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_after_any_end_the_next_run_goes_on_and_nothing_stands_twice(
    stack: Running, tmp_path: Path, how: signal.Signals
) -> None:
    file = tmp_path / "in.jsonl"
    write_batch(file, 40, max_tokens=24)
    for stop_at in (1, 9, 20):
        process = start(stack, file, "--at-once", "6")
        wait_for(file, stop_at)
        process.send_signal(how)
        process.communicate(timeout=30)
        assert process.returncode == (-9 if how == signal.SIGKILL else 130)
        assert len(output_of(file)) < 40
    stood = output_of(file)
    summary = run(stack, file)
    assert summary["before"] == len(stood)
    entries = output_of(file)
    assert entries[: len(stood)] == stood
    assert sorted(entry["custom_id"] for entry in entries) == sorted(f"line/{number}" for number in range(40))
    for entry in entries:
        assert (tmp_path / "in.batch" / entry["response"]["body"]["countersign"]["receipt"]).stat().st_size > 0


def test_a_line_that_is_refused_is_an_error_of_its_own_and_the_others_are_answered(
    stack: Running, tmp_path: Path
) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": "def f(", "max_tokens": 4},
        {"prompt": "", "max_tokens": 4},
        {"prompt": "def f(", "max_tokens": 10**6},
        {"prompt": [10**6], "max_tokens": 4},
        {"prompt": "def f(", "model": "nobody"},
        {"prompt": "def f(", "max_tokens": 4, "temperature": -1},
        {"prompt": "def f(", "max_tokens": -4},
    ]
    write_lines(tmp_path / "in.jsonl", bodies)
    summary = run(stack, tmp_path / "in.jsonl", code=1)
    assert (summary["completed"], summary["failed"]) == (1, 6)
    errors = [json.loads(line) for line in Path(summary["errors"]).read_text().splitlines()]
    assert {error["custom_id"]: error["error"]["code"] for error in errors} == {
        "line/1": "EMPTY_PROMPT",
        "line/2": "MAX_TOKENS_TOO_LARGE",
        "line/3": "TOKEN_OUT_OF_VOCABULARY",
        "line/4": "UNKNOWN_MODEL",
        "line/5": "BAD_TEMPERATURE",
        "line/6": "OUT_OF_RANGE",
    }


def test_without_a_router_the_batch_ends_with_a_word_of_what_to_do(tmp_path: Path) -> None:
    write_batch(tmp_path / "in.jsonl", 2)
    environment = {**os.environ, "CS_ROUTER": "127.0.0.1:9"}
    command = [*COMMAND, str(tmp_path / "in.jsonl"), "--patience", "1"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert ended.returncode == 1
    assert "Run the same command again" in ended.stderr
