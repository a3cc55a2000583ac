"""Deliberate bugs, each where a hurried hand would put it, and the one property that must fall.

Where the log's own checks would stop the harm first, they are taken away too: a bug is to be seen by what it does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from tests.simulation.jetstream import COMMIT, COMMITTED, RECEIPT, JetStream

from countersign.client import Client, _Progress
from countersign.services.protocol.appender import Appender
from countersign.services.protocol.commit import LogState
from countersign.services.protocol.errors import WrongEpoch
from countersign.services.protocol.events import AssignedTo, ReadTail
from countersign.services.protocol.opener import Opener
from countersign.services.protocol.tokens import Tokens
from countersign.services.protocol.writer import Writer
from countersign.services.runtime.journal import Entry, Journal, _place
from countersign.services.target.committer import Committer
from countersign.services.target.session import Session
from countersign.v1.commit_pb2 import Assigned

Change = tuple[Any, str, Any]
_NO_CHECK = lambda *_: None  # noqa: E731  a method that finds nothing wrong


@dataclass(frozen=True, slots=True)
class Mutant:
    """``killer``: the property that it must violate. ``seed``: the first that showed it, when last looked at."""

    killer: str
    seed: int
    changes: Callable[[], list[Change]]

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as patches:
            for owner, name, value in self.changes():
                patches.enter_context(mock.patch.object(owner, name, value))
            yield


def _around(owner: Any, name: str, make: Callable[[Any], Any]) -> Change:
    """``make`` gets the method as it is."""
    return (owner, name, make(getattr(owner, name)))


def _deaf(unheard: Callable[[Writer], bool]) -> Change:
    """A writer that does not heed what ``unheard`` says of it."""

    def make(heed: Any) -> Any:
        return lambda writer: None if unheard(writer) else heed(writer)

    return _around(Writer, "_heed", make)


def _heed_only(writer: Writer, _: LogState) -> None:
    writer._heed()


def _rebase(writer: Writer, before: LogState) -> None:
    """Whoever wrote the tokens that came before ours: ours follow them."""
    for extended in writer._passes:
        extended.base += len(writer.log.tokens) - len(before.tokens)
    writer._heed()


def _forget_pass(writer: Any) -> ReadTail:
    if isinstance(writer, Writer) and writer._closing is None and writer._passes:
        writer._passes.popleft()
        writer._in_flight = None
    return ReadTail(writer.log.sequence)


def _last_of_stream(stream: JetStream, subject: str, expected: int) -> bool:
    return expected == stream.sequences[COMMIT if subject.startswith(COMMIT) else RECEIPT]


async def _trusting(journal: Journal, subject: str, queue: asyncio.Queue[Any], after: int) -> list[Entry]:
    try:
        async with asyncio.timeout(journal._silence):
            message = await queue.get()
    except TimeoutError:
        return await journal._reread(subject, after)
    sequence, _ = _place(message)
    return [Entry(sequence, message.data)] if sequence > after else []


def _eager(try_append: Any) -> Any:
    async def stream_first(journal: Any, subject: str, data: bytes, *, expected: int) -> Any:
        headers = {"Nats-Sequence": str(expected + 1), "Nats-Last-Sequence": str(expected)}
        journal._bus._network._republish(COMMITTED + subject.removeprefix(COMMIT), data, headers)
        return await try_append(journal, subject, data, expected=expected)

    return stream_first


def _from_the_start(resume: Any) -> Any:
    return lambda client, request_id, _, *lasted: resume(client, request_id, 0, *lasted)


def _take_all(take: Any) -> Any:
    def believe(progress: Any, message: Any) -> Any:
        if message.HasField("tokens"):
            progress.position = message.tokens.position
        return take(progress, message)

    return believe


def _of_sampled(receipt: Any) -> Any:
    async def make(committer: Any, session: Session, log: LogState, reason: Any) -> Any:
        sampled = session.generation.tokens[session.prompt_tokens :]
        # With as many passes, so that the receipt agrees with itself and is signed.
        false = replace(log, tokens=Tokens().extended(sampled, 0), passes=len(sampled))
        return await receipt(committer, session, false, reason)

    return make


def _once(receipt: Any) -> Any:
    async def make(committer: Any, session: Session, log: LogState, reason: Any) -> Any:
        made = committer.__dict__.setdefault("made", {})
        key = (session.request_id, session.writer.epoch)
        if key not in made:
            made[key] = await receipt(committer, session, log, reason)
        return made[key]

    return make


def _inflated(usage: Any) -> Any:
    def bill(log: LogState) -> Any:
        made = usage(log)
        made.output_tokens += made.drafted_tokens - made.accepted_tokens
        return made

    return bill


def _same_epoch(opener: Opener, instance: str) -> Any:
    return opener._want(Assigned(epoch=max(1, opener.log.epoch), instance=instance))


def _assign_anyway(answer: Any) -> Any:
    def decide(opener: Opener, wanted: Any) -> Any:
        final = answer(opener, wanted)
        return None if isinstance(final, AssignedTo) and isinstance(wanted, Assigned) else final

    return decide


def _any_epoch(check: Any) -> Any:
    def lenient(log: LogState, payload: Any) -> None:
        try:
            check(log, payload)
        except WrongEpoch:
            if not isinstance(payload, Assigned):
                raise

    return lenient


class _Stack(deque[Any]):
    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(-1)

    def popleft(self) -> Any:
        return self.pop()


def _stacked(init: Any) -> Any:
    def make(session: Session, *args: Any, **fields: Any) -> None:
        init(session, *args, **fields)
        session.uncommitted = _Stack()

    return make


def _hasty(end: Any) -> Any:
    def close_now(session: Session, *args: Any) -> None:
        end(session, *args)
        while len(session.uncommitted) > 1:
            session.uncommitted.pop()

    return close_now


_again: list[Change] = [(Appender, "_is_own", lambda *_: False)]

MUTANTS: dict[str, Mutant] = {
    # The stream's
    "no_compare_and_set": Mutant("ExactlyOnce", 3, lambda: [(JetStream, "accepts", lambda *_: True)]),
    "compare_stream_sequence": Mutant("Liveness", 0, lambda: [(JetStream, "accepts", _last_of_stream)]),
    # The writer's
    "retry_appends_again": Mutant("OnlyVerified", 2, lambda: [*_again, (Writer, "_overtaken", _rebase)]),
    "no_base_check": Mutant(
        "ExactlyOnce",
        2,
        lambda: [*_again, (Writer, "_overtaken", _heed_only), (LogState, "_check_extended", _NO_CHECK)],
    ),
    "advance_on_unacknowledged": Mutant(
        "OnlyVerified", 9, lambda: [(Appender, "ack_lost", _forget_pass), (Writer, "_overtaken", _heed_only)]
    ),
    "cancel_overtaken": Mutant(
        "ClosedIsFinal",
        9,
        lambda: [
            (LogState, "check", _NO_CHECK),
            _deaf(lambda writer: writer.log.cancelled is not None and writer.log.closed is None),
        ],
    ),
    "no_fencing": Mutant(
        "Fenced",
        15,
        lambda: [
            (LogState, "_check_extended", _NO_CHECK),
            _deaf(lambda writer: writer.log.epoch > writer.epoch and not writer.log.ended),
        ],
    ),
    "shared_epoch": Mutant("OnlyVerified", 19, lambda: [(Writer, "_overtaken", _rebase)]),
    "passes_out_of_order": Mutant("OnlyVerified", 2, lambda: [_around(Session, "__init__", _stacked)]),
    "close_before_pending": Mutant("ClosedIsFinal", 5, lambda: [_around(Session, "end", _hasty)]),
    "receipt_of_sampled": Mutant("OneReceipt", 12, lambda: [_around(Committer, "_receipt", _of_sampled)]),
    "receipt_reused": Mutant("OneReceipt", 113, lambda: [_around(Committer, "_receipt", _once)]),
    "bill_of_sampled": Mutant("BilledIsCommitted", 0, lambda: [_around(LogState, "usage", _inflated)]),
    # The router's and the client's
    "epoch_not_raised": Mutant(
        "Fenced",
        0,
        lambda: [
            (Opener, "assign", _same_epoch),
            _around(Opener, "_answer", _assign_anyway),
            _around(LogState, "check", _any_epoch),
        ],
    ),
    "tail_without_gap_check": Mutant("Agreement", 0, lambda: [(Journal, "_next", _trusting)]),
    "stream_before_commit": Mutant("Agreement", 0, lambda: [_around(Journal, "try_append", _eager)]),
    "client_ignores_position": Mutant(
        "Agreement", 2, lambda: [_around(Client, "_resume", _from_the_start), _around(_Progress, "take", _take_all)]
    ),
}
