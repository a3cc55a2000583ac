"""The house test and what drafting is worth: held-out prompts, drafting on and off, greedy and drawn."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from typing import Literal

from countersign.cli.bench import Row, stack_config
from countersign.cli.prompts import heldout_prompts
from countersign.client import Answer, Client
from countersign.services.runtime.supervisor import Supervisor

TOKENS = 64
STREAMS = 16


async def run(quick: bool) -> list[Row]:
    """200 prompts of 64 tokens, 16 at a time, each with drafting on and off."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        config = stack_config(folder)
        prompts = [p.text for p in heldout_prompts(config.target.model.parent, 16 if quick else 200)]
        async with Supervisor(config) as stack:
            for temperature in (0.0, 0.8):
                rows += await _compare(stack.router_address, prompts, temperature)
    return rows


async def _compare(router: str, prompts: Sequence[str], temperature: float) -> list[Row]:
    with_draft, with_seconds = await _answers(router, prompts, temperature, "model")
    without, without_seconds = await _answers(router, prompts, temperature, "off")
    case, n = f"temperature {temperature:g}", len(prompts)
    same = sum(_ids(a) == _ids(b) for a, b in zip(with_draft, without, strict=True))
    tokens = sum(answer.usage.output_tokens for answer in with_draft)
    passes = sum(answer.usage.target_passes for answer in with_draft)
    accepted = sum(answer.usage.accepted_tokens for answer in with_draft)
    drafted = sum(answer.usage.drafted_tokens for answer in with_draft)
    per_pass = tokens / passes
    greedy = temperature == 0
    return [
        Row("house", case, "answers identical with drafting off", same / n, "share", n, "1", same == n),
        Row("house", case, "tokens accepted", accepted, "tokens", n, "> 0", accepted > 0),
        Row("house", case, "share of drafts accepted", accepted / drafted, "share", n),
        Row(
            "house",
            case,
            "tokens per target pass, drafts of 4",
            per_pass,
            "tokens",
            n,
            ">= 2.0" if greedy else None,
            per_pass >= 2.0 if greedy else None,
        ),
        Row(
            "house",
            case,
            f"throughput, {STREAMS} streams, drafting on",
            tokens / with_seconds,
            "tokens/s",
            n,
            peer="drafting off",
            ratio=without_seconds / with_seconds,
        ),
    ]


async def _answers(
    router: str, prompts: Sequence[str], temperature: float, drafting: Literal["model", "off"]
) -> tuple[list[Answer], float]:
    gate = asyncio.Semaphore(STREAMS)

    async def one(client: Client, seed: int, prompt: str) -> Answer:
        async with gate:
            return await client.complete(
                prompt,
                max_tokens=TOKENS,
                temperature=temperature,
                seed=seed,
                drafting=drafting,
                tenant=f"{drafting}-{temperature}",
                timeout=600,
            )

    began = time.perf_counter()
    async with Client(router) as client:
        found = await asyncio.gather(*(one(client, i, prompt) for i, prompt in enumerate(prompts)))
    return list(found), time.perf_counter() - began


def _ids(answer: Answer) -> list[int]:
    return [token.id for token in answer.tokens]
