"""What is asked and answered stays where it belongs: in no log line, span, metric or other file of a stack.

Exempt are, below the data folder:

- ``nats/.../CS_COMMITS``: the token log, which is the request, and the only truth about it (DESIGN.md, section 4);
- ``kv``: the store's blocks, which are computed from the prompt (section 7).

Not exempt are receipts, verdicts and the transparency log: they hold salted digests (section 8).
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from leaks import RUN, Leaks, forms_of_ids, forms_of_text

from countersign.cli.spans import trace_of
from countersign.client import Client, Finished, Tokens
from countersign.services.protocol.commit import decode
from countersign.services.protocol.subjects import commit_subject
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.config import FREE_PORTS, load
from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.fetching import ask
from countersign.services.runtime.journal import Journal
from countersign.services.runtime.registry import Registry
from countersign.services.runtime.supervisor import Supervisor
from countersign.services.runtime.telemetry.kept import read_spans
from countersign.services.runtime.telemetry.lines import parsed
from countersign.v1.auditor_pb2 import GetLogRequest, GetLogResponse
from countersign.v1.commit_pb2 import Assigned

SECRET = "the password of Ansgar Quist is zyx-88213-kvetch"
STOP = "never-said-marker-55102"
LONG = f'def report(name):\n    """{SECRET}; é 中"""\n    if name == "Ansgar'
SETTINGS = (
    "telemetry.log_level=debug",
    "telemetry.sample=1",
    "auditor.share=1",
    "auditor.checkpoint_s=0.2",
    "target.processes=2",
    "kv.disk_bytes=67108864",
    "router.max_timeout_ms=60000",
)
# What an answer says, cut into pieces of this length, is looked for piece by piece.
PIECE = 24
DONE_S = 90.0


@dataclass
class Asked:
    """What was asked of the stack below ``folder`` and what it answered; what its processes told of themselves."""

    folder: Path
    prompt_ids: Sequence[int] = ()
    answers: list[str] = field(default_factory=list)
    ids: list[Sequence[int]] = field(default_factory=list)
    closed: int = 0
    metrics: dict[str, bytes] = field(default_factory=dict)

    async def ask(
        self,
        client: Client,
        request_id: str,
        prompt: str = LONG,
        *,
        meanwhile: Callable[[], Awaitable[bool]] | None = None,
        **options: object,
    ) -> None:
        """One answer, kept as far as it comes. ``meanwhile`` is called once it has begun; false: leave it."""
        texts, ids = list[str](), list[int]()
        events = client.generate(prompt, request_id=request_id, stop=(STOP,), ignore_eos=True, seed=3, **options)  # type: ignore[arg-type]  # by name
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Tokens):
                    texts += [token.text for token in event.tokens]
                    ids += [token.id for token in event.tokens]
                    if meanwhile is not None and len(ids) > 2 * RUN:
                        if not await meanwhile():
                            break
                        meanwhile = None
                self.closed += isinstance(event, Finished)
        self.answers.append("".join(texts))
        self.ids.append(ids)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Of a stack that has stopped."""
    return asyncio.run(run(tmp_path_factory.mktemp("secret") / "data"))


async def run(folder: Path) -> Asked:
    """Answers, refusals, one answer that is left and one that loses its target; until all is audited."""
    asked, config = Asked(folder), load(None, {}, [f"data_dir={folder}", *FREE_PORTS, *SETTINGS])
    async with AsyncExitStack() as undo:
        running = await undo.enter_async_context(Supervisor(config))
        bus = await undo.enter_async_context(await Bus.connect(running.nats_url, "test"))
        registry = await undo.enter_async_context(Registry(bus))
        client = await undo.enter_async_context(Client(running.router_address))
        asked.prompt_ids = await client.tokenize(LONG)
        await asyncio.gather(
            asked.ask(client, "drafted", max_tokens=120),
            asked.ask(client, "drawn", max_tokens=60, temperature=0.9, drafting="off"),
            asked.ask(client, "late", max_tokens=1500, timeout=0.6),
            asked.ask(client, "left", max_tokens=1500, meanwhile=leave),
        )
        await asked.ask(client, "cached", max_tokens=40)
        kill = partial(kill_target, "taken-over", Journal(bus), registry)
        await asked.ask(client, "taken-over", max_tokens=800, drafting="off", meanwhile=kill)
        await refused(client, asked)
        await audited(bus, asked.closed)
        for each in registry.everybody():
            told = await asyncio.to_thread(ask, f"http://{each.metrics_address}/metrics")
            asked.metrics[each.instance] = told.body
    return asked


async def leave() -> bool:
    return False


