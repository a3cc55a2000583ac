"""Loads that benchmarks put on a running stack."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from countersign.client import Client, Tokens

STREAMS = 16


async def throughput(router: str, prompts: Sequence[str], answers: int, tokens: int = 64) -> float:
    """Tokens a second of so many answers of ``tokens`` tokens, 16 at a time."""
    gate = asyncio.Semaphore(STREAMS)

    async def one(client: Client, number: int) -> int:
        async with gate:
            answer = await client.complete(
                prompts[number % len(prompts)], max_tokens=tokens, ignore_eos=True, seed=number
            )
            return answer.usage.output_tokens

    async with Client(router) as client:
        begin = time.perf_counter()
        made = sum(await asyncio.gather(*(one(client, number) for number in range(answers))))
        return made / (time.perf_counter() - begin)


async def first_token_s(client: Client, prompt: str) -> float:
    """Seconds until the first token of one answer, which is then read to its end."""
    begin, first = time.perf_counter(), 0.0
    async for event in client.generate(prompt, max_tokens=4, ignore_eos=True):
        if isinstance(event, Tokens) and not first:
            first = time.perf_counter() - begin
    return first
