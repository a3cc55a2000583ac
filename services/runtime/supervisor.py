"""The whole stack as local processes: nats-server and the services, kept running, stopped in order.

    async with Supervisor(config) as stack:      # a program that uses a stack
        ... stack.router_address ...
    await Supervisor(config).run()               # `countersign up`: until SIGINT or SIGTERM

Start: lock the data folder; nats-server; config.json; all services side by side, each healthy when its gRPC health
service, at the address that it announced in the registry, says SERVING; stack.json. Stop is the reverse: stack.json,
services, nats-server, lock. However this process ends, none of its children outlives it (child.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Never, Self, TypeVar

from countersign.services.runtime.bus import Bus
from countersign.services.runtime.child import Child
from countersign.services.runtime.clock import wall_ms
from countersign.services.runtime.config import Config, TargetConfig, dump
from countersign.services.runtime.errors import CountersignError, Unavailable
from countersign.services.runtime.health import is_serving
from countersign.services.runtime.keeper import Ended, Healthy, Keeper
from countersign.services.runtime.nats_server import NatsServer
from countersign.services.runtime.registry import Registry
from countersign.services.runtime.restart import Limits, RestartPolicy
from countersign.services.runtime.stack import DataFolderLock, Stack, stack_file, write_stack

__all__ = [
    "NATS",
    "ROUTER",
    "SERVICES",
    "Complete",
    "Ended",
    "Event",
    "Healthy",
    "Patience",
    "Supervisor",
    "service_command",
]

NATS = "nats"
ROUTER = "router"
DRAFT = "draft"
SIDECAR = "sidecar"
TARGET = "target"
SERVICES = ("tokenizer", DRAFT, TARGET, "kv", "auditor", SIDECAR, ROUTER)
# Between a service's name and the number of its process.
COPY = "-"

_PROBE_S = 0.05
_DISCONNECT_S = 2.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Complete:
    """All is healthy, ``after_s`` seconds after `Supervisor.start` was called."""

    router: str
    after_s: float


Event = Healthy | Ended | Complete


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: for a process to become healthy, and to end when asked to."""

    start: float = 120.0
    stop: float = 5.0


def service_command(name: str) -> list[str]:
    """What runs a service of this package; ``-P`` so that no file of the current folder can shadow a module."""
    return [sys.executable, "-P", "-m", f"countersign.services.{name}"]


