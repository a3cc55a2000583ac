"""Many clients at once: every request ends with all its tokens and one valid receipt, or with a typed error."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from stacks import Running

from countersign.cli.prompts import heldout_prompts
from countersign.client import Client
from countersign.services.runtime.errors import CountersignError
from countersign.verify.audit import audit
from countersign.verify.keys import load_public
from countersign.verify.receipt import parse

CLIENTS = 16


@pytest.mark.parametrize(
    "seconds", [4, pytest.param(60, marks=[pytest.mark.long, pytest.mark.timeout(300)])], ids=["short", "long"]
)
async def test_sixteen_clients_get_every_token_and_one_receipt_each(stack: Running, root: Path, seconds: int) -> None:
    prompts = [prompt.text for prompt in heldout_prompts(root / "infra" / "models", 50)]
    key = load_public(stack.data_dir / "keys" / "receipts.pub")
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    done: list[str] = []
    refused: list[CountersignError] = []

    async def client(number: int) -> None:
        async with Client(stack.router) as connection:
            turn = 0
            while loop.time() < end:
                turn += 1
                index = (number * 7 + turn) % len(prompts)
                try:
                    answer = await connection.complete(
                        prompts[index], max_tokens=32, temperature=0.8 * (turn % 2), seed=turn, ignore_eos=True
                    )
                except CountersignError as error:
                    refused.append(error)
                    continue
                assert len(answer.tokens) == 32
                report = audit(answer.receipt, trusted_keys=[key], reference=None, levels=["form", "count"])
                assert report.verdict == "pass", report
                assert parse(answer.receipt).receipt.request_id == answer.request_id
                done.append(answer.request_id)

    async with asyncio.timeout(seconds + 120):
        await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    assert len(done) == len(set(done)) >= CLIENTS
    assert [error for error in refused if not error.reason] == []
    print(f"{len(done)} answers, {len(refused)} typed refusals in {seconds} s")
