"""Reads and writes KV blocks at the kv service. Whatever goes wrong there costs a recompute only."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from countersign.services.protocol.keys import chain_keys, root_key
from countersign.services.runtime.background import Background
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.errors import CountersignError
from countersign.services.target.backoff import Backoff
from countersign.services.target.blocks import Staging, StoreLink
from countersign.services.target.putting import Putting
from countersign.services.target.wire import Wire
from countersign.v1.kv_pb2 import (
    BlockId,
    BlockKind,
    LookupRequest,
    LookupResponse,
    ReleaseRequest,
    ReleaseResponse,
    ReserveRequest,
    ReserveResponse,
)

# An answer waits for what is found, and can do without. Nothing but a prefill waits for a put to begin: that costs more
# to give up than to wait for.
LOOKUP_TIMEOUT_S, PUT_TIMEOUT_S = 0.5, 2.0
TTL_MS = 30_000
MAX_KEYS = 512
# Stores that died, to which calls may still be under way.
MAX_RETIRED = 8


@dataclass(frozen=True, slots=True)
class PrefixKeys:
    """The chained keys of the full blocks of a sequence (DESIGN.md section 7) of one model and cache format.

    What belongs to no tenant has none: it is shared with nobody.
    """

    weights: bytes
    cache_format: str

    def __call__(self, tenant: str, token_ids: Sequence[int]) -> list[bytes]:
        if not tenant:
            return []
        return chain_keys(root_key(self.weights, self.cache_format, tenant), token_ids)[:MAX_KEYS]


class Prefixes:
    """The kv service as one target sees it.

    Args:
        holder: the target's instance.
        keys: what its blocks are of.
        block_bytes: size of one block.
        wire: how its numbers are stored; None: as they are.
        share_memory: false: bytes go by gRPC even where the store is on this host.
    """

    def __init__(
        self,
        bus: Bus,
        holder: str,
        clock: Callable[[], float],
        log: logging.Logger,
        *,
        keys: PrefixKeys,
        block_bytes: int,
        wire: Wire | None = None,
        share_memory: bool = True,
    ) -> None:
        self._bus = bus
        # Who knows the name of a writer gets its leases, so that nobody may guess it.
        self._holder = f"{holder}/{secrets.token_hex(8)}"
        self.cost_us = 0  # what a block takes to compute, in microseconds; 0: not known
        self._backoff = Backoff(clock)
        self._log = log
        self._wire = wire
        size = wire.size(block_bytes) if wire is not None else block_bytes
        self._kind = BlockKind(weights_sha256=keys.weights, cache_format=keys.cache_format, size=size)
        self._staging = Staging() if share_memory else None
        self._links: dict[tuple[str, str], StoreLink] = {}
        self._retired: list[StoreLink] = []
        self._background = Background()

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
        try:
            lookup = LookupRequest(keys=keys, holder=f"{self._holder}/{request_id}", ttl_ms=TTL_MS, skip=first)
            found = await self._bus.call("kv", "Lookup", lookup, LookupResponse, timeout=LOOKUP_TIMEOUT_S)
            try:
                blocks: list[bytes] = []
                if found.found > first:
                    link = await self._link(found.address, found.socket)
                    blocks = await link.read(keys[first : found.found], found)
            finally:
                # What was read stays read, and nobody waits for this.
                self._background.spawn(self._give_back([found.pin]))
        except CountersignError as error:
            self._backoff.failed()
            self._log.warning(
                "the kv store does not answer, prefilling instead",
                extra={"request_id": request_id, "reason": error.reason},
            )
            return []
        self._backoff.answered()
        if self._wire is None:
            return blocks
        return await asyncio.to_thread(lambda wire: [wire.decode(block) for block in blocks], self._wire)

    @asynccontextmanager
    async def putting(self, request_id: str, keys: Sequence[bytes], first: int, count: int) -> AsyncIterator[Putting]:
        """A put of ``count`` blocks from ``keys[first]`` on; leaving it seals those that are whole.

        ``async with prefixes.putting(...) as put:`` then ``await put.part(layer, [a slice of each of the blocks])`` for
        each layer in turn, or ``await put.whole({place: block})``, some blocks at a time. ``put.wanted`` are the places
        of those that nobody has or writes: only these need to be made. Nothing that the store does raises here. Puts of
        one request come one after the other: a block is sealed after those before it.
        """
        put = Putting(self._log, self._wire)
        leases: list[int] = []
        if count > 0 and not self._backoff.resting:
            leases = await self._begin(put, request_id, keys[: first + count], first)
        try:
            yield put
        except BaseException:
            await put.abandon()
            await self._give_back(leases)
            raise
        if leases:
            await put.end()
            if put.failure is not None:
                self._backoff.failed()
                about = {"request_id": request_id, "blocks": put.sealed, "reason": put.failure.reason}
                self._log.warning("the kv store did not take all blocks", extra=about)
            if put.sealed < len(leases):
                await self._give_back(leases)

    async def close(self) -> None:
        await self._background.drain()
        for link in (*self._links.values(), *self._retired):
            await link.close()
        if self._staging is not None:
            self._staging.close()

    async def _begin(self, put: Putting, request_id: str, keys: Sequence[bytes], first: int) -> list[int]:
        """Reserves the blocks; the leases."""
        ids = [
            BlockId(key=keys[i], parent=keys[i - 1] if i else b"", cost_us=self.cost_us)
            for i in range(first, len(keys))
        ]
        request = ReserveRequest(blocks=ids, holder=f"{self._holder}/{request_id}", ttl_ms=TTL_MS, kind=self._kind)
        try:
            reserved = await self._bus.call("kv", "Reserve", request, ReserveResponse, timeout=PUT_TIMEOUT_S)
        except CountersignError as error:
            self._backoff.failed()
            self._log.warning("the kv store took nothing", extra={"request_id": request_id, "reason": error.reason})
            return []
        self._backoff.answered()
        granted = [(i, ids[i].key, grant.lease) for i, grant in enumerate(reserved.grants) if grant.lease]
        if granted:
            link = await self._link(reserved.address, reserved.socket)
            await put.begin(link, self._staging, granted, self._kind.size)
        return [lease for _, _, lease in granted]

    async def _give_back(self, numbers: Sequence[int]) -> None:
        """Best effort: what is not given back lapses."""
        if any(numbers):
            request = ReleaseRequest(numbers=numbers)
            with suppress(CountersignError):
                await self._bus.call("kv", "Release", request, ReleaseResponse, timeout=PUT_TIMEOUT_S, traced=False)

    async def _link(self, address: str, socket: str) -> StoreLink:
        """The store there. One that has died is let go, so that nothing keeps its memory."""
        for name, link in list(self._links.items()):
            if link.dead:
                link.let_go()
                self._retired.append(self._links.pop(name))
        while len(self._retired) > MAX_RETIRED:
            await self._retired.pop(0).close()
        if (address, socket) not in self._links:
            self._links[address, socket] = StoreLink(address, socket, self._staging, self._log)
        return self._links[address, socket]
