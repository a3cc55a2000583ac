"""A kv service alone, without a bus: ``kv_store_program.py FOLDER RAM DISK [CLOCK]``; prints its address and socket.

``CLOCK`` names a file of one little-endian double: the time, as the test has it.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

from countersign.services.kv.disk import Disk
from countersign.services.kv.service import KvService
from countersign.services.kv.store import BlockStore
from countersign.services.runtime.rpc_server import RpcServer
from countersign.services.runtime.shared_memory import MemoryServer


def clock_of(file: str) -> Callable[[], float]:
    with Path(file).open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 8, prot=mmap.PROT_READ)
    return lambda: float(struct.unpack("<d", mapped[:8])[0])


async def main(folder: str, ram: str, disk: str, clock: str = "") -> None:
    tier = Disk(Path(folder), int(disk)) if int(disk) else None
    store = BlockStore(int(ram), disk=tier, clock=clock_of(clock) if clock else time.monotonic)
    restored = await store.start()
    memory = MemoryServer(f"kv-{os.getpid()}", store.arena.memory, store.draw)
    memory.start()
    address = ""
    service = KvService(store, lambda: address, memory)
    server = RpcServer("127.0.0.1:0")
    server.add(service)
    address = await server.start()
    print(address, restored, flush=True)
    await service.run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
