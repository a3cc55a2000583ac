"""What the commit protocol's machines say: effects for the shell to carry out, and news of the log."""

from __future__ import annotations

from dataclasses import dataclass

from countersign.v1.sampling_pb2 import FinishReason, Usage


@dataclass(frozen=True, slots=True)
class Append:
    """Publish ``data`` on the request's subject, naming ``expected`` as the sequence of its last record (0: none yet).

    Tell the machine how it ended: ``acked``, ``refused`` (another record is last) or ``ack_lost`` (nobody knows).
    """

    expected: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ReadTail:
    """Read all records after sequence ``after`` and give them to ``tail``."""

    after: int


@dataclass(frozen=True, slots=True)
class Settled:
    """What was asked is in the log; nothing is in flight."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """Another target owns the request: drop it."""

    epoch: int
    instance: str


@dataclass(frozen=True, slots=True)
class ClosedAlready:
    """The log is closed, and not by this machine."""

    reason: FinishReason.ValueType


@dataclass(frozen=True, slots=True)
class CancelledByClient:
    """No token follows; what was not committed is dropped. The owner closes the log with reason CANCELLED."""

    cause: str


@dataclass(frozen=True, slots=True)
class AssignedTo:
    """The request belongs to ``instance`` from here on."""

    epoch: int
    instance: str


@dataclass(frozen=True, slots=True)
class Committed:
    """Output tokens from ``position`` on; the first ``accepted`` of them had been proposed by the draft."""

    position: int
    token_ids: tuple[int, ...]
    accepted: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is final. ``receipt_digest`` is empty when no receipt could be made."""

    reason: FinishReason.ValueType
    usage: Usage
    receipt_digest: bytes
    message: str


Event = Committed | AssignedTo | CancelledByClient | Ended
Stop = Fenced | ClosedAlready | CancelledByClient
Effect = Append | ReadTail | Settled | Fenced | ClosedAlready | CancelledByClient | AssignedTo