async def kill_target(request_id: str, journal: Journal, registry: Registry) -> bool:
    """The one that has the request."""
    records = [decode(entry.data)[1] for entry in await journal.read(commit_subject(request_id))]
    (owner,) = (record.instance for record in records if isinstance(record, Assigned))
    (target,) = (each for each in registry.live("target") if each.instance == owner)
    os.kill(target.pid, signal.SIGKILL)
    return True


async def refused(client: Client, asked: Asked) -> None:
    """Requests that are wrong in one way each: what refuses them may tell of it."""
    for wrong in ({"max_tokens": 0}, {"temperature": -1.0}, {"request_id": "drawn", "max_tokens": 7}):
        with pytest.raises(CountersignError):
            await asked.ask(client, **{"request_id": "refused", **wrong})  # type: ignore[arg-type]  # by name
    with pytest.raises(CountersignError):
        await asked.ask(client, "refused", prompt=LONG * 400)


async def audited(bus: Bus, least: int) -> None:
    """Until as many receipts are audited as there are answers with their last event."""
    async with asyncio.timeout(DONE_S):
        while True:
            log = await bus.call("auditor", "GetLog", GetLogRequest(), GetLogResponse, timeout=5)
            if log.size >= least and not log.waiting and sum(log.outcomes.values()) >= least:
                return
            await asyncio.sleep(0.2)


def leaks(asked: Asked) -> Leaks:
    texts = {"the secret": SECRET, "the stop string": STOP, "a part of it": SECRET[4:28]}
    for place, answer in enumerate(asked.answers):
        pieces = (answer[begin : begin + PIECE] for begin in range(0, len(answer) - PIECE, PIECE // 2))
        texts |= {
            f"piece {number} of answer {place}": piece for number, piece in enumerate(pieces) if len(set(piece)) > 8
        }
    ids = {"the prompt": asked.prompt_ids} | {f"answer {place}": each for place, each in enumerate(asked.ids)}
    return Leaks(texts, ids)


def exempt(folder: Path) -> list[Path]:
    return [folder / "nats" / "jetstream" / "$G" / "streams" / "CS_COMMITS", folder / "kv"]


def test_nothing_that_was_asked_or_answered_is_in_a_file_of_the_stack_but_the_token_log(asked: Asked) -> None:
    folder = asked.folder
    assert leaks(asked).below(folder, exempt(folder)) == {}


def test_nothing_that_was_asked_or_answered_is_in_metrics(asked: Asked) -> None:
    found = leaks(asked)
    assert {name: found.within(body) for name, body in asked.metrics.items() if found.within(body)} == {}


def test_it_was_looked_for_where_it_could_have_been(asked: Asked) -> None:
    folder, found = asked.folder, leaks(asked)
    assert found.below(folder)  # the token log: what is looked for is what is written
    assert all("CS_COMMITS" in file for file in found.below(folder, [folder / "kv"]))
    logs = "".join(file.read_text() for file in (folder / "logs").glob("*.log"))
    for words in ('"level": "debug"', '"request_id": "drafted"', "a request was taken from its target"):
        assert words in logs
    assert {kept.span.name for kept in read_spans(folder / "traces")} >= {"answer", "audit", "tokenizer/Encode"}
    assert len(asked.metrics) >= 8
    assert all(b"countersign_" in body for body in asked.metrics.values())
    assert len(asked.answers) == 6
    assert all(len(answer) > PIECE for answer in asked.answers)
    assert (folder / "auditor" / "log").is_dir()


def test_log_lines_lead_to_the_trace_of_their_request(asked: Asked) -> None:
    logs = [
        parsed(line) or {} for file in (asked.folder / "logs").glob("*.log") for line in file.read_text().splitlines()
    ]
    for request_id in ("drafted", "taken-over"):
        lines = [line for line in logs if line.get("request_id") == request_id]
        assert {line["service"] for line in lines} >= {"router", "target", "auditor"}
        trace = trace_of(read_spans(asked.folder / "traces"), request_id)
        assert trace is not None
        assert {line["trace_id"] for line in lines if "trace_id" in line} == {trace.trace_id}
        assert [line["message"] for line in lines if "trace_id" in line]


@pytest.mark.parametrize("how", [*forms_of_text(SECRET), *forms_of_ids(range(300, 312))])
def test_a_leak_in_any_form_is_found(tmp_path: Path, how: str) -> None:
    ids = list(range(300, 320))
    planted = forms_of_text(SECRET) | forms_of_ids(ids[3:15])
    (tmp_path / "a.log").write_bytes(b"before " + planted[how] + b" after")
    assert list(Leaks({"s": SECRET}, {"p": ids}).below(tmp_path)) == ["a.log"]
    assert Leaks({"s": SECRET}, {"p": ids}).below(tmp_path, [tmp_path]) == {}
