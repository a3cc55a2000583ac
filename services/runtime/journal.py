"""Logs that many write and one wins: compare-and-set appends to JetStream, reads, and tails without gaps.

A subject is a log. An append names the sequence of the last entry its writer has seen; JetStream stores it only if that
still is the last (``Nats-Expected-Last-Subject-Sequence``), so this is where writers are put in order. What the entries
mean is not known here.

    CS_COMMITS    cs.v1.commit.<id>     kept for a set time; each entry also goes out on cs.v1.committed.<id>
    CS_RECEIPTS   cs.v1.receipt.<id>    kept
    CS_DRAWS      cs.v1.draw.<id>       kept as long as the log
    CS_AUDITS     what auditors sign    kept
                  cs.v1.checkpoint.<log>.<size>, .verdict.<auditor>.<receipt>, .equivocation.<auditor>.<evidence>
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext
from nats.js.api import RePublish, StorageType, StreamConfig
from nats.js.errors import APIError, ServiceUnavailableError

from countersign.services.runtime.bus import Bus
from countersign.services.runtime.config import NatsConfig
from countersign.services.runtime.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from countersign.services.runtime.jetstream import STREAM_EXISTS, WrongSequence, header, is_status, reply_of, status_of

__all__ = ["AUDITS", "COMMITS", "DRAWS", "RECEIPTS", "Entry", "Journal", "WrongSequence"]

COMMITS = "CS_COMMITS"
RECEIPTS = "CS_RECEIPTS"
AUDITS = "CS_AUDITS"
DRAWS = "CS_DRAWS"
_COMMIT = "cs.v1.commit."
_COMMITTED = "cs.v1.committed."
_RECEIPT = "cs.v1.receipt."
_DRAW = "cs.v1.draw."
_SIGNED = ("cs.v1.checkpoint.", "cs.v1.verdict.", "cs.v1.equivocation.")

# Of one read: entries and bytes; and entries of the first page back, which is all that most look at.
_PAGE, _MAX_BYTES, _FIRST_PAGE = 1000, 8 << 20, 64
_TIMEOUT_S = 5.0
_APPEND_TIMEOUT_S = 2.0
_START_S = 15.0  # a cluster elects its leaders first
_RETRY_S = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored record: its place in the stream (from 1, growing along a subject, not dense) and its bytes."""

    sequence: int
    data: bytes


