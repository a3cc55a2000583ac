"""The token log of one request: its records and the one state they lead to.

The log is the only truth about a request. Its records, in order:

    one Opened; any number of Assigned(epoch + 1) and Extended(current epoch); at most one Cancelled; at most one Closed

Each holds the SHA-256 of the one before it. JetStream stores a record only where its writer names the sequence of the
last one (compare-and-set); ``LogState.apply`` checks everything else, and every reader and writer runs it on every
record. What it accepts has these properties, whoever wrote it:

    ExactlyOnce        the Extended records tile the output: each position is committed once, in order
    Fenced             no Extended of epoch e after Assigned e + 1
    ClosedIsFinal      no token after Cancelled, nothing after Closed
    OneReceipt         one Closed, thus one receipt digest
    BilledIsCommitted  the usage in Closed is what the log adds up to

DESIGN.md section 4. Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Protocol

from google.protobuf.message import DecodeError

from countersign.services.protocol.errors import (
    AfterCancelled,
    AfterClosed,
    BrokenChain,
    EmptyExtension,
    MalformedRecord,
    NotOpened,
    OpenedTwice,
    SequenceOrder,
    TooManyTokens,
    WrongBase,
    WrongBill,
    WrongCounts,
    WrongEpoch,
    WrongReason,
    WrongRequest,
)
from countersign.services.protocol.tokens import Tokens
from countersign.v1.commit_pb2 import Assigned, Cancelled, Closed, CommitRecord, Extended, Opened
from countersign.v1.sampling_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_UNSPECIFIED,
    Usage,
)

MAX_FINGERPRINT_BYTES = 256
"""Of one token: 128 numbers in fp16."""

Payload = Opened | Assigned | Extended | Cancelled | Closed


class Entry(Protocol):
    """A record as the stream holds it."""

    @property
    def sequence(self) -> int: ...

    @property
    def data(self) -> bytes: ...


def record_digest(data: bytes) -> bytes:
    """SHA-256 of a record as stored: the next record's ``previous_sha256``."""
    return sha256(data).digest()


def encode(request_id: str, previous: bytes, payload: Payload) -> bytes:
    """The bytes of a record; the same arguments always give the same bytes."""
    record = CommitRecord(request_id=request_id, previous_sha256=previous)
    match payload:
        case Opened():
            record.opened.CopyFrom(payload)
        case Assigned():
            record.assigned.CopyFrom(payload)
        case Extended():
            record.extended.CopyFrom(payload)
        case Cancelled():
            record.cancelled.CopyFrom(payload)
        case Closed():
            record.closed.CopyFrom(payload)
    return record.SerializeToString(deterministic=True)


def decode(data: bytes) -> tuple[CommitRecord, Payload]:
    """A stored record and what it holds.

    Raises:
        MalformedRecord: the bytes are no record of a kind known here.
    """
    try:
        record = CommitRecord.FromString(data)
    except DecodeError as error:
        raise MalformedRecord(f"the bytes are no CommitRecord: {error}", data=data[:64]) from error
    match record.WhichOneof("record"):
        case "opened":
            return record, record.opened
        case "assigned":
            return record, record.assigned
        case "extended":
            return record, record.extended
        case "cancelled":
            return record, record.cancelled
        case "closed":
            return record, record.closed
    raise MalformedRecord("the record holds nothing that is known here", data=data[:64])


