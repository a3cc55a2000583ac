"""A service that does nothing but start and stop like a real one: ``small_service.py NAME [deaf] --config FILE``."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from countersign.services.runtime.bus import Bus
from countersign.services.runtime.config import load
from countersign.services.runtime.registry import Registry
from countersign.v1.registry_pb2 import Instance


async def main(name: str, *, deaf: bool, config_file: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, (lambda: None) if deaf else stop.set)
    health = HealthServicer()
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    bus = await Bus.connect(load(config_file, {}, []).nats.url, name)
    registry = Registry(bus)
    await registry.start()
    pid = os.getpid()
    await registry.announce(Instance(service=name, instance=str(pid), address=f"127.0.0.1:{port}", pid=pid))
    await stop.wait()
    await registry.withdraw()
    await registry.stop()
    await bus.close()
    await server.stop(grace=0)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], deaf="deaf" in sys.argv, config_file=Path(sys.argv[-1])))
