"""What the protocols refuse, and why.

    ProtocolError
    ├── LogError               a record that may not stand where it stands
    │   ├── MalformedRecord    the bytes are no record
    │   ├── WrongRequest       it belongs to another request
    │   ├── SequenceOrder      its stream sequence does not increase
    │   ├── BrokenChain        it does not name the record before it
    │   ├── NotOpened          it comes before Opened
    │   ├── OpenedTwice        it is a second Opened
    │   ├── WrongEpoch         Extended by an epoch that is not the owner, Assigned to one that is not the next
    │   ├── WrongBase          Extended does not continue the tokens that are there
    │   ├── EmptyExtension     Extended without a token
    │   ├── WrongCounts        Extended counts what cannot be
    │   ├── TooManyTokens      Extended goes past max_tokens
    │   ├── AfterCancelled     only Closed may follow Cancelled
    │   ├── AfterClosed        nothing may follow Closed
    │   ├── WrongReason        Closed says Cancelled where the log does not, or the other way round
    │   └── WrongBill          Closed bills other figures than the log's own
    ├── AppendError            the appender was used against its rules
    │   ├── NotOwner           the log does not give this epoch to this instance
    │   ├── EpochShared        somebody else writes in this writer's epoch
    │   ├── AppendInFlight     the append before has not been settled
    │   ├── NothingInFlight    an answer to an append that was never made
    │   └── AppenderStopped    it was told to stop
    ├── RequestIdTaken         the request id names another request
    └── CacheError             the block cache was used against its rules
        ├── NotPinned          a read without a pin
        ├── NotLeased          a write without a lease, or with one that has lapsed
        ├── NotSealable        a block whose bytes, or whose ancestors, are not all there
        └── CacheCorrupt       the cache's own books do not agree

Each carries its evidence: the figures that disagree, by name.
"""

from __future__ import annotations

Evidence = str | int | bytes


class ProtocolError(Exception):
    """Base of all. ``evidence`` holds the figures that disagree."""

    def __init__(self, message: str, **evidence: Evidence) -> None:
        super().__init__(message)
        self.message = message
        self.evidence = evidence

    def __str__(self) -> str:
        shown = (
            f"{name}={value.hex() if isinstance(value, bytes) else value}" for name, value in self.evidence.items()
        )
        return f"{self.message} ({', '.join(shown)})" if self.evidence else self.message


class LogError(ProtocolError): ...


class MalformedRecord(LogError): ...


class WrongRequest(LogError): ...


class SequenceOrder(LogError): ...


class BrokenChain(LogError): ...


class NotOpened(LogError): ...


class OpenedTwice(LogError): ...


class WrongEpoch(LogError): ...


class WrongBase(LogError): ...


class EmptyExtension(LogError): ...


class WrongCounts(LogError): ...


class TooManyTokens(LogError): ...


class AfterCancelled(LogError): ...


class AfterClosed(LogError): ...


class WrongReason(LogError): ...


class WrongBill(LogError): ...


class AppendError(ProtocolError): ...


class NotOwner(AppendError): ...


class EpochShared(AppendError): ...


class AppendInFlight(AppendError): ...


class NothingInFlight(AppendError): ...


class AppenderStopped(AppendError): ...


class RequestIdTaken(ProtocolError): ...


class CacheError(ProtocolError): ...


class NotPinned(CacheError): ...


class NotLeased(CacheError): ...


class NotSealable(CacheError): ...


class CacheCorrupt(CacheError): ...
