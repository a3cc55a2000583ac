"""Two hundred requests of all kinds at a real stack, whose spans an OTLP collector gets: one whole tree for each."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from collector import Collector, Seen, children, collector, covered, orphans, roots
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import StatusCode
from stacks import running_stack

from countersign.client import Client
from countersign.services.runtime.errors import NotFound
from countersign.services.runtime.telemetry import attributes as names
from countersign.verify.receipt import parse

REQUESTS = 200
AT_ONCE = 4

Kind = str


@dataclass(frozen=True, slots=True)
class Run:
    """What was asked, by request id, and what came of it."""

    kinds: dict[str, Kind]
    receipts: dict[str, bytes]
    traces: dict[bytes, list[Seen]]
    collector: Collector

    def of(self, *kinds: Kind) -> Iterator[tuple[str, list[Seen]]]:
        """The traces of these kinds of requests."""
        for trace in self.traces.values():
            for seen in roots(trace):
                request_id = seen.attributes.get(names.REQUEST_ID, "")
                if self.kinds.get(request_id) in kinds:
                    yield request_id, trace


def kind_of(number: int) -> Kind:
    return {3: "refused", 5: "cancelled", 7: "deadline"}.get(number % 10, "drafted" if number % 2 else "plain")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with collector() as found:
        folder = tmp_path_factory.mktemp("traces") / "stack"
        provider = TracerProvider(resource=Resource.create({"service.name": "client"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=found.endpoint)))
        try:
            with running_stack(folder, f"telemetry.otlp_endpoint={found.endpoint}", "auditor.share=0.1") as stack:
                kinds, receipts = asyncio.run(_all(stack.router, provider))
                found.awaits("audit", {names.VERDICT: "pass"})
        finally:
            provider.shutdown()
        yield Run(kinds, receipts, found.settled(quiet_s=0.5), found)


async def _all(address: str, provider: TracerProvider) -> tuple[dict[str, Kind], dict[str, bytes]]:
    kinds = {f"request-{number}": kind_of(number) for number in range(REQUESTS)}
    receipts: dict[str, bytes] = {}
    turns = asyncio.Semaphore(AT_ONCE)
    async with Client(address, tracer_provider=provider) as client:

        async def one(request_id: str, kind: Kind) -> None:
            async with turns:
                receipts[request_id] = await _ask(client, request_id, kind)

        await asyncio.gather(*(one(*each) for each in kinds.items()))
    return kinds, receipts


async def _ask(client: Client, request_id: str, kind: Kind) -> bytes:
    prompt = f"# {request_id}: sorts values by the method that everybody knows, in place\ndef quicksort(values):\n    "
    if kind == "refused":
        with pytest.raises(NotFound):
            await client.complete(prompt, model="unheard-of", request_id=request_id)
        return b""
    if kind == "cancelled":
        async with aclosing(client.generate(prompt, max_tokens=400, ignore_eos=True, request_id=request_id)) as events:
            async for _ in events:
                if (await anext(events)) is not None:
                    break
        return b""
    timeout = 0.05 if kind == "deadline" else None
    tokens = 400 if kind == "deadline" else 16
    drafting: Literal["off", "model"] = "off" if kind == "plain" else "model"
    answer = await client.complete(
        prompt, max_tokens=tokens, ignore_eos=True, drafting=drafting, request_id=request_id, timeout=timeout
    )
    return answer.receipt


def test_each_request_is_one_whole_tree(run: Run) -> None:
    assert Counter(run.kinds.values()).keys() == {"plain", "drafted", "cancelled", "deadline", "refused"}
    assert len(run.traces) == REQUESTS
    for trace in run.traces.values():
        assert [seen.service for seen in roots(trace)] == ["client"]
        assert not orphans(trace)
        assert len({seen.span.span_id for seen in trace}) == len(trace)
    asked = [roots(trace)[0].attributes[names.REQUEST_ID] for trace in run.traces.values()]
    assert sorted(asked) == sorted(run.kinds)


def test_the_tree_leads_through_every_service(run: Run) -> None:
    for _, trace in run.of("plain", "drafted", "deadline", "cancelled"):
        found = {(seen.service, seen.name) for seen in trace}
        assert {("router", "admit"), ("router", "place"), ("tokenizer", "tokenizer/Encode")} <= found
        assert {("target", "target/Start"), ("target", "answer"), ("target", "queue")} <= found
    for _, trace in run.of("plain", "drafted"):
        found = {(seen.service, seen.name) for seen in trace}
        assert {("target", "prefill"), ("target", "decode"), ("target", "commit"), ("kv", "kv/Reserve")} <= found
    every = Counter((seen.service, seen.name) for trace in run.traces.values() for seen in trace)
    assert every["kv", "kv/Lookup"] > 0
    drafted = [("draft", "draft") in {(seen.service, seen.name) for seen in trace} for _, trace in run.of("drafted")]
    assert any(drafted)
    assert not any(seen.service == "draft" for _, trace in run.of("plain", "refused") for seen in trace)


def test_child_spans_cover_the_request(run: Run) -> None:
    for _, trace in run.of("plain", "drafted", "deadline", "cancelled", "refused"):
        (root,) = roots(trace)
        assert covered(root, children(trace, root)) >= 0.95
        (served,) = (seen for seen in trace if seen.service == "router" and seen.name == root.name)
        assert covered(served, children(trace, served)) >= 0.95


def test_a_round_is_an_event_of_the_answer(run: Run) -> None:
    for request_id, trace in run.of("plain", "drafted"):
        (answer,) = (seen for seen in trace if seen.name == "answer")
        rounds = [event for event in answer.span.events if event.name == names.ROUND]
        receipt = parse(run.receipts[request_id]).receipt
        assert len(rounds) == receipt.evidence.passes == answer.attributes[names.ROUNDS]
        assert answer.attributes[names.ACCEPTED] == receipt.evidence.accepted
        assert all(answer.span.start_time_unix_nano <= event.time_unix_nano for event in rounds)


def test_what_went_wrong_is_an_error_and_what_did_not_is_none(run: Run) -> None:
    for _, trace in run.of("refused"):
        root = roots(trace)[0]
        assert root.span.status.code == StatusCode.ERROR.value
        assert root.attributes["error.type"] == "UNKNOWN_MODEL"
    for request_id, trace in run.of("plain", "drafted", "cancelled", "deadline"):
        failed = [seen for seen in trace if seen.span.status.code == StatusCode.ERROR.value]
        assert [(request_id, seen.service, seen.name, seen.attributes.get("error.type")) for seen in failed] == []
    reasons = {
        kind: {tuple(roots(trace)[0].attributes[names.FINISH_REASONS]) for _, trace in run.of(kind)}
        for kind in ("plain", "cancelled", "deadline")
    }
    assert reasons == {"plain": {("length",)}, "cancelled": {("cancelled",)}, "deadline": {("deadline",)}}


def test_a_receipt_names_its_trace_and_its_audit_is_there(run: Run) -> None:
    for request_id, trace in run.of("plain", "drafted"):
        named = parse(run.receipts[request_id]).receipt.trace
        assert named is not None
        (served,) = (seen for seen in trace if seen.service == "router" and seen.span.span_id == named.span)
        assert served.span.trace_id == named.id
    audits = [seen for trace in run.traces.values() for seen in trace if seen.name == "audit"]
    verdicts = {seen.attributes.get(names.VERDICT) for seen in audits}
    assert "pass" in verdicts
    assert verdicts <= {"pass", "inconclusive", None}  # of a few tokens; None: the stack was stopped meanwhile


def test_no_prompt_is_told(run: Run) -> None:
    assert not any(b"quicksort" in message for message in run.collector.raw)


def test_the_folder_holds_no_spans_where_a_collector_has_them(
    run: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert not list(Path(tmp_path_factory.getbasetemp()).glob("traces*/stack/traces/*"))


async def test_a_collector_that_is_down_harms_nothing(tmp_path: Path) -> None:
    with running_stack(tmp_path / "stack", "telemetry.otlp_endpoint=http://127.0.0.1:1") as stack:
        async with Client(stack.router) as client:
            answers = await asyncio.gather(*(client.complete("def f(", max_tokens=8) for _ in range(40)))
        assert all(answer.receipt for answer in answers)
        await asyncio.sleep(4)  # several exports fail
    for log in (tmp_path / "stack" / "logs").glob("*.log"):
        told = [line for line in log.read_text().splitlines() if "xport" in line]
        assert len(told) <= 4, told
    assert not list((tmp_path / "stack").glob("traces/*"))
