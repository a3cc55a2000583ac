"""Who is alive: each process announces itself in the bucket ``cs-instances`` and renews that each second.

Every process keeps its own view, so a look-up costs nothing. The view follows the bucket's subjects directly: that
survives reconnects and restarts of the server (a KV watch is a consumer, which does not), and heartbeats mend what it
missed. A server sends no event when a record's time is up, so each view counts the time itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self, TypeVar

from google.protobuf.message import DecodeError
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.js.api import KeyValueConfig

from countersign.services.runtime.bus import Bus
from countersign.services.runtime.errors import CountersignError, Unavailable
from countersign.services.runtime.jetstream import header, is_status, reply_of
from countersign.v1.registry_pb2 import Instance

BUCKET = "cs-instances"
_SUBJECTS = f"$KV.{BUCKET}."
_TIMEOUT_S = 2.0
_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Record:
    instance: Instance
    expires: float  # on time.monotonic()


class Registry:
    """The live instances as this process sees them, and its own announcement.

    Args:
        bus: the connection.
        ttl: seconds after which a record that is not renewed is dead.
        heartbeat: seconds between renewals.
        replicas: copies of the bucket in a cluster.
    """

    def __init__(self, bus: Bus, *, ttl: float = 5.0, heartbeat: float = 1.0, replicas: int = 1) -> None:
        self._bus = bus
        self._ttl = ttl
        self._heartbeat = heartbeat
        self._replicas = replicas
        self._records: dict[str, _Record] = {}
        self._changed = asyncio.Condition()
        self._subscription: Subscription | None = None
        self._beating: asyncio.Task[None] | None = None
        self._key = ""

    async def start(self, *, create: bool = True) -> None:
        """Make the bucket if need be and fill the view; from then on it stays up to date.

        Args:
            create: false for who only looks: then there must be a bucket.

        Raises:
            Unavailable: reason NO_REGISTRY: there is no bucket; else NATS does not answer.
            DeadlineExceeded: NATS does not answer.
        """
        if create:
            await self._ensure_bucket()
        self._subscription = await self._bus.subscribe(f"{_SUBJECTS}>", self._receive)
        await self._bus.flush()
        # Heartbeats that came in the meantime are newer than what is read now.
        try:
            found = await self._read_all()
        except Unavailable as error:
            if error.reason != "NO_RESPONDERS":
                raise
            raise Unavailable(
                "no stack has announced itself on this NATS", reason="NO_REGISTRY", help="start one: countersign up"
            ) from None
        for msg in found:
            if _key(header(msg, "Nats-Subject")) not in self._records:
                self._apply(_key(header(msg, "Nats-Subject")), msg, self._ttl - _age(msg))

    async def stop(self) -> None:
        """Withdraw if announced, and follow the bucket no longer."""
        await self.withdraw()
        if self._subscription is not None:
            await self._bus.unsubscribe(self._subscription)
            self._subscription = None

    async def announce(self, instance: Instance, refresh: Callable[[Instance], None] | None = None) -> None:
        """Put this process's record, and renew it until `withdraw`; ``refresh`` brings it up to date before each time.

        Raises:
            Unavailable, DeadlineExceeded: the first time failed.
        """
        self._key = f"{instance.service}.{instance.instance}"
        await self._put(instance, refresh)
        self._beating = asyncio.create_task(self._beat(instance, refresh), name="registry heartbeat")

    async def withdraw(self) -> None:
        """Take this process's record back. Does nothing when there is none; an unreachable bus lets it expire."""
        if self._beating is None:
            return
        self._beating.cancel()
        with suppress(asyncio.CancelledError):
            await self._beating
        self._beating = None
        try:
            await self._bus.request(_SUBJECTS + self._key, b"", {"KV-Operation": "DEL"}, _TIMEOUT_S)
        except CountersignError as error:
            _log.warning("the registry record is left to expire", extra={"error": str(error)})

    def live(self, service: str) -> list[Instance]:
        """The service's instances whose record is younger than the TTL, by instance id; draining ones included."""
        return [each for each in self.everybody() if each.service == service]

    def everybody(self) -> list[Instance]:
        """The live instances of all services, by instance id; may be called from any thread."""
        now, records = time.monotonic(), list(self._records.values())
        alive = (record.instance for record in records if record.expires > now and record.instance.instance)
        return sorted(alive, key=lambda each: each.instance)

    async def wait_for(self, service: str, timeout: float) -> Instance:  # noqa: ASYNC109  ends in a typed error
        """The first instance that takes work, waiting for one ``timeout`` seconds at most.

        Raises:
            Unavailable: reason NO_INSTANCE.
        """

        def look() -> Instance | None:
            return next((each for each in self.live(service) if not each.draining), None)

        found = await self.until(look, timeout)
        if found is None:
            raise Unavailable(
                f"no {service} service is up after {timeout:.3g} s",
                reason="NO_INSTANCE",
                help=f"start it: python -m countersign.services.{service}",
                service=service,
            )
        return found

    async def until(self, look: Callable[[], T | None], timeout: float) -> T | None:  # noqa: ASYNC109  returns in time
        """What ``look`` finds, which is called again after each record that comes; None: nothing in ``timeout``
        seconds.
        """
        try:
            async with asyncio.timeout(timeout), self._changed:
                while (found := look()) is None:
                    await self._changed.wait()
                return found
        except TimeoutError:
            return None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def _ensure_bucket(self) -> None:
        config = KeyValueConfig(bucket=BUCKET, ttl=self._ttl, replicas=self._replicas, direct=True)
        try:
            await self._bus.jetstream().create_key_value(config)
        except NatsError as error:
            raise Unavailable(f"the registry bucket {BUCKET} cannot be made: {error}", reason="NO_REGISTRY") from None

    async def _beat(self, instance: Instance, refresh: Callable[[Instance], None] | None) -> None:
        while True:
            await asyncio.sleep(self._heartbeat)
            try:
                await self._put(instance, refresh)
            except CountersignError as error:
                _log.warning("a heartbeat failed, trying on", extra={"error": str(error)})
                if error.reason == "NO_RESPONDERS":  # the server has lost its data: make the bucket again
                    with suppress(CountersignError):
                        await self._ensure_bucket()

    async def _put(self, instance: Instance, refresh: Callable[[Instance], None] | None) -> None:
        if refresh is not None:
            try:
                refresh(instance)
            except Exception:  # noqa: BLE001  a bug in a description must not make a live process look dead
                _log.exception("a service failed to describe itself")
        subject = _SUBJECTS + self._key
        reply_of(await self._bus.request(subject, instance.SerializeToString(), {}, _TIMEOUT_S), subject)

    async def _read_all(self) -> list[Msg]:
        """The last message of every key (NATS ADR-31, multi-subject direct get)."""
        query = json.dumps({"multi_last": [f"{_SUBJECTS}>"]}).encode()
        api = f"$JS.API.DIRECT.GET.KV_{BUCKET}"
        *messages, _ = await self._bus.request_many(api, query, _TIMEOUT_S, is_status)
        return messages

    async def _receive(self, msg: Msg) -> None:
        self._apply(_key(msg.subject), msg, self._ttl)
        async with self._changed:
            self._changed.notify_all()

    def _apply(self, key: str, msg: Msg, lives: float) -> None:
        now = time.monotonic()
        self._records = {each: record for each, record in self._records.items() if record.expires > now}
        if header(msg, "KV-Operation"):
            # Kept, with nothing in it, so that a slower read of the same key cannot bring it back.
            self._records[key] = _Record(Instance(), now + self._ttl)
            return
        try:
            self._records[key] = _Record(Instance.FromString(msg.data), now + lives)
        except DecodeError:
            _log.warning("a registry record cannot be read", extra={"key": key})


def _key(subject: str) -> str:
    return subject.removeprefix(_SUBJECTS)


def _age(msg: Msg) -> float:
    """Seconds since the server stored it, by this host's clock; never negative."""
    stored = datetime.fromisoformat(header(msg, "Nats-Time-Stamp"))
    return max(0.0, (datetime.now(UTC) - stored).total_seconds())
