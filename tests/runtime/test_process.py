import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from nats.aio.msg import Msg

from countersign.services.runtime.bus import Bus
from countersign.services.runtime.config import Config, NatsConfig, dump
from countersign.services.runtime.nats_server import NatsServer
from countersign.services.runtime.registry import Registry
from countersign.services.runtime.rpc import Channel
from countersign.services.runtime.telemetry.lines import readable
from countersign.v1.kv_pb2 import LookupRequest, LookupResponse
from countersign.v1.registry_pb2 import Instance

Start = Callable[..., Awaitable[asyncio.subprocess.Process]]
PROGRAM = Path(__file__).with_name("kv_program.py")


@pytest.fixture
async def start(server: NatsServer, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts the program, its stderr to a pipe; whatever still runs at the end is killed."""
    processes: list[asyncio.subprocess.Process] = []
    file = tmp_path / "config.json"
    file.write_text(dump(Config(nats=NatsConfig(url=server.url))))

    async def start(*arguments: str, fault: str = "") -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(PROGRAM),
            *(arguments or ("--config", str(file))),
            env={**os.environ, "FAULT": fault},
            stderr=asyncio.subprocess.PIPE,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.fixture
async def registry(bus: Bus) -> AsyncIterator[Registry]:
    async with Registry(bus) as registry:
        yield registry


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    async with asyncio.timeout(20):
        _, errors = await process.communicate()
    return process.returncode, "\n".join(map(readable, errors.decode().splitlines()))


async def serving(instance: Instance) -> None:
    """Return when its gRPC server says that it serves."""
    async with Channel(instance.address) as channel, asyncio.timeout(20):
        path, request = "/grpc.health.v1.Health/Watch", HealthCheckRequest()
        async with aclosing(channel.stream(path, request, HealthCheckResponse, 20)) as states:
            async for state in states:
                if state.status == HealthCheckResponse.SERVING:
                    return


async def gone(registry: Registry) -> None:
    """Return when no kv service is in the registry; a withdrawal that was not sent is noticed sooner than the TTL."""
    async with asyncio.timeout(2):
        while registry.live("kv"):  # noqa: ASYNC110  the registry offers no event for this
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_service_answers_on_both_transports_and_leaves_cleanly_on_a_signal(
    start: Start, bus: Bus, registry: Registry, number: signal.Signals
) -> None:
    process = await start()
    instance = await registry.wait_for("kv", 20)
    await serving(instance)
    assert instance.pid == process.pid
    assert instance.instance.startswith("kv-")
    assert instance.active_requests == 7
    over_nats = await bus.call("kv", "Lookup", LookupRequest(), LookupResponse, timeout=5, instance=instance.instance)
    async with Channel(instance.address) as channel:
        path = "/countersign.v1.KvService/Lookup"
        over_grpc = await channel.unary(path, LookupRequest(), LookupResponse, 5)
    assert over_nats == over_grpc == LookupResponse(found=1, address=instance.address)
    process.send_signal(number)
    code, log = await ended(process)
    assert code == 0, log
    await gone(registry)
    assert f"INFO kv ready address={instance.address}" in log
    assert f"INFO kv closed address={instance.address}" in log


async def test_what_is_there_when_it_is_ready_is_no_work_for_the_collector(
    start: Start, bus: Bus, registry: Registry
) -> None:
    await start()
    await serving(await registry.wait_for("kv", 20))
    reply = await bus.call("kv", "Lookup", LookupRequest(holder="frozen"), LookupResponse, timeout=5)
    assert reply.found > 50_000


async def test_calls_in_hand_are_answered_before_the_process_ends(start: Start, bus: Bus, registry: Registry) -> None:
    started: asyncio.Queue[Msg] = asyncio.Queue()
    await bus.subscribe("test.slow.started", started.put)
    process = await start()
    instance = await registry.wait_for("kv", 20)
    await serving(instance)
    slow = LookupRequest(holder="slow")
    async with Channel(instance.address) as channel, asyncio.timeout(10):
        calls = [
            asyncio.create_task(bus.call("kv", "Lookup", slow, LookupResponse, timeout=10)),
            asyncio.create_task(channel.unary("/countersign.v1.KvService/Lookup", slow, LookupResponse, 10)),
        ]
        await started.get()
        await started.get()
        process.terminate()
        process.send_signal(signal.SIGINT)  # a second signal changes nothing
        await gone(registry)
        assert not any(call.done() for call in calls)
        await bus.publish("test.slow.go", b"", {})
        assert [reply.found for reply in await asyncio.gather(*calls)] == [1, 1]
    code, log = await ended(process)
    assert code == 0, log


async def test_a_background_loop_that_fails_ends_the_process_with_code_1(start: Start, registry: Registry) -> None:
    code, log = await ended(await start(fault="run"))
    assert code == 1
    assert "ERROR kv failed" in log
    assert "ValueError: the loop broke" in log
    await gone(registry)


@pytest.mark.parametrize(
    ("fault", "subject"), [("create", "$JS.API.STREAM.CREATE.KV_cs-instances"), ("deaf", "test.deaf")]
)
async def test_a_signal_while_starting_ends_the_process_cleanly(
    start: Start, bus: Bus, fault: str, subject: str
) -> None:
    connected: asyncio.Queue[Msg] = asyncio.Queue()
    await bus.subscribe(subject, connected.put)
    process = await start(fault=fault)
    async with asyncio.timeout(20):
        await connected.get()
    process.terminate()
    code, log = await ended(process)
    assert code == 0, log


async def test_a_wrong_configuration_ends_the_process_with_code_2_and_says_which(start: Start) -> None:
    code, log = await ended(await start("--set", "kv.ram_byte=1"))
    assert code == 2
    assert "unknown key kv.ram_byte (did you mean kv.ram_bytes?)" in log


async def test_a_bus_that_is_not_configured_ends_the_process_with_code_2(start: Start) -> None:
    code, log = await ended(await start("--set", "nats.port=0"))
    assert (code, "nats.url is empty" in log) == (2, True)
    assert "process.py" not in log
