"""The simulated JetStream answers as the real nats-server does: the same operations on both, answer by answer."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nats.aio.msg import Msg
from tests.simulation.jetstream import COMMIT, COMMITTED, RECEIPT, JetStream

from countersign.services.runtime.bus import Bus
from countersign.services.runtime.config import NatsConfig
from countersign.services.runtime.jetstream import is_status
from countersign.services.runtime.journal import COMMITS, RECEIPTS, Journal
from countersign.services.runtime.nats_server import NatsServer

STREAMS = {COMMIT: COMMITS, RECEIPT: RECEIPTS}
numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Publish:
    """An append that names the subject's last sequence, plus so many."""

    prefix: str
    subject: int
    off: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Read:
    """A batch from the place behind so many of the subject's messages."""

    prefix: str
    subject: int
    behind: int
    most: int


@dataclass(frozen=True, slots=True)
class Last:
    prefix: str
    subject: int


prefixes, subjects = st.sampled_from(list(STREAMS)), st.integers(0, 2)
operations = st.one_of(
    st.builds(Publish, prefixes, subjects, st.sampled_from([0, 0, 0, -1, 1, 5]), st.binary(max_size=20)),
    st.builds(Read, prefixes, subjects, st.integers(0, 6), st.integers(1, 4)),
    st.builds(Last, prefixes, subjects),
)


class Real:
    """One nats-server for all examples; each takes subjects of its own, and sequences from where it begins."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.republished: list[tuple[str, str, str, bytes]] = []

    async def heard(self, msg: Msg) -> None:
        headers = msg.headers or {}
        self.republished.append((msg.subject, headers["Nats-Sequence"], headers["Nats-Last-Sequence"], msg.data))


@asynccontextmanager
async def server(folder: Path) -> AsyncIterator[Real]:
    async with NatsServer(folder) as nats:
        bus = await Bus.connect(nats.url, "test")
        await Journal(bus).ensure_streams(NatsConfig())
        real = Real(bus)
        await bus.subscribe(f"{COMMITTED}*", real.heard)
        await bus.flush()
        yield real
        await bus.close()


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def real(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    context = server(tmp_path_factory.mktemp("nats"))
    yield runner.run(context.__aenter__())
    runner.run(context.__aexit__(None, None, None))


def told(messages: list[Msg]) -> list[tuple[bytes, dict[str, str]]]:
    """What of a batch the journal looks at."""
    answers = []
    for msg in messages:
        headers = msg.headers or {}
        names = ("Status", "Nats-Num-Pending") if "Status" in headers else ("Nats-Sequence",)
        answers.append((msg.data, {name: headers[name] for name in (*names, "Nats-Last-Sequence") if name in headers}))
    return answers


async def compare(real: Real, drawn: list[Publish | Read | Last]) -> None:
    example = next(numbers)
    sent: list[tuple[str, str, str, bytes]] = []

    def republish(subject: str, data: bytes, headers: dict[str, str]) -> None:
        sent.append((subject, headers["Nats-Sequence"], headers["Nats-Last-Sequence"], data))

    sim = JetStream(lambda message, who: None, republish)
    for prefix, stream in STREAMS.items():
        info = json.loads((await real.bus.request(f"$JS.API.STREAM.INFO.{stream}", b"", {}, 5)).data)
        sim.sequences[prefix] = info["state"]["last_seq"]
    real.republished.clear()
    for operation in drawn:
        subject = f"{operation.prefix}x{example}-{operation.subject}"
        match operation:
            case Publish(_, _, off, data):
                headers = {"Nats-Expected-Last-Subject-Sequence": str(max(0, sim.last(subject) + off))}
                answer = json.loads((await real.bus.request(subject, data, headers, 5)).data)
                expected = sim.publish(subject, data, headers, 0.0, "")
                assert essence(answer) == essence(expected)
            case Read(prefix, _, behind, most):
                known = [0, *(message.sequence for message in sim.subjects.get(subject, []))]
                first = known[min(behind, len(known) - 1)] + 1
                query = json.dumps({"next_by_subj": subject, "seq": first, "batch": most, "max_bytes": 8 << 20})
                api = f"$JS.API.DIRECT.GET.{STREAMS[prefix]}"
                messages = await real.bus.request_many(api, query.encode(), 5, is_status)
                assert told(messages) == told(sim.get_batch(subject, first, 1.0, most))
            case Last(prefix, _):
                query = json.dumps({"last_by_subj": subject})
                api = f"$JS.API.STREAM.MSG.GET.{STREAMS[prefix]}"
                answer = json.loads((await real.bus.request(api, query.encode(), {}, 5)).data)
                assert essence(answer) == essence(sim.get_last(subject))
    which = json.dumps({"subjects_filter": f"{COMMIT}*"}).encode()
    listed = json.loads((await real.bus.request(f"$JS.API.STREAM.INFO.{COMMITS}", which, {}, 5)).data)
    mine = {name: count for name, count in listed["state"].get("subjects", {}).items() if f".x{example}-" in name}
    assert mine == sim.get_info(COMMIT)["state"]["subjects"]
    async with asyncio.timeout(5):
        while len(real.republished) < len(sent):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert real.republished == sent


def essence(answer: dict[str, Any]) -> object:
    """What of an answer the journal looks at."""
    if "error" in answer:
        return answer["error"]["err_code"]
    if "message" in answer:
        return answer["message"]["seq"], answer["message"].get("data", "")
    return answer["seq"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(operations, min_size=1, max_size=25))
def test_the_same_operations_have_the_same_answers(
    runner: asyncio.Runner, real: Real, drawn: list[Publish | Read | Last]
) -> None:
    runner.run(compare(real, drawn))
