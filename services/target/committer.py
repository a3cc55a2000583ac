"""Brings a session's passes into its log, then its receipt, then closes it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from countersign.services.protocol.commit import LogState
from countersign.services.protocol.driver import Final, settle
from countersign.services.protocol.errors import ProtocolError
from countersign.services.protocol.events import Append, CancelledByClient, ClosedAlready, Fenced, ReadTail, Settled
from countersign.services.protocol.subjects import commit_subject, receipt_subject
from countersign.services.runtime.announcer import NOBODY, Announcer
from countersign.services.runtime.errors import CountersignError, DeadlineExceeded, Unavailable
from countersign.services.runtime.journal import Journal, WrongSequence
from countersign.services.target.metering import CommitMeter
from countersign.services.target.receipts import ReceiptMaker
from countersign.services.target.session import Session
from countersign.v1.event_pb2 import ReceiptMade
from countersign.v1.sampling_pb2 import FinishReason
from countersign.verify.errors import VerificationError
from countersign.verify.receipt import receipt_digest

T = TypeVar("T")

RETRY_S = 0.2
GIVE_UP_S = 60.0
PUBLISH_TIMEOUT_S = 5.0


class LogMovedOn(Exception):
    """A record has come that this session has not read."""


class Committer:
    """One task a session: ``run`` appends what the verifier puts in ``session.uncommitted``, until the log is closed.

    ``wake`` is called whenever the session may take part in a pass again, or is done.
    """

    def __init__(
        self,
        journal: Journal,
        receipts: ReceiptMaker,
        wall_ms: Callable[[], int],
        wake: Callable[[], None],
        log: logging.Logger,
        announcer: Announcer = NOBODY,
    ) -> None:
        self._journal = journal
        self._receipts = receipts
        self._wall_ms = wall_ms
        self._wake = wake
        self._log = log
        self._announcer = announcer
        self._meter = CommitMeter()

    async def run(self, session: Session, changed: asyncio.Event) -> None:
        """Commit until the end. ``changed`` is set whenever a pass was added or ``finish`` was set."""
        try:
            if await self._extend(session, changed):
                await self._close(session)
        except (CountersignError, ProtocolError, VerificationError) as error:
            # The log is the truth and is left as it is: another epoch can go on from there.
            self._log.exception("a request is dropped", extra={"request_id": session.request_id})
            session.trace.fails(type(error).__name__)
        finally:
            session.trace.ended(session.writer.log.closed)
            session.done = True
            self._wake()

    async def _extend(self, session: Session, changed: asyncio.Event) -> bool:
        """Append pass by pass; True when the log is ours to close."""
        writer = session.writer
        while session.uncommitted or session.finish is None:
            if isinstance(writer.stop, CancelledByClient):
                session.cancel()
                return True
            if writer.stop is not None:
                return False
            if not session.uncommitted:
                changed.clear()
                await changed.wait()
                continue
            sampled, first = session.uncommitted[0], writer.log.epoch_passes == 0
            effect = writer.extend(
                sampled.token_ids,
                drafted=sampled.drafted,
                accepted=sampled.accepted,
                cached_prompt_tokens=session.generation.cached if first else 0,
                fingerprints=b"".join(sampled.fingerprints),
            )
            began = asyncio.get_running_loop().time()
            final = await self._settle(session, effect)
            if isinstance(final, CancelledByClient):
                session.cancel()
                return True
            session.trace.committed(session.uncommitted.popleft(), asyncio.get_running_loop().time() - began)
            self._wake()
            if first:
                self._meter.began(session.prompt_tokens, session.generation.cached)
            if not isinstance(final, Settled):
                about = {"request_id": session.request_id, "outcome": repr(final)}
                self._log.info("a request went elsewhere", extra=about)
                return False
        return True

    async def _close(self, session: Session) -> None:
        """Receipt, then Closed. A cancel that comes in between wins: then once more, as cancelled."""
        writer = session.writer
        while session.finish is not None:
            reason, digest, moved = session.finish, b"", False
            try:
                digest = await self._receipt(session, writer.log, reason)
            except LogMovedOn:
                # Somebody else's record says whether the request is still this session's.
                await self._settle(session, ReadTail(writer.log.sequence))
                moved = True
            except (VerificationError, CountersignError) as error:
                self._log.exception("no receipt could be made", extra={"request_id": session.request_id})
                session.message = f"no receipt could be made: {error}"
                if reason != FinishReason.FINISH_REASON_CANCELLED:
                    reason = FinishReason.FINISH_REASON_ERROR
            # Learned while the receipt was on its way: the log is another's, or may only close as cancelled.
            if isinstance(writer.stop, Fenced | ClosedAlready):
                return
            if isinstance(writer.stop, CancelledByClient) and reason != FinishReason.FINISH_REASON_CANCELLED:
                session.cancel()
            elif moved:
                await asyncio.sleep(RETRY_S)  # the replica that was read lags behind
            else:
                close = writer.close(reason, receipt_sha256=digest, message=session.message)
                if not isinstance(await self._settle(session, close), CancelledByClient):
                    return
                session.cancel()

    async def _receipt(self, session: Session, log: LogState, reason: FinishReason.ValueType) -> bytes:
        """Make and store the receipt of the log as it stands; its digest.

        Raises:
            LogMovedOn: it stands otherwise: whoever has lost the request must not store a receipt over its owner's.
        """
        data = self._receipts.make(log, reason, session.started_unix_ms, self._wall_ms())
        digest = receipt_digest(data)
        subject = receipt_subject(session.request_id)

        async def publish() -> int:
            last = await self._journal.last(subject)
            if last is not None and last.data == data:
                return last.sequence  # its ack was lost
            # In this order: a receipt that an owner after this one stores is then seen above, or refuses this one.
            newest = await self._journal.last(commit_subject(session.request_id))
            if newest is None or newest.sequence != log.sequence:
                raise LogMovedOn
            expected = last.sequence if last is not None else 0
            return await self._journal.append(subject, data, expected=expected, timeout=PUBLISH_TIMEOUT_S)

        await self._patiently(publish)
        self._meter.receipt()
        made = ReceiptMade(
            epoch=session.writer.epoch,
            receipt_sha256=digest,
            tokens=len(log.tokens),
            cancelled=reason == FinishReason.FINISH_REASON_CANCELLED,
        )
        await self._announcer.announce(session.party.says(log.sequence, receipt_made=made))
        return digest

    async def _settle(self, session: Session, effect: Append | ReadTail | None) -> Final:
        writer, first, began = session.writer, [effect], asyncio.get_running_loop().time()

        async def go_on() -> Final:
            await self._announcer.announce()  # what an outage has kept back, for this record rests on it
            return await settle(writer, first.pop() if first else ReadTail(writer.log.sequence), self._journal)

        final = await self._patiently(go_on)
        self._meter.settled(final, asyncio.get_running_loop().time() - began)
        return final

    async def _patiently(self, action: Callable[[], Awaitable[T]]) -> T:
        """Try again while the log cannot be reached. Raises the last error after ``GIVE_UP_S``."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + GIVE_UP_S
        while True:
            try:
                return await action()
            except (Unavailable, DeadlineExceeded, WrongSequence) as error:
                if loop.time() > give_up:
                    raise
                self._log.warning("the token log does not answer, trying again", extra={"reason": error.reason})
            await asyncio.sleep(RETRY_S)
