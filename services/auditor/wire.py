"""Audits and their outcomes, between the verifier's words and the contract's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from countersign.services.auditor.ledger import Audit
from countersign.services.runtime.errors import InvalidArgument
from countersign.v1.auditor_pb2 import AuditLevel, AuditOutcome, AuditResponse, LevelResult, VerdictEntry
from countersign.verify.audit import LEVELS, AuditReport, Level

DIGEST_BYTES = 32
PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_PAGE_BYTES = 512 * 1024
"""Of statements: a message on NATS has at most 1 MiB."""

_LEVELS: dict[AuditLevel.ValueType, Level] = {
    AuditLevel.Value(f"AUDIT_LEVEL_{level.upper()}"): level for level in LEVELS
}
_LEVEL_NUMBERS = {level: number for number, level in _LEVELS.items()}
_OUTCOMES = {
    "pass": AuditOutcome.AUDIT_OUTCOME_PASS,
    "fail": AuditOutcome.AUDIT_OUTCOME_FAIL,
    "inconclusive": AuditOutcome.AUDIT_OUTCOME_INCONCLUSIVE,
}


def level_of(number: AuditLevel.ValueType) -> Level:
    """Raises InvalidArgument for an unknown level."""
    level = _LEVELS.get(number)
    if level is None:
        known = ", ".join(AuditLevel.Name(known) for known in _LEVELS)
        raise InvalidArgument(f"there is no audit level {number}", reason="UNKNOWN_LEVEL", help=f"known are {known}")
    return level


def digest_of(data: bytes) -> bytes:
    """A receipt's digest as asked for. Raises InvalidArgument if it is none."""
    if len(data) != DIGEST_BYTES:
        raise InvalidArgument(f"a receipt's SHA-256 has {DIGEST_BYTES} bytes, not {len(data)}", reason="NO_DIGEST")
    return data


def page_of(size: int, token: str) -> tuple[int, int]:
    """After which index, and how many. Raises InvalidArgument for a token that no page gave."""
    if not token:
        after = -1
    elif token.isascii() and token.isdigit() and len(token) < 19:
        after = int(token)
    else:
        raise InvalidArgument(f"{token!r} is no page token", reason="NO_PAGE", help="begin with an empty one")
    return after, min(size or PAGE_SIZE, MAX_PAGE_SIZE)


def fitting(audits: Sequence[Audit]) -> Sequence[Audit]:
    """As many of them, from the first on, as go into one message; at least one, where there is one."""
    ends = accumulate(len(audit.verdict or b"") for audit in audits)
    return audits[: max(1, sum(end <= MAX_PAGE_BYTES for end in ends))]


def response_of(report: AuditReport) -> AuditResponse:
    """An audit's report as the contract has it."""
    levels = [
        LevelResult(
            level=_LEVEL_NUMBERS[part.level],
            outcome=_OUTCOMES[part.outcome],
            summary=part.summary,
            figures=part.figures,
        )
        for part in report.levels
    ]
    return AuditResponse(verdict=_OUTCOMES[report.verdict], levels=levels)


def entry_of(audit: Audit) -> VerdictEntry:
    """A decided audit as the contract has it."""
    return VerdictEntry(
        index=audit.index,
        receipt_sha256=audit.digest,
        outcome=audit.outcome or "",
        statement=audit.verdict or b"",
    )
