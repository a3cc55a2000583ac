"""The auditor's keys: each signs one kind of thing, so that no signature can stand for another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from countersign.verify.cose import key_id
from countersign.verify.keys import load_or_create_signing_key, write_public
from countersign.verify.log.checkpoint import KeyKind, NoteKey

NAME_DIGITS = 16
"""Hex digits of a key id that name it in subjects and default origins: 64 bits."""


@dataclass(frozen=True, slots=True)
class Keys:
    """``log`` signs checkpoints, ``verdicts`` verdicts and evidence, ``witness`` cosigns other logs' checkpoints."""

    log: Ed25519PrivateKey
    verdicts: Ed25519PrivateKey
    witness: Ed25519PrivateKey
    origin: str

    @staticmethod
    def load(folder: Path, origin: str = "") -> Keys:
        """The keys in ``folder``, made if there are none, their public halves beside them.

        Args:
            folder: for keys.
            origin: The log's name; empty: made from its key.

        Raises:
            KeyFileError: a file cannot be used.
        """
        log, verdicts, witness = (
            load_or_create_signing_key(folder / f"{name}.key") for name in ("log", "auditor", "witness")
        )
        write_public(folder / "auditor.pub", verdicts.public_key())
        return Keys(log, verdicts, witness, origin or f"countersign.log/{_short(log)}")

    @property
    def log_key(self) -> NoteKey:
        """With which others check this log's checkpoints."""
        return NoteKey(self.origin, self.log.public_key())

    @property
    def witness_key(self) -> NoteKey:
        """With which others check this auditor's cosignatures."""
        return NoteKey(f"countersign.witness/{_short(self.witness)}", self.witness.public_key(), KeyKind.WITNESS)

    @property
    def log_name(self) -> str:
        """This log in subjects on the bus."""
        return _short(self.log)

    @property
    def auditor_name(self) -> str:
        """This auditor in subjects on the bus."""
        return _short(self.verdicts)


def _short(key: Ed25519PrivateKey) -> str:
    return key_id(key.public_key()).hex()[:NAME_DIGITS]