@dataclass(frozen=True, slots=True)
class LogState:
    """What a log says up to its record number ``records``. Begin with ``LogState(request_id)``, ``apply`` each record.

    ``sequence`` and ``digest`` are those of the last record seen (0 and empty before the first). ``epoch_passes``
    counts the passes of the current epoch, ``arithmetic`` is how the tokens were computed. The messages held here are
    not to be changed.
    """

    request_id: str
    sequence: int = 0
    digest: bytes = b""
    records: int = 0
    opened: Opened | None = None
    epoch: int = 0
    instance: str = ""
    arithmetic: str = ""
    tokens: Tokens = field(default_factory=Tokens)
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    cached_prompt_tokens: int = 0
    epoch_passes: int = 0
    cancelled: Cancelled | None = None
    closed: Closed | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All committed output tokens."""
        return self.tokens.ids()

    @property
    def proposed(self) -> tuple[bool, ...]:
        """For each committed token whether the draft had proposed it."""
        return self.tokens.proposed()

    @property
    def fingerprints(self) -> tuple[bytes, ...]:
        """Of each committed token that of the state it was sampled from; none where not all have one of one size."""
        return self.tokens.fingerprints()

    @property
    def ended(self) -> bool:
        """No token can follow."""
        return self.cancelled is not None or self.closed is not None

    def usage(self) -> Usage:
        """What the log adds up to: the bill."""
        return Usage(
            prompt_tokens=len(self.opened.prompt_token_ids) if self.opened is not None else 0,
            output_tokens=len(self.tokens),
            cached_prompt_tokens=self.cached_prompt_tokens,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            target_passes=self.passes,
        )

    def apply(self, sequence: int, data: bytes) -> LogState:
        """The state after the record ``data``, stored as number ``sequence`` of the stream.

        Raises:
            LogError: the record may not stand here; the kind and its evidence say why.
        """
        return self.follow(sequence, *decode(data), record_digest(data))

    def follow(self, sequence: int, record: CommitRecord, payload: Payload, digest: bytes) -> LogState:
        """As :meth:`apply`, of a record that is decoded already; ``digest`` is that of its bytes."""
        if record.request_id != self.request_id:
            raise WrongRequest("a record of another request", found=record.request_id, expected=self.request_id)
        if sequence <= self.sequence:
            raise SequenceOrder("the sequence does not increase", found=sequence, last=self.sequence)
        if record.previous_sha256 != self.digest:
            raise BrokenChain(
                "the record does not follow the last one seen",
                sequence=sequence,
                found=record.previous_sha256,
                expected=self.digest,
            )
        self.check(payload)
        changes = self._changes(payload)
        return replace(self, sequence=sequence, digest=digest, records=self.records + 1, **changes)

    def check(self, payload: Payload) -> None:
        """Whether ``payload`` may follow.

        Raises:
            LogError: it may not.
        """
        if isinstance(payload, Opened):
            if self.opened is not None:
                raise OpenedTwice("a log opens once", sequence=self.sequence)
            return
        if self.opened is None:
            raise NotOpened(f"{_kind(payload)} before Opened")
        if self.closed is not None:
            raise AfterClosed(f"{_kind(payload)} after Closed", sequence=self.sequence)
        if self.cancelled is not None and not isinstance(payload, Closed):
            raise AfterCancelled(f"{_kind(payload)} after Cancelled", sequence=self.sequence)
        match payload:
            case Assigned() if payload.epoch != self.epoch + 1:
                raise WrongEpoch("Assigned is not the next epoch", found=payload.epoch, expected=self.epoch + 1)
            case Extended():
                self._check_extended(self.opened, payload)
            case Closed():
                self._check_closed(payload)

    def _check_extended(self, opened: Opened, extended: Extended) -> None:
        if self.epoch == 0 or extended.epoch != self.epoch:
            raise WrongEpoch("Extended by an epoch that is not the owner", found=extended.epoch, expected=self.epoch)
        if extended.base != len(self.tokens):
            raise WrongBase(
                "Extended does not begin where the tokens end", found=extended.base, expected=len(self.tokens)
            )
        check_pass(opened, extended, first=self.epoch_passes == 0)

    def _check_closed(self, closed: Closed) -> None:
        if closed.reason == FINISH_REASON_UNSPECIFIED:
            raise WrongReason("Closed without a reason")
        if (closed.reason == FINISH_REASON_CANCELLED) != (self.cancelled is not None):
            raise WrongReason(
                "Closed as cancelled goes with a Cancelled record",
                reason=closed.reason,  # a number, known or not
                cancelled=self.cancelled is not None,
            )
        if closed.usage != self.usage():
            raise WrongBill(
                "Closed bills what the log does not hold", found=str(closed.usage), expected=str(self.usage())
            )

    def _changes(self, payload: Payload) -> dict[str, Any]:
        """The fields that a record changes."""
        match payload:
            case Opened():
                return {"opened": payload}
            case Assigned():
                return self._assigned(payload)
            case Extended():
                return self._extended(payload)
            case Cancelled():
                return {"cancelled": payload}
            case Closed():
                return {"closed": payload}

    def _assigned(self, assigned: Assigned) -> dict[str, Any]:
        return {
            "epoch": assigned.epoch,
            "instance": assigned.instance,
            "arithmetic": self.arithmetic if self.tokens else assigned.arithmetic,
            "epoch_passes": 0,
        }

    def _extended(self, extended: Extended) -> dict[str, Any]:
        # A take-over prefills the prompt once more; what the first prefill found is what the client is told.
        cached = extended.cached_prompt_tokens if self.passes == 0 else self.cached_prompt_tokens
        return {
            "tokens": self.tokens.extended(extended.token_ids, extended.accepted, extended.fingerprints),
            "drafted": self.drafted + extended.drafted,
            "accepted": self.accepted + extended.accepted,
            "passes": self.passes + 1,
            "cached_prompt_tokens": cached,
            "epoch_passes": self.epoch_passes + 1,
        }


def check_pass(opened: Opened, extended: Extended, *, first: bool) -> None:
    """Whether one target pass can have given ``extended``; ``first``: it is the first of its epoch.

    Raises:
        EmptyExtension, WrongCounts, TooManyTokens: it cannot.
    """
    count, end = len(extended.token_ids), extended.base + len(extended.token_ids)
    if count == 0:
        raise EmptyExtension("Extended holds no token", base=extended.base)
    if extended.accepted > min(extended.drafted, count):
        raise WrongCounts(
            "more accepted than proposed or committed",
            accepted=extended.accepted,
            drafted=extended.drafted,
            tokens=count,
        )
    if extended.cached_prompt_tokens > (len(opened.prompt_token_ids) if first else 0):
        raise WrongCounts(
            "cached prompt tokens belong to the first pass of an epoch, and are at most the prompt",
            cached=extended.cached_prompt_tokens,
            prompt=len(opened.prompt_token_ids),
        )
    if len(extended.fingerprints) % count or len(extended.fingerprints) > MAX_FINGERPRINT_BYTES * count:
        raise WrongCounts(
            "fingerprints have the same size for each token, and a bounded one",
            size=len(extended.fingerprints),
            tokens=count,
            most=MAX_FINGERPRINT_BYTES,
        )
    if end > opened.sampling.max_tokens:
        raise TooManyTokens("more tokens than were asked for", end=end, max_tokens=opened.sampling.max_tokens)


def replay(request_id: str, entries: Iterable[Entry]) -> LogState:
    """The state of a log that is read from its first record on.

    Raises:
        LogError: a record may not stand where it stands.
    """
    log = LogState(request_id)
    for entry in entries:
        log = log.apply(entry.sequence, entry.data)
    return log


def _kind(payload: Payload) -> str:
    return payload.DESCRIPTOR.name
