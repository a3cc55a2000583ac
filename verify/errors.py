"""Why a receipt is not believed.

    VerificationError          nothing else escapes the verifier, whatever bytes it is fed
    ├── Malformed              the bytes are no receipt in the one encoding that is allowed
    ├── Inconsistent           the signed claims contradict each other
    ├── Untrusted              the signer is not among the trusted keys
    ├── BadSignature           the signature is not the key's over these bytes
    ├── OpeningMismatch        the openings are not of what was signed
    └── NotCheckable           nothing wrong was found, but something that the check needs is missing

    KeyFileError               a key file that cannot be used; not about a receipt
    LogFolderError             a log folder that cannot be used, or holds something else than was written

Each carries its evidence: what was expected and what was found.
"""

from __future__ import annotations


class VerificationError(Exception):
    """Base of all. ``evidence`` holds short texts by name, safe to print: no opened token or prompt is among them."""

    def __init__(self, message: str, **evidence: object) -> None:
        super().__init__(message)
        self.message = message
        self.evidence = {name: _text(value) for name, value in evidence.items()}

    def __str__(self) -> str:
        if not self.evidence:
            return self.message
        return f"{self.message} ({', '.join(f'{name}: {value}' for name, value in self.evidence.items())})"


class Malformed(VerificationError):
    pass


class Inconsistent(VerificationError):
    pass


class Untrusted(VerificationError):
    pass


class BadSignature(VerificationError):
    pass


class OpeningMismatch(VerificationError):
    pass


class NotCheckable(VerificationError):
    """``help`` says what whoever audits can do about it."""

    def __init__(self, message: str, *, help: str = "", **evidence: object) -> None:  # noqa: A002  the field's word
        super().__init__(message, **evidence)
        self.help = help


class KeyFileError(Exception):
    """The message names the file and says what to do."""


class LogFolderError(Exception):
    """The message names the folder or file and says what to do."""


def _text(value: object) -> str:
    """Bytes as hex, no control characters (a receipt must not steer a terminal), cut to a length that fits a line."""
    text = value.hex() if isinstance(value, bytes) else str(value)
    text = "".join(character if character.isprintable() else "?" for character in text[:200])
    return text if len(text) <= 80 else text[:77] + "..."
