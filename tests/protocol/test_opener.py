"""The router's side: open, assign and cancel against other routers and the target."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from countersign.services.protocol import errors
from countersign.services.protocol.commit import LogState, Payload, encode, replay
from countersign.services.protocol.events import (
    Append,
    AssignedTo,
    CancelledByClient,
    ClosedAlready,
    ReadTail,
    Settled,
)
from countersign.services.protocol.opener import Opener
from countersign.v1.commit_pb2 import Assigned, Cancelled, Closed, Extended, Opened
from countersign.v1.sampling_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_DEADLINE,
    FINISH_REASON_STOP,
    SamplingParams,
)

OPENED = Opened(model="m", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=6), opened_unix_ms=5)
ASSIGNED = Assigned(epoch=1, instance="t1")
TOKEN = Extended(epoch=1, base=0, token_ids=[7])
CANCELLED = Cancelled(cause="bored")


@dataclass(frozen=True, slots=True)
class Stored:
    sequence: int
    data: bytes


def stored(*payloads: Payload) -> list[Stored]:
    log, entries = LogState("r1"), []
    for payload in payloads:
        entries.append(Stored(log.sequence + 4, encode("r1", log.digest, payload)))
        log = log.apply(entries[-1].sequence, entries[-1].data)
    return entries


def opener_of(*payloads: Payload) -> Opener:
    return Opener(replay("r1", stored(*payloads)))


def closed_after(*payloads: Payload) -> Closed:
    return Closed(reason=FINISH_REASON_STOP, usage=replay("r1", stored(*payloads)).usage())


def sent(effect: object) -> Append:
    assert isinstance(effect, Append)
    return effect


def test_a_request_is_opened_assigned_and_cancelled_one_append_after_the_other() -> None:
    opener = Opener(LogState("r1"))
    first = sent(opener.open(OPENED))
    assert first == Append(0, encode("r1", b"", OPENED))
    assert opener.acked(3) == Settled()
    assert sent(opener.assign("t1")).expected == 3
    assert opener.acked(4) == Settled()
    assert sent(opener.cancel("bored")).expected == 4
    assert opener.acked(9) == Settled()
    assert (opener.log.epoch, opener.log.instance, opener.log.cancelled) == (1, "t1", CANCELLED)


def test_a_repeated_open_succeeds_even_when_it_is_asked_later() -> None:
    later = Opened()
    later.CopyFrom(OPENED)
    later.opened_unix_ms, later.deadline_unix_ms = 77, 99
    for opened in (OPENED, later):
        opener = Opener(LogState("r1"))
        opener.open(opened)
        assert opener.refused(stored(OPENED, ASSIGNED, TOKEN)) == Settled()
        assert opener.log.token_ids == (7,)


def test_an_id_that_names_another_request_is_taken() -> None:
    other = Opened(model="m", prompt_token_ids=[2], sampling=OPENED.sampling)
    opener = Opener(LogState("r1"))
    opener.open(other)
    with pytest.raises(errors.RequestIdTaken):
        opener.refused(stored(OPENED))
    assert opener.in_flight is None
    with pytest.raises(errors.RequestIdTaken):
        opener_of(OPENED).open(other)


def test_a_lost_open_is_sent_again_and_a_stored_one_found() -> None:
    opener = Opener(LogState("r1"))
    first = opener.open(OPENED)
    assert opener.ack_lost() == ReadTail(0)
    assert opener.tail([]) == first
    assert opener.refused([]) == ReadTail(0)
    assert opener.tail(stored(OPENED)) == Settled()


def test_a_cancel_that_races_with_tokens_is_tried_again_behind_them() -> None:
    opener = opener_of(OPENED, ASSIGNED)
    opener.cancel("bored")
    entries = stored(OPENED, ASSIGNED, TOKEN)
    again = sent(opener.refused(entries))
    assert again.expected == entries[-1].sequence
    assert opener.acked(50) == Settled()
    assert opener.log.cancelled == CANCELLED


def test_a_cancel_that_somebody_else_made_is_as_good() -> None:
    opener = opener_of(OPENED, ASSIGNED)
    opener.cancel("me too")
    assert opener.refused(stored(OPENED, ASSIGNED, TOKEN, CANCELLED)) == Settled()
    assert opener.cancel("once more") == Settled()


def test_a_cancel_of_an_answer_that_has_ended_says_so() -> None:
    end = closed_after(OPENED, ASSIGNED)
    opener = opener_of(OPENED, ASSIGNED)
    opener.cancel("bored")
    assert opener.refused(stored(OPENED, ASSIGNED, end)) == ClosedAlready(FINISH_REASON_STOP)
    assert opener.assign("t2") == ClosedAlready(FINISH_REASON_STOP)


def test_a_take_over_goes_behind_the_tokens_that_came_in_between() -> None:
    opener = opener_of(OPENED, ASSIGNED)
    opener.assign("t2")
    again = sent(opener.refused(stored(OPENED, ASSIGNED, TOKEN)))
    assert opener.acked(again.expected + 1) == Settled()
    assert (opener.log.epoch, opener.log.instance, opener.log.token_ids) == (2, "t2", (7,))


def test_the_second_of_two_routers_that_assign_at_once_yields() -> None:
    opener = opener_of(OPENED)
    opener.assign("t2")
    assert opener.refused(stored(OPENED, ASSIGNED)) == AssignedTo(1, "t1")
    opener.assign("t2")
    assert opener.refused(stored(OPENED, ASSIGNED, TOKEN, Assigned(epoch=2, instance="t2"))) == Settled()


def test_a_cancelled_request_is_not_assigned_any_more() -> None:
    opener = opener_of(OPENED)
    opener.assign("t1")
    assert opener.refused(stored(OPENED, CANCELLED)) == CancelledByClient("bored")


def test_one_append_is_in_flight_at_a_time() -> None:
    opener = opener_of(OPENED)
    opener.assign("t1")
    with pytest.raises(errors.AppendInFlight):
        opener.cancel("bored")


def test_a_log_that_nobody_opened_takes_nothing_else() -> None:
    with pytest.raises(errors.NotOpened):
        Opener(LogState("r1")).assign("t1")
    with pytest.raises(errors.NotOpened):
        Opener(LogState("r1")).cancel("bored")


def test_a_log_that_a_router_took_over_is_closed_with_what_it_adds_up_to() -> None:
    opener = opener_of(OPENED, ASSIGNED, TOKEN)
    opener.assign("router-1")
    opener.acked(50)
    opener.close(FINISH_REASON_DEADLINE, "too late")
    assert opener.acked(51) == Settled()
    closed = opener.log.closed
    assert closed is not None
    assert (closed.reason, closed.message, closed.usage.output_tokens) == (FINISH_REASON_DEADLINE, "too late", 1)


def test_a_cancelled_log_whose_target_is_gone_is_closed_as_cancelled() -> None:
    opener = opener_of(OPENED, ASSIGNED, TOKEN, CANCELLED)
    opener.close(FINISH_REASON_CANCELLED)
    assert opener.acked(50) == Settled()


def test_a_close_that_tokens_overtake_bills_them_too() -> None:
    opener = opener_of(OPENED, ASSIGNED)
    opener.close(FINISH_REASON_DEADLINE)
    opener.refused(stored(OPENED, ASSIGNED, TOKEN))
    opener.acked(50)
    assert opener.log.closed is not None
    assert opener.log.closed.usage.output_tokens == 1


def test_a_close_yields_to_a_router_that_found_a_target() -> None:
    opener = opener_of(OPENED, ASSIGNED)
    opener.close(FINISH_REASON_DEADLINE)
    assert opener.refused(stored(OPENED, ASSIGNED, Assigned(epoch=2, instance="t2"))) == AssignedTo(2, "t2")
    assert opener.in_flight is None


def test_a_close_yields_to_a_cancel_and_to_another_close() -> None:
    opener = opener_of(OPENED, ASSIGNED)
    opener.close(FINISH_REASON_DEADLINE)
    assert opener.refused(stored(OPENED, ASSIGNED, CANCELLED)) == CancelledByClient("bored")
    opener = opener_of(OPENED, ASSIGNED)
    opener.close(FINISH_REASON_DEADLINE)
    end = closed_after(OPENED, ASSIGNED)
    assert opener.refused(stored(OPENED, ASSIGNED, end)) == ClosedAlready(FINISH_REASON_STOP)
