"""What is believed of a receipt in the hands of somebody, and of a log: by whom signed, where logged, seen by whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from countersign.verify import cose_receipt, merkle
from countersign.verify.arithmetic import arithmetic_of
from countersign.verify.cose import key_id
from countersign.verify.equivocation import conflict_of
from countersign.verify.errors import Inconsistent, NotCheckable, Untrusted
from countersign.verify.log import checkpoint as notes
from countersign.verify.log.checkpoint import Checkpoint, KeyKind, NoteKey, Signed
from countersign.verify.receipt import ReceiptVerifier, SignedReceipt

SKEW_MS = 5 * 60 * 1000
"""How far the clocks of whoever signs and whoever checks may be apart."""


@dataclass(frozen=True, slots=True)
class TrustPolicy:
    """Whom to believe, all given as values.

    Attributes:
        receipt_keys: Keys of targets.
        logs: Keys of transparency logs, each by the origin of its log.
        witnesses: Keys of witnesses, of which ``quorum`` different ones must have cosigned a checkpoint.
        quorum: How many; 0 asks for none. More also demand that a receipt is logged: under a checkpoint that they saw.
        logged: Whether a receipt must be in a trusted log.
        now_unix_ms: The time; None leaves clocks out.
        max_age_ms: How long ago an answer may have been finished; None sets no bound.
        arithmetics: How the targets compute, such as "native fp32" (see ``arithmetic``); none given: as they say.
    """

    receipt_keys: tuple[Ed25519PublicKey, ...] = ()
    logs: tuple[NoteKey, ...] = ()
    witnesses: tuple[NoteKey, ...] = ()
    quorum: int = 0
    logged: bool = False
    now_unix_ms: int | None = None
    max_age_ms: int | None = None
    arithmetics: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Logged:
    """The receipt is entry ``index`` of the log of that origin, when it had ``size`` entries."""

    origin: str
    size: int
    index: int
    root: bytes


@dataclass(frozen=True, slots=True)
class Trusted:
    """A receipt that holds, with what was found about its log. ``unchecked`` says what was carried but not believed."""

    signed: SignedReceipt
    included: tuple[Logged, ...] = ()
    checkpoint: Signed | None = None
    unchecked: tuple[str, ...] = ()

    @property
    def witnesses(self) -> int:
        """How many trusted witnesses have cosigned the checkpoint."""
        return 0 if self.checkpoint is None else _witnesses(self.checkpoint)


class TrustRules:
    """All trust rules, in the order in which they are applied. No input or output, no clock.

    ``form`` (the receipt):
        1 to 7. Those of ``ReceiptVerifier.form``.
        8. Where a time is given: finished neither after it, give or take ``SKEW_MS``, nor longer ago than allowed.
        9. Where arithmetics are given: the receipt names one of them, not one with more room for errors.
        10. Each proof that a trusted log has signed leads from this receipt to the root that it signed. Proofs of other
            logs count for nothing. Two of one log and size lead to one root.
        11. A carried checkpoint is one that ``checkpoint`` believes, over the tree of one of these proofs.
        12. Where logging or a quorum is demanded: there is a proof, and with a quorum such a checkpoint.

        What may be missing without anything being wrong comes last, so that it hides nothing that is.

    ``checkpoint`` (size and root of a log):
        1. Signed by a trusted log under its own origin, and no line of a known key is wrong.
        2. Cosigned by at least the quorum of trusted witnesses, each counted once.

    ``successor`` (two checkpoints of one log):
        1. The later one is not smaller.
        2. The consistency proof leads from the earlier root to the later.
        3. Of the same size they do not differ in a way by which a draw could be chosen.
    """

    def __init__(self, policy: TrustPolicy) -> None:
        self._policy = policy
        self._receipts = ReceiptVerifier(policy.receipt_keys)
        self._logs = tuple(log for log in policy.logs if log.kind == KeyKind.LOG)
        self._witnesses = tuple(witness for witness in policy.witnesses if witness.kind == KeyKind.WITNESS)
        self._log_keys = {key_id(log.key): log for log in self._logs}

    def form(self, data: bytes) -> Trusted:
        """Checks a receipt.

        Raises:
            NotCheckable: nothing is wrong, but no key is trusted at all, or a proof is demanded and missing.
            VerificationError: the rule that is broken.
        """
        signed = self._receipts.form(data)  # 1 to 7
        self._in_time(signed)  # 8
        self._computed(signed)  # 9
        included, foreign = self._included(signed)  # 10
        checkpoint, unknown = self._carried(signed, included)  # 11
        if self._policy.logged or self._policy.quorum:  # 12
            self._logged(included, checkpoint)
        return Trusted(signed, included, checkpoint, (*foreign, *unknown))

    def checkpoint(self, note: bytes) -> Signed:
        """Checks a signed checkpoint.

        Raises:
            NotCheckable: fewer witnesses than asked for have cosigned it.
            VerificationError: it cannot be read, no trusted log signed it, or a known key's line is wrong.
        """
        signed = notes.verify(note, (*self._logs, *self._witnesses))
        origin = signed.checkpoint.origin
        if not any(signer.key.kind == KeyKind.LOG and signer.key.name == origin for signer in signed.signers):
            raise Untrusted("the checkpoint is not signed by the log that it is of", origin=origin)
        seen = _witnesses(signed)
        if seen < self._policy.quorum:
            raise NotCheckable(
                "fewer witnesses than asked for have cosigned the checkpoint",
                help="wait for them, or ask the log for a checkpoint that they have cosigned",
                cosigned=seen,
                quorum=self._policy.quorum,
            )
        return signed

    def successor(self, earlier: Checkpoint, later: Checkpoint, path: Sequence[bytes]) -> None:
        """Checks that a log has only grown from one checkpoint to another.

        Raises:
            Inconsistent: it has not, or the proof does not show it.
        """
        sizes = {"earlier": earlier.size, "later": later.size}
        if earlier.origin != later.origin:
            raise Inconsistent("checkpoints of two logs", earlier=earlier.origin, later=later.origin)
        if later.size < earlier.size:
            raise Inconsistent("the log has shrunk", **sizes)
        if not merkle.verify_consistency(earlier.size, later.size, earlier.root, later.root, path):
            raise Inconsistent("the log is not shown to have only grown", **sizes)
        if later.size == earlier.size and (conflict := conflict_of(earlier, later, ())):
            raise Inconsistent(conflict)

    def _in_time(self, signed: SignedReceipt) -> None:
        now, finished = self._policy.now_unix_ms, signed.receipt.usage.finished_unix_ms
        if now is None:
            return
        if finished > now + SKEW_MS:
            raise Inconsistent("finished in the future", ahead_ms=finished - now)
        if self._policy.max_age_ms is not None and finished < now - self._policy.max_age_ms:
            raise Inconsistent("older than is accepted", age_ms=now - finished, limit_ms=self._policy.max_age_ms)

    def _included(self, signed: SignedReceipt) -> tuple[tuple[Logged, ...], tuple[str, ...]]:
        included, foreign = list[Logged](), list[str]()
        keys = [log.key for log in self._log_keys.values()]
        for proof in signed.proofs:
            try:
                found = cose_receipt.verify_inclusion(proof, signed.leaf, keys)
                origin = self._log_keys[found.key_id].name
                included.append(Logged(origin, found.size, found.index, found.root))
            except Untrusted as error:
                foreign.append(f"a proof of a log that is not trusted here ({error.evidence['signer'][:16]})")
        for one, other in combinations(included, 2):
            if (one.origin, one.size) == (other.origin, other.size) and one.root != other.root:
                raise Inconsistent("the log has signed two roots for one size", size=one.size, origin=one.origin)
        return tuple(included), tuple(foreign)

    def _carried(self, signed: SignedReceipt, included: Sequence[Logged]) -> tuple[Signed | None, tuple[str, ...]]:
        if signed.checkpoint is None:
            return None, ()
        try:
            believed = self.checkpoint(signed.checkpoint)
        except Untrusted:
            return None, ("a checkpoint of a log that is not trusted here",)
        head = believed.checkpoint
        roots = [proof.root for proof in included if (proof.origin, proof.size) == (head.origin, head.size)]
        if not roots:
            return None, ("a checkpoint that no proof here leads to",)
        if any(root != head.root for root in roots):
            raise Inconsistent("the log has signed two roots for one size", size=head.size, checkpoint=head.root)
        return believed, ()

    def _logged(self, included: Sequence[Logged], checkpoint: Signed | None) -> None:
        if not included:
            raise NotCheckable(
                "no proof that the receipt is in a trusted log",
                help="ask the log for it, and name the log's key (--log-key)",
            )
        if self._policy.quorum and checkpoint is None:
            raise NotCheckable(
                "no checkpoint that witnesses have cosigned", help="ask the log for the proof with its checkpoint"
            )

    def _computed(self, signed: SignedReceipt) -> None:
        named, agreed = str(arithmetic_of(signed.receipt)), self._policy.arithmetics
        if agreed and named not in agreed:
            raise Inconsistent("computed otherwise than was agreed", named=named, agreed=", ".join(agreed))


def _witnesses(signed: Signed) -> int:
    keys = [signer.key for signer in signed.signers if signer.key.kind == KeyKind.WITNESS]
    return len({key.key.public_bytes_raw() for key in keys})
