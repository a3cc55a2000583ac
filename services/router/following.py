"""Turns a request's log into the events that its client reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from countersign.services.protocol.commit import LogState
from countersign.services.protocol.errors import LogError
from countersign.services.protocol.events import Committed, Ended, Event
from countersign.services.protocol.reader import Reader
from countersign.services.protocol.subjects import commit_subject
from countersign.services.router.answer import Answer
from countersign.services.router.receipts import Receipts
from countersign.services.router.text import Text
from countersign.services.runtime.errors import DataLoss, DeadlineExceeded, Unavailable, translated
from countersign.services.runtime.journal import Entry, Journal
from countersign.services.runtime.registry import Registry
from countersign.v1.router_pb2 import Accepted, Finished, StreamEvent
from countersign.v1.sampling_pb2 import FinishReason

CHECK_S = 1.0
# How long the bus may be away, and the pause between two looks whether it is back.
PATIENCE_S = 30.0
PAUSE_S = 0.2
# Reasons with which a request is given up, whatever the bus does.
ABANDONED = frozenset({"TARGET_LOST", "TARGET_SILENT"})
# A target answers its requests' deadlines itself; this long after one the router stops believing in it.
DEADLINE_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Follower:
    """What following a log needs of the outside. ``wall_ms`` is Unix time in milliseconds."""

    text: Text
    journal: Journal
    registry: Registry
    receipts: Receipts
    wall_ms: Callable[[], int]

    async def follow(self, request_id: str, position: int) -> AsyncGenerator[StreamEvent, None]:
        """Accepted, the committed tokens from ``position`` on, Finished.

        Raises:
            Unavailable: reason TARGET_LOST: its target is gone; the log keeps what is committed. Else the bus is away.
            DeadlineExceeded: its target let the deadline pass.
            DataLoss: the log or the receipt is not as it was written.
        """
        reader = Reader(request_id)
        answer: Answer | None = None
        async with aclosing(self._entries(request_id, reader)) as entries:
            async for entry in entries:
                events = _read(reader, entry)
                if answer is None:
                    answer = _answer(reader.log, position)
                    yield StreamEvent(accepted=_accepted(reader.log))
                for event in events:
                    async for out in self._told(reader.log, answer, event):
                        yield out
                    if isinstance(event, Ended):
                        return

    async def _told(self, log: LogState, answer: Answer, event: Event) -> AsyncIterator[StreamEvent]:
        """What the client learns from one event."""
        if isinstance(event, Committed):
            answer.committed(event.token_ids, event.accepted)
            async for out in self._decode(answer, final=False):
                yield out
        elif isinstance(event, Ended):
            async for out in self._decode(answer, final=True):
                yield out
            yield StreamEvent(finished=await self._finished(log, event))

    async def ended(self, request_id: str) -> FinishReason.ValueType:
        """Why it ended, once it has. Raises as ``follow``."""
        reader = Reader(request_id)
        async with aclosing(self._entries(request_id, reader)) as entries:
            async for entry in entries:
                for event in _read(reader, entry):
                    if isinstance(event, Ended):
                        return event.reason
        raise DataLoss(f"the log of request {request_id} ends without Closed")

    async def _entries(self, request_id: str, reader: Reader) -> AsyncGenerator[Entry, None]:
        """The log's records as they come, through outages of the bus that are shorter than ``PATIENCE_S``."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + PATIENCE_S
        while True:
            try:
                async with aclosing(self._tail(request_id, reader)) as tail:
                    async for entry in tail:
                        give_up = loop.time() + PATIENCE_S
                        yield entry
            except (Unavailable, DeadlineExceeded) as error:
                if error.reason in ABANDONED or loop.time() > give_up:
                    raise
            await asyncio.sleep(PAUSE_S)

    async def _tail(self, request_id: str, reader: Reader) -> AsyncGenerator[Entry, None]:
        """The records after those read; between them, whether anyone is still working on the request."""
        tail = self.journal.tail(commit_subject(request_id), after=reader.log.sequence)
        pending: asyncio.Task[Entry] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(tail))
                done, _ = await asyncio.wait({pending}, timeout=CHECK_S)
                if done:
                    entry, pending = pending.result(), None
                    yield entry
                else:
                    self._check(request_id, reader.log)
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
            await tail.aclose()

    def _check(self, request_id: str, log: LogState) -> None:
        """Raises when nobody can be at work on the request any more."""
        if log.opened is None:
            return  # the first read is not back yet
        deadline = log.opened.deadline_unix_ms
        if deadline and self.wall_ms() > deadline + DEADLINE_GRACE_S * 1000:
            raise DeadlineExceeded(
                f"request {request_id} is past its deadline and its target {log.instance} has not ended it",
                reason="TARGET_SILENT",
                request_id=request_id,
            )
        live = {target.instance for target in self.registry.live("target")}
        # Who does not see itself does not see the others either: the bus is away.
        sighted = bool(self.registry.live("router"))
        if sighted and log.instance and log.instance not in live:
            raise Unavailable(
                f"target {log.instance} is gone in the middle of request {request_id}",
                reason="TARGET_LOST",
                help=f"its {len(log.tokens)} committed tokens stay in the log; ask again under another request id",
                request_id=request_id,
            )

    async def _decode(self, answer: Answer, *, final: bool) -> AsyncIterator[StreamEvent]:
        """The tokens whose text is settled by now."""
        pieces: Sequence[str] = ()
        if answer.undecoded:
            pieces = await self.text.decode(answer.context, answer.undecoded, final=final)
        tokens = answer.decoded(pieces, final=final)
        if tokens is not None:
            yield StreamEvent(tokens=tokens)

    async def _finished(self, log: LogState, ended: Ended) -> Finished:
        receipt = await self.receipts.of(log) if ended.receipt_digest else b""
        return Finished(reason=ended.reason, usage=ended.usage, receipt=receipt, message=ended.message)


def _read(reader: Reader, entry: Entry) -> list[Event]:
    with translated(LogError, DataLoss, about=f"the log of request {reader.log.request_id} is damaged"):
        return reader.entry(entry.sequence, entry.data)


def _answer(log: LogState, position: int) -> Answer:
    if log.opened is None:
        raise DataLoss(f"the log of request {log.request_id} does not begin with Opened")
    answer = Answer(stop=tuple(log.opened.sampling.stop), position=position)
    answer.prompt(log.opened.prompt_token_ids)
    return answer


def _accepted(log: LogState) -> Accepted:
    if log.opened is None:
        raise DataLoss(f"the log of request {log.request_id} does not begin with Opened")
    return Accepted(request_id=log.request_id, model=log.opened.model, prompt_tokens=len(log.opened.prompt_token_ids))
