"""Where the spans of an audited request are."""

from __future__ import annotations

from countersign.services.runtime.telemetry.traceparent import of_ids
from countersign.verify.errors import VerificationError
from countersign.verify.receipt import parse


def request_traceparent(receipt: bytes) -> str:
    """The router's span of the request, as its receipt says; empty where it says nothing, or cannot be read."""
    try:
        named = parse(receipt).receipt.trace
    except VerificationError:
        return ""
    if named is None:
        return ""
    return of_ids(int.from_bytes(named.id, "big"), int.from_bytes(named.span, "big"), named.sampled)
