"""Reads and writes KV blocks at the kv service. Whatever goes wrong there costs a recompute only."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from countersign.services.protocol.keys import chain_keys, root_key
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.rpc import Channel
from countersign.services.target.backoff import Backoff
from countersign.v1.kv_pb2 import (
    BlockId,
    GetRequest,
    GetResponse,
    LookupRequest,
    LookupResponse,
    PutRequest,
    PutResponse,
    ReleaseRequest,
    ReleaseResponse,
    ReserveRequest,
    ReserveResponse,
)

CALL_TIMEOUT_S = 0.5
DATA_TIMEOUT_S = 5.0
TTL_MS = 10_000
MAX_KEYS = 512


@dataclass(frozen=True, slots=True)
class PrefixKeys:
    """The chained keys of the full blocks of a sequence (DESIGN.md section 7) of one model and cache format."""

    weights: bytes
    cache_format: str

    def __call__(self, tenant: str, token_ids: Sequence[int]) -> list[bytes]:
        return chain_keys(root_key(self.weights, self.cache_format, tenant), token_ids)[:MAX_KEYS]


class Prefixes:
    """The kv service as one target sees it; ``holder`` is the target's instance."""

    def __init__(self, bus: Bus, holder: str, clock: Callable[[], float], log: logging.Logger) -> None:
        self._bus = bus
        self._holder = holder
        self._backoff = Backoff(clock)
        self._log = log
        self._channels: dict[str, Channel] = {}

    @property
    def resting(self) -> bool:
        """The store did not answer, and is left alone for a while."""
        return self._backoff.resting

    async def fetch(self, request_id: str, keys: Sequence[bytes], first: int) -> list[bytes]:
        """The data of the longest stored prefix of ``keys``, from block ``first`` on; [] when no more is stored, or the
        store does not answer.
        """
        if len(keys) <= first or self._backoff.resting:
            return []
        holder = f"{self._holder}/{request_id}"
        try:
            lookup = LookupRequest(keys=keys, holder=holder, ttl_ms=TTL_MS)
            found = await self._bus.call("kv", "Lookup", lookup, LookupResponse, timeout=CALL_TIMEOUT_S)
            if not found.found:
                self._backoff.answered()
                return []
            blocks = await self._get(found.address, holder, keys[first : found.found])
            await self._release(holder)
        except CountersignError as error:
            self._backoff.failed()
            self._log.warning("kv store does not answer, prefilling instead error=%s", error.reason)
            return []
        self._backoff.answered()
        return blocks

    async def store(self, request_id: str, keys: Sequence[bytes], blocks: Sequence[bytes], first: int) -> None:
        """Put the blocks ``first``, ``first`` + 1, ... of a chain, those that nobody has or writes."""
        holder = f"{self._holder}/{request_id}"
        ids = [
            BlockId(key=keys[i], parent=keys[i - 1] if i else b"", size=len(block))
            for i, block in enumerate(blocks, first)
        ]
        if not ids or self._backoff.resting:
            return
        try:
            request = ReserveRequest(blocks=ids, holder=holder, ttl_ms=TTL_MS)
            reserved = await self._bus.call("kv", "Reserve", request, ReserveResponse, timeout=CALL_TIMEOUT_S)
            leased = [(i, lease) for i, lease in enumerate(reserved.leases) if lease]
            if leased:
                puts = _puts([(ids[i].key, lease, blocks[i]) for i, lease in leased])
                channel = self._channel(reserved.address)
                await channel.put_stream("/countersign.v1.KvService/Put", puts, PutResponse, timeout=DATA_TIMEOUT_S)
            await self._release(holder)
        except CountersignError as error:
            self._backoff.failed()
            self._log.warning("kv store took nothing error=%s", error.reason)

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def _get(self, address: str, holder: str, keys: Sequence[bytes]) -> list[bytes]:
        request = GetRequest(keys=keys, holder=holder)
        channel = self._channel(address)
        blocks: list[bytes] = []
        replies = channel.stream("/countersign.v1.KvService/Get", request, GetResponse, timeout=DATA_TIMEOUT_S)
        async for reply in replies:
            if reply.key != keys[len(blocks)] or hashlib.sha256(reply.data).digest() != reply.checksum:
                self._log.error("kv store sent a damaged block, prefilling from there block=%d", len(blocks))
                break
            blocks.append(reply.data)
        return blocks

    async def _release(self, holder: str) -> None:
        request = ReleaseRequest(holder=holder)
        await self._bus.call("kv", "Release", request, ReleaseResponse, timeout=CALL_TIMEOUT_S)

    def _channel(self, address: str) -> Channel:
        if address not in self._channels:
            self._channels[address] = Channel(address)
        return self._channels[address]


async def _puts(blocks: Sequence[tuple[bytes, int, bytes]]) -> AsyncIterator[PutRequest]:
    for key, lease, data in blocks:
        yield PutRequest(key=key, lease=lease, checksum=hashlib.sha256(data).digest(), data=data)
