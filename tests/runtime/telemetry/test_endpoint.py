"""A process's metrics over HTTP, as Prometheus, and whoever means it no good, meets them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from countersign import __version__
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.config import Config, NatsConfig, RouterConfig, dump
from countersign.services.runtime.errors import FailedPrecondition
from countersign.services.runtime.nats_server import NatsServer
from countersign.services.runtime.registry import Registry
from countersign.services.runtime.telemetry import endpoint
from countersign.services.runtime.telemetry.endpoint import MOST_CALLS, Served, targets
from countersign.v1.registry_pb2 import Instance, TargetRole

PROGRAM = Path(__file__).resolve().parents[1] / "kv_program.py"
Start = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture
async def start(server: NatsServer, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a service as a process; what still runs at the end is killed."""
    processes: list[asyncio.subprocess.Process] = []
    file = tmp_path / "config.json"
    file.write_text(dump(Config(nats=NatsConfig(url=server.url), data_dir=tmp_path)))

    async def start(*settings: str) -> asyncio.subprocess.Process:
        options = [item for setting in settings for item in ("--set", setting)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(PROGRAM), "--config", str(file), *options, stderr=asyncio.subprocess.PIPE
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


async def get(address: str, path: str, accept: str = "text/plain") -> tuple[int, str, str]:
    """Status, type, body."""

    def ask() -> tuple[int, str, str]:
        try:
            with urlopen(Request(f"http://{address}{path}", headers={"Accept": accept}), timeout=10) as reply:
                return reply.status, reply.headers["Content-Type"], reply.read().decode()
        except HTTPError as error:
            return error.code, error.headers["Content-Type"], error.read().decode()

    return await asyncio.to_thread(ask)


async def test_a_process_serves_its_metrics_where_it_says_in_both_formats(start: Start, registry: Registry) -> None:
    await start()
    instance = await registry.wait_for("kv", 20)
    assert instance.version == __version__
    status, kind, text = await get(instance.metrics_address, "/metrics")
    assert (status, kind.partition(";")[0]) == (200, "text/plain")
    assert "countersign_bus_dropped_total 0.0" in text
    assert f'service_instance_id="{instance.instance}",service_name="kv"' in text
    assert "process_resident_memory_bytes" in text
    status, kind, text = await get(instance.metrics_address, "/metrics", "application/openmetrics-text;version=1.0.0")
    assert (status, kind.partition(";")[0]) == (200, "application/openmetrics-text")
    assert text.endswith("# EOF\n")
    assert (await get(instance.metrics_address, "/secrets"))[0] == 404


async def test_every_process_tells_where_all_of_them_serve(start: Start, registry: Registry) -> None:
    await start()
    instance = await registry.wait_for("kv", 20)
    async with asyncio.timeout(10):
        while (body := (await get(instance.metrics_address, "/targets"))[2]) == "[]":  # noqa: ASYNC110  no event
            await asyncio.sleep(0.05)
    labels = {"service": "kv", "instance": instance.instance, "role": ""}
    assert json.loads(body) == [{"targets": [instance.metrics_address], "labels": labels}]


async def test_an_address_in_use_ends_the_process_and_names_the_key(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = await start(f"telemetry.metrics_listen=127.0.0.1:{taken.getsockname()[1]}")
        async with asyncio.timeout(20):
            _, errors = await process.communicate()
    assert process.returncode == 2
    assert "set telemetry.metrics_listen to another address" in errors.decode()
    assert "Traceback" not in errors.decode()


def test_a_router_has_an_address_of_its_own_for_prometheus_to_begin_with() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = Config(router=_router(f"127.0.0.1:{taken.getsockname()[1]}"))
        with pytest.raises(FailedPrecondition, match=r"router\.metrics_listen") as caught:
            endpoint.start(config, service="router", instance="router-1")
    assert caught.value.reason == "ADDRESS_UNUSABLE"


def _router(listen: str) -> RouterConfig:
    return RouterConfig(metrics_listen=listen)


async def test_switched_off_nothing_is_served_and_prometheus_client_is_not_even_imported(
    start: Start, registry: Registry, tmp_path: Path
) -> None:
    await start("telemetry.metrics=false")
    instance = await registry.wait_for("kv", 20)
    assert (instance.metrics_address, instance.version) == ("", __version__)
    program = (
        "import sys\n"
        "from countersign.services.runtime.config import load\n"
        "from countersign.services.runtime.telemetry import endpoint, metrics\n"
        "served = endpoint.start(load(None, {}, ['telemetry.metrics=false']), service='kv', instance='kv-1')\n"
        "metrics.counter(metrics.TAKEOVERS).add(1)\n"
        "served.close()\n"
        "print(any('prometheus_client' in name for name in sys.modules))\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, env=dict(os.environ)
    )
    out, _ = await process.communicate()
    assert out.decode().strip() == "False"


def test_prometheus_discovers_who_serves_with_service_instance_and_role() -> None:
    target = Instance(
        service="target",
        instance="target-1",
        metrics_address="127.0.0.1:1234",
        role=TargetRole.TARGET_ROLE_PREFILL,
    )
    quiet = Instance(service="kv", instance="kv-1")
    assert targets([target, quiet]) == [
        {"targets": ["127.0.0.1:1234"], "labels": {"service": "target", "instance": "target-1", "role": "prefill"}}
    ]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server without the process around it, whose peers may be silent for half a second."""
    monkeypatch.setattr(endpoint, "PATIENCE_S", 0.5)
    server = endpoint._listening("telemetry.metrics_listen", "127.0.0.1:0")
    served = Served(server, f"127.0.0.1:{server.server_port}")

    def scrape(environ: object, start_response: Callable[..., object]) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"up 1\n"]

    served.open(scrape)
    yield served
    served.close()


async def test_peers_that_say_nothing_neither_grow_a_thread_each_nor_keep_others_out(served: Served) -> None:
    host, port = served.address.split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(4 * MOST_CALLS)]
    try:
        assert await get(served.address, "/metrics") == (200, "text/plain", "up 1\n")
        answering = [thread for thread in threading.enumerate() if "process_request" in thread.name]
        assert len(answering) <= MOST_CALLS
    finally:
        for each in silent:
            each.close()


async def test_what_is_not_http_is_let_go_and_the_next_is_answered(served: Served) -> None:
    host, port = served.address.split(":")
    with socket.create_connection((host, int(port))) as peer:
        peer.sendall(b"\x16\x03\x01" + bytes(200) + b"\n")
        peer.settimeout(10)
        while peer.recv(4096):
            pass
    assert (await get(served.address, "/metrics"))[0] == 200


async def test_after_its_end_nobody_listens(served: Served) -> None:
    assert (await get(served.address, "/metrics"))[0] == 200
    served.close()
    host, port = served.address.split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


async def test_silent_peers_do_not_keep_a_process_from_ending(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PATIENCE_S", 600)
    assert served._server is not None
    free, full = served._server._free, threading.Event()
    acquire = free.acquire

    def acquired(**wait: Any) -> bool:
        found = acquire(**wait)
        if not found:
            full.set()
        return found

    monkeypatch.setattr(free, "acquire", acquired)
    host, port = served.address.split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(MOST_CALLS + 1)]
    try:
        assert await asyncio.to_thread(full.wait, 20)
        async with asyncio.timeout(20):
            await asyncio.to_thread(served.close)
    finally:
        for each in silent:
            each.close()
