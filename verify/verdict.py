"""An auditor's signed word on one receipt: what was checked, what came out, and why this receipt was looked at.

A signed statement (``statement``) over

    {"version": 1, "receipt": digest, "request_id": text, "outcome": "pass" | "fail" | "inconclusive",
     "levels": [{"level", "outcome", "summary", "figures": {name: number}}, ...],
     "log": {"index", "checkpoint": note}, "audited_unix_ms"}

``log`` makes the draw repeatable: the receipt is entry ``index`` of the log whose checkpoint this note is, the first
that covers it, and ``sampling.selected`` is true of its beacon, the digest, and the share that the checkpoint states in
a line "countersign-share 0.1".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from countersign.verify import sampling, statement
from countersign.verify.audit import Outcome
from countersign.verify.errors import Inconsistent, Malformed
from countersign.verify.log import checkpoint as notes

CONTENT_TYPE = "application/vnd.countersign.verdict+cbor"
VERSION = 1
SHARE_LINE = sampling.SHARE_LINE

MAX_LEVELS = 16
MAX_FIGURES = 128
MAX_TEXT = 4096

_DIGEST = 32
_SHARE = re.compile(r"[0-9]\.[0-9]{1,20}|[1-9](\.[0-9]{1,20})?e-[0-9]{2}", re.ASCII)
_OUTCOMES: tuple[str, ...] = get_args(Outcome)


@dataclass(frozen=True, slots=True)
class Finding:
    """How one level ended."""

    level: str
    outcome: str
    summary: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """``receipt``: its digest. ``checkpoint``: the signed note it was drawn from."""

    receipt: bytes
    request_id: str
    outcome: str
    findings: tuple[Finding, ...]
    index: int
    checkpoint: bytes
    audited_unix_ms: int

    def sign(self, key: Ed25519PrivateKey) -> bytes:
        """The signed statement."""
        return statement.sign(_to_cbor(self), CONTENT_TYPE, key)

    def was_drawn(self, log: notes.NoteKey) -> None:
        """Checks that the public rule drew this receipt from the log's checkpoint.

        That the receipt is entry ``index``, and that no earlier checkpoint covers it, the log's proof and its other
        checkpoints tell.

        Raises:
            Inconsistent: it did not.
            VerificationError: the checkpoint is not signed by the log.
        """
        note = notes.verify(self.checkpoint, [log])
        if not self.index < note.checkpoint.size:
            raise Inconsistent("the checkpoint does not cover the receipt", index=self.index)
        if not sampling.selected(beacon_of(self.checkpoint, log), self.receipt, share_of(note.checkpoint)):
            raise Inconsistent("the receipt was not drawn from this checkpoint", receipt=self.receipt)


def verify(data: bytes, trusted_keys: Iterable[Ed25519PublicKey]) -> Verdict:
    """The verdict that a trusted auditor signed.

    Raises:
        VerificationError: it is none, or signed by somebody else; see ``statement.verify``.
    """
    return _from_cbor(statement.verify(data, CONTENT_TYPE, trusted_keys))


def beacon_of(note: bytes, log: notes.NoteKey) -> bytes:
    """What receipts are drawn with (``sampling.beacon``): of the log's own signature, whoever else signed the note.

    Raises:
        Malformed: it is no note, or the log did not sign it.
    """
    parsed = notes.parse_note(note)
    for line in parsed.signatures:
        if (line.name, line.key_id) == (log.name, log.id):
            return sampling.beacon(parsed.text, line.data)
    raise Malformed("the log did not sign this checkpoint", log=log.name)


def share_of(checkpoint: notes.Checkpoint) -> float:
    """The share of receipts that a checkpoint puts up for audit.

    Raises:
        Malformed: it does not state one, from 0 to 1.
    """
    stated = [line.removeprefix(SHARE_LINE) for line in checkpoint.extensions if line.startswith(SHARE_LINE)]
    if len(stated) == 1 and _SHARE.fullmatch(stated[0]) and 0 <= float(stated[0]) <= 1:
        return float(stated[0])
    raise Malformed("the checkpoint does not state one share of receipts to be audited", lines=" ".join(stated))


def _to_cbor(verdict: Verdict) -> dict[object, object]:
    return {
        "version": VERSION,
        "receipt": verdict.receipt,
        "request_id": verdict.request_id,
        "outcome": verdict.outcome,
        "levels": [
            {
                "level": finding.level,
                "outcome": finding.outcome,
                "summary": finding.summary[:MAX_TEXT],
                "figures": {name: float(value) for name, value in finding.figures.items()},
            }
            for finding in verdict.findings
        ],
        "log": {"index": verdict.index, "checkpoint": verdict.checkpoint},
        "audited_unix_ms": verdict.audited_unix_ms,
    }


def _from_cbor(value: object) -> Verdict:
    match value:
        case {
            "version": 1,
            "receipt": bytes(receipt),
            "request_id": str(request_id),
            "outcome": str(outcome),
            "levels": list(levels),
            "log": {"index": int(index), "checkpoint": bytes(checkpoint), **of_log},
            "audited_unix_ms": int(audited),
            **more,
        } if not (more or of_log):
            if len(receipt) == _DIGEST and outcome in _OUTCOMES and len(levels) <= MAX_LEVELS:
                findings = tuple(map(_finding, levels))
                if index >= 0 and audited >= 0 and len(request_id) <= MAX_TEXT:
                    return Verdict(receipt, request_id, outcome, findings, index, checkpoint, audited)
    raise Malformed("not a verdict of version 1")


def _finding(value: object) -> Finding:
    match value:
        case {
            "level": str(level),
            "outcome": str(outcome),
            "summary": str(summary),
            "figures": dict(figures),
            **more,
        } if not more:
            named = all(isinstance(name, str) and isinstance(figure, float) for name, figure in figures.items())
            if named and outcome in _OUTCOMES and len(figures) <= MAX_FIGURES and len(summary) <= MAX_TEXT:
                return Finding(level, outcome, summary, figures)
    raise Malformed("not a level of a verdict")