class Supervisor:
    """A stack of processes on this machine; one start and one stop.

    Args:
        config: with ``nats.url`` set, that server is used and none is started.
        services: names of this package's services, or names with their commands; each command gets ``--config FILE``.
            Draft and sidecar are left out where ``config.draft.enabled`` or ``config.sidecar.enabled`` is false.
        on_event: called in the event loop with each `Event`.
        limits: of restarts.
        patience: with starts and stops.
    """

    def __init__(
        self,
        config: Config,
        *,
        services: Sequence[str] | Mapping[str, Sequence[str]] = SERVICES,
        on_event: Callable[[Event], None] = lambda _: None,
        limits: Limits | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._config = config
        self._data_dir = config.data_dir.absolute()
        commands = services if isinstance(services, Mapping) else {name: service_command(name) for name in services}
        off = {name for name, on in ((DRAFT, config.draft.enabled), (SIDECAR, config.sidecar.enabled)) if not on}
        self._commands = {name: list(command) for name, command in commands.items() if name not in off}
        self._commands |= _more_targets(self._commands, config.target)
        self._on_event = on_event
        self._policy = RestartPolicy(limits)
        self._patience = patience or Patience()
        self._keepers: dict[str, Keeper] = {}
        self._undo = contextlib.AsyncExitStack()  # filled as start() goes, unwound by stop()
        self._stopping = asyncio.Lock()
        self._failure: asyncio.Future[Never] | None = None
        self._nats_url = config.nats.url
        self._complete_at = 0

    @property
    def data_dir(self) -> Path:
        return self._data_dir

    @property
    def nats_url(self) -> str:
        return self._nats_url

    @property
    def router_address(self) -> str:
        return self.address(ROUTER)

    def address(self, name: str) -> str:
        """Where a service was last healthy (host:port; for ``nats`` its URL); empty when it has not been yet."""
        keeper = self._keepers.get(name)
        return keeper.address if keeper else ""

    def pid(self, name: str) -> int | None:
        """Process id of a service, or of ``nats``, that runs now."""
        child = self._keepers[name].child if name in self._keepers else None
        return child.pid if child is not None and child.exit_code is None else None

    async def start(self) -> None:
        """Start everything and wait until all of it is healthy. Leaves nothing behind when it fails or is cancelled.

        Raises:
            FailedPrecondition: reason DATA_FOLDER_IN_USE, DATA_FOLDER_UNUSABLE, NATS_SERVER_MISSING or PORT_TAKEN.
            Unavailable: reason SERVICE_FAILED: a process failed again and again (metadata ``log_tail``), or nobody
                answers at ``nats.url``.
            DeadlineExceeded: reason SERVICE_FAILED: a process did not become healthy in time.
        """
        began = time.monotonic()
        self._failure = asyncio.get_running_loop().create_future()
        async with contextlib.AsyncExitStack() as on_failure:
            on_failure.push_async_callback(self.stop)
            self._lock_folder()
            if not self._nats_url:
                await self._start_nats()
            registry = await self._connect()
            self._start_services(registry)
            await self._or_failure(self._all_healthy())
            self._publish_stack()
            on_failure.pop_all()
        self._on_event(Complete(self.router_address, time.monotonic() - began))

    async def run(self) -> None:
        """Start, keep everything running until SIGINT or SIGTERM, stop. A second signal stops without grace.

        Raises:
            CountersignError: whatever `start` raises.
        """
        work = asyncio.create_task(self._serve())
        with _signals(first=work.cancel, again=self._kill) as asked:
            try:
                await work
            except asyncio.CancelledError:
                if not asked.is_set():
                    raise

    async def stop(self) -> None:
        """Stop what runs, in order. Does nothing when nothing does. When cancelled, kills instead of waiting."""
        async with self._stopping:
            await self._undo.aclose()
        if self._failure is not None and not self._failure.cancel() and not self._failure.cancelled():
            self._failure.exception()  # reported by start() or run(), if anybody asked

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def _serve(self) -> None:
        async with self:
            await self._or_failure(asyncio.Event().wait())

    def _lock_folder(self) -> None:
        lock = DataFolderLock(self._data_dir)
        lock.acquire()
        self._undo.callback(lock.release)
        stack_file(self._data_dir).unlink(missing_ok=True)  # of a stack that was killed

    async def _start_nats(self) -> None:
        server = NatsServer(self._data_dir, port=self._config.nats.port, log=self._log(NATS))
        keeper = self._keep(NATS, server.spawn, server.ready)
        self._undo.push_async_callback(keeper.stop, self._patience.stop)
        await self._or_failure(keeper.healthy.wait())
        self._nats_url = server.url

    async def _connect(self) -> Registry:
        bus = await self._or_failure(Bus.connect(self._nats_url, "supervisor"))
        self._undo.push_async_callback(_in_time, bus.close)
        registry = Registry(bus, replicas=self._config.nats.replicas)
        await self._or_failure(registry.start())
        self._undo.push_async_callback(_in_time, registry.stop)
        return registry

    def _start_services(self, registry: Registry) -> None:
        file = self._data_dir / "config.json"
        nats = replace(self._config.nats, url=self._nats_url)
        file.write_text(dump(replace(self._config, data_dir=self._data_dir, nats=nats)))
        self._undo.push_async_callback(self._stop_services)
        for name, command in self._commands.items():
            spawn = partial(Child, [*command, "--config", str(file)], log=self._log(name))
            self._keep(name, spawn, partial(_probe, registry, name.split(COPY)[0]))

    async def _all_healthy(self) -> None:
        # At the same time: one that was healthy may be gone again when the slowest is.
        while waiting := [keeper for keeper in self._keepers.values() if not keeper.healthy.is_set()]:
            await waiting[0].healthy.wait()

    async def _stop_services(self) -> None:
        services = [keeper for name, keeper in self._keepers.items() if name != NATS]
        await asyncio.gather(*(keeper.stop(self._patience.stop) for keeper in services))

    def _keep(self, name: str, spawn: Callable[[], Child], probe: Callable[[Child], Awaitable[str]]) -> Keeper:
        keeper = Keeper(
            name,
            spawn=spawn,
            probe=probe,
            policy=self._policy,
            notify=self._notify,
            patience=self._patience.start,
        )
        self._keepers[name] = keeper
        keeper.start().add_done_callback(self._keeper_ended)
        return keeper

    def _keeper_ended(self, task: asyncio.Task[Never]) -> None:
        if task.cancelled() or self._failure is None:
            return
        error = task.exception()
        if error is not None and not self._failure.done():
            self._failure.set_exception(error)

    def _notify(self, event: Healthy | Ended) -> None:
        if isinstance(event, Healthy) and event.name == ROUTER and self._complete_at:
            self._write_stack()  # a router on a free port has another one now
        self._on_event(event)

    def _publish_stack(self) -> None:
        self._complete_at = wall_ms()
        self._undo.callback(stack_file(self._data_dir).unlink, missing_ok=True)
        self._write_stack()

    def _write_stack(self) -> None:
        write_stack(self._data_dir, Stack(self.router_address, self._nats_url, os.getpid(), self._complete_at))

    def _kill(self) -> None:
        for keeper in self._keepers.values():
            keeper.kill()

    def _log(self, name: str) -> Path:
        return self._data_dir / "logs" / f"{name}.log"

    async def _or_failure(self, awaitable: Awaitable[T]) -> T:
        """What ``awaitable`` gives, unless a process is given up first."""
        if self._failure is None:
            raise Unavailable("the supervisor has not been started")
        wanted = asyncio.ensure_future(awaitable)
        try:
            either: list[asyncio.Future[Any]] = [wanted, self._failure]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return wanted.result() if wanted.done() else self._failure.result()
        finally:
            wanted.cancel()
            await asyncio.gather(wanted, return_exceptions=True)


def _more_targets(commands: Mapping[str, Sequence[str]], config: TargetConfig) -> dict[str, list[str]]:
    """The targets beyond the first, each on a free port; those for prefill last."""
    if TARGET not in commands:
        return {}
    command = [*commands[TARGET], "--set", "target.listen=127.0.0.1:0"]
    prefill = [*command, "--set", "target.role=prefill"]
    kinds = [command] * (config.processes - 1) + [prefill] * config.prefill_processes
    return {f"{TARGET}{COPY}{number}": kind for number, kind in enumerate(kinds, start=2)}


async def _probe(registry: Registry, name: str, child: Child) -> str:
    """The address of the service that ``child`` runs, once it serves."""
    while child.exit_code is None:
        for instance in registry.live(name):
            # By process, because the record of the process before this one lives on for some seconds.
            if instance.pid == child.pid and await is_serving(instance.address):
                return instance.address
        await asyncio.sleep(_PROBE_S)
    raise Unavailable(f"{name} ended with code {child.exit_code}")


async def _in_time(close: Callable[[], Awaitable[None]]) -> None:
    """Close a connection, but do not wait for a server that may be gone."""
    with contextlib.suppress(TimeoutError, CountersignError):
        async with asyncio.timeout(_DISCONNECT_S):
            await close()


@contextlib.contextmanager
def _signals(*, first: Callable[[], object], again: Callable[[], object]) -> Iterator[asyncio.Event]:
    """Handle SIGINT and SIGTERM: ``first`` once, then ``again``. The event is set from the first on."""
    asked = asyncio.Event()

    def handle() -> None:
        action = again if asked.is_set() else first
        asked.set()
        action()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle)
    try:
        yield asked
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
