"""The auditor in a real stack, with another one as its witness: from an answer to a proof and a verdict."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from auditor_process import AuditorProcess
from stacks import Running, running_stack

from countersign.services.auditor.keys import Keys
from countersign.services.auditor.ledger import Ledger
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.errors import NotFound
from countersign.v1.auditor_pb2 import AuditState, GetVerdictRequest, GetVerdictResponse
from countersign.verify import verdict
from countersign.verify.log import checkpoint as notes
from countersign.verify.receipt import receipt_digest

END_S = 90.0


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A stack whose receipts are all audited."""
    folder = tmp_path_factory.mktemp("audited")
    with running_stack(
        folder / "data", "auditor.share=1", "auditor.checkpoint_s=0.2", "auditor.arithmetics=native fp32"
    ) as running:
        yield running


def countersign(*arguments: object) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    run = [sys.executable, "-c", "from countersign.cli.main import main; main()", *map(str, arguments)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout if done.returncode in (0, 1) and done.stdout else done.stdout + done.stderr


def answer(running: Running, file: Path) -> Path:
    options = ["--max-tokens", 12, "--temperature", 0.8, "--router", running.router, "--receipt", file, "--json"]
    code, out = countersign("generate", "def f(", *options)
    assert code == 0, out
    return file


def status(running: Running) -> dict[str, Any]:
    code, out = countersign("log", "status", "--data-dir", running.data_dir, "--json")
    assert code == 0, out
    found: dict[str, Any] = json.loads(out)
    return found


async def verdict_on(running: Running, digest: bytes) -> verdict.Verdict:
    """Once there is one."""
    request, deadline = GetVerdictRequest(receipt_sha256=digest), time.monotonic() + END_S
    async with await Bus.connect(running.nats, "test") as bus:
        while True:
            assert time.monotonic() < deadline, "no verdict"
            with contextlib.suppress(NotFound):  # it is not logged yet
                found = await bus.call("auditor", "GetVerdict", request, GetVerdictResponse, timeout=5)
                if found.state == AuditState.AUDIT_STATE_DECIDED:
                    keys = Keys.load(running.data_dir / "keys")
                    return verdict.verify(found.verdict.statement, [keys.verdicts.public_key()])
            await asyncio.sleep(0.1)


def test_an_answer_is_logged_drawn_audited_to_its_activations_and_proven(audited: Running, tmp_path: Path) -> None:
    running = audited
    file = answer(running, tmp_path / "answer.receipt")
    found = asyncio.run(verdict_on(running, receipt_digest(file.read_bytes())))
    levels = [(level.level, level.outcome) for level in found.findings]
    assert levels == [(level, "pass") for level in ("form", "count", "tokens", "activations")]
    log = status(running)
    found.was_drawn(notes.NoteKey.parse(log["log_key"]))
    code, out = countersign("log", "prove", file, "--data-dir", running.data_dir)
    assert (code, f"entry {found.index} of" in out) == (0, True)
    proven = ["audit", file, "--data-dir", running.data_dir, "--level", "count", "--json"]
    code, out = countersign(*proven, "--log-key", log["log_key"])
    assert (code, json.loads(out)["verdict"]) == (0, "pass")
    stranger = Keys.load(tmp_path / "keys").log_key.encode()
    assert countersign(*proven, "--log-key", stranger)[0] == 2, "a log that is not trusted proves nothing"


def test_anybody_can_check_the_log_from_outside_and_that_it_only_grew(audited: Running, tmp_path: Path) -> None:
    running = audited
    answer(running, tmp_path / "first")
    assert countersign("log", "prove", tmp_path / "first", "--data-dir", running.data_dir)[0] == 0
    log = status(running)
    check = ["log", "check", log["url"], "--key", log["log_key"], "--state", tmp_path / "state", "--json"]
    code, out = countersign(*check)
    first = json.loads(out)
    assert (code, first["ok"], first["before"]) == (0, True, 0)
    answer(running, tmp_path / "second")
    assert countersign("log", "prove", tmp_path / "second", "--data-dir", running.data_dir)[0] == 0
    code, out = countersign(*check)
    assert (code, json.loads(out)["before"]) == (0, first["size"])
    assert json.loads(out)["size"] > first["size"]
    # A log that had shown somebody another history.
    keys = Keys.load(running.data_dir / "keys")
    (tmp_path / "state").write_bytes(notes.sign(notes.Checkpoint(keys.origin, 1, b"r" * 32), keys.log))
    code, out = countersign(*check)
    assert (code, json.loads(out)["ok"]) == (1, False)


def test_a_receipt_of_nowhere_is_said_not_to_be_logged(audited: Running, tmp_path: Path) -> None:
    running = audited
    (tmp_path / "x").write_bytes(b"no receipt")
    code, out = countersign("log", "prove", tmp_path / "x", "--data-dir", running.data_dir)
    assert (code, "Traceback" in out) == (1, False)


def test_a_second_auditor_follows_the_log(audited: Running, tmp_path: Path) -> None:
    running = audited
    log = status(running)
    witness = AuditorProcess(
        tmp_path / "witness", running.nats, f"auditor.follow={log['log_key']} {log['url']}", "auditor.follow_s=0.1"
    )
    try:
        witness.start()
        answer(running, tmp_path / "third")
        deadline = time.monotonic() + END_S
        ledger = Ledger.open(f"sqlite:///{tmp_path}/witness/auditor/ledger.db")
        while ledger.last_seen(log["origin"]) is None:
            assert time.monotonic() < deadline, witness.log
            time.sleep(0.1)
        assert ledger.counts().conflicts == 0
        ledger.close()
        assert witness.stop() == 0
    finally:
        witness.kill()
