"""Turns a request's log into the events that its client reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from countersign.services.protocol.commit import LogState
from countersign.services.protocol.custody import Custody
from countersign.services.protocol.errors import LogError
from countersign.services.protocol.events import Committed, Ended, Event
from countersign.services.protocol.reader import Reader
from countersign.services.protocol.subjects import commit_subject
from countersign.services.router.answer import Answer
from countersign.services.router.client import Client
from countersign.services.router.placing import Placer
from countersign.services.router.receipts import Receipts
from countersign.services.router.text import Text
from countersign.services.runtime.announcer import Announcer
from countersign.services.runtime.errors import DataLoss, DeadlineExceeded, Unavailable, translated
from countersign.services.runtime.journal import Entry, Journal
from countersign.v1.router_pb2 import Accepted, Finished, StreamEvent, Tokens
from countersign.v1.sampling_pb2 import FinishReason
from countersign.verify.logged import markers_of
from countersign.verify.segments import Segmenter

# How often it is looked whether anyone works on a silent request.
CHECK_S = 0.25
# How long the bus may be away, and the pause between two looks whether it is back.
PATIENCE_S = 30.0
PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class Follower:
    """What following a log needs of the outside. ``wall_ms`` is Unix time in milliseconds."""

    text: Text
    journal: Journal
    placer: Placer
    receipts: Receipts
    wall_ms: Callable[[], int]
    announcer: Announcer

    async def follow(self, request_id: str, position: int) -> AsyncGenerator[StreamEvent, None]:
        """Accepted, the committed tokens from ``position`` on, Finished.

        Raises:
            Unavailable, DeadlineExceeded: the bus is away.
            DataLoss: the log or the receipt is not as it was written.
        """
        reader = Reader(request_id)
        answer: Answer | None = None
        client = Client(self.announcer, self.announcer.party(request_id), position)
        async with aclosing(self._entries(request_id, reader)) as entries:
            async for entry in entries:
                events = _read(reader, entry)
                if answer is None:
                    answer = _answer(reader.log, position)
                    yield StreamEvent(accepted=_accepted(reader.log))
                for event in events:
                    async for out in self._told(reader.log, answer, event):
                        client.gets(reader.log, out)
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
        loop, custody = asyncio.get_running_loop(), Custody(self.wall_ms())
        give_up = loop.time() + PATIENCE_S
        while True:
            try:
                async with aclosing(self._tail(request_id, reader, custody)) as tail:
                    async for entry in tail:
                        give_up = loop.time() + PATIENCE_S
                        yield entry
            except (Unavailable, DeadlineExceeded):
                if loop.time() > give_up:
                    raise
            await asyncio.sleep(PAUSE_S)

    async def _tail(self, request_id: str, reader: Reader, custody: Custody) -> AsyncGenerator[Entry, None]:
        """The records after those read; while there are none, the request is looked after."""
        tail = self.journal.tail(commit_subject(request_id), after=reader.log.sequence)
        pending: asyncio.Task[Entry] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(tail))
                done, _ = await asyncio.wait({pending}, timeout=CHECK_S)
                if done:
                    entry, pending = pending.result(), None
                    custody.grew(self.wall_ms())
                    yield entry
                else:
                    await self.placer.look_after(custody, reader.log, self.wall_ms())
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
            await tail.aclose()

    async def _decode(self, answer: Answer, *, final: bool) -> AsyncIterator[StreamEvent]:
        """The tokens whose text is settled by now."""
        pieces: Sequence[str] = ()
        if answer.undecoded:
            pieces = await self.text.decode(answer.context, answer.undecoded, final=final)
        for out in answer.decoded(pieces, final=final):
            yield StreamEvent(tokens=out) if isinstance(out, Tokens) else StreamEvent(hidden=out)

    async def _finished(self, log: LogState, ended: Ended) -> Finished:
        receipt = await self.receipts.of(log) if ended.receipt_digest else b""
        return Finished(reason=ended.reason, usage=ended.usage, receipt=receipt, message=ended.message)


def _read(reader: Reader, entry: Entry) -> list[Event]:
    with translated(LogError, DataLoss, about=f"the log of request {reader.log.request_id} is damaged"):
        return reader.entry(entry.sequence, entry.data)


def _answer(log: LogState, position: int) -> Answer:
    if log.opened is None:
        raise DataLoss(f"the log of request {log.request_id} does not begin with Opened")
    segmenter = Segmenter(markers_of(log.opened), log.opened.prompt_token_ids)
    answer = Answer(stop=tuple(log.opened.sampling.stop), position=position, segmenter=segmenter)
    answer.prompt(log.opened.prompt_token_ids)
    return answer


def _accepted(log: LogState) -> Accepted:
    if log.opened is None:
        raise DataLoss(f"the log of request {log.request_id} does not begin with Opened")
    return Accepted(request_id=log.request_id, model=log.opened.model, prompt_tokens=len(log.opened.prompt_token_ids))
