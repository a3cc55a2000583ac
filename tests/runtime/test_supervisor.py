"""A stack of real processes: nats-server and small services that announce themselves like the real ones."""

import asyncio
import os
import sys
from pathlib import Path

import psutil
import pytest

from countersign.services.runtime.config import Config, DraftConfig, NatsConfig, load
from countersign.services.runtime.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from countersign.services.runtime.health import is_serving
from countersign.services.runtime.nats_server import NatsServer
from countersign.services.runtime.restart import Limits
from countersign.services.runtime.stack import read_stack
from countersign.services.runtime.supervisor import Complete, Ended, Event, Healthy, Patience, Supervisor

SERVICE = Path(__file__).with_name("small_service.py")
FAST = Limits(first_delay=0.05, max_delay=0.2)


def service(name: str, *flags: str) -> list[str]:
    return [sys.executable, str(SERVICE), name, *flags]


def script(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def survivors(folder: Path) -> list[list[str]]:
    """Command lines of processes that name the data folder: every process of a stack does."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if str(folder) in " ".join(command) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(command)
    return found


class Watched:
    """A supervisor whose events can be awaited."""

    def __init__(self, config: Config, services: dict[str, list[str]], *, patience: Patience | None = None) -> None:
        self.events: list[Event] = []
        self._changed = asyncio.Event()
        self.stack = Supervisor(config, services=services, on_event=self._on_event, limits=FAST, patience=patience)

    def _on_event(self, event: Event) -> None:
        self.events.append(event)
        self._changed.set()

    async def until(self, name: str, kind: type[Event], count: int) -> None:
        """Until ``count`` events of a kind about a process have come."""
        async with asyncio.timeout(30):
            while sum(isinstance(e, kind) and getattr(e, "name", "") == name for e in self.events) < count:
                self._changed.clear()
                await self._changed.wait()


def watched(folder: Path, *names: str, config: Config | None = None) -> Watched:
    return Watched(config or Config(data_dir=folder), {name: service(name) for name in names})


def kill(pid: int | None) -> None:
    assert pid is not None
    psutil.Process(pid).kill()


async def test_a_stack_is_found_by_its_folder_while_it_runs_and_leaves_nothing(tmp_path: Path) -> None:
    watch = watched(tmp_path, "kv", "router")
    async with watch.stack as stack:
        found = read_stack(tmp_path)
        assert (found.router, found.nats, found.pid) == (stack.router_address, stack.nats_url, os.getpid())
        assert await is_serving(stack.router_address)
        assert await is_serving(stack.address("kv"))
        assert len(survivors(tmp_path)) == 3
    assert survivors(tmp_path) == []
    with pytest.raises(Unavailable):
        read_stack(tmp_path)
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"nats.log", "kv.log", "router.log"}


async def test_each_process_is_reported_once_it_is_healthy_and_the_whole_last(tmp_path: Path) -> None:
    watch = watched(tmp_path, "kv", "router")
    async with watch.stack as stack:
        first, *services, last = watch.events
    assert first == Healthy("nats", stack.nats_url)
    assert set(services) == {Healthy(name, stack.address(name)) for name in ("kv", "router")}
    assert isinstance(last, Complete)
    assert last.router == stack.router_address
    assert 0 < last.after_s < 60


async def test_services_get_the_resolved_configuration(tmp_path: Path) -> None:
    config = Config(data_dir=tmp_path, draft=DraftConfig(tokens=7))
    async with watched(tmp_path, "router", config=config).stack as stack:
        handed = load(tmp_path / "config.json", os.environ, [])
    assert (handed.nats.url, handed.draft.tokens, handed.data_dir) == (stack.nats_url, 7, tmp_path)


async def test_a_killed_service_comes_back(tmp_path: Path) -> None:
    watch = watched(tmp_path, "kv", "router")
    async with watch.stack as stack:
        before = stack.pid("kv")
        kill(before)
        await watch.until("kv", Healthy, 2)
        assert stack.pid("kv") not in (None, before)
        assert await is_serving(stack.address("kv"))
        ended = [event for event in watch.events if isinstance(event, Ended)]
    assert [(event.name, event.code) for event in ended] == [("kv", -9)]


async def test_a_router_that_comes_back_elsewhere_is_found_there(tmp_path: Path) -> None:
    watch = watched(tmp_path, "router")
    async with watch.stack as stack:
        before = stack.router_address
        kill(stack.pid("router"))
        await watch.until("router", Healthy, 2)
        assert read_stack(tmp_path).router == stack.router_address != before


async def test_a_killed_nats_server_comes_back_with_its_port_and_services_are_found_through_it(tmp_path: Path) -> None:
    watch = watched(tmp_path, "kv", "router")
    async with watch.stack as stack:
        url, kv = stack.nats_url, stack.pid("kv")
        kill(stack.pid("nats"))
        await watch.until("nats", Healthy, 2)
        assert (stack.nats_url, stack.pid("kv")) == (url, kv)
        kill(kv)
        await watch.until("kv", Healthy, 2)


async def test_a_proxy_in_the_environment_does_not_hide_local_services(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    async with watched(tmp_path, "router").stack as stack:
        assert await is_serving(stack.router_address)


async def test_a_service_that_cannot_start_is_given_up_with_the_tail_of_its_log(tmp_path: Path) -> None:
    broken = script("import sys; print('loading', flush=True); sys.exit('no such model: x')")
    stack = Supervisor(Config(data_dir=tmp_path), services={"kv": service("kv"), "target": broken}, limits=FAST)
    with pytest.raises(Unavailable, match=r"target ended 3 times .* code 1: no such model: x .*target\.log") as caught:
        await stack.start()
    assert "\n" not in str(caught.value)
    assert (caught.value.reason, caught.value.metadata["log_tail"]) == ("SERVICE_FAILED", "loading\nno such model: x")
    assert survivors(tmp_path) == []


async def test_a_service_that_never_becomes_healthy_is_given_up_after_a_while(tmp_path: Path) -> None:
    mute = script("import time; print('loading'); time.sleep(60)")
    stack = Supervisor(Config(data_dir=tmp_path), services={"kv": mute}, patience=Patience(start=0.5))
    with pytest.raises(DeadlineExceeded, match=r"kv was not healthy within 0\.5 s"):
        await stack.start()
    assert survivors(tmp_path) == []


async def test_a_service_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    stack = Supervisor(
        Config(data_dir=tmp_path), services={"router": service("router", "deaf")}, patience=Patience(stop=0.2)
    )
    await stack.start()
    await stack.stop()
    assert survivors(tmp_path) == []


async def test_a_second_stack_on_a_folder_is_refused_and_the_first_left_alone(tmp_path: Path) -> None:
    async with watched(tmp_path, "router").stack as first:
        with pytest.raises(FailedPrecondition, match=f"in use by the stack of process {os.getpid()}"):
            await watched(tmp_path, "router").stack.start()
        assert read_stack(tmp_path).router == first.router_address
        assert await is_serving(first.router_address)


async def test_without_drafting_no_draft_is_started(tmp_path: Path) -> None:
    config = Config(data_dir=tmp_path, draft=DraftConfig(enabled=False))
    async with watched(tmp_path, "draft", "router", config=config).stack as stack:
        assert stack.pid("draft") is None
        assert stack.address("draft") == ""


async def test_a_server_named_by_the_configuration_is_used_and_left_running(tmp_path: Path) -> None:
    async with NatsServer(tmp_path / "elsewhere") as server:
        config = Config(data_dir=tmp_path / "stack", nats=NatsConfig(url=server.url))
        async with watched(tmp_path / "stack", "router", config=config).stack as stack:
            assert (stack.nats_url, stack.pid("nats")) == (server.url, None)
        assert server.child is not None
        assert server.child.exit_code is None


async def test_another_stacks_service_of_the_same_name_is_not_taken_for_ours(tmp_path: Path) -> None:
    mute = script("import time; time.sleep(60)")
    async with watched(tmp_path / "first", "kv").stack as first:
        config = Config(data_dir=tmp_path / "second", nats=NatsConfig(url=first.nats_url))
        second = Supervisor(config, services={"kv": mute}, patience=Patience(start=0.5))
        with pytest.raises(DeadlineExceeded, match="kv was not healthy"):
            await second.start()


async def test_a_taken_nats_port_ends_the_start_at_once(tmp_path: Path) -> None:
    async with NatsServer(tmp_path / "elsewhere") as server:
        config = Config(data_dir=tmp_path / "stack", nats=NatsConfig(port=server.port))
        with pytest.raises(FailedPrecondition, match=str(server.port)):
            await watched(tmp_path / "stack", "router", config=config).stack.start()
    assert survivors(tmp_path) == []


@pytest.mark.parametrize("seen", ["lock", "logs/nats.log", "config.json", "logs/router.log", "stack.json"])
async def test_a_start_cancelled_at_any_moment_leaves_nothing(tmp_path: Path, seen: str) -> None:
    watch = watched(tmp_path, "kv", "router")
    start = asyncio.create_task(watch.stack.start())
    async with asyncio.timeout(30):
        while True:
            if (tmp_path / seen).exists():
                break
            await asyncio.sleep(0)
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    await watch.stack.stop()
    assert survivors(tmp_path) == []
    async with watched(tmp_path, "router").stack:  # the lock is free, the data is sound
        pass


def test_the_default_stack_is_the_six_services_of_this_package() -> None:
    default = Supervisor(Config())._commands
    assert set(default) == {"tokenizer", "draft", "target", "kv", "auditor", "sidecar", "router"}
    assert default["kv"] == [sys.executable, "-P", "-m", "countersign.services.kv"]


async def test_a_supervisor_that_never_started_stops_without_ado(tmp_path: Path) -> None:
    await watched(tmp_path / "folder", "router").stack.stop()
    assert not (tmp_path / "folder").exists()
