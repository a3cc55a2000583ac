"""Evidence that a log showed two histories: two of its signed checkpoints that cannot both be of one growing log.

Nobody has to believe whoever found it. Either both checkpoints have the same size and another root, or another text of
which one is drawn from (``sampling.SHARE_LINE``; other logs may well write the time into theirs). Or ``steps`` prove
it: the hashes of a consistency proof (RFC 9162 section 2.1.4). They give the later root, so they are of the later tree,
and from the same hashes another root follows for the earlier size than the log signed.

Hashes that do not give the later root are no evidence: anybody could make some up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from countersign.verify import merkle
from countersign.verify.errors import Malformed, NotCheckable
from countersign.verify.log import checkpoint as notes
from countersign.verify.log.checkpoint import Checkpoint, NoteKey
from countersign.verify.sampling import SHARE_LINE

CONTENT_TYPE = "application/vnd.countersign.equivocation+cbor"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Equivocation:
    """Two signed checkpoints (notes) of one log, the smaller first, and hashes (``consistency_roots``)."""

    earlier: bytes
    later: bytes
    steps: tuple[bytes, ...] = ()

    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of the two texts: the same evidence has one name, whoever cosigned the notes."""
        parts = [notes.parse_note(note).text for note in (self.earlier, self.later)]
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()

    def to_cbor(self) -> dict[object, object]:
        """As a signed statement holds it."""
        return {"version": VERSION, "earlier": self.earlier, "later": self.later, "steps": list(self.steps)}

    @staticmethod
    def from_cbor(value: object) -> Equivocation:
        """What ``to_cbor`` gave, nothing verified.

        Raises:
            Malformed: anything else.
        """
        match value:
            case {"version": 1, "earlier": bytes(earlier), "later": bytes(later), "steps": list(steps), **more}:
                if not more and len(steps) <= merkle.MAX_PATH and all(_is_hash(step) for step in steps):
                    return Equivocation(earlier, later, tuple(steps))
        raise Malformed("not evidence of equivocation of version 1")

    def verify(self, log_keys: Iterable[NoteKey]) -> str:
        """What it proves, as a sentence.

        Raises:
            NotCheckable: it proves nothing: the checkpoints fit, or the hashes are of another tree.
            VerificationError: a checkpoint is not signed by one of ``log_keys``, or they are of different logs.
        """
        keys = [key for key in log_keys if key.kind == notes.KeyKind.LOG]
        earlier, later = (notes.verify(note, keys).checkpoint for note in (self.earlier, self.later))
        if earlier.origin != later.origin or earlier.size > later.size:
            raise Malformed("the checkpoints are of two logs, or in the wrong order", first=earlier.origin)
        found = conflict_of(earlier, later, self.steps)
        if found is None:
            raise NotCheckable("these checkpoints fit, or the hashes are not of the later one")
        return found


def conflict_of(earlier: Checkpoint, later: Checkpoint, steps: Sequence[bytes]) -> str | None:
    """Why two checkpoints of one log cannot both be honest; None where that is not proven.

    Args:
        earlier: The smaller one.
        later: The larger one, or one of the same size.
        steps: As for ``merkle.consistency_roots``; none where the sizes are the same.
    """
    if earlier.size == later.size:
        if earlier.root != later.root:
            return f"two roots are signed for {later.size} entries"
        lines = (*earlier.extensions, *later.extensions)
        if earlier != later and any(line.startswith(SHARE_LINE) for line in lines):
            return f"two checkpoints over {later.size} entries are signed, so that a draw could be chosen"
        return None
    if earlier.size == 0:
        return None if earlier.root == merkle.EMPTY_ROOT else "a root is signed for no entries that no empty tree has"
    roots = merkle.consistency_roots(earlier.size, later.size, steps)
    if roots is None or roots[1] != later.root or roots[0] == earlier.root:
        return None
    return f"the tree over {later.size} entries does not begin with the one that was signed over {earlier.size}"


def _is_hash(part: object) -> bool:
    return isinstance(part, bytes) and len(part) == merkle.HASH_SIZE
