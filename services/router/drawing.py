"""Opens a few hidden tokens of an answer to whoever has them drawn: once, so that nobody learns all by asking again."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from countersign.services.protocol.commit import LogState
from countersign.services.protocol.subjects import draw_subject
from countersign.services.runtime.errors import FailedPrecondition, InvalidArgument
from countersign.services.runtime.journal import Journal, WrongSequence
from countersign.verify.coin import challenge
from countersign.verify.coin.challenge import Demand
from countersign.verify.logged import openings_of
from countersign.verify.receipt import parse
from countersign.verify.sampling import DIGEST_SIZE

APPEND_TIMEOUT_S = 2.0
HIDDEN_PER_LEAF = 4


@dataclass(frozen=True, slots=True)
class Draws:
    """The beacon of the first draw is kept with the log; any router answers that one again, and no other.

    At most ``leaves`` hidden tokens are opened, and at most one in ``HIDDEN_PER_LEAF`` of them.
    """

    journal: Journal
    leaves: int

    async def opened(self, log: LogState, receipt: bytes, beacon: bytes) -> tuple[int, bytes]:
        """How many leaves are drawn of the answer that ``log`` holds and ``receipt`` signs, and they.

        Raises:
            InvalidArgument: BAD_BEACON.
            FailedPrecondition: NOTHING_HIDDEN, NOT_OPENED, ALREADY_DRAWN.
            Unavailable, DeadlineExceeded: the draw could not be kept; the same one may be asked for again.
        """
        signed = parse(receipt)
        hidden = signed.receipt.output.hidden
        self._check(hidden, log.request_id, beacon)
        await self._settle(log.request_id, beacon)
        leaves = min(self.leaves, hidden // HIDDEN_PER_LEAF)
        asked = challenge.draw(signed, beacon, Demand(leaves=leaves))
        # All leaves are hashed, a quarter of a second for 32,000 tokens: others are streamed to meanwhile.
        opened = await asyncio.to_thread(challenge.respond, log.request_id, openings_of(log), asked)
        return leaves, challenge.encode(opened)

    def _check(self, hidden: int, request_id: str, beacon: bytes) -> None:
        if len(beacon) != DIGEST_SIZE:
            raise InvalidArgument(
                f"the beacon has {len(beacon)} bytes", reason="BAD_BEACON", help=f"make it of {DIGEST_SIZE} random ones"
            )
        if not hidden:
            raise FailedPrecondition(
                f"request {request_id} has no hidden tokens",
                reason="NOTHING_HIDDEN",
                help="its receipt opens everything",
            )
        if not self.leaves:
            raise FailedPrecondition(
                "this deployment opens no hidden tokens", reason="NOT_OPENED", help="set router.open_hidden above 0"
            )

    async def _settle(self, request_id: str, beacon: bytes) -> None:
        """This is the draw of the request from here on, or was before."""
        subject = draw_subject(request_id)
        try:
            await self.journal.append(subject, beacon, expected=0, timeout=APPEND_TIMEOUT_S)
        except WrongSequence as error:
            first = await self.journal.last(subject)
            if first is None or first.data != beacon:
                raise FailedPrecondition(
                    f"hidden tokens of request {request_id} were drawn before",
                    reason="ALREADY_DRAWN",
                    help="the first draw stands: ask whoever made it for its beacon, or the provider for an audit",
                ) from error
