"""What can be audited of a logged receipt, judged from the token log of its request. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from countersign.services.protocol.commit import Entry, LogState
from countersign.services.protocol.errors import ProtocolError
from countersign.verify.envelope import unseal
from countersign.verify.errors import NotCheckable
from countersign.verify.logged import opened_fingerprints, openings_of
from countersign.verify.receipt import parse
from countersign.verify.sampling import positions

CHALLENGED = 32
"""Positions of an answer whose fingerprints are compared: two show weights of 4 bits, as a rule; to let an answer pass
takes 25 where arithmetics differ in bf16.
"""


@dataclass(frozen=True, slots=True)
class Disclosed:
    """The receipt with the openings that the token log gives; whether they are its own, the audit says.

    ``positions`` of the answer were drawn for their fingerprints, none where the receipt commits to none; ``answer``
    holds these as the log has them, None where it lacks one.
    """

    receipt: bytes
    positions: tuple[int, ...] = ()
    answer: bytes | None = None


@dataclass(frozen=True, slots=True)
class NotYet:
    """The request is still open: its receipt came before its last record."""


@dataclass(frozen=True, slots=True)
class Missed:
    """Nothing more than the form can be audited, and this is why."""

    why: str


Case = Disclosed | NotYet | Missed


def case_of(receipt: bytes, request_id: str, records: Iterable[Entry], beacon: bytes) -> Case:
    """What there is to audit.

    Args:
        receipt: Without openings.
        request_id: Of its request.
        records: The request's token log; none if it is gone.
        beacon: Of the checkpoint that drew the receipt; it draws the positions too.
    """
    log = LogState(request_id)
    try:
        for record in records:
            log = log.apply(record.sequence, record.data)
    except ProtocolError as error:
        return Missed(f"the token log of the request cannot be read: {error}")
    if log.records == 0:
        return Missed("the token log of the request is gone: it was kept for its time, and the audit came later")
    if log.closed is None:
        return NotYet()
    envelope = unseal(receipt)
    if log.closed.receipt_sha256 != envelope.digest():
        closed = log.closed.receipt_sha256.hex() or "none"
        return Missed(f"the request was closed with another receipt ({closed}): this one was made in vain")
    try:
        disclosed = replace(envelope, openings=openings_of(log)).encode()
    except NotCheckable as error:
        return Missed(str(error))
    activations = parse(receipt).receipt.evidence.activations
    if activations is None:
        return Disclosed(disclosed)
    drawn = positions("activations", beacon, envelope.digest(), activations.count, CHALLENGED)
    return Disclosed(disclosed, drawn, _answer(log, drawn))


def _answer(log: LogState, drawn: Sequence[int]) -> bytes | None:
    try:
        return opened_fingerprints(log, drawn)
    except NotCheckable:
        return None
