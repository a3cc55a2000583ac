"""A caller of a kv service in tests, and blocks whose bytes follow from their keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message

from countersign.services.protocol.checksum import checksum
from countersign.services.runtime.errors import Unavailable
from countersign.services.runtime.rpc import Channel
from countersign.services.target.prefixes import Prefixes
from countersign.v1.kv_pb2 import (
    BlockId,
    BlockKind,
    GetPart,
    GetRequest,
    GetResponse,
    GetStatsRequest,
    GetStatsResponse,
    Grant,
    LookupRequest,
    LookupResponse,
    PutPart,
    PutRequest,
    PutResponse,
    ReleaseRequest,
    ReleaseResponse,
    ReserveRequest,
    ReserveResponse,
)

SIZE = 4096
KIND = BlockKind(weights_sha256=b"w" * 32, cache_format="fp32", size=SIZE)
_SERVICE = "/countersign.v1.KvService"


def data_of(key: bytes, size: int = SIZE) -> bytes:
    """The only bytes that this key may have."""
    return (key * (size // len(key) + 1))[:size]


def block(key: bytes, lease: int, data: bytes | None = None, digest: bytes | None = None) -> PutPart:
    """A whole block as one part."""
    data = data_of(key) if data is None else data
    return PutPart(key=key, lease=lease, data=data, checksum=digest or checksum([data]))


@dataclass
class Kv:
    """Calls a served store; ``now`` is the store's clock where the test gives it one."""

    channel: Channel
    now: float = 0.0
    timeout: float = 10.0

    async def look(
        self, keys: Sequence[bytes], ttl_ms: int = 1000, holder: str = "reader", skip: int = 0
    ) -> LookupResponse:
        request = LookupRequest(keys=keys, holder=holder, ttl_ms=ttl_ms, skip=skip)
        return await self.channel.unary(f"{_SERVICE}/Lookup", request, LookupResponse, self.timeout)

    async def reserve(
        self, keys: Sequence[bytes], holder: str = "writer", ttl_ms: int = 1000, parent: bytes = b""
    ) -> list[int]:
        """Leases for a chain of keys, 0 where there is none."""
        parents = (parent, *keys[:-1])
        blocks = [BlockId(key=key, parent=above) for key, above in zip(keys, parents, strict=True)]
        return [grant.lease for grant in await self.grants(blocks, holder, ttl_ms)]

    async def grants(
        self, blocks: Sequence[BlockId], holder: str = "writer", ttl_ms: int = 1000, kind: BlockKind = KIND
    ) -> list[Grant]:
        request = ReserveRequest(blocks=blocks, holder=holder, ttl_ms=ttl_ms, kind=kind)
        reply = await self.channel.unary(f"{_SERVICE}/Reserve", request, ReserveResponse, self.timeout)
        return list(reply.grants)

    async def put(self, *parts: PutPart) -> int:
        async def stream() -> AsyncIterator[PutRequest]:
            for part in parts:
                yield PutRequest(parts=[part])

        return (await self.channel.put_stream(f"{_SERVICE}/Put", stream(), PutResponse, self.timeout)).sealed

    async def store_chain(self, keys: Sequence[bytes], holder: str = "writer") -> int:
        leases = await self.reserve(keys, holder)
        return await self.put(*(block(key, lease) for key, lease in zip(keys, leases, strict=True) if lease))

    async def parts(self, keys: Sequence[bytes], pin: int, part_bytes: int = 0) -> list[GetPart]:
        request = GetRequest(keys=keys, pin=pin, part_bytes=part_bytes)
        replies = self.channel.stream(f"{_SERVICE}/Get", request, GetResponse, self.timeout)
        return [part async for reply in replies for part in reply.parts]

    async def get(self, keys: Sequence[bytes], pin: int) -> list[bytes]:
        """The blocks, each compared with its checksum."""
        blocks = [b""] * len(keys)
        for part in await self.parts(keys, pin):
            blocks[part.index] += part.data
            assert not part.checksum or part.checksum == checksum([blocks[part.index]])
        return blocks

    async def release(self, *numbers: int) -> None:
        await self.channel.unary(f"{_SERVICE}/Release", ReleaseRequest(numbers=numbers), ReleaseResponse, self.timeout)

    async def stats(self) -> GetStatsResponse:
        return await self.channel.unary(f"{_SERVICE}/GetStats", GetStatsRequest(), GetStatsResponse, self.timeout)


@dataclass
class GrpcBus:
    """Carries calls to one service over its gRPC; ``broken`` lists methods that do not answer."""

    channel: Channel
    broken: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    replies: dict[str, Message] = field(default_factory=dict)

    async def call(
        self,
        service: str,
        method: str,
        request: Message,
        reply_type: Any,
        timeout: float,  # noqa: ASYNC109
        *,
        traced: bool = True,
    ) -> Any:
        self.calls.append(method)
        if method in self.broken:
            raise Unavailable("nobody answers", reason="NO_RESPONDERS")
        reply = await self.channel.unary(f"/countersign.v1.KvService/{method}", request, reply_type, timeout)
        self.replies[method] = reply
        return reply


async def stored(target: Prefixes, name: str, keys: Sequence[bytes], blocks: Sequence[bytes]) -> None:
    """A target puts a chain's first blocks."""
    async with target.putting(name, keys, 0, len(blocks)) as put:
        await put.whole(dict(enumerate(blocks)))
