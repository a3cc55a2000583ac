"""The target's side: what a writer does about each ending of an append."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from countersign.services.protocol import errors
from countersign.services.protocol.commit import LogState, Payload, encode, replay
from countersign.services.protocol.events import (
    Append,
    CancelledByClient,
    ClosedAlready,
    Fenced,
    ReadTail,
    Settled,
)
from countersign.services.protocol.writer import Writer
from countersign.v1.commit_pb2 import Assigned, Cancelled, Closed, Extended, Opened
from countersign.v1.sampling_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    SamplingParams,
    Usage,
)


@dataclass(frozen=True, slots=True)
class Stored:
    sequence: int
    data: bytes


class Log:
    """The stream's side of one subject; ``put`` is somebody else's append."""

    def __init__(self, *payloads: Payload) -> None:
        self.entries: list[Stored] = []
        for payload in payloads:
            self.put(payload)

    @property
    def state(self) -> LogState:
        return replay("r1", self.entries)

    def put(self, payload: Payload) -> None:
        self.store(encode("r1", self.state.digest, payload))

    def store(self, data: bytes) -> int:
        self.entries.append(Stored(len(self.entries) * 3 + 5, data))
        return self.entries[-1].sequence

    def after(self, writer: Writer) -> list[Stored]:
        return [entry for entry in self.entries if entry.sequence > writer.log.sequence]


OPENED = Opened(model="m", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=6))


@pytest.fixture
def log() -> Log:
    return Log(OPENED, Assigned(epoch=1, instance="t1"))


@pytest.fixture
def writer(log: Log) -> Writer:
    return Writer(log.state, epoch=1, instance="t1")


def sent(effect: object) -> Append:
    assert isinstance(effect, Append)
    return effect


def test_tokens_are_pending_until_the_ack_and_committed_after_it(log: Log, writer: Writer) -> None:
    append = sent(writer.extend([7, 8], drafted=3, accepted=1, cached_prompt_tokens=2))
    assert append.expected == log.entries[-1].sequence
    assert (writer.pending, writer.log.token_ids) == ((7, 8), ())
    assert writer.acked(log.store(append.data)) == Settled()
    assert (writer.pending, writer.log.token_ids) == ((), (7, 8))
    assert writer.log == log.state


def test_a_pass_that_ends_early_waits_for_the_ack_of_the_one_before(log: Log, writer: Writer) -> None:
    first = sent(writer.extend([7]))
    assert writer.extend([8, 9]) is None
    ahead = writer.pending
    second = sent(writer.acked(log.store(first.data)))
    assert (ahead, writer.pending, writer.log.token_ids) == ((7, 8, 9), (8, 9), (7,))
    assert second.expected == log.entries[-1].sequence
    assert writer.acked(log.store(second.data)) == Settled()
    assert log.state.token_ids == (7, 8, 9)


def test_a_lost_ack_of_a_stored_append_is_found_in_the_tail(log: Log, writer: Writer) -> None:
    append = sent(writer.extend([7]))
    log.store(append.data)
    assert writer.ack_lost() == ReadTail(append.expected)
    assert writer.tail(log.after(writer)) == Settled()
    assert (writer.log.token_ids, writer.in_flight) == ((7,), None)


def test_a_lost_append_is_sent_again_byte_for_byte(log: Log, writer: Writer) -> None:
    append = sent(writer.extend([7]))
    writer.ack_lost()
    assert writer.tail(log.after(writer)) == append


def test_a_repetition_that_is_refused_because_the_first_arrived_counts_as_stored(log: Log, writer: Writer) -> None:
    append = sent(writer.extend([7]))
    writer.ack_lost()
    writer.tail([])
    log.store(append.data)
    assert writer.refused(log.after(writer)) == Settled()
    assert log.state.token_ids == (7,)


def test_a_refusal_that_the_tail_does_not_explain_yet_makes_it_read_again(writer: Writer) -> None:
    append = sent(writer.extend([7]))
    assert writer.refused([]) == ReadTail(append.expected)
    assert writer.in_flight == append


def test_a_higher_epoch_fences_the_writer_for_good(log: Log, writer: Writer) -> None:
    writer.extend([7])
    writer.extend([8])
    log.put(Assigned(epoch=2, instance="t2"))
    assert writer.refused(log.after(writer)) == Fenced(2, "t2")
    assert (writer.pending, writer.in_flight, writer.wants_tokens) == ((), None, False)
    with pytest.raises(errors.AppenderStopped):
        writer.extend([7])
    with pytest.raises(errors.AppenderStopped):
        writer.close(FINISH_REASON_STOP)


def test_its_own_record_counts_even_when_it_was_fenced_right_after(log: Log, writer: Writer) -> None:
    append = sent(writer.extend([7]))
    log.store(append.data)
    log.put(Assigned(epoch=2, instance="t2"))
    writer.ack_lost()
    assert writer.tail(log.after(writer)) == Fenced(2, "t2")
    assert writer.log.token_ids == (7,)


def test_after_a_cancel_the_owner_drops_what_is_pending_and_closes_with_a_receipt(log: Log, writer: Writer) -> None:
    append = sent(writer.extend([7]))
    writer.acked(log.store(append.data))
    writer.extend([8])
    log.put(Cancelled(cause="bored"))
    assert writer.refused(log.after(writer)) == CancelledByClient("bored")
    assert writer.pending == ()
    with pytest.raises(errors.WrongReason):
        writer.close(FINISH_REASON_STOP)
    closing = writer.close(FINISH_REASON_CANCELLED, receipt_sha256=b"\7" * 32)
    assert writer.acked(log.store(closing.data)) == Settled()
    assert log.state.closed == Closed(
        reason=FINISH_REASON_CANCELLED,
        receipt_sha256=b"\7" * 32,
        usage=Usage(prompt_tokens=3, output_tokens=1, target_passes=1),
    )


def test_a_cancel_that_overtakes_the_close_makes_the_owner_close_again_as_cancelled(log: Log, writer: Writer) -> None:
    writer.close(FINISH_REASON_LENGTH, receipt_sha256=b"\1" * 32)
    log.put(Cancelled(cause="bored"))
    assert writer.refused(log.after(writer)) == CancelledByClient("bored")
    closing = writer.close(FINISH_REASON_CANCELLED, receipt_sha256=b"\2" * 32)
    writer.acked(log.store(closing.data))
    assert log.state.closed is not None
    assert log.state.closed.receipt_sha256 == b"\2" * 32


def test_a_lost_ack_of_the_close_is_settled_like_any_other(log: Log, writer: Writer) -> None:
    closing = writer.close(FINISH_REASON_STOP)
    writer.ack_lost()
    assert writer.tail([]) == closing
    log.store(closing.data)
    assert writer.refused(log.after(writer)) == Settled()
    with pytest.raises(errors.AppenderStopped):
        writer.close(FINISH_REASON_STOP)
    with pytest.raises(errors.AppenderStopped):
        writer.extend([7])


def test_a_log_that_somebody_else_closed_stops_the_writer(log: Log, writer: Writer) -> None:
    writer.extend([7])
    log.put(Closed(reason=FINISH_REASON_STOP, usage=log.state.usage()))
    assert writer.refused(log.after(writer)) == ClosedAlready(FINISH_REASON_STOP)


def test_the_log_is_not_closed_over_tokens_that_are_still_pending(writer: Writer) -> None:
    writer.extend([7])
    with pytest.raises(errors.AppendInFlight):
        writer.close(FINISH_REASON_STOP)


def test_the_tail_tells_news_to_a_writer_that_has_nothing_in_flight(log: Log, writer: Writer) -> None:
    assert writer.tail([]) == Settled()
    log.put(Cancelled(cause="bored"))
    assert writer.tail(log.entries) == CancelledByClient("bored")
    assert writer.stop == CancelledByClient("bored")


def test_a_second_writer_in_the_same_epoch_is_an_error_and_not_a_merge(log: Log, writer: Writer) -> None:
    writer.extend([7])
    log.put(Extended(epoch=1, base=0, token_ids=[8]))
    with pytest.raises(errors.EpochShared):
        writer.refused(log.after(writer))
    assert not writer.wants_tokens


def test_a_writer_takes_over_only_what_the_log_gives_it(log: Log) -> None:
    for epoch, instance in ((1, "t2"), (2, "t1"), (0, "")):
        with pytest.raises(errors.NotOwner):
            Writer(log.state, epoch=epoch, instance=instance)
    with pytest.raises(errors.NotOwner):
        Writer(LogState("r1"), epoch=0, instance="")


def test_a_writer_that_takes_over_a_cancelled_request_may_only_close_it(log: Log) -> None:
    log.put(Cancelled(cause="bored"))
    writer = Writer(log.state, epoch=1, instance="t1")
    assert writer.stop == CancelledByClient("bored")
    assert writer.close(FINISH_REASON_CANCELLED).expected == log.entries[-1].sequence


def test_a_pass_that_cannot_be_is_refused_before_it_is_sent(writer: Writer) -> None:
    with pytest.raises(errors.EmptyExtension):
        writer.extend([])
    with pytest.raises(errors.WrongCounts):
        writer.extend([7], accepted=1)
    writer.extend([7, 8, 9, 10])
    with pytest.raises(errors.TooManyTokens):
        writer.extend([7, 8, 9])
    with pytest.raises(errors.WrongCounts):
        writer.extend([7], cached_prompt_tokens=1)
    assert writer.pending == (7, 8, 9, 10)


def test_an_answer_without_an_append_is_an_error(writer: Writer) -> None:
    with pytest.raises(errors.NothingInFlight):
        writer.acked(9)
    with pytest.raises(errors.NothingInFlight):
        writer.refused([])
    with pytest.raises(errors.NothingInFlight):
        writer.ack_lost()
