"""A target that takes one request at a time: what waits can end, what is refused leaves nothing open."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import psutil
import pytest
from stacks import Running, running_stack

from countersign.client import Accepted, Client, Finished, FinishReason, Tokens
from countersign.services.protocol.commit import LogState
from countersign.services.protocol.driver import settle
from countersign.services.protocol.opener import Opener
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.errors import ResourceExhausted
from countersign.services.runtime.journal import Journal
from countersign.services.runtime.registry import Registry
from countersign.v1.commit_pb2 import Opened
from countersign.v1.sampling_pb2 import SamplingParams

PROMPT = "def f(x):\n    "


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One request in work, four in all."""
    with running_stack(
        tmp_path_factory.mktemp("narrow") / "data", "target.max_running=1", "target.max_requests=4"
    ) as running:
        yield running


@asynccontextmanager
async def busy(client: Client, count: int = 1) -> AsyncIterator[None]:
    """So many long requests at the target; cancelled at the end."""
    ids = []
    streams = [client.generate(PROMPT, max_tokens=1900, ignore_eos=True, timeout=600) for _ in range(count)]
    try:
        for stream in streams:
            event = await anext(stream)
            assert isinstance(event, Accepted)
            ids.append(event.request_id)
        async for event in streams[0]:
            if isinstance(event, Tokens):
                break
        yield
    finally:
        for stream in streams:
            await stream.aclose()
        for request_id in ids:
            await client.cancel(request_id)


async def test_a_deadline_that_passes_while_waiting_ends_the_request_with_a_receipt(narrow: Running) -> None:
    async with Client(narrow.router) as client, busy(client):
        async with asyncio.timeout(10):
            answer = await client.complete(PROMPT, max_tokens=4, timeout=0.5)
    assert answer.finish is FinishReason.DEADLINE
    assert answer.tokens == ()
    assert answer.receipt


async def test_a_waiting_request_can_be_cancelled(narrow: Running) -> None:
    async with Client(narrow.router) as client, busy(client):
        stream = client.generate(PROMPT, max_tokens=4, on_disconnect="continue")
        accepted = await anext(stream)
        assert isinstance(accepted, Accepted)
        async with asyncio.timeout(3):
            assert await client.cancel(accepted.request_id) is FinishReason.CANCELLED
            finished = [event async for event in stream][-1]
    assert isinstance(finished, Finished)
    assert finished.reason is FinishReason.CANCELLED


async def test_a_request_that_no_target_takes_is_closed_and_asking_again_does_not_hang(narrow: Running) -> None:
    async with Client(narrow.router) as client, busy(client, count=4):
        with pytest.raises(ResourceExhausted) as caught:
            await client.complete(PROMPT, max_tokens=4, request_id="one-too-many")
        assert caught.value.reason == "TARGET_FULL"
        async with asyncio.timeout(5):
            again = await client.complete(PROMPT, max_tokens=4, request_id="one-too-many")
    assert again.finish is FinishReason.ERROR
    assert "no target took" in again.message


async def test_a_request_whose_router_died_before_it_started_is_mended_by_asking_again(narrow: Running) -> None:
    async with (
        await Bus.connect(narrow.nats, "test") as bus,
        Registry(bus) as registry,
        Client(narrow.router) as client,
    ):
        target = await registry.wait_for("target", 5)
        (model,) = (await client.info()).models
        prompt = [0, 300, 301]
        opened = Opened(
            model=model.name,
            weights_sha256=model.weights_sha256,
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=5, top_p=1.0),
            tenant="default",
            salt_key=bytes(32),
        )
        opener, journal = Opener(LogState("orphan")), Journal(bus)
        await settle(opener, opener.open(opened), journal)
        await settle(opener, opener.assign(target.instance), journal)
        async with asyncio.timeout(20):
            answer = await client.complete(prompt, max_tokens=5, request_id="orphan")
    assert len(answer.tokens) == 5
    assert answer.receipt


async def test_a_bus_that_stalls_in_the_middle_of_an_answer_only_delays_it(narrow: Running) -> None:
    children = psutil.Process(narrow.process.pid).children(recursive=True)
    (nats,) = [child.pid for child in children if "nats-server" in child.name()]
    async with Client(narrow.router) as client:
        whole = await client.complete(PROMPT, max_tokens=300, ignore_eos=True)
        token_ids: list[int] = []
        async for event in client.generate(PROMPT, max_tokens=300, ignore_eos=True, timeout=60):
            if isinstance(event, Accepted):
                os.kill(nats, signal.SIGSTOP)
                asyncio.get_running_loop().call_later(2.0, os.kill, nats, signal.SIGCONT)
            elif isinstance(event, Tokens):
                token_ids += [token.id for token in event.tokens]
    assert token_ids == [token.id for token in whole.tokens]
