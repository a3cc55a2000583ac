"""Whole stacks over the kv store: what it kept on disk outlives its process, and a lossy wire is in the receipt."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import psutil
from stacks import Running, running_stack

from countersign.client import Answer, Client
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.errors import CountersignError
from countersign.v1.kv_pb2 import GetStatsRequest, GetStatsResponse
from countersign.verify.receipt import parse

PROMPT = [3 + 7 * number % 400 for number in range(320)]
FULL_BLOCKS = 19  # the last token is always computed


async def complete(running: Running, *, timeout: float = 60) -> Answer:  # noqa: ASYNC109
    async with Client(running.router) as client:
        return await client.complete(PROMPT, max_tokens=8, ignore_eos=True, temperature=0.8, seed=5, timeout=timeout)


async def stats(running: Running) -> GetStatsResponse:
    async with await Bus.connect(running.nats, "test") as bus:
        return await bus.call("kv", "GetStats", GetStatsRequest(), GetStatsResponse, timeout=5)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(90):
        while True:
            with suppress(CountersignError):
                if await condition():
                    return
            await asyncio.sleep(0.1)


def kill(running: Running, *names: str) -> None:
    for child in psutil.Process(running.process.pid).children(recursive=True):
        if any(f"countersign.services.{name}" in " ".join(child.cmdline()) for name in names):
            os.kill(child.pid, signal.SIGKILL)


async def test_blocks_on_disk_outlive_the_store_and_the_target(tmp_path: Path) -> None:
    with running_stack(tmp_path / "data", "kv.disk_bytes=67108864") as running:
        first = await complete(running)
        assert first.usage.cached_prompt_tokens == 0

        async def on_disk() -> bool:
            return (await stats(running)).disk.blocks >= FULL_BLOCKS

        await until(on_disk)
        kill(running, "kv", "target")

        async def restored() -> bool:
            found = await stats(running)
            return found.disk.blocks >= FULL_BLOCKS and found.sealed == 0

        await until(restored)
        again: list[Answer] = []

        async def answered() -> bool:
            again.append(await complete(running, timeout=10))
            return True

        await until(answered)
        assert [token.id for token in again[0].tokens] == [token.id for token in first.tokens]
        assert again[0].usage.cached_prompt_tokens == 16 * FULL_BLOCKS


async def test_a_lossy_wire_is_declared_in_the_receipt_and_used(tmp_path: Path) -> None:
    with running_stack(tmp_path / "data", "target.kv_wire=int8") as running:
        first = await complete(running)
        assert parse(first.receipt).receipt.evidence.kv_policy == "int8"

        async def stored() -> bool:
            return (await stats(running)).blocks >= FULL_BLOCKS

        await until(stored)
        found = await stats(running)
        kill(running, "target")
        again: list[Answer] = []

        async def answered() -> bool:
            again.append(await complete(running, timeout=10))
            return True

        await until(answered)
        assert again[0].usage.cached_prompt_tokens == 16 * FULL_BLOCKS
        assert (await stats(running)).read > found.read
