"""Traces that are not sampled, and still kept: errors, take-overs, failed audits, from all the processes they touch."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass

import pytest
from collector import Collector, Seen, http_collector
from stacks import Running, running_stack

from countersign.client import Accepted, Client, Finished, Tokens
from countersign.services.protocol.commit import replay
from countersign.services.protocol.subjects import commit_subject
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.errors import NotFound
from countersign.services.runtime.journal import Journal
from countersign.services.runtime.registry import Registry
from countersign.services.runtime.telemetry import attributes as names

PROMPT = "def quicksort(values):\n    # sorts them by the method that everybody knows\n    "


@dataclass(frozen=True, slots=True)
class House:
    stack: Running
    collector: Collector

    def spans(self, request_id: str) -> list[Seen]:
        """All of the traces that a request is in."""
        traces = {
            seen.span.trace_id for seen in self.collector.spans if seen.attributes.get(names.REQUEST_ID) == request_id
        }
        return [seen for seen in self.collector.spans if seen.span.trace_id in traces]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Two targets that sample with another seed than they sign for; all is audited, nothing is sampled; over HTTP."""
    with (
        http_collector() as found,
        running_stack(
            tmp_path_factory.mktemp("sampling") / "stack",
            f"telemetry.otlp_endpoint={found.endpoint}",
            "telemetry.otlp_protocol=http",
            "telemetry.sample=0",
            "auditor.share=1",
            "target.processes=2",
            "target.fault=seed",
        ) as stack,
    ):
        yield House(stack, found)


async def test_what_goes_well_is_not_exported(house: House) -> None:
    async with Client(house.stack.router) as client:
        await client.complete(PROMPT, max_tokens=8, request_id="well")  # greedy: the seed plays no part
    await asyncio.sleep(3)
    assert not house.spans("well")


async def test_an_error_is_kept(house: House) -> None:
    async with Client(house.stack.router) as client:
        with pytest.raises(NotFound):
            await client.complete(PROMPT, model="unheard-of", request_id="refused")
    await asyncio.to_thread(house.collector.awaits, "text_completion unheard-of")
    await asyncio.to_thread(house.collector.settled, 1.5)
    assert {seen.name for seen in house.spans("refused")} == {"text_completion unheard-of", "admit"}


async def test_a_failed_audit_brings_the_whole_request_out_of_every_process(house: House) -> None:
    async with Client(house.stack.router) as client:
        await client.complete(PROMPT, max_tokens=200, temperature=1.0, seed=1, ignore_eos=True, request_id="cheated")
    told = {names.VERDICT: "fail", names.REQUEST_ID: "cheated"}
    await asyncio.to_thread(house.collector.awaits, "audit", told, 120)
    await asyncio.to_thread(house.collector.settled, 2.5)
    found = {(seen.service, seen.name) for seen in house.spans("cheated")}
    wanted = {("router", "stream"), ("tokenizer", "tokenizer/Encode"), ("target", "answer"), ("auditor", "audit")}
    assert wanted <= found


async def test_a_take_over_is_kept(house: House) -> None:
    async with Client(house.stack.router) as client:
        events = client.generate(PROMPT, max_tokens=1900, ignore_eos=True, request_id="moved")
        killed = False
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Tokens) and not killed:
                    killed = True
                    await _kill_target_of(house, "moved")
                assert isinstance(event, Accepted | Tokens | Finished)
    told = {names.EPOCH: 2, names.REQUEST_ID: "moved"}
    await asyncio.to_thread(house.collector.awaits, "answer", told)
    await asyncio.to_thread(house.collector.settled, 2.5)
    found = {(seen.service, seen.name) for seen in house.spans("moved")}
    assert {("router", "stream"), ("router", "place"), ("target", "answer")} <= found


async def _kill_target_of(house: House, request_id: str) -> None:
    """SIGKILL for the target that works on the request, by its log."""
    async with await Bus.connect(house.stack.nats, "test") as bus, Registry(bus) as registry:
        log = replay(request_id, await Journal(bus).read(commit_subject(request_id)))
        (pid,) = [target.pid for target in registry.live("target") if target.instance == log.instance]
        os.kill(pid, signal.SIGKILL)
