"""A deployment that keeps its model's reasoning to itself: what the client gets, and what an auditor finds."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from stacks import Running, running_stack

from countersign.client import Answer, Client, Event, Finished, Hidden, Tokens
from countersign.services.engine.text import Tokenizer
from countersign.services.protocol.commit import LogState, replay
from countersign.services.protocol.subjects import commit_subject
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.errors import FailedPrecondition, InvalidArgument
from countersign.services.runtime.journal import Journal
from countersign.verify.audit import audit
from countersign.verify.coin import challenge
from countersign.verify.coin.challenge import Demand
from countersign.verify.coin.counting import Drawn
from countersign.verify.difr import load_reference
from countersign.verify.keys import load_public
from countersign.verify.logged import openings_of
from countersign.verify.receipt import PartialOpenings, attach, parse

# Docstrings stand in for thoughts: they are hidden from their quotes to the first full stop.
BEGIN, END = '"""', "."
PROMPT = 'class Queue:\n    """A queue."""\n\n    def push(self, item):\n        """'


@pytest.fixture(scope="module")
def hiding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_stack(tmp_path_factory.mktemp("hiding") / "data", f"target.hidden_markers={BEGIN} {END}") as running:
        yield running


async def log_of(running: Running, request_id: str) -> LogState:
    async with await Bus.connect(running.nats, "test-hidden") as bus:
        return replay(request_id, await Journal(bus).read(commit_subject(request_id)))


async def test_reasoning_is_billed_signed_and_counted_but_not_shown(
    hiding: Running, demo_models: dict[str, Path]
) -> None:
    async with Client(hiding.router) as client:
        events = [event async for event in client.generate(PROMPT, max_tokens=120, temperature=0.7, seed=5)]
        request_id = events[0].request_id  # type: ignore[union-attr]  # always Accepted
        again = [event async for event in client.resume(request_id, 3)]
    finished = events[-1]
    assert isinstance(finished, Finished)
    log = await log_of(hiding, request_id)
    seen, hidden = told(events, 0)
    assert len(log.token_ids) == finished.usage.output_tokens == len(seen) + hidden
    assert hidden > 3, "the model must have reasoned for this test to mean anything"
    assert len(seen) > 3, "and must have said something"
    assert seen == {position: log.token_ids[position] for position in seen}
    assert told(again, 3) == ({p: t for p, t in seen.items() if p >= 3}, hidden - sum(p not in seen for p in range(3)))

    # The client's copy opens what it saw; the auditor's, with the log, opens everything.
    keys = [load_public(hiding.data_dir / "keys" / "receipts.pub")]
    mine = parse(finished.receipt)
    assert isinstance(mine.openings, PartialOpenings)
    assert mine.openings.leaves.token_ids == tuple(seen.values())
    assert [level.outcome for level in audit(finished.receipt, trusted_keys=keys, reference=None).levels][:2] == [
        "pass",
        "inconclusive",
    ]
    reference = partial(load_reference, demo_models["target"])
    opened = audit(
        attach(finished.receipt, openings_of(log)), trusted_keys=keys, reference=reference, levels=["tokens"]
    )
    assert opened.verdict == "pass", opened


async def test_hidden_tokens_are_drawn_and_opened_once_so_that_a_client_can_count_them(hiding: Running) -> None:
    async with Client(hiding.router) as client:
        answer = await thoughtful(client)
        beacon = secrets.token_bytes(32)
        leaves, openings = await client.open_hidden(answer.request_id, beacon)
        assert await client.open_hidden(answer.request_id, beacon) == (leaves, openings)
        with pytest.raises(FailedPrecondition) as again:
            await client.open_hidden(answer.request_id, secrets.token_bytes(32))
        with pytest.raises(InvalidArgument) as short:
            await client.open_hidden(answer.request_id, b"short")
        few = await client.complete(PROMPT, max_tokens=7, temperature=0.0)
        assert (await client.open_hidden(few.request_id, beacon))[0] == 1, "at most a quarter is opened"
        plain = await client.complete("x = 1", max_tokens=2, temperature=0.0)
        with pytest.raises(FailedPrecondition) as nothing:
            await client.open_hidden(plain.request_id, beacon)
    reasons = [error.value.reason for error in (again, short, nothing)]
    assert reasons == ["ALREADY_DRAWN", "BAD_BEACON", "NOTHING_HIDDEN"]
    log = await log_of(hiding, answer.request_id)
    mine = parse(answer.receipt)
    asked = challenge.draw(mine, beacon, Demand(leaves=leaves))
    assert leaves == len(asked.leaves) == 16
    found = challenge.check(mine, asked, challenge.decode(openings))
    assert found == {position: log.token_ids[position] for position in found}
    drawn = Drawn(beacon, Demand(leaves=leaves), openings)
    keys = [load_public(hiding.data_dir / "keys" / "receipts.pub")]
    report = audit(answer.receipt, trusted_keys=keys, reference=None, levels=["count"], drawn=drawn)
    assert report.verdict == "pass", report


