"""A target that spans rank processes: the tokens of one that does not, and a rank's death is a pause."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import psutil
import pytest
from scraping import scraped
from stacks import Running, running_stack

from countersign.cli.prompts import heldout_prompts
from countersign.client import Answer, Client, Finished, FinishReason, Tokens
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.registry import Registry
from countersign.verify.audit import audit
from countersign.verify.difr import load_reference
from countersign.verify.keys import load_public

PROMPT = "class Stack:\n    def push(self, item):\n"


def ranked(folder: Path, ranks: int) -> AbstractContextManager[Running]:
    """A stack of its own whose target spans ``ranks`` processes; small units, so that short prompts use all."""
    settings = (f"target.ranks={ranks}", "target.rank_unit=64", "target.rank_timeout_ms=10000")
    return running_stack(folder / "data", *settings)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with ranked(tmp_path_factory.mktemp("ranks"), 2) as running:
        yield running


def rank_pids(running: Running) -> list[int]:
    """Of the target's ranks."""
    target = next(
        child
        for child in psutil.Process(running.process.pid).children(recursive=True)
        if "countersign.services.target" in " ".join(child.cmdline())
    )
    return [child.pid for child in target.children() if "spawn_main" in " ".join(child.cmdline())]


async def house(router: str, prompts: list[str], tokens: int, temperature: float) -> list[list[int]]:
    """Token ids, drafting on, eight at a time."""
    gate = asyncio.Semaphore(8)

    async def one(client: Client, seed: int, prompt: str) -> Answer:
        async with gate:
            return await client.complete(
                prompt, max_tokens=tokens, temperature=temperature, seed=seed, ignore_eos=True, timeout=600
            )

    async with Client(router) as client:
        answers = await asyncio.gather(*(one(client, seed, prompt) for seed, prompt in enumerate(prompts)))
    return [[token.id for token in answer.tokens] for answer in answers]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_two_ranks_give_the_tokens_of_one(
    stack: Running, two_ranks: Running, demo_models: dict[str, Path], temperature: float
) -> None:
    prompts = [prompt.text for prompt in heldout_prompts(demo_models["target"].parent, 12)]
    expected = await house(stack.router, prompts, 48, temperature)
    assert await house(two_ranks.router, prompts, 48, temperature) == expected


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("ranks", [2, 4])
async def test_the_long_house_test_over_ranks(
    stack: Running, tmp_path: Path, demo_models: dict[str, Path], ranks: int
) -> None:
    prompts = [prompt.text for prompt in heldout_prompts(demo_models["target"].parent, 200)]
    with ranked(tmp_path, ranks) as running:
        for temperature in (0.0, 0.8):
            expected = await house(stack.router, prompts, 64, temperature)
            assert await house(running.router, prompts, 64, temperature) == expected


async def test_a_rank_dies_in_the_middle_of_an_answer_and_nothing_is_lost(
    stack: Running, two_ranks: Running, demo_models: dict[str, Path]
) -> None:
    [expected] = await house(stack.router, [PROMPT], 300, 0.7)
    token_ids: list[int] = []
    finished: Finished | None = None
    async with asyncio.timeout(100), Client(two_ranks.router) as client:
        async for event in client.generate(PROMPT, max_tokens=300, ignore_eos=True, temperature=0.7, seed=0):
            if isinstance(event, Tokens):
                if not token_ids:
                    os.kill(rank_pids(two_ranks)[1], signal.SIGKILL)
                token_ids += [token.id for token in event.tokens]
            elif isinstance(event, Finished):
                finished = event
    assert token_ids == expected
    assert finished is not None
    assert finished.reason is FinishReason.LENGTH
    report = audit(
        finished.receipt,
        trusted_keys=[load_public(two_ranks.data_dir / "keys" / "receipts.pub")],
        reference=partial(load_reference, demo_models["target"]),
    )
    assert report.verdict == "pass", report


async def test_no_rank_outlives_its_target(tmp_path: Path) -> None:
    with ranked(tmp_path, 2) as running:
        pids = rank_pids(running)
        assert len(pids) == 2
        os.kill(psutil.Process(pids[0]).ppid(), signal.SIGKILL)
        gone, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
        assert not alive, gone


async def test_operators_see_the_bytes_between_ranks_by_direction(two_ranks: Running) -> None:
    async with Client(two_ranks.router) as client:
        await client.complete(PROMPT * 20, max_tokens=2)  # long enough for queries to travel round the ring
    async with await Bus.connect(two_ranks.nats, "test") as bus, Registry(bus) as registry:
        await registry.wait_for("target", 20)
        sent = await scraped(registry, "target", "countersign_ring_sent_bytes_total", "countersign_ring_direction")
    assert sent.keys() == {"forward", "back"}
    assert min(sent.values()) > 0
