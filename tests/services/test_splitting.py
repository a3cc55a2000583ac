"""What a router waits for while a prompt is computed ahead: bounded, whatever the target does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from google.protobuf.message import Message

from countersign.services.protocol.commit import LogState
from countersign.services.router.splitting import Splitter
from countersign.services.runtime.clock import wall_ms
from countersign.services.runtime.config import Config, RouterConfig
from countersign.services.runtime.errors import ResourceExhausted, Unavailable
from countersign.v1.commit_pb2 import Opened
from countersign.v1.registry_pb2 import Instance, TargetRole
from countersign.v1.router_pb2 import ModelInfo
from countersign.v1.target_pb2 import PrefillResponse, RefreshResponse

WEIGHTS = bytes(32)
PREFILL, DECODE = TargetRole.TARGET_ROLE_PREFILL, TargetRole.TARGET_ROLE_DECODE


async def for_ever(timeout: float) -> None:  # noqa: ASYNC109  as the bus does
    await asyncio.sleep(min(timeout, 60))
    raise Unavailable("no answer in time", reason="LATE")


async def at_once(timeout: float) -> None:  # noqa: ASYNC109
    """It answers."""


async def refused(timeout: float) -> None:  # noqa: ASYNC109
    raise ResourceExhausted("full", reason="TARGET_FULL")


async def dead(timeout: float) -> None:  # noqa: ASYNC109
    raise Unavailable("nobody listens", reason="NO_RESPONDERS")


Reaction = Callable[[float], Awaitable[None]]


@dataclass
class House:
    """Targets that react to a call as they are told; ``called``: (method, instance)."""

    targets: list[Instance]
    prefill: Reaction = at_once
    refresh: Reaction = at_once
    called: list[tuple[str, str]] = field(default_factory=list)
    pending: int = 0

    def live(self, service: str) -> list[Instance]:
        assert service == "target"
        return self.targets

    async def call(
        self,
        service: str,
        method: str,
        request: Message,
        reply: type[Message],
        *,
        timeout: float,  # noqa: ASYNC109  as the bus does
        instance: str,
        traced: bool = True,
    ) -> Message:
        self.called.append((method, instance))
        self.pending += 1
        try:
            await (self.prefill if method == "Prefill" else self.refresh)(timeout)
        finally:
            self.pending -= 1
        return PrefillResponse(done=True) if method == "Prefill" else RefreshResponse()

    def splitter(self, timeout_ms: int = 30_000) -> Splitter:
        config = Config(router=RouterConfig(split_prompt_tokens=100, split_timeout_ms=timeout_ms))
        return Splitter(cast("Any", SimpleNamespace(config=config, bus=self, registry=self, log=logging.getLogger())))

    @property
    def prefills(self) -> list[str]:
        return [instance for method, instance in self.called if method == "Prefill"]


def target(name: str, role: TargetRole.ValueType, tokens: int = 0) -> Instance:
    model = ModelInfo(weights_sha256=WEIGHTS)
    return Instance(service="target", instance=name, role=role, pending_prompt_tokens=tokens, model=model)


def log(tokens: int = 200, deadline_ms: int = 60_000) -> LogState:
    opened = Opened(
        prompt_token_ids=range(tokens), weights_sha256=WEIGHTS, deadline_unix_ms=wall_ms() + deadline_ms, tenant="t"
    )
    return replace(LogState("r"), opened=opened)


def both() -> list[Instance]:
    return [target("d", DECODE), target("p", PREFILL)]


async def test_long_prompts_go_to_the_target_for_prefill_and_short_ones_to_nobody() -> None:
    house = House(both())
    splitter = house.splitter()
    await splitter.prefill(log(99))
    assert house.called == []
    await splitter.prefill(log(100))
    assert house.prefills == ["p"]
    assert [each.instance for each in splitter.answerers(log())] == ["d", "p"]


@pytest.mark.parametrize(
    "targets",
    [
        [target("p", PREFILL)],
        [target("m", TargetRole.TARGET_ROLE_MIXED), target("d", DECODE)],
        [target("d", DECODE), target("p", PREFILL, tokens=8192)],
    ],
    ids=["who prefills would answer", "nobody is there for it", "who is is full"],
)
async def test_who_answers_computes_the_prompt_itself_where_nobody_else_should(targets: list[Instance]) -> None:
    house = House(targets)
    await house.splitter().prefill(log())
    assert house.called == []


async def test_prompts_that_the_registry_does_not_know_of_yet_count_for_the_queue() -> None:
    house = House([target("d", DECODE), target("p1", PREFILL), target("p2", PREFILL, tokens=150)], prefill=for_ever)
    splitter = house.splitter()
    running = [asyncio.create_task(splitter.prefill(log())) for _ in range(2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert house.prefills == ["p1", "p2"]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def test_a_prompt_that_was_given_up_counts_no_more() -> None:
    house = House([target("d", DECODE), target("p1", PREFILL), target("p2", PREFILL, tokens=150)], prefill=for_ever)
    splitter = house.splitter()
    running = asyncio.create_task(splitter.prefill(log()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    house.prefill = at_once
    await splitter.prefill(log())
    assert house.prefills == ["p1", "p1"]


@pytest.mark.parametrize(
    ("prefill", "refresh", "timeout_ms", "deadline_ms"),
    [
        (refused, at_once, 30_000, 60_000),
        (for_ever, dead, 30_000, 60_000),
        (for_ever, at_once, 50, 60_000),
        (for_ever, at_once, 30_000, 50),
    ],
    ids=["it refuses", "it died over it", "it is slow", "the deadline is near"],
)
async def test_the_request_goes_on_without_a_prefill_that_does_not_come(
    prefill: Reaction, refresh: Reaction, timeout_ms: int, deadline_ms: int
) -> None:
    house = House(both(), prefill, refresh)
    async with asyncio.timeout(10):
        await house.splitter(timeout_ms).prefill(log(deadline_ms=deadline_ms))
    assert house.prefills == ["p"]
    assert house.pending == 0, "a call is left behind"


async def test_a_prompt_goes_to_the_next_where_the_registry_tells_of_a_target_that_died() -> None:
    house = House([*both(), target("q", PREFILL), target("r", PREFILL)])

    async def only_r(timeout: float) -> None:  # noqa: ASYNC109
        if house.called[-1][1] != "r":
            await dead(timeout)

    house.prefill = only_r
    await house.splitter().prefill(log())
    assert house.prefills == ["p", "q", "r"]


async def test_nobody_is_asked_twice_where_all_died() -> None:
    house = House([*both(), target("q", PREFILL)], dead)
    async with asyncio.timeout(10):
        await house.splitter().prefill(log())
    assert house.prefills == ["p", "q"]


async def test_a_target_that_is_busy_and_answers_is_waited_for() -> None:
    house, done = House(both()), asyncio.Event()

    async def slowly(timeout: float) -> None:  # noqa: ASYNC109
        while len(house.called) < 4:  # noqa: ASYNC110  asked three times meanwhile
            await asyncio.sleep(0.01)
        done.set()

    house.prefill = slowly
    async with asyncio.timeout(10):
        await house.splitter().prefill(log())
    assert done.is_set()
    assert [method for method, _ in house.called] == ["Prefill", "Refresh", "Refresh", "Refresh"]
