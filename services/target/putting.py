"""Puts a run of blocks into the store, part by part: a part may travel while the next is computed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from xxhash import xxh3_128

from countersign.services.runtime.errors import CountersignError
from countersign.services.target.blocks import Staging, StoreLink, seal_of, staged
from countersign.services.target.wire import Wire
from countersign.v1.kv_pb2 import PutPart, PutRequest

# Parts that wait for the wire; then who computes them waits.
MAX_WAITING = 8
# Bytes of one message, where bytes go by gRPC.
MESSAGE_BYTES = 4 << 20
# From here on bytes are copied and hashed on another thread.
_OFF_LOOP_BYTES = 1 << 20


@dataclass(slots=True)
class _Block:
    """One granted block: how far it is."""

    index: int
    key: bytes
    lease: int
    filled: int = 0
    digest: xxh3_128 = field(default_factory=xxh3_128)


class Putting:
    """The blocks of one put that the store granted. ``part`` takes a slice of each, ``whole`` all of some, and leaving
    the block that made it seals.

    Whatever goes wrong, the rest is not sent: it costs a recompute only, and nobody is told but the log.
    """

    def __init__(self, log: logging.Logger, wire: Wire | None = None) -> None:
        self._log = log
        self._wire = wire
        self._blocks: list[_Block] = []
        self._size = 0
        self._staging: Staging | None = None
        self._session = 0
        self._region: int | None = None
        self._layer = 0
        self._queue: asyncio.Queue[PutRequest | None] = asyncio.Queue(MAX_WAITING)
        self._sending: asyncio.Task[int] | None = None
        self.sealed = 0
        self.failure: CountersignError | None = None

    @property
    def wanted(self) -> list[int]:
        """Places, among the blocks that were offered, of those that the store takes."""
        return [block.index for block in self._blocks]

    async def begin(
        self, link: StoreLink, staging: Staging | None, grants: Sequence[tuple[int, bytes, int]], size: int
    ) -> None:
        """``grants``: place, key and lease of each block of ``size`` bytes."""
        self._blocks = [_Block(*grant) for grant in grants]
        self._size = size
        memory = await link.memory() if staging is not None else None
        if memory is not None and staging is not None:
            self._staging, self._session = staging, memory.session
            self._region = staging.take(size * len(self._blocks))
        self._sending = asyncio.create_task(link.put(self._requests()))

    async def part(self, layer: int, slices: Sequence[bytes | memoryview]) -> None:
        """The next bytes of every block that was offered, of layer ``layer``; waits while too many are on their way.

        Parts come in the order of the layers, so that a block is its slices one after the other.

        Raises:
            ValueError: another layer was next.
        """
        if layer != self._layer:
            raise ValueError(f"layer {self._layer} is next, not {layer}")
        self._layer += 1
        await self._pass_on([(place, slices[block.index]) for place, block in enumerate(self._blocks)])

    async def whole(self, blocks: Mapping[int, bytes]) -> None:
        """All bytes of some of the blocks that were offered, by their places; waits while too many are on their way."""
        places = [(place, block.index) for place, block in enumerate(self._blocks)]
        await self._pass_on([(place, blocks[index]) for place, index in places if index in blocks])

    async def end(self) -> None:
        """Seals what is whole."""
        whole = [block for block in self._blocks if block.filled == self._size]
        if whole and self.failure is None:
            seals = [seal_of(block.key, block.lease, block.digest.digest()) for block in whole]
            await self._send(PutRequest(parts=seals))
        await self._send(None)
        try:
            if self._sending is not None:
                self.sealed = await self._sending
        except CountersignError as error:
            self.failure = error
        finally:
            self._give_back()

    async def abandon(self) -> None:
        """Sends no more."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)
        self._give_back()

    async def _pass_on(self, pieces: Sequence[tuple[int, bytes | memoryview]]) -> None:
        if not pieces or self.failure is not None:
            return
        if sum(len(data) for _, data in pieces) >= _OFF_LOOP_BYTES:
            requests = await asyncio.to_thread(self._take, pieces)
        else:
            requests = self._take(pieces)
        for request in requests:
            await self._send(request)

    def _take(self, pieces: Sequence[tuple[int, bytes | memoryview]]) -> list[PutRequest]:
        """Stages the next bytes of blocks, which are named by their places among the granted, or copies them into
        messages.
        """
        requests, size = [PutRequest()], 0
        for place, piece in pieces:
            block, data = self._blocks[place], piece if self._wire is None else self._wire.encode(piece)
            block.digest.update(data)
            part = PutPart(key=block.key, lease=block.lease, offset=block.filled)
            if self._region is not None and self._staging is not None:
                start = self._region + place * self._size + block.filled
                self._staging.memory.view[start : start + len(data)] = data
                part.staged.CopyFrom(staged(self._session, start, len(data)))
            else:
                if size and size + len(data) > MESSAGE_BYTES:
                    requests.append(PutRequest())
                    size = 0
                part.data = bytes(data)
                size += len(data)
            block.filled += len(data)
            requests[-1].parts.append(part)
        return requests

    async def _send(self, request: PutRequest | None) -> None:
        """Waits for room, or for the call to fail."""
        if self._sending is None or self._sending.done():
            return
        putting = asyncio.ensure_future(self._queue.put(request))
        await asyncio.wait({putting, self._sending}, return_when=asyncio.FIRST_COMPLETED)
        putting.cancel()
        if self._sending.done() and not self._sending.cancelled():
            error = self._sending.exception()
            self.failure = error if isinstance(error, CountersignError) else self.failure

    async def _requests(self) -> AsyncIterator[PutRequest]:
        while (request := await self._queue.get()) is not None:
            yield request

    def _give_back(self) -> None:
        if self._region is not None and self._staging is not None:
            self._staging.give(self._region, self._size * len(self._blocks))
            self._region = None
