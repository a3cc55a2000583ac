"""A service as a process: ``python -m countersign.services.<name> --config FILE``.

configuration -> bus -> streams, registry -> the service -> gRPC and NATS -> announced, SERVING
SIGTERM or SIGINT: withdrawn -> no new calls -> those in hand get 5 s -> closed -> exit 0
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from countersign import __version__
from countersign.services.runtime import config as configuration
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.call import methods_of
from countersign.services.runtime.clock import wall_ms
from countersign.services.runtime.config import Config
from countersign.services.runtime.errors import CountersignError, FailedPrecondition, Unavailable
from countersign.services.runtime.journal import Journal
from countersign.services.runtime.registry import Registry
from countersign.services.runtime.restart import MISCONFIGURED
from countersign.services.runtime.rpc_server import RpcServer
from countersign.services.runtime.service import Context, Create, Service
from countersign.services.runtime.telemetry import endpoint, logs, metrics, wiring
from countersign.v1.registry_pb2 import Instance

_GRACE_S = 5.0
# Until Python 3.12 `asyncio.wait_for`, which nats-py uses, loses a cancellation that comes together with an answer.
_HEARD_S = 0.2
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(name: str, create: Create, arguments: Sequence[str] | None = None) -> None:
    """Run a service until a signal or a failure, then exit: 0 stopped, 1 failed, 2 wrong configuration.

    Args:
        name: its short name, such as ``tokenizer``; also its section of the configuration.
        create: makes the service; may be slow, the process counts as starting until it returns.
        arguments: the command line without the program's name; ``sys.argv`` by default.
    """
    options = _parse(name, arguments)
    logs.configure(name)
    try:
        config = configuration.load(options.config, os.environ, options.overrides)
    except CountersignError as error:
        print(error, file=sys.stderr)
        sys.exit(MISCONFIGURED)
    process = _Process(name, config, create)
    telemetry = config.telemetry
    logs.configure(name, instance=process.instance, level=telemetry.log_level, style=telemetry.log_format)
    sys.exit(asyncio.run(_run(process)))


def _parse(name: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m countersign.services.{name}")
    parser.add_argument("--config", type=Path, help="TOML file, or what `countersign up` wrote")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args(arguments)


@dataclass(slots=True)
class _Process:
    name: str
    config: Config
    create: Create
    instance: str = field(init=False)
    log: logging.Logger = field(init=False)
    address: str = ""
    leaving: bool = False

    def __post_init__(self) -> None:
        self.instance = f"{self.name}-{os.urandom(4).hex()}"
        self.log = logging.getLogger(f"countersign.{self.name}")

    def own_address(self) -> str:
        if not self.address:
            raise FailedPrecondition(f"{self.name} does not listen yet")
        return self.address


async def _run(process: _Process) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.set)
    serving = asyncio.create_task(_serve(process), name=process.name)
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    # Wherever it is, in the middle of starting too, it undoes what it has done; more signals change nothing.
    while not (process.leaving or serving.done()):
        serving.cancel()
        await asyncio.wait({serving}, timeout=_HEARD_S)
    try:
        await serving
    except asyncio.CancelledError:
        process.log.info("stopped")
        return 0
    except CountersignError as error:
        about = {"error": str(error), "reason": error.reason}
        process.log.error("the service ends", extra=about)  # noqa: TRY400  the error says it all
        if isinstance(error, FailedPrecondition) and not process.address:
            return MISCONFIGURED
    except Exception:  # the process's last words
        process.log.exception("failed")
    return 1


async def _serve(process: _Process) -> None:
    """Start, then wait until cancelled. Raises what ends the service; undoes everything on the way out."""
    async with contextlib.AsyncExitStack() as undo:
        try:
            await _live(process, undo)
        finally:
            process.leaving = True


async def _live(process: _Process, undo: contextlib.AsyncExitStack) -> None:
    config = process.config
    wired = wiring.start(config.telemetry, service=process.name, instance=process.instance, data_dir=config.data_dir)
    undo.push_async_callback(asyncio.to_thread, wired.close)
    served = endpoint.start(config, service=process.name, instance=process.instance)
    undo.push_async_callback(asyncio.to_thread, served.close)
    bus = await _connect(process)
    metrics.observe(metrics.BUS_DROPPED, lambda: bus.dropped)
    undo.push_async_callback(bus.close)
    await wired.join(bus)
    journal = Journal(bus)
    await journal.ensure_streams(config.nats)
    registry = await undo.enter_async_context(Registry(bus, replicas=config.nats.replicas))
    served.discover = registry.everybody
    context = Context(
        config=config,
        bus=bus,
        journal=journal,
        registry=registry,
        name=process.name,
        instance=process.instance,
        address=process.own_address,
        log=process.log,
    )
    service = await process.create(context)
    # What is here now stays. A collection that looked through it (torch's modules: a third of a million objects)
    # would keep requests waiting for a tenth of a second.
    gc.freeze()
    undo.push_async_callback(service.close)
    background: list[asyncio.Task[None]] = []
    undo.push_async_callback(_cancel, background)  # once the last handler, which may need it, has ended
    await _open(process, context, service, undo, served.address)
    background += [
        asyncio.create_task(service.run(), name="service.run"),
        asyncio.create_task(bus.wait_closed(), name="bus closed"),
    ]
    await _until_failure(*background)


async def _connect(process: _Process) -> Bus:
    url = process.config.nats.url
    if not url:
        raise FailedPrecondition(
            "nats.url is empty, so there is no bus to join",
            reason="NO_BUS",
            help="start everything by `countersign up`, or name a running server: --set nats.url=nats://127.0.0.1:4222",
        )
    return await Bus.connect(url, process.instance)


async def _open(
    process: _Process, context: Context, service: Service, undo: contextlib.AsyncExitStack, metrics_address: str
) -> None:
    """Serve both transports, then tell the others. Undone in reverse: withdrawn first."""
    server = RpcServer(getattr(process.config, process.name).listen)
    server.add(service)
    process.address = await server.start(serving=False)
    undo.push_async_callback(_stop_calls, server, context.bus)
    methods = methods_of(service.descriptor, service)
    unary = {method.name: method for method in methods if method.unary}
    await context.bus.serve(process.name, process.instance, unary)
    record = Instance(
        service=process.name,
        instance=process.instance,
        address=process.address,
        pid=os.getpid(),
        started_unix_ms=wall_ms(),
        version=__version__,
        metrics_address=metrics_address,
    )
    await context.registry.announce(record, service.describe)
    undo.push_async_callback(context.registry.withdraw)
    await server.set_serving(True)
    process.log.info("ready", extra={"address": process.address})


async def _stop_calls(server: RpcServer, bus: Bus) -> None:
    await asyncio.gather(server.stop(_GRACE_S), bus.stop_serving(_GRACE_S))


async def _until_failure(work: asyncio.Task[None], lost: asyncio.Task[None]) -> None:
    await asyncio.wait({work, lost}, return_when=asyncio.FIRST_COMPLETED)
    if work.done():
        work.result()
        await lost  # a service without background work
    raise Unavailable("NATS closed the connection for good", reason="BUS_CLOSED")


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
