"""Prefill apart from decode (ADR 19): the same tokens as without, whoever dies in the middle of it.

One target for prefill, one that answers. Counters prove the path: blocks that the one offered, tokens that the other
found stored.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from stacks import Running, running_stack

from countersign.client import Answer, Client, FinishReason
from countersign.services.protocol.commit import LogState, replay
from countersign.services.protocol.subjects import commit_subject
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.errors import CountersignError, InvalidArgument, Unavailable
from countersign.services.runtime.journal import Journal
from countersign.services.runtime.registry import Registry
from countersign.v1.kv_pb2 import GetStatsRequest, GetStatsResponse
from countersign.v1.registry_pb2 import Instance, TargetRole
from countersign.v1.target_pb2 import RefreshRequest, RefreshResponse, SetRoleRequest, SetRoleResponse

LENGTH = 48
CHUNK = 16
PREFILL, DECODE = TargetRole.TARGET_ROLE_PREFILL, TargetRole.TARGET_ROLE_DECODE
# After which every target has told anew what it has done.
HEARTBEAT_S = 2.5


def prompt(number: int, tokens: int = 1960) -> list[int]:
    """Ids of no text, and no two prompts begin alike."""
    return [3 + (number * 31 + index * index) % 200 for index in range(tokens)]


def full_blocks(tokens: list[int]) -> int:
    """Tokens in those blocks of a prompt that can come from the store."""
    return (len(tokens) - 1) // 16 * 16


@dataclass(frozen=True, slots=True)
class Stage:
    """A view of a stack from outside."""

    running: Running
    bus: Bus
    registry: Registry

    async def log(self, request_id: str) -> LogState:
        return replay(request_id, await Journal(self.bus).read(commit_subject(request_id)))

    def of(self, kind: str) -> Instance:
        """The store, or the target for prefill."""
        return next(each for each in self.registry.live(kind) if kind == "kv" or each.role == PREFILL)

    def role(self, instance: str) -> TargetRole.ValueType:
        return next(each.role for each in self.registry.live("target") if each.instance == instance)

    async def offered(self, least: int = 0) -> int:
        """Blocks that targets have offered, as the registry tells once it is so many."""
        async with asyncio.timeout(10):
            while True:
                found = sum(each.prefilled_blocks for each in self.registry.live("target"))
                if found >= least:
                    return found
                await asyncio.sleep(0.05)

    async def stored(self) -> int:
        stats = await self.bus.call("kv", "GetStats", GetStatsRequest(), GetStatsResponse, timeout=5)
        return stats.blocks

    async def half_way(self) -> None:
        """A prompt's first blocks are stored, and more to come."""
        before = await self.stored()
        async with asyncio.timeout(20):
            while await self.stored() < before + 4:
                pass

    async def answer(self, request_id: str, tokens: list[int], temperature: float = 0.0) -> Answer:
        return await answered(self.running.router, request_id, tokens, temperature)

    async def all_live(self) -> None:
        """Raises CountersignError, unless both targets answer and nobody else is known."""
        targets = self.registry.live("target")
        if sorted(each.role == PREFILL for each in targets) != [False, True]:
            raise Unavailable("a target is away, or a dead one still known", reason="NOT_READY")
        for each in targets:
            request = RefreshRequest(request_id="nobody")
            await self.bus.call("target", "Refresh", request, RefreshResponse, timeout=1, instance=each.instance)

    async def ready(self) -> None:
        """Wait until what was hurt is back and nobody tells of the dead any more, and prompts are split again: a target
        leaves a store that failed alone.
        """
        async with asyncio.timeout(90):
            for turn in itertools.count():
                with suppress(CountersignError):
                    await self.all_live()
                    probe = await self.answer(f"probe-{os.urandom(4).hex()}", prompt(1000 + turn, 300))
                    if probe.usage.cached_prompt_tokens:
                        return
                await asyncio.sleep(0.2)


async def answered(router: str, request_id: str, tokens: list[int], temperature: float) -> Answer:
    async with asyncio.timeout(60), Client(router) as client:
        return await client.complete(
            tokens,
            request_id=request_id,
            tenant=request_id,  # nobody else's blocks
            max_tokens=LENGTH,
            ignore_eos=True,
            temperature=temperature,
            seed=7,
        )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Its processes get hurt, so that the stack is this file's own."""
    settings = ("target.prefill_processes=1", f"target.prefill_chunk={CHUNK}", "router.split_prompt_tokens=256")
    with running_stack(tmp_path_factory.mktemp("split") / "data", *settings) as running:
        yield running


@asynccontextmanager
async def watched(running: Running) -> AsyncIterator[Stage]:
    async with await Bus.connect(running.nats, "test") as bus, Registry(bus) as registry:
        yield Stage(running, bus, registry)


@pytest.fixture
async def stage(running: Running) -> AsyncIterator[Stage]:
    async with watched(running) as stage:
        await stage.ready()
        yield stage