class Journal:
    """JetStream on a bus connection.

    Args:
        bus: the connection.
        silence: seconds that a tail trusts a quiet subject before it looks at the stream.
        pending: entries that a tail holds for a slow reader; what is over it is read from the stream again.
    """

    def __init__(self, bus: Bus, *, silence: float = 2.0, pending: int = 4096) -> None:
        self._bus = bus
        self._silence = silence
        self._pending = pending

    async def ensure_streams(self, config: NatsConfig) -> None:
        """Create the streams, or bring them to this configuration. Safe from many processes at once.

        Raises:
            Unavailable: JetStream does not answer.
            FailedPrecondition: reason STREAM_CONFLICT: a stream exists that cannot become what is wanted.
        """
        commits = StreamConfig(
            name=COMMITS,
            subjects=[f"{_COMMIT}*"],
            max_age=config.commit_retention_s,
            republish=RePublish(src=f"{_COMMIT}*", dest=f"{_COMMITTED}{{{{wildcard(1)}}}}"),
        )
        receipts = StreamConfig(name=RECEIPTS, subjects=[f"{_RECEIPT}*"])
        audits = StreamConfig(name=AUDITS, subjects=[f"{kind}*.*" for kind in _SIGNED])
        # A draw stands as long as the log is there that it opens.
        draws = StreamConfig(name=DRAWS, subjects=[f"{_DRAW}*"], max_age=config.commit_retention_s)
        for stream in (commits, receipts, audits, draws):
            await self._ensure(
                stream.evolve(
                    storage=StorageType.FILE,
                    num_replicas=config.replicas,
                    allow_direct=True,
                    deny_delete=True,
                    deny_purge=True,
                )
            )

    async def append(self, subject: str, data: bytes, *, expected: int, timeout: float) -> int:  # noqa: ASYNC109  ends in a typed error
        """Store an entry if the subject's last sequence still is ``expected`` (0: it has none); returns its sequence.

        Raises:
            WrongSequence: another was first; nothing is stored.
            DeadlineExceeded: reason ACK_LOST: no answer in ``timeout`` seconds, the outcome is unknown.
            Unavailable: reason CONNECTION_LOST: the outcome is unknown; any other reason: nothing is stored.
                When it is unknown, a read proves nothing yet: the server may still have the append before it. Append
                again with the same ``expected``: one of the two at most is stored, and WrongSequence means that the
                log has moved on, by it or by another; the tail then says which.
            ResourceExhausted: the entry is too large, or the disk is full; nothing is stored.
        """
        headers = {"Nats-Expected-Last-Subject-Sequence": str(expected)}
        try:
            msg = await self._bus.request(subject, data, headers, timeout)
        except DeadlineExceeded as error:
            raise DeadlineExceeded(
                f"no acknowledgement for an append to {subject} within {timeout:.3g} s",
                reason="ACK_LOST",
                help="append it again with the same expected sequence; if that is refused, read the tail",
            ) from error
        return int(reply_of(msg, subject)["seq"])

    async def try_append(self, subject: str, data: bytes, *, expected: int) -> int | Literal["refused", "lost"]:
        """`append` as the commit protocol's driver wants it: what is no failure is an answer.

        "refused": another entry is the last. "lost": nobody knows whether it is stored.

        Raises:
            ResourceExhausted, Unavailable: as `append`, where nothing is stored.
        """
        try:
            return await self.append(subject, data, expected=expected, timeout=_APPEND_TIMEOUT_S)
        except WrongSequence:
            return "refused"
        except DeadlineExceeded:
            return "lost"
        except Unavailable as error:
            if error.reason == "CONNECTION_LOST":
                return "lost"
            raise

    async def read(self, subject: str, *, after: int = 0, most: int | None = None) -> list[Entry]:
        """All entries of a subject with a sequence over ``after``, in order; of ``most`` bytes, if that is given.

        With replicas any of them may answer, so the newest entries can be missing for a moment; those that come are
        always the next ones.

        Raises:
            Unavailable, DeadlineExceeded: JetStream does not answer.
            ResourceExhausted: reason LOG_TOO_LARGE: there is more than ``most``.
        """
        entries: list[Entry] = []
        size, more = 0, True
        while more:
            batch, more = await self._read_batch(subject, entries[-1].sequence if entries else after)
            entries += batch
            size += sum(len(entry.data) for entry in batch)
            if most is not None and size > most:
                raise ResourceExhausted(f"{subject} has more than {most} bytes", reason="LOG_TOO_LARGE")
        return entries

    async def pages_back(self, subject: str) -> AsyncGenerator[list[Entry]]:
        """All entries of the subjects that ``subject``, with wildcards, covers, the newest first, some at a time.

        Raises:
            Unavailable, DeadlineExceeded: JetStream does not answer.
        """
        newest, page = await self.last(subject), _FIRST_PAGE
        end = newest.sequence if newest is not None else 0
        while end > 0:
            after, found, more = max(0, end - page), list[Entry](), True
            while more and (found[-1].sequence if found else after) < end:
                batch, more = await self._read_batch(subject, found[-1].sequence if found else after, page)
                found += [entry for entry in batch if entry.sequence <= end]
                more = more and batch[-1:] == found[-1:]
            yield found[::-1]
            end, page = after, min(4 * page, _PAGE)

    async def newest_each(self, subjects: Sequence[str]) -> dict[str, Entry]:
        """The newest entry of each subject that ``subjects``, with wildcards and of one stream, cover; 1024 at most.

        Raises:
            Unavailable, DeadlineExceeded: JetStream does not answer.
            Internal: reason JETSTREAM_ERROR: there are more.
        """
        if not subjects:
            return {}
        query, api = json.dumps({"multi_last": list(subjects)}).encode(), f"$JS.API.DIRECT.GET.{_stream(subjects[0])}"
        *messages, end = await self._bus.request_many(api, query, _TIMEOUT_S, is_status)
        if status_of(end) not in {"204", "404"}:
            raise Internal(f"JetStream refuses to read {subjects[0]}, ...: {end.headers}", reason="JETSTREAM_ERROR")
        return {header(msg, "Nats-Subject"): Entry(_place(msg)[0], msg.data) for msg in messages}

    async def last(self, subject: str) -> Entry | None:
        """The newest entry, or None when there is none. The stream's leader answers: what is acknowledged is seen.

        Raises:
            Unavailable, DeadlineExceeded: JetStream does not answer.
        """
        query = json.dumps({"last_by_subj": subject}).encode()
        api = f"$JS.API.STREAM.MSG.GET.{_stream(subject)}"
        try:
            reply = reply_of(await self._bus.request(api, query, {}, _TIMEOUT_S), subject)
        except NotFound:
            return None
        message = reply["message"]
        return Entry(int(message["seq"]), base64.b64decode(message.get("data", "")))

    async def subjects(self) -> list[str]:
        """Of all logs in CS_COMMITS that are kept, in no order.

        Raises:
            Unavailable, DeadlineExceeded: JetStream does not answer.
        """
        found: list[str] = []
        api = f"$JS.API.STREAM.INFO.{COMMITS}"
        while True:
            query = json.dumps({"subjects_filter": f"{_COMMIT}*", "offset": len(found)}).encode()
            reply = reply_of(await self._bus.request(api, query, {}, _TIMEOUT_S), api)
            page = reply["state"].get("subjects") or {}
            found += page
            if not page or len(found) >= int(reply.get("total", 0)):
                return found

    async def tail(self, subject: str, *, after: int = 0) -> AsyncGenerator[Entry]:
        """Every entry with a sequence over ``after``, as it comes, without gap, repeat or end. Close it when done.

        It follows the republished subject. Each message names its predecessor's sequence; where one is missing, and
        after some quiet time, the stream itself is read. A broken connection is waited out.

        Raises:
            InvalidArgument: the subject's stream is not republished.
            Unavailable, DeadlineExceeded: JetStream does not answer at the start, or the bus is closed for good.
        """
        if not subject.startswith(_COMMIT):
            raise InvalidArgument(f"{subject} cannot be tailed: only {_COMMIT}* is republished")
        queue: asyncio.Queue[Msg] = asyncio.Queue(self._pending)

        async def receive(msg: Msg) -> None:
            if not queue.full():  # what is dropped here is read from the stream
                queue.put_nowait(msg)

        # The subscription comes before the first read, so that no entry falls between them.
        subscription = await self._bus.subscribe(_COMMITTED + subject.removeprefix(_COMMIT), receive)
        try:
            await self._bus.flush()
            missing = await self.read(subject, after=after)
            while True:
                for entry in missing:
                    yield entry
                    after = entry.sequence
                missing = await self._next(subject, queue, after)
        finally:
            await self._bus.unsubscribe(subscription)

    async def _next(self, subject: str, queue: asyncio.Queue[Msg], after: int) -> list[Entry]:
        """What follows entry ``after``, as soon as a message or the silence says that there may be something."""
        try:
            async with asyncio.timeout(self._silence):
                msg = await queue.get()
        except TimeoutError:
            return await self._reread(subject, after)
        sequence, previous = _place(msg)
        if sequence <= after:
            return []
        if previous == after:
            return [Entry(sequence, msg.data)]
        return await self._reread(subject, after)

    async def _reread(self, subject: str, after: int) -> list[Entry]:
        try:
            return await self.read(subject, after=after)
        except (Unavailable, DeadlineExceeded) as error:
            if error.reason == "BUS_CLOSED":
                raise
            _log.warning("a tail waits for the journal", extra={"subject": subject, "error": str(error)})
            return []

    async def _read_batch(self, subject: str, after: int, most: int = _PAGE) -> tuple[list[Entry], bool]:
        """Some of the entries over ``after``, and whether there are more (NATS ADR-31, batched direct get)."""
        query = json.dumps({"next_by_subj": subject, "seq": after + 1, "batch": most, "max_bytes": _MAX_BYTES}).encode()
        api = f"$JS.API.DIRECT.GET.{_stream(subject)}"
        *messages, end = await self._bus.request_many(api, query, _TIMEOUT_S, is_status)
        if status_of(end) == "404":
            return [], False
        if status_of(end) != "204":
            raise Internal(f"JetStream refuses to read {subject}: {end.headers}", reason="JETSTREAM_ERROR")
        entries: list[Entry] = []
        for msg in messages:
            sequence, previous = _place(msg)
            # Each names the one before it in this batch, the first 0.
            if previous != (entries[-1].sequence if entries else 0):
                return entries, True  # one was lost on the way: go on from there
            entries.append(Entry(sequence, msg.data))
        ended = int(header(end, "Nats-Last-Sequence")) == (entries[-1].sequence if entries else 0)
        return entries, int(header(end, "Nats-Num-Pending")) > 0 or not ended

    async def _ensure(self, stream: StreamConfig) -> None:
        manager = self._bus.jetstream()
        try:
            async with asyncio.timeout(_START_S):
                while True:
                    if await self._try_ensure(manager, stream):
                        return
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            raise Unavailable(
                f"JetStream did not answer within {_START_S:g} s",
                reason="JETSTREAM_UNAVAILABLE",
                help="does nats-server run with --jetstream?",
            ) from None

    async def _try_ensure(self, manager: JetStreamContext, stream: StreamConfig) -> bool:
        """Whether the stream is as wanted now; False when JetStream is not ready."""
        try:
            try:
                await manager.add_stream(stream)
            except APIError as error:
                if error.err_code != STREAM_EXISTS:
                    raise
                await manager.update_stream(stream)
        except (ServiceUnavailableError, NatsTimeoutError):
            return False
        except APIError as error:
            text = f"JetStream refuses the stream {stream.name}: {error.description}"
            raise FailedPrecondition(text, reason="STREAM_CONFLICT", stream=str(stream.name)) from None
        except NatsError as error:
            raise Unavailable(f"JetStream cannot be asked: {error}", reason="DISCONNECTED") from None
        return True


def _place(msg: Msg) -> tuple[int, int]:
    """The sequences of a stored message and of the one before it on its subject."""
    return int(header(msg, "Nats-Sequence") or 0), int(header(msg, "Nats-Last-Sequence") or 0)


def _stream(subject: str) -> str:
    kinds = ((_COMMIT, COMMITS), (_RECEIPT, RECEIPTS), (_DRAW, DRAWS), *((kind, AUDITS) for kind in _SIGNED))
    for prefix, stream in kinds:
        if subject.startswith(prefix):
            return stream
    raise InvalidArgument(
        f"{subject} belongs to no stream: {_COMMIT}<id>, {_RECEIPT}<id> and {_DRAW}<id> do, and what auditors sign"
    )
