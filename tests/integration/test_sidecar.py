"""The sidecar beside a real stack: silent where all is right, and soon aware of a bug that was planted in a service."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
import pytest
from collector import children, collector, roots
from opentelemetry.trace import StatusCode

from countersign.client import Answer, Client, Tokens
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.config import FREE_PORTS, load
from countersign.services.runtime.errors import DataLoss, NotFound
from countersign.services.runtime.supervisor import SERVICES, Supervisor, service_command
from countersign.services.runtime.telemetry import attributes as names
from countersign.v1.sidecar_pb2 import GetRunRequest, GetRunResponse, StatusRequest, StatusResponse, Violation
from countersign.verify.spec.run import Run, read_run
from countersign.verify.spec.trace import replay

PLANTED = Path(__file__).resolve().parents[1] / "support" / "planted.py"
COMMAND = str(Path(sys.executable).parent / "countersign")


@asynccontextmanager
async def stack(folder: Path, *settings: str, planted: tuple[str, str] | None = None) -> AsyncIterator[Supervisor]:
    config = load(None, os.environ, [f"data_dir={folder}", *FREE_PORTS, *settings])
    services = {name: service_command(name) for name in SERVICES}
    if planted is not None:
        services[planted[0]] = [sys.executable, str(PLANTED), *planted]
    async with Supervisor(config, services=services) as running:
        yield running


async def answer(running: Supervisor, request_id: str) -> Answer:
    async with Client(running.router_address) as client:
        return await client.complete("def f(", max_tokens=24, ignore_eos=True, seed=1, request_id=request_id)


async def command(*arguments: str) -> tuple[int, str]:
    """What ``countersign`` says."""
    process = await asyncio.create_subprocess_exec(COMMAND, *arguments, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    return process.returncode or 0, out.decode()


async def violations(running: Supervisor, bus: Bus) -> StatusResponse:
    return await bus.call("sidecar", "Status", StatusRequest(), StatusResponse, timeout=5)


async def test_a_sound_stack_is_watched_in_silence_and_its_runs_are_accepted(tmp_path: Path) -> None:
    async with (
        stack(tmp_path / "data", "sidecar.record=true") as running,
        await Bus.connect(running.nats_url, "test") as bus,
    ):
        await asyncio.gather(*(answer(running, f"sound-{number}") for number in range(4)))
        file = tmp_path / "data" / "runs" / "sound-3.jsonl"
        async with asyncio.timeout(20):
            while not all(file.with_name(f"sound-{number}.jsonl").exists() for number in range(4)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        seen = await violations(running, bus)
        assert (seen.requests, seen.violation_count) == (4, 0)
        # A record and an event of each pass at least, and what the clients got.
        assert seen.records >= 4 * 4
        assert seen.events >= 4 * 6
        code, told = await command("spec", "status", "--data-dir", str(running.data_dir))
        assert (code, told.endswith(" 0 violations\n")) == (0, True), told
        with pytest.raises(NotFound):
            await bus.call("sidecar", "GetRun", GetRunRequest(request_id="nobody"), GetRunResponse, timeout=5)
        given = await bus.call("sidecar", "GetRun", GetRunRequest(request_id="sound-3"), GetRunResponse, timeout=5)
    assert given.run == file.read_text()
    code, told = await command("spec", "replay", str(file.parent))
    assert (code, told.count(": accepted, ")) == (0, 4), told


@pytest.mark.parametrize(
    ("service", "bug", "property_"),
    [("target", "commits_another_token", "OnlyVerified"), ("router", "skips_a_token", "Agreement")],
)
async def test_a_bug_that_was_planted_is_reported_with_evidence_that_the_specification_rejects(
    tmp_path: Path, service: str, bug: str, property_: str
) -> None:
    async with (
        stack(tmp_path / "data", planted=(service, bug)) as running,
        await Bus.connect(running.nats_url, "test") as bus,
    ):
        reports: asyncio.Queue[Violation] = asyncio.Queue()

        async def told(msg: object) -> None:
            reports.put_nowait(Violation.FromString(msg.data))  # type: ignore[attr-defined]  # a message of NATS

        await bus.subscribe("cs.v1.event.violation", told)
        with suppress(DataLoss):  # the client misses a token by itself
            await answer(running, "planted")
        async with asyncio.timeout(20):
            report = await reports.get()
        assert (report.request_id, report.property) == ("planted", property_)
        given = await bus.call("sidecar", "GetRun", GetRunRequest(request_id="planted"), GetRunResponse, timeout=5)
        assert (await violations(running, bus)).violation_count == 1
    found = read_run(Path(report.evidence))
    assert isinstance(found, Run)
    assert found.request_id == "planted"
    whole = tmp_path / "whole.jsonl"
    whole.write_text(given.run)
    verdict = replay(read_run(whole))
    assert not verdict.accepted
    assert "nothing explains" in verdict.first


async def test_a_violation_is_in_the_trace_of_its_request_which_is_kept(tmp_path: Path) -> None:
    with collector() as found:
        settings = (f"telemetry.otlp_endpoint={found.endpoint}", "telemetry.sample=0")
        async with stack(tmp_path / "data", *settings, planted=("target", "commits_another_token")) as running:
            await answer(running, "planted")
            violation = await asyncio.to_thread(found.awaits, "violation")
            traces = await asyncio.to_thread(found.settled)
    (trace,) = traces.values()
    assert (violation.service, violation.span.status.code) == ("sidecar", StatusCode.ERROR.value)
    assert violation.attributes[names.REQUEST_ID] == "planted"
    assert violation.attributes["countersign.property"] == "OnlyVerified"
    assert "no target said it had sampled" in violation.attributes[names.VIOLATION]
    (root,) = roots(trace)
    assert violation in children(trace, root)
    # Nothing else went wrong: for its sake alone all that was held comes out.
    assert [seen.name for seen in trace if seen.span.status.code == StatusCode.ERROR.value] == ["violation"]
    assert {"admit", "place", "stream", "answer", "decode", "tokenizer/Encode"} <= {seen.name for seen in trace}


async def test_a_sidecar_that_starts_in_the_middle_of_an_answer_raises_no_false_alarm(tmp_path: Path) -> None:
    async with (
        stack(tmp_path / "data") as running,
        await Bus.connect(running.nats_url, "test") as bus,
        Client(running.router_address) as client,
    ):
        first = running.pid("sidecar") or 0
        asked = client.generate("def f(", max_tokens=1900, ignore_eos=True, seed=1, drafting="off", request_id="middle")
        async for event in asked:
            if isinstance(event, Tokens) and psutil.pid_exists(first):
                os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(30):
            while running.pid("sidecar") in {None, first} or not running.address("sidecar"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await answer(running, "after")
        await asyncio.sleep(2)  # as long as a fault may take to be told
        seen = await violations(running, bus)
        assert seen.requests >= 1
        assert list(seen.violations) == []
