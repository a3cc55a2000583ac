"""A kv service as a process, misbehaving on request: ``kv_program.py --config FILE`` with FAULT in the environment."""

import asyncio
import gc
import os
from contextlib import suppress

from nats.aio.msg import Msg

from countersign.services.runtime import process
from countersign.services.runtime.service import Call, Context
from countersign.v1 import kv_pb2
from countersign.v1.registry_pb2 import Instance


class Kv:
    descriptor = kv_pb2.DESCRIPTOR.services_by_name["KvService"]

    def __init__(self, context: Context) -> None:
        self._context = context

    async def run(self) -> None:
        if os.environ.get("FAULT") == "run":
            raise ValueError("the loop broke")

    async def close(self) -> None:
        self._context.log.info("closed", extra={"address": self._context.address()})

    def describe(self, instance: Instance) -> None:
        instance.active_requests = 7

    async def Lookup(self, request: kv_pb2.LookupRequest, call: Call) -> kv_pb2.LookupResponse:
        if request.holder == "slow":
            await self._wait_for_go()
        if request.holder == "frozen":
            return kv_pb2.LookupResponse(found=gc.get_freeze_count())
        return kv_pb2.LookupResponse(found=1, address=self._context.address())

    async def _wait_for_go(self) -> None:
        go = asyncio.Event()

        async def receive(msg: Msg) -> None:
            go.set()

        bus = self._context.bus
        await bus.subscribe("test.slow.go", receive)
        await bus.flush()
        await bus.publish("test.slow.started", b"", {})
        await go.wait()

    async def Reserve(self, request: kv_pb2.ReserveRequest, call: Call) -> kv_pb2.ReserveResponse:
        return kv_pb2.ReserveResponse()

    Put = Get = Release = GetStats = Reserve


async def create(context: Context) -> Kv:
    if os.environ.get("FAULT") == "deaf":
        await context.bus.publish("test.deaf", b"", {})
        with suppress(asyncio.CancelledError):  # as asyncio.wait_for, where an answer comes at the same time
            await asyncio.Event().wait()
    if os.environ.get("FAULT") in ("create", "deaf"):
        await asyncio.Event().wait()
    return Kv(context)


if __name__ == "__main__":
    process.main("kv", create)
