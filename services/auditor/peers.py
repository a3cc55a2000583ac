"""Who watches whom, as the configuration says it: ``auditor.follow`` and ``auditor.witnesses``."""

from __future__ import annotations

from dataclasses import dataclass

from countersign.services.runtime.config import AuditorConfig
from countersign.services.runtime.errors import FailedPrecondition
from countersign.verify.errors import Malformed
from countersign.verify.log.checkpoint import KeyKind, NoteKey


@dataclass(frozen=True, slots=True)
class Peer:
    """A log that is followed or a witness that is asked; ``url`` without a slash at its end, empty if none is known."""

    key: NoteKey
    url: str


@dataclass(frozen=True, slots=True)
class Others:
    """The logs that this auditor follows, and the witnesses of its own."""

    follow: tuple[Peer, ...] = ()
    witnesses: tuple[Peer, ...] = ()

    @staticmethod
    def of(config: AuditorConfig) -> Others:
        """As configured. Raises FailedPrecondition (reason CONFIG_INVALID)."""
        return Others(
            peers("auditor.follow", config.follow, KeyKind.LOG, with_url=False),
            peers("auditor.witnesses", config.witnesses, KeyKind.WITNESS, with_url=True),
        )


NOBODY = Others()


def peers(key: str, text: str, kind: KeyKind, *, with_url: bool) -> tuple[Peer, ...]:
    """The peers in "KEY URL, KEY URL".

    Args:
        key: of the configuration, for messages.
        text: its value.
        kind: what the peers' keys must be for.
        with_url: whether each needs a URL.

    Raises:
        FailedPrecondition: reason CONFIG_INVALID.
    """
    return tuple(_peer(key, item.split(), kind, with_url) for item in text.split(",") if item.strip())


def _peer(key: str, words: list[str], kind: KeyKind, with_url: bool) -> Peer:
    try:
        found = NoteKey.parse(words[0])
    except Malformed as error:
        raise _wrong(key, words, str(error)) from None
    if found.kind != kind:
        raise _wrong(key, words, f"the key is one of a {found.kind.name.lower()}, not of a {kind.name.lower()}")
    url = words[1].rstrip("/") if len(words) == 2 else ""
    usable = url.startswith(("http://", "https://")) if url else not with_url
    if len(words) > 2 or not usable:
        raise _wrong(key, words, "expected KEY URL" if with_url else "expected KEY or KEY URL")
    return Peer(found, url)


def _wrong(key: str, words: list[str], why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{key}: {' '.join(words)[:200]}: {why}",
        reason="CONFIG_INVALID",
        help="take KEY from the peer's /keys, and write: KEY http://host:port, more of them after commas",
    )
