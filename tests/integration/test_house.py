"""The house test (DESIGN.md section 1): what changes the speed must not change a token.

{drafting on, off} x {alone, in a batch} x {cold, warm store} x {greedy, drawn}, token by token, with counters that show
that each path was really taken. The long form is the issue's bar: 200 held-out prompts of 64 tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
from stacks import Running

from countersign.cli.prompts import heldout_prompts
from countersign.client import Answer, Client

BATCH = 16


async def answers(
    router: str,
    prompts: Sequence[str],
    *,
    drafting: Literal["model", "off"],
    temperature: float,
    tokens: int,
    tenant: str,
    batch: int = BATCH,
) -> list[Answer]:
    """One answer a prompt, ``batch`` at a time."""
    gate = asyncio.Semaphore(batch)

    async def one(client: Client, index: int, prompt: str) -> Answer:
        async with gate:
            return await client.complete(
                prompt,
                max_tokens=tokens,
                temperature=temperature,
                seed=index,
                drafting=drafting,
                tenant=tenant,
                timeout=600,
            )

    async with Client(router) as client:
        return list(await asyncio.gather(*(one(client, i, prompt) for i, prompt in enumerate(prompts))))


def ids(found: Sequence[Answer]) -> list[list[int]]:
    return [[token.id for token in answer.tokens] for answer in found]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("count", "tokens"), [(12, 24), pytest.param(200, 64, marks=[pytest.mark.long, pytest.mark.timeout(3000)])]
)
async def test_drafting_batching_and_the_store_change_no_token(
    stack: Running, root: Path, temperature: float, count: int, tokens: int
) -> None:
    prompts = [prompt.text for prompt in heldout_prompts(root / "infra" / "models", count)]
    name = f"house-{temperature}-{count}"
    drafted = await answers(
        stack.router, prompts, drafting="model", temperature=temperature, tokens=tokens, tenant=f"{name}-a"
    )
    # Before the other runs fill the store and these blocks make room.
    alone = await answers(
        stack.router, prompts[:6], drafting="model", temperature=temperature, tokens=tokens, tenant=f"{name}-a", batch=1
    )
    plain = await answers(
        stack.router, prompts, drafting="off", temperature=temperature, tokens=tokens, tenant=f"{name}-b"
    )
    assert ids(drafted) == ids(plain)
    assert sum(answer.usage.accepted_tokens for answer in drafted) > 0
    assert sum(answer.usage.drafted_tokens for answer in plain) == 0
    assert ids(alone) == ids(drafted)[:6]
    assert sum(answer.usage.cached_prompt_tokens for answer in alone) > 0, "nothing came from the store"
    assert sum(answer.usage.cached_prompt_tokens for answer in plain) == 0, "the cold runs were not cold"
