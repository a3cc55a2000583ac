"""Processes die in the middle of answers: requests go on, and the stack mends itself."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import psutil
import pytest
from stacks import Running, running_stack

from countersign.client import Client, Tokens
from countersign.services.runtime.errors import CountersignError

PROMPT = "class Stack:\n    def push(self, item):\n"


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A stack of this file's own, since it gets hurt."""
    with running_stack(tmp_path_factory.mktemp("hurt") / "data") as running:
        yield running


def service(running: Running, name: str) -> int:
    """Process id of a service of the stack."""
    for child in psutil.Process(running.process.pid).children(recursive=True):
        if f"countersign.services.{name}" in " ".join(child.cmdline()):
            return child.pid
    pytest.fail(f"no process runs {name}")


async def recovered(running: Running) -> list[int]:
    """The tokens of a short answer, once the stack gives one again."""
    async with asyncio.timeout(60):
        while True:
            try:
                async with Client(running.router) as client:
                    answer = await client.complete(PROMPT, max_tokens=16, timeout=20)
                    return [token.id for token in answer.tokens]
            except CountersignError:
                await asyncio.sleep(0.2)


async def test_the_draft_dies_and_the_answer_goes_on_with_the_same_tokens(own_stack: Running) -> None:
    async with Client(own_stack.router) as client:
        whole = await client.complete(PROMPT, max_tokens=200, ignore_eos=True, drafting="off")
        token_ids: list[int] = []
        async for event in client.generate(PROMPT, max_tokens=200, ignore_eos=True):
            if isinstance(event, Tokens):
                if not token_ids:
                    os.kill(service(own_stack, "draft"), signal.SIGKILL)
                token_ids += [token.id for token in event.tokens]
    assert token_ids == [token.id for token in whole.tokens]


async def test_the_tokenizer_dies_and_the_answer_goes_on_with_the_same_text(own_stack: Running) -> None:
    async with Client(own_stack.router) as client:
        whole = await client.complete(PROMPT, max_tokens=200, ignore_eos=True)
        text = ""
        async for event in client.generate(PROMPT, max_tokens=200, ignore_eos=True):
            if isinstance(event, Tokens):
                if not text:
                    os.kill(service(own_stack, "tokenizer"), signal.SIGKILL)
                text += event.text
    assert text == whole.text


async def test_the_store_dies_and_requests_go_on(own_stack: Running) -> None:
    before = await recovered(own_stack)
    os.kill(service(own_stack, "kv"), signal.SIGKILL)
    assert await recovered(own_stack) == before


async def test_the_only_target_dies_and_its_request_goes_on_when_it_is_up_again(own_stack: Running) -> None:
    async with asyncio.timeout(60), Client(own_stack.router) as client:
        whole = await client.complete(PROMPT, max_tokens=1000, ignore_eos=True)
        token_ids: list[int] = []
        async for event in client.generate(PROMPT, max_tokens=1000, ignore_eos=True):
            if isinstance(event, Tokens):
                if not token_ids:
                    os.kill(service(own_stack, "target"), signal.SIGKILL)
                token_ids += [token.id for token in event.tokens]
    assert token_ids == [token.id for token in whole.tokens]
