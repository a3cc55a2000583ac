"""Watching other logs: each checkpoint must fit the one seen before it. Pure rules, and the ledger that remembers.

A log's keys say whom to watch. Of each log the largest checkpoint that was found consistent is remembered, durable
before the cosignature over the next one leaves this process: a witness that is killed and comes back can never cosign
two histories. Two signed checkpoints that cannot both be honest are kept as evidence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from countersign.services.auditor.keys import Keys
from countersign.services.auditor.ledger import Ledger
from countersign.verify import merkle, statement
from countersign.verify.equivocation import CONTENT_TYPE, Equivocation, conflict_of
from countersign.verify.errors import Malformed
from countersign.verify.log import checkpoint as notes
from countersign.verify.log.checkpoint import Checkpoint, KeyKind, NoteKey

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cosigned:
    """Consistent with all that was seen. ``line``: the cosignature, a line of a signed note."""

    line: str


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """The proof begins at another size than the one seen last, which is ``size``."""

    size: int


@dataclass(frozen=True, slots=True)
class Unproven:
    """The proof does not lead from the checkpoint seen last to this one. By itself that is no evidence."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """The log showed two histories; the evidence is kept. ``what``: a sentence."""

    what: str


Answer = Cosigned | Elsewhere | Unproven | Conflict


class Witness:
    """Watches the logs of these keys.

    Args:
        ledger: remembers.
        keys: whose cosignature it is, and who signs evidence.
        logs: keys of logs, each by the name that is its origin.
        wall_ms: the time.
    """

    def __init__(self, ledger: Ledger, keys: Keys, logs: Iterable[NoteKey], wall_ms: Callable[[], int]) -> None:
        self._ledger = ledger
        self._keys = keys
        self._logs = {log.name: log for log in logs if log.kind == KeyKind.LOG}
        self._wall_ms = wall_ms

    def read(self, note: bytes) -> Checkpoint:
        """The checkpoint of a log that is watched.

        Raises:
            Malformed: it is no signed checkpoint.
            Untrusted: no log that is watched signed it under its own origin.
            BadSignature: the signature is not the log's.
        """
        origin = notes.parse_note(note).checkpoint.origin
        return notes.verify(note, [self._logs[origin]] if origin in self._logs else []).checkpoint

    def seen(self, origin: str) -> Checkpoint | None:
        """What was seen last of a log."""
        note = self._ledger.last_seen(origin)
        return None if note is None else notes.parse_note(note).checkpoint

    def observe(self, note: bytes, old: int, path: Sequence[bytes]) -> Answer:
        """A checkpoint, and the proof that it goes on from the tree of ``old`` entries; c2sp.org/tlog-witness.

        Raises:
            VerificationError: as ``read``.
        """
        checkpoint, note = self.read(note), self._bare(note)
        last_note = self._ledger.last_seen(checkpoint.origin)
        last = Checkpoint(checkpoint.origin, 0, merkle.EMPTY_ROOT)
        if last_note is not None:
            last = notes.parse_note(last_note).checkpoint
            if checkpoint.size == last.size and (what := conflict_of(last, checkpoint, ())):
                return self._conflict(Equivocation(last_note, note), checkpoint.origin, what)
        if old > checkpoint.size:
            raise Malformed("the proof is to begin behind the checkpoint", old=old, size=checkpoint.size)
        if old != last.size:
            return Elsewhere(last.size)
        if not merkle.verify_consistency(old, checkpoint.size, last.root, checkpoint.root, path):
            return self._unproven(last_note, last, note, checkpoint, path)
        if not self._ledger.saw(checkpoint.origin, last_note, note):
            return Elsewhere((self.seen(checkpoint.origin) or last).size)  # another request was first
        return Cosigned(self._cosignature(note))

    def accuse(self, earlier: bytes, later: bytes, steps: Sequence[bytes]) -> str | None:
        """Keeps the evidence where two checkpoints and these hashes (``conflict_of``) are some; what it proves.

        Raises:
            VerificationError: as ``read``.
        """
        first, second = self.read(earlier), self.read(later)
        what = conflict_of(first, second, steps) if first.origin == second.origin else None
        if what is not None:
            bare = self._bare(earlier), self._bare(later)
            self._conflict(Equivocation(*bare, tuple(steps)), first.origin, what)
        return what

    def _unproven(
        self, last_note: bytes | None, last: Checkpoint, note: bytes, checkpoint: Checkpoint, path: Sequence[bytes]
    ) -> Answer:
        if last_note is None:
            return Unproven()
        what = conflict_of(last, checkpoint, path)
        if what is None:
            return Unproven()
        return self._conflict(Equivocation(last_note, note, tuple(path)), checkpoint.origin, what)

    def _conflict(self, found: Equivocation, origin: str, what: str) -> Conflict:
        signed = statement.sign(found.to_cbor(), CONTENT_TYPE, self._keys.verdicts)
        if self._ledger.keep(found, origin, signed, self._wall_ms()):
            _log.error("a log showed two histories", extra={"origin": origin, "error": what})
        return Conflict(what)

    def _cosignature(self, note: bytes) -> str:
        own = self._keys.witness_key
        signed = notes.cosign(note, self._keys.witness, own.name, time=self._wall_ms() // 1000)
        return notes.parse_note(signed).signatures[-1].line()

    def _bare(self, note: bytes) -> bytes:
        """A note that was read, with the log's own signature alone: who else signed it may be anybody's 64 KiB."""
        parsed = notes.parse_note(note)
        return notes.Note(
            parsed.text, parsed.checkpoint, _lines_of(parsed, self._logs[parsed.checkpoint.origin])
        ).encode()


def merged(note: bytes, line: str, witness: NoteKey) -> bytes:
    """The note with a witness's cosignature in the place of any that it had of this witness.

    Raises:
        VerificationError: the line is not this witness's cosignature of this note.
    """
    parsed = notes.parse_note(note)
    fresh = notes.parse_note(parsed.text + b"\n" + line.encode())
    added = _lines_of(fresh, witness)
    kept = tuple(one for one in parsed.signatures if one not in _lines_of(parsed, witness))
    cosigned = notes.Note(parsed.text, parsed.checkpoint, (*kept, *added)).encode()
    notes.verify(cosigned, [witness])
    return cosigned


def _lines_of(note: notes.Note, key: NoteKey) -> tuple[notes.NoteSignature, ...]:
    return tuple(line for line in note.signatures if (line.name, line.key_id) == (key.name, key.id))
