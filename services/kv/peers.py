"""Other stores: what they have and this one lacks comes over gRPC; how long a look-up waits for it is bounded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from countersign.services.kv.store import BlockStore, Place
from countersign.services.protocol.cache import Outcome
from countersign.services.runtime.background import Background
from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.registry import Registry
from countersign.services.runtime.rpc import Channel
from countersign.services.runtime.waiting import happened
from countersign.v1.kv_pb2 import (
    GetRequest,
    GetResponse,
    LookupRequest,
    LookupResponse,
    ReleaseRequest,
    ReleaseResponse,
)

# How long a look-up waits for what others have. What comes later is there for the next.
WAIT_S = 0.2
_LOOKUP_S = 0.1
_TRANSFER_S = 10.0
_TTL_MS = 15_000
_SERVICE = "/countersign.v1.KvService"


class Peers:
    """The stores of the registry, without this one."""

    def __init__(self, store: BlockStore, registry: Registry, instance: str, log: logging.Logger) -> None:
        self._store = store
        self._registry = registry
        self._instance = instance
        self._log = log
        self._channels: dict[str, Channel] = {}
        self._under_way: dict[bytes, asyncio.Event] = {}
        self._background = Background()

    async def fetch(self, keys: Sequence[bytes], have: int) -> bool:
        """Fetches blocks of the chain from ``have`` on, from who has most; True when some came within the bound."""
        addresses = [each.address for each in self._registry.live("kv") if each.instance != self._instance]
        wanted = keys[have]
        if not addresses:
            return False
        if wanted not in self._under_way:
            self._under_way[wanted] = asyncio.Event()
            self._background.spawn(self._transfer(addresses, keys, have))
        if not await happened(self._under_way[wanted], WAIT_S):
            return False
        block = self._store.cache.get(wanted)
        return block is not None and block.sealed

    async def close(self) -> None:
        await self._background.cancel()
        for channel in self._channels.values():
            await channel.close()

    async def _transfer(self, addresses: Sequence[str], keys: Sequence[bytes], have: int) -> None:
        try:
            offers = await asyncio.gather(*(self._look(address, keys, have) for address in addresses))
            best = max(offers, key=lambda offer: offer[1].found)
            if best[1].found > have:
                await self._copy(*best, keys, have)
            for address, offer in offers:
                await self._release(address, offer.pin)
        except CountersignError as error:
            self._log.warning("another store ended a transfer", extra={"error": str(error), "reason": error.reason})
        finally:
            self._under_way.pop(keys[have]).set()

    async def _look(self, address: str, keys: Sequence[bytes], have: int) -> tuple[str, LookupResponse]:
        """What it has; nothing when it does not answer."""
        request = LookupRequest(keys=keys, holder=f"peer/{self._instance}", ttl_ms=_TTL_MS, local=True, skip=have)
        try:
            reply = await self._channel(address).unary(f"{_SERVICE}/Lookup", request, LookupResponse, _LOOKUP_S)
        except CountersignError:
            reply = LookupResponse()
        return address, reply

    async def _copy(self, address: str, offer: LookupResponse, keys: Sequence[bytes], have: int) -> None:
        """Lookup and Get there, Reserve, write and Seal here: nobody finds a block before its checksum is right."""
        request = GetRequest(keys=keys[have : offer.found], pin=offer.pin)
        replies = self._channel(address).stream(f"{_SERVICE}/Get", request, GetResponse, _TRANSFER_S)
        data = b""
        async for reply in replies:
            for part in reply.parts:
                data += part.data
                if part.checksum:
                    at = have + part.index
                    if not self._keep(keys[at], keys[at - 1] if at else b"", data, part.checksum, offer.kind):
                        return
                    data = b""

    def _keep(self, key: bytes, parent: bytes, data: bytes, checksum: bytes, kind: bytes) -> bool:
        """False when the rest of the chain is of no use here."""
        holder = f"peer/{self._instance}"
        (reserved,) = self._store.reserve([Place(key, parent)], len(data), kind, holder, ttl=_TRANSFER_S)
        if reserved.outcome is Outcome.GRANTED:
            self._store.write(key, reserved.lease, 0, data)
            self._store.seal(key, reserved.lease, checksum)
            self._store.counts.from_peers += 1
        return reserved.outcome in {Outcome.GRANTED, Outcome.PRESENT}

    async def _release(self, address: str, pin: int) -> None:
        if pin:
            request = ReleaseRequest(numbers=[pin])
            await self._channel(address).unary(f"{_SERVICE}/Release", request, ReleaseResponse, _LOOKUP_S)

    def _channel(self, address: str) -> Channel:
        if address not in self._channels:
            self._channels[address] = Channel(address, bulk=True)
        return self._channels[address]
