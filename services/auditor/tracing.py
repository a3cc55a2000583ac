"""Where the spans of an audited request are."""

from __future__ import annotations

from countersign.verify.errors import VerificationError
from countersign.verify.receipt import parse


def request_traceparent(receipt: bytes) -> str:
    """The router's span of the request, as its receipt says; empty where it says nothing, or cannot be read."""
    try:
        named = parse(receipt).receipt.trace
    except VerificationError:
        return ""
    return "" if named is None else f"00-{named.id.hex()}-{named.span.hex()}-{int(named.sampled):02x}"
