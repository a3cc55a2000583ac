import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from countersign.services.runtime.bus import Bus
from countersign.services.runtime.errors import Unavailable
from countersign.services.runtime.nats_server import NatsServer
from countersign.services.runtime.registry import Registry
from countersign.v1.registry_pb2 import Instance

Connect = Callable[[], Awaitable[Bus]]
TTL = 1.0


def registry_on(bus: Bus) -> Registry:
    return Registry(bus, ttl=TTL, heartbeat=0.2)


def record(instance: str, service: str = "target", *, draining: bool = False) -> Instance:
    return Instance(service=service, instance=instance, address="127.0.0.1:1", pid=1, draining=draining)


async def until(condition: Callable[[], bool], within: float = 10.0) -> float:
    """Seconds until the condition holds."""
    start = time.monotonic()
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110  time alone makes it true
            await asyncio.sleep(0.01)
    return time.monotonic() - start


async def test_an_announced_instance_is_seen_by_those_before_and_after(connect: Connect) -> None:
    async with registry_on(await connect()) as before, registry_on(await connect()) as announcing:
        await announcing.announce(record("t1"))
        assert (await before.wait_for("target", 5)).instance == "t1"
        async with registry_on(await connect()) as after:
            assert [each.instance for each in after.live("target")] == ["t1"]
            assert after.live("draft") == []


async def test_who_only_looks_sees_all_makes_nothing_and_is_told_where_there_is_nothing(connect: Connect) -> None:
    looking = registry_on(await connect())
    with pytest.raises(Unavailable) as caught:
        await looking.start(create=False)
    await looking.stop()
    assert (caught.value.reason, caught.value.help) == ("NO_REGISTRY", "start one: countersign up")
    async with registry_on(await connect()) as one, registry_on(await connect()) as other:
        await one.announce(record("t1"))
        await other.announce(record("d1", "draft"))
        await looking.start(create=False)
        assert [each.instance for each in looking.everybody()] == ["d1", "t1"]
        await looking.stop()


async def test_heartbeats_keep_an_instance_alive_and_its_record_fresh(connect: Connect) -> None:
    requests = 0

    def refresh(instance: Instance) -> None:
        nonlocal requests
        requests += 1
        instance.active_requests = requests

    async with registry_on(await connect()) as view, registry_on(await connect()) as announcing:
        await announcing.announce(record("t1"), refresh)
        await view.wait_for("target", 5)
        for _ in range(15):  # twice the TTL
            await asyncio.sleep(TTL / 7)
            assert len(view.live("target")) == 1
        assert view.live("target")[0].active_requests > 5


async def test_an_instance_that_stops_renewing_disappears_within_ttl_and_two_seconds(connect: Connect) -> None:
    dying = await connect()
    announcing = registry_on(dying)
    await announcing.start()
    await announcing.announce(record("t1"))
    async with registry_on(await connect()) as view:
        await view.wait_for("target", 5)
        await dying.close()  # as a killed process: without a word
        assert await until(lambda: not view.live("target")) < TTL + 2
        with pytest.raises(Unavailable) as caught:
            await view.wait_for("target", 0.1)
        assert caught.value.reason == "NO_INSTANCE"
    await announcing.stop()


async def test_a_view_opened_after_the_last_renewal_counts_from_that(connect: Connect) -> None:
    dying = await connect()
    announcing = registry_on(dying)
    await announcing.start()
    await announcing.announce(record("t1"))
    await dying.close()
    renewed = time.monotonic()
    await asyncio.sleep(TTL * 0.7)
    async with registry_on(await connect()) as view:
        await until(lambda: not view.live("target"))
        assert time.monotonic() - renewed < TTL + 0.5
    await announcing.stop()


async def test_a_withdrawn_instance_is_gone_at_once(connect: Connect) -> None:
    async with registry_on(await connect()) as view, registry_on(await connect()) as announcing:
        await announcing.announce(record("t1"))
        await view.wait_for("target", 5)
        await announcing.withdraw()
        assert await until(lambda: not view.live("target")) < TTL / 2
        async with registry_on(await connect()) as after:
            assert after.live("target") == []


async def test_waiting_ends_when_an_instance_that_takes_work_comes(connect: Connect) -> None:
    async with (
        registry_on(await connect()) as view,
        registry_on(await connect()) as old,
        registry_on(await connect()) as new,
    ):
        await old.announce(record("t1", draining=True))
        await until(lambda: len(view.live("target")) == 1)
        waiting = asyncio.create_task(view.wait_for("target", 10))
        await new.announce(record("t2"))
        assert (await waiting).instance == "t2"
        assert [each.instance for each in view.live("target")] == ["t1", "t2"]


async def test_the_registry_mends_itself_when_the_server_restarts(server: NatsServer, connect: Connect) -> None:
    async with registry_on(await connect()) as view, registry_on(await connect()) as announcing:
        await announcing.announce(record("t1"))
        await view.wait_for("target", 5)
        assert server.child is not None
        server.child.kill()
        await until(lambda: not view.live("target"))
        await server.start()
        assert (await view.wait_for("target", 20)).instance == "t1"


async def test_a_description_that_fails_is_logged_and_the_heartbeat_goes_on(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(instance: Instance) -> None:
        raise ValueError("cannot describe")

    async with registry_on(await connect()) as view, registry_on(await connect()) as announcing:
        await announcing.announce(record("t1"), fail)
        assert (await view.wait_for("target", 5)).instance == "t1"
    assert "a service failed to describe itself" in caplog.text


async def test_a_record_that_cannot_be_read_is_passed_over(bus: Bus, connect: Connect) -> None:
    async with registry_on(await connect()) as view:
        await bus.publish("$KV.cs-instances.target.bad", b"\xff\xff", {})
        async with registry_on(await connect()) as announcing:
            await announcing.announce(record("t1"))
            assert (await view.wait_for("target", 5)).instance == "t1"
            assert len(view.live("target")) == 1
