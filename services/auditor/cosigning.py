"""Both ends of cosigning: this log asks its witnesses, and answers as a witness of others (``tlog_witness``)."""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web

from countersign.services.auditor.ledger import Ledger
from countersign.services.auditor.notary import Notary
from countersign.services.auditor.peers import Peer
from countersign.services.auditor.tlog_witness import SIZE_TYPE, encode_request, parse_request, parse_size
from countersign.services.auditor.witness import Conflict, Cosigned, Elsewhere, Unproven, Witness, merged
from countersign.services.runtime.errors import CountersignError, Unavailable
from countersign.services.runtime.fetching import ask
from countersign.verify.errors import BadSignature, Malformed, Untrusted, VerificationError
from countersign.verify.log import checkpoint as notes
from countersign.verify.log.store import TileLog

MAX_REPLY_BYTES = 4096
_TRIES = 3

_log = logging.getLogger(__name__)


async def add_checkpoint(witness: Witness, request: web.Request) -> web.Response:
    """Answers ``POST /add-checkpoint``."""
    body = await request.read()
    try:
        old, path, note = parse_request(body)
        answer = await asyncio.to_thread(witness.observe, note, old, path)
    except Untrusted as error:
        raise web.HTTPNotFound(text=f"{error}\n") from None
    except BadSignature as error:
        raise web.HTTPForbidden(text=f"{error}\n") from None
    except Malformed as error:
        raise web.HTTPBadRequest(text=f"{error}\n") from None
    match answer:
        case Cosigned(line):
            return web.Response(text=line)
        case Elsewhere(size):
            return web.Response(status=409, body=f"{size}\n".encode(), headers={"Content-Type": SIZE_TYPE})
        case Conflict(what):
            raise web.HTTPConflict(text=f"{what}; the evidence is kept\n")
        case Unproven():
            raise web.HTTPUnprocessableEntity(
                text="the proof does not lead from the checkpoint seen last to this one\n"
            )


class Cosigners:
    """The witnesses of this log. ``gather`` blocks; to be called in a thread, by one at a time."""

    def __init__(self, log: TileLog, ledger: Ledger, notary: Notary, witnesses: tuple[Peer, ...]) -> None:
        self._log = log
        self._ledger = ledger
        self._notary = notary
        self._witnesses = witnesses
        self._seen = {witness.key.name: 0 for witness in witnesses}  # what each saw last, as far as it has said
        self._told: dict[str, str] = {}

    def gather(self) -> bool:
        """Asks those that have not cosigned the newest checkpoint; whether somebody has now."""
        last = self._ledger.last_checkpoint()
        if last is None:
            return False
        size, note = last
        signed = {(line.name, line.key_id) for line in notes.parse_note(note).signatures}
        fresh = note
        for witness in self._witnesses:
            if (witness.key.name, witness.key.id) in signed:
                continue
            try:
                fresh = merged(fresh, self._ask(witness, size, note), witness.key)
                self._told.pop(witness.key.name, None)
            except (CountersignError, VerificationError, IndexError) as error:
                self._tell(witness, str(error))
        if fresh == note:
            return False
        self._notary.cosigned(size, fresh)
        return True

    def _ask(self, witness: Peer, size: int, note: bytes) -> str:
        """The cosignature line of a witness.

        Raises:
            Unavailable: it does not give one.
            IndexError: it has seen more of this log than there is.
        """
        for _ in range(_TRIES):
            old = self._seen[witness.key.name]
            body = encode_request(old, self._log.consistency(old, size), note)
            reply = ask(f"{witness.url}/add-checkpoint", body, most=MAX_REPLY_BYTES)
            if reply.status == 200:
                self._seen[witness.key.name] = size
                return reply.body.decode("utf-8", errors="replace")
            if reply.status != 409:
                break
            self._seen[witness.key.name] = parse_size(reply.body)
        raise Unavailable(
            f"status {reply.status}: {reply.body[:200].decode(errors='replace').strip()}", reason="NOT_COSIGNED"
        )

    def _tell(self, witness: Peer, what: str) -> None:
        if self._told.get(witness.key.name) != what:
            _log.warning("a witness does not cosign", extra={"witness": witness.key.name, "error": what})
        self._told[witness.key.name] = what