async def test_the_command_line_has_hidden_tokens_opened_and_compares_the_bill(hiding: Running, tmp_path: Path) -> None:
    async with Client(hiding.router) as client:
        answer = await thoughtful(client)
    file = tmp_path / "receipt.cose"
    file.write_bytes(answer.receipt)
    command = [str(Path(sys.executable).parent / "countersign"), "audit", str(file), "--level", "count", "--json"]
    command += ["--data-dir", str(hiding.data_dir)]
    verdicts = []
    billed = str(answer.usage.output_tokens)
    for options in ([], ["--open-hidden", "--billed", billed], ["--billed", billed + "0"]):
        process = await asyncio.create_subprocess_exec(*command, *options, stdout=asyncio.subprocess.PIPE)
        out, _ = await asyncio.wait_for(process.communicate(), 60)
        verdicts.append(json.loads(out)["verdict"])
    assert verdicts == ["inconclusive", "pass", "fail"]


async def test_a_prompt_that_ends_inside_a_thought_hides_the_answer_from_its_first_token(hiding: Running) -> None:
    async with Client(hiding.router) as client:
        events = [event async for event in client.generate(PROMPT, max_tokens=4, temperature=0.0)]
    assert isinstance(events[1], Hidden)
    assert events[1].position == 0


async def test_what_is_hidden_never_reaches_the_client(hiding: Running, demo_models: dict[str, Path]) -> None:
    async with Client(hiding.router) as client:
        answer = await client.complete(PROMPT, max_tokens=60, temperature=0.7, seed=6)
    log = await log_of(hiding, answer.request_id)
    secret = Tokenizer(demo_models["target"]).decode(log.token_ids)[:12]
    assert secret.strip()
    assert not answer.text.startswith(secret)
    assert log.opened is not None
    assert log.opened.salt_key not in answer.receipt


async def thoughtful(client: Client) -> Answer:
    """An answer with 64 hidden tokens or more."""
    for seed in range(40):
        answer = await client.complete(PROMPT, max_tokens=120, temperature=0.9, seed=seed)
        if answer.usage.output_tokens - len(answer.tokens) >= 64:
            return answer
    raise AssertionError("the model never thinks for long")


def told(events: list[Event], position: int) -> tuple[dict[int, int], int]:
    """The visible tokens by position, and how many were hidden; nothing is missing between them."""
    seen: dict[int, int] = {}
    hidden = 0
    for event in events:
        if isinstance(event, Tokens):
            assert event.position == position
            seen |= {position + i: token.id for i, token in enumerate(event.tokens)}
            position += len(event.tokens)
        elif isinstance(event, Hidden):
            assert event.position == position
            hidden += event.count
            position += event.count
    return seen, hidden


async def test_hidden_tokens_that_the_model_never_said_are_counted_and_refused(
    tmp_path: Path, demo_models: dict[str, Path]
) -> None:
    """A client sees nothing of it; whoever may open the hidden tokens does."""
    settings = (f"target.hidden_markers={BEGIN} {END}", "target.fault=inflate-50")
    with running_stack(tmp_path / "data", *settings) as stack:
        async with Client(stack.router) as client:
            answer = await client.complete(PROMPT, max_tokens=120, temperature=0.7, seed=5)
        log = await log_of(stack, answer.request_id)
        keys = [load_public(stack.data_dir / "keys" / "receipts.pub")]
    mine = audit(answer.receipt, trusted_keys=keys, reference=None)
    assert mine.verdict == "inconclusive"
    opened = attach(answer.receipt, openings_of(log))
    report = audit(opened, trusted_keys=keys, reference=partial(load_reference, demo_models["target"]))
    assert [(level.level, level.outcome) for level in report.levels] == [
        ("form", "pass"),
        ("count", "pass"),
        ("tokens", "fail"),
    ]
    assert parse(answer.receipt).receipt.output.hidden > 10
