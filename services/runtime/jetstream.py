"""JetStream's API answers as Python values and typed errors, for the journal and the registry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nats.aio.msg import Msg

from countersign.services.runtime.errors import (
    CountersignError,
    FailedPrecondition,
    Internal,
    NotFound,
    ResourceExhausted,
    Unavailable,
)

# API error codes (nats-server, server/errors.json).
STREAM_EXISTS = 10058
_NOT_FOUND = 10037
_WRONG_LAST_SEQUENCE = frozenset({10071, 10164})
_FULL = frozenset({10023, 10028, 10047, 10077})  # out of resources, memory or storage; the store failed


class WrongSequence(FailedPrecondition):
    """Another entry has been appended since the writer last looked: read the tail, then decide anew."""

    default_reason = "WRONG_LAST_SEQUENCE"


def header(msg: Msg, name: str) -> str:
    """One header of a message; empty when it has none."""
    return str((msg.headers or {}).get(name, ""))


def status_of(msg: Msg) -> str:
    """The server's status, such as 503 for no responders; empty in ordinary messages."""
    return header(msg, "Status")


def is_status(msg: Msg) -> bool:
    """Whether it ends a sequence of replies."""
    return status_of(msg) != ""


def reply_of(msg: Msg, subject: str) -> dict[str, Any]:
    """The JSON object that JetStream answered about ``subject``.

    Raises:
        WrongSequence, NotFound: as they say.
        ResourceExhausted: reason JOURNAL_FULL.
        Unavailable: reason JETSTREAM_UNAVAILABLE: no leader, or not enough replicas.
        Internal: reason JETSTREAM_ERROR: anything else.
    """
    try:
        reply = json.loads(msg.data)
    except ValueError:
        reply = None
    if not isinstance(reply, dict):
        raise Internal(f"JetStream answered no JSON object about {subject}", reason="JETSTREAM_ERROR")
    if "error" in reply:
        raise _failure(reply["error"], subject)
    return reply


def _failure(error: Mapping[str, Any], subject: str) -> CountersignError:
    code, text = error.get("err_code"), f"JetStream on {subject}: {error.get('description', 'no description')}"
    if code in _WRONG_LAST_SEQUENCE:
        return WrongSequence(text, help="read the tail")
    if code == _NOT_FOUND:
        return NotFound(text)
    if code in _FULL:
        return ResourceExhausted(text, reason="JOURNAL_FULL", help="is the disk full?")
    if error.get("code") == 503:
        return Unavailable(text, reason="JETSTREAM_UNAVAILABLE")
    return Internal(text, reason="JETSTREAM_ERROR", err_code=str(code))