def ids(answer: Answer) -> list[int]:
    return [token.id for token in answer.tokens]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_one_target_computes_long_prompts_and_another_answers_with_the_same_tokens(
    stage: Stage, stack: Running, temperature: float
) -> None:
    prompts = [prompt(number, 700 + 7 * number) for number in range(4)]
    before, name = await stage.offered(), f"t{int(10 * temperature)}"
    split = await asyncio.gather(
        *(stage.answer(f"split-{name}-{n}", each, temperature) for n, each in enumerate(prompts))
    )
    whole = [await answered(stack.router, f"whole-{name}-{n}", each, temperature) for n, each in enumerate(prompts)]
    assert [ids(answer) for answer in split] == [ids(answer) for answer in whole]
    tokens = [full_blocks(each) for each in prompts]
    assert [answer.usage.cached_prompt_tokens for answer in split] == tokens, "not all came from the store"
    await stage.offered(before + sum(tokens) // 16)
    prefiller = stage.of("target").instance
    logs = [await stage.log(answer.request_id) for answer in split]
    assert prefiller not in {log.instance for log in logs}
    assert [answer.usage.cached_prompt_tokens for answer in whole] == [0] * len(prompts)


@pytest.mark.parametrize(
    ("kind", "hurt"),
    [("target", signal.SIGKILL), ("target", signal.SIGSTOP), ("kv", signal.SIGKILL)],
    ids=["prefill killed", "prefill stopped", "store killed"],
)
async def test_who_dies_in_the_middle_of_a_prompt_costs_a_pause_and_no_token(
    stage: Stage, stack: Running, kind: str, hurt: signal.Signals
) -> None:
    name, tokens = f"hurt-{kind}-{hurt.name}", prompt(hurt.value + len(kind))
    victim = stage.of(kind).pid
    answering = asyncio.create_task(stage.answer(name, tokens))
    await stage.half_way()
    os.kill(victim, hurt)
    try:
        found = await answering
    finally:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGCONT)
    whole = await answered(stack.router, f"whole-{name}", tokens, 0.0)
    assert ids(found) == ids(whole)
    cached = found.usage.cached_prompt_tokens
    assert cached < full_blocks(tokens), "it was over before it was hurt"
    assert (cached > 0) == (kind == "target"), "what was stored before was not used"
    log = await stage.log(name)
    assert log.epoch == 1, "an answer had begun"


async def test_a_cancel_ends_the_prefill_too(stage: Stage) -> None:
    async with asyncio.timeout(30), Client(stage.running.router) as client:
        answering = asyncio.create_task(client.complete(prompt(3), request_id="given-up", tenant="given-up"))
        await stage.half_way()
        assert await client.cancel("given-up") is FinishReason.CANCELLED
        assert (await answering).finish is FinishReason.CANCELLED
        stored = await stage.stored()
        while stage.of("target").pending_prompt_tokens:  # noqa: ASYNC110  as a heartbeat tells
            await asyncio.sleep(0.05)
    assert await stage.stored() - stored <= 4
    log = await stage.log("given-up")
    assert log.epoch == 0, "it was answered"
    assert log.closed is not None


async def test_an_operator_can_have_a_target_do_something_else(stage: Stage) -> None:
    prefiller = stage.of("target").instance

    async def have(role: TargetRole.ValueType) -> None:
        request = SetRoleRequest(role=role)
        await stage.bus.call("target", "SetRole", request, SetRoleResponse, timeout=5, instance=prefiller)
        async with asyncio.timeout(10):
            while stage.role(prefiller) != role:  # noqa: ASYNC110  as a heartbeat tells
                await asyncio.sleep(0.05)

    await have(TargetRole.TARGET_ROLE_MIXED)
    answer = await stage.answer("unsplit", prompt(4))
    assert answer.usage.cached_prompt_tokens == 0
    await have(PREFILL)
    answer = await stage.answer("split-again", prompt(4))
    assert answer.usage.cached_prompt_tokens == full_blocks(prompt(4))
    with pytest.raises(InvalidArgument, match="no role"):
        await have(TargetRole.TARGET_ROLE_UNSPECIFIED)


async def test_an_overloaded_pool_has_a_target_of_the_other_compute_prompts_until_it_has_drained(
    tmp_path: Path, stack: Running
) -> None:
    settings = (
        "target.role=decode",
        "target.processes=2",
        "target.prefill_processes=1",
        f"target.prefill_chunk={CHUNK}",
        "router.full_prompt_tokens=1500",
    )
    with running_stack(tmp_path / "pools", *settings) as running:
        async with watched(running) as stage:

            async def by_role() -> dict[TargetRole.ValueType, int]:
                """Blocks offered by targets of each role, once a heartbeat has told of all."""
                await asyncio.sleep(HEARTBEAT_S)
                found: dict[TargetRole.ValueType, int] = {}
                for each in stage.registry.live("target"):
                    found[each.role] = found.get(each.role, 0) + each.prefilled_blocks
                return found

            prompts = [prompt(number) for number in range(20, 26)]
            split = await asyncio.gather(*(stage.answer(f"pools-{n}", each) for n, each in enumerate(prompts)))
            overloaded = await by_role()
            assert overloaded[PREFILL] > 0
            assert overloaded[DECODE] > 0, "nobody was borrowed"
            # One at a time overloads nobody, and gives back.
            for number in range(3):
                await stage.answer(f"drained-{number}", prompt(30 + number, 600))
            drained = await by_role()
            assert drained[DECODE] == overloaded[DECODE]
            assert drained[PREFILL] > overloaded[PREFILL]
    whole = [await answered(stack.router, f"whole-pools-{n}", each, 0.0) for n, each in enumerate(prompts)]
    assert [ids(answer) for answer in split] == [ids(answer) for answer in whole]
