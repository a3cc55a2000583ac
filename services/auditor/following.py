"""A log that is followed at its URL: every new checkpoint is fetched and held against the one seen before it.

What a log leaves out cannot be told from a fault of the way to it: it is said, and asked for again.
"""

from __future__ import annotations

import logging
from urllib.parse import quote

from countersign.services.auditor.ledger import Ledger
from countersign.services.auditor.peers import Peer
from countersign.services.auditor.witness import Conflict, Cosigned, Unproven, Witness
from countersign.services.runtime.errors import CountersignError, Unavailable
from countersign.services.runtime.fetching import ask
from countersign.verify.errors import VerificationError
from countersign.verify.log.checkpoint import MAX_NOTE_BYTES, Checkpoint
from countersign.verify.log.proofs import TileTree
from countersign.verify.log.tiles import Tile

MAX_TILE_BYTES = 64 * 1024
"""8 KiB of hashes, or what a server says in their place."""

_log = logging.getLogger(__name__)


class Follower:
    """Follows one log. ``look`` blocks; to be called in a thread, by one at a time."""

    def __init__(self, peer: Peer, witness: Witness, ledger: Ledger) -> None:
        self._peer = peer
        self._witness = witness
        self._ledger = ledger
        self._told = ""

    def look(self) -> None:
        """Fetch the newest checkpoint and judge it; what is wrong is logged, once as long as it stays the same."""
        try:
            self._tell(self._judge())
        except (CountersignError, VerificationError, IndexError) as error:
            self._tell(f"cannot be followed: {error}")

    def _judge(self) -> str:
        """What is wrong with the log, empty if nothing is."""
        reply = ask(f"{self._peer.url}/checkpoint", most=MAX_NOTE_BYTES)
        if reply.status == 404 and self._witness.seen(self._peer.key.name) is None:
            return ""  # it has not begun
        if reply.status != 200:
            return f"its checkpoint is answered with status {reply.status}"
        checkpoint = self._witness.read(reply.body)
        last_note, last = self._ledger.last_seen(checkpoint.origin), self._witness.seen(checkpoint.origin)
        old = 0 if last is None else last.size
        if last is not None and last_note is not None and checkpoint.size < old:
            proven = self._accuse(reply.body, checkpoint, last_note, last)
            return proven or f"it shows {checkpoint.size} entries, and had {old} before"
        path = TileTree(self._tile).consistency(old, checkpoint.size)
        match self._witness.observe(reply.body, old, path):
            case Cosigned():
                return ""
            case Conflict(what):
                return what
            case Unproven() if last is not None and last_note is not None:
                proven = self._accuse(last_note, last, reply.body, checkpoint)
                return proven or "its tiles do not bear out its checkpoint"
        return "its tiles do not bear out its checkpoint" if last is None else ""

    def _accuse(self, earlier: bytes, first: Checkpoint, later: bytes, second: Checkpoint) -> str | None:
        """Evidence from the tiles, if they are those of the later checkpoint."""
        tree = TileTree(self._tile)
        path = tree.consistency(first.size, second.size)
        whole = first.size & (first.size - 1) == 0  # then the proof leaves the earlier tree itself out
        steps = [tree.root(first.size), *path] if whole else path
        return self._witness.accuse(earlier, later, steps)

    def _tile(self, tile: Tile) -> bytes | None:
        reply = ask(f"{self._peer.url}/{quote(tile.path)}", most=MAX_TILE_BYTES)
        if reply.status == 404:
            return None
        if reply.status != 200:
            raise Unavailable(f"{tile.path} is answered with status {reply.status}", reason="PEER_UNREACHABLE")
        return reply.body

    def _tell(self, what: str) -> None:
        if what and what != self._told:
            _log.error("a followed log is not as it should be", extra={"origin": self._peer.key.name, "error": what})
        elif not what and self._told:
            _log.info("a followed log is well again", extra={"origin": self._peer.key.name})
        self._told = what
