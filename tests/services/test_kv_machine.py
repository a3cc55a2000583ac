"""The rules of the cache machine over a real service by gRPC, which is killed between steps, beside the same model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from cache_rules import CacheRules, digest_of, reach, run
from hypothesis.stateful import rule
from kv_client import data_of
from kv_process import KvProcess

from countersign.services.kv.arena import PAGE
from countersign.services.protocol.cache import Found, Outcome, Reserved
from countersign.services.protocol.checksum import checksum
from countersign.services.protocol.errors import NotLeased, NotPinned, NotSealable
from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.rpc_client import error_of
from countersign.v1.kv_pb2 import (
    BlockId,
    BlockKind,
    GetRequest,
    LookupRequest,
    PutPart,
    PutRequest,
    ReleaseRequest,
    ReserveOutcome,
    ReserveRequest,
)
from countersign.v1.kv_pb2_grpc import KvServiceStub

TIMEOUT_S = 20.0
REFUSALS = {"NOT_PINNED": NotPinned, "LEASE_EXPIRED": NotLeased, "NOT_SEALABLE": NotSealable}


@dataclass
class Read:
    checksum: bytes


class ServedCache:
    """Answers as ``BlockCache`` does, through a service; what that evicts, it does not say."""

    def __init__(self, process: KvProcess) -> None:
        self.process = process
        self.sizes: dict[int, int] = {}
        self.connect()

    def connect(self) -> None:
        self.channel = grpc.insecure_channel(self.process.address)
        self.stub: Any = KvServiceStub(self.channel)

    def lookup(self, keys: Sequence[bytes], holder: str, *, now: int, ttl: int) -> Found:
        self.process.set_clock(now)
        reply = self.call("Lookup", LookupRequest(keys=keys, holder=holder, ttl_ms=1000 * ttl))
        return Found(reply.found, reply.pin if reply.found else 0)

    def read(self, key: bytes, pin: int, *, now: int) -> Read:
        self.process.set_clock(now)
        try:
            replies = list(self.stub.Get(GetRequest(keys=[key], pin=pin), timeout=TIMEOUT_S))
        except grpc.RpcError as error:
            raise self.refusal(error, key) from error
        data = b"".join(part.data for reply in replies for part in reply.parts)
        return Read(digest_of(key) if data == data_of(key, len(data)) else checksum([data]))

    def reserve(
        self, key: bytes, parent: bytes, size: int, holder: str, *, now: int, ttl: int, kind: bytes
    ) -> Reserved:
        self.process.set_clock(now)
        named = BlockKind(weights_sha256=kind, cache_format="fp32", size=size)
        blocks = [BlockId(key=key, parent=parent)]
        request = ReserveRequest(blocks=blocks, holder=holder, ttl_ms=1000 * ttl, kind=named)
        (grant,) = self.call("Reserve", request).grants
        self.sizes[grant.lease] = size
        outcome = ReserveOutcome.Name(grant.outcome).removeprefix("RESERVE_OUTCOME_")
        return Reserved(Outcome[outcome], grant.lease)

    def write(self, key: bytes, lease: int, start: int, length: int, *, now: int) -> None:
        self.process.set_clock(now)
        data = data_of(key, start + length)[start:]
        self.put(PutPart(key=key, lease=lease, offset=start, data=data))

    def seal(self, key: bytes, lease: int, digest: bytes, *, now: int) -> None:
        self.process.set_clock(now)
        size = self.sizes.get(lease, PAGE)
        self.put(PutPart(key=key, lease=lease, checksum=checksum([data_of(key, size)])))

    def release(self, number: int) -> None:
        self.call("Release", ReleaseRequest(numbers=[number]))

    def expire(self, now: int) -> None:
        self.process.set_clock(now)

    def drops(self) -> list[object]:
        return []

    def get(self, key: bytes) -> None:
        return None

    def put(self, part: PutPart) -> None:
        try:
            self.stub.Put(iter([PutRequest(parts=[part])]), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise self.refusal(error, part.key) from error

    def call(self, method: str, request: object) -> Any:
        return getattr(self.stub, method)(request, timeout=TIMEOUT_S)

    def refusal(self, error: grpc.RpcError, key: bytes) -> Exception:
        typed: CountersignError = error_of(cast("Any", error), self.process.address)
        kind = REFUSALS.get(typed.reason)
        return kind(typed.message, key=key) if kind is not None else typed

    def kill(self, *, empty: bool = False) -> None:
        self.channel.close()
        self.process.restart(empty=empty)
        self.connect()


class ServiceRules(CacheRules):
    """One process after the other; each run of the machine begins with an empty store."""

    ram, disk, unit = 6 * PAGE, 5 * PAGE, PAGE
    exact = False
    served: ServedCache

    def made(self) -> ServedCache:
        self.served.kill(empty=True)
        self.served.process.set_clock(0)
        return self.served

    @rule()
    def kill(self) -> None:
        """RAM, pins and leases are gone; of what is sealed, what the disk has comes back, and nothing else."""
        self.cache.kill()
        for block in self.blocks.values():
            block.pins = {}
        self.old_pins += list(self.pins)
        self.pins = {}
        self.forget([block for block in self.blocks.values() if not block.sealed])
        self.saw("killed")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedCache]:
    served = ServedCache(KvProcess(tmp_path, ServiceRules.ram, ServiceRules.disk, clock=True))
    yield served
    served.channel.close()
    served.process.kill()


def test_no_schedule_of_readers_writers_lapses_and_kills_breaks_a_property(served: ServedCache) -> None:
    reach(ServiceRules, {"found", "read", "killed", "a lease is renewed"}, examples=6, served=served)


@pytest.mark.long
@pytest.mark.timeout(1200)  # each kill is a start of a process
def test_no_long_schedule_of_readers_writers_lapses_and_kills_breaks_a_property(served: ServedCache) -> None:
    machine = type("Sound", (ServiceRules,), {"seen": set(), "served": served})
    run(machine, examples=60, steps=60)
