"""A durable place in a stream: what was not acknowledged comes again, to this process or to the one after it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError

from countersign.services.runtime.bus import Bus
from countersign.services.runtime.errors import FailedPrecondition, Unavailable


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message of the stream; ``attempt`` counts from 1."""

    subject: str
    data: bytes
    sequence: int
    attempt: int
    message: Msg


class Consumer:
    """A pull consumer of JetStream. Made by ``open``."""

    def __init__(self, subscription: JetStreamContext.PullSubscription) -> None:
        self._subscription = subscription

    @classmethod
    async def open(cls, bus: Bus, stream: str, name: str, *, ack_wait_s: float = 10.0, pending: int = 4096) -> Consumer:
        """The consumer ``name`` of a stream, made at its first message if there is none.

        Args:
            bus: the connection.
            stream: such as ``CS_RECEIPTS``.
            name: its place survives under this name.
            ack_wait_s: seconds after which a delivery that was not acknowledged comes again.
            pending: most deliveries that wait for that.

        Raises:
            Unavailable: JetStream does not answer.
            FailedPrecondition: reason CONSUMER_CONFLICT: one of this name exists that cannot become what is wanted.
        """
        config = ConsumerConfig(
            durable_name=name,
            ack_policy=AckPolicy.EXPLICIT,
            deliver_policy=DeliverPolicy.ALL,
            ack_wait=ack_wait_s,
            max_ack_pending=pending,
        )
        jetstream = bus.jetstream()
        try:
            await jetstream.add_consumer(stream, config)
            return cls(await jetstream.pull_subscribe_bind(consumer=name, stream=stream))
        except APIError as error:
            raise FailedPrecondition(
                f"JetStream refuses the consumer {name} of {stream}: {error.description}", reason="CONSUMER_CONFLICT"
            ) from None
        except (NatsError, NatsTimeoutError) as error:
            raise Unavailable(
                f"JetStream cannot be asked for {stream}: {error}", reason="JETSTREAM_UNAVAILABLE"
            ) from None

    async def close(self) -> None:
        """What was handed out and not acknowledged comes again, to whoever has the place then."""
        with contextlib.suppress(NatsError):  # the connection is gone, and with it the subscription
            await self._subscription.unsubscribe()

    async def fetch(self, most: int, wait_s: float) -> list[Delivery]:
        """What there is, at most ``most`` of it; after ``wait_s`` seconds what has come until then.

        Raises:
            Unavailable: JetStream does not answer, or the bus is closed.
        """
        try:
            messages = await self._subscription.fetch(most, timeout=wait_s)
        except (NatsTimeoutError, TimeoutError):
            return []
        except NatsError as error:
            raise Unavailable(f"JetStream hands nothing out: {error}", reason="JETSTREAM_UNAVAILABLE") from None
        finally:
            _still_cancelled()
        return [_delivery(message) for message in messages]

    async def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        """They need not come again. One whose acknowledgement is lost comes again.

        Raises:
            Unavailable: the bus is closed.
        """
        try:
            for delivery in deliveries:
                await delivery.message.ack()
        except NatsError as error:
            raise Unavailable(f"deliveries cannot be acknowledged: {error}", reason="DISCONNECTED") from None

    async def postpone(self, delivery: Delivery, delay_s: float) -> None:
        """It shall come again, after ``delay_s`` seconds.

        Raises:
            Unavailable: the bus is closed.
        """
        try:
            await delivery.message.nak(delay_s)
        except NatsError as error:
            raise Unavailable(f"a delivery cannot be put off: {error}", reason="DISCONNECTED") from None


def _still_cancelled() -> None:
    """nats-py loses a cancellation that comes with a message (its ``wait_for``, before Python 3.12)."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _delivery(message: Msg) -> Delivery:
    metadata = message.metadata
    return Delivery(message.subject, message.data, metadata.sequence.stream, metadata.num_delivered, message)
