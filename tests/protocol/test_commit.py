"""What a log accepts, what it refuses and with which evidence."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.services.protocol import errors
from countersign.services.protocol.commit import LogState, Payload, decode, encode, record_digest
from countersign.services.protocol.tokens import Tokens
from countersign.v1.commit_pb2 import Assigned, Cancelled, Closed, CommitRecord, Extended, Opened
from countersign.v1.sampling_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    SamplingParams,
    Usage,
)

OPENED = Opened(model="m", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=6))
ASSIGNED = Assigned(epoch=1, instance="t1")
CANCELLED = Cancelled(cause="bored")


def extended(
    base: int,
    *token_ids: int,
    epoch: int = 1,
    drafted: int = 0,
    accepted: int = 0,
    cached: int = 0,
    prints: bytes = b"",
) -> Extended:
    return Extended(
        epoch=epoch,
        base=base,
        token_ids=token_ids,
        drafted=drafted,
        accepted=accepted,
        cached_prompt_tokens=cached,
        fingerprints=prints,
    )


def log_of(*payloads: Payload) -> LogState:
    log = LogState("r1")
    for payload in payloads:
        log = follow(log, payload)
    return log


def follow(log: LogState, payload: Payload) -> LogState:
    return log.apply(log.sequence + 2, encode("r1", log.digest, payload))


def test_the_arithmetic_is_that_of_the_tokens_and_may_change_until_there_are_any() -> None:
    first, second = (Assigned(epoch=epoch, arithmetic=f"native {bits}") for epoch, bits in ((1, "fp32"), (2, "bf16")))
    assert log_of(OPENED, first).arithmetic == "native fp32"
    assert log_of(OPENED, first, second).arithmetic == "native bf16"
    begun = (OPENED, first, extended(0, 10))
    assert log_of(*begun).arithmetic == "native fp32"
    assert log_of(*begun, Assigned(epoch=2, instance="router-1")).arithmetic == "native fp32"


def test_a_whole_request_leads_to_its_tokens_their_source_and_the_bill() -> None:
    log = log_of(
        OPENED,
        ASSIGNED,
        extended(0, 10, 11, 12, drafted=4, accepted=2, cached=3),
        Assigned(epoch=2, instance="t2"),
        extended(3, 13, epoch=2, drafted=1, cached=1),
    )
    bill = Usage(
        prompt_tokens=3,
        output_tokens=4,
        cached_prompt_tokens=3,
        drafted_tokens=5,
        accepted_tokens=2,
        target_passes=2,
    )
    assert log.usage() == bill
    log = follow(log, Closed(reason=FINISH_REASON_STOP, usage=bill, receipt_sha256=b"\7" * 32))
    assert log.token_ids == (10, 11, 12, 13)
    assert log.proposed == (True, True, False, False)
    assert (log.epoch, log.instance, log.records, log.sequence) == (2, "t2", 6, 12)
    assert log.closed is not None
    assert log.closed.receipt_sha256 == b"\7" * 32


EMPTY: tuple[Payload, ...] = ()
RUNNING: tuple[Payload, ...] = (OPENED, ASSIGNED, extended(0, 10))
STOPPED: tuple[Payload, ...] = (*RUNNING, CANCELLED)
BILL = Usage(prompt_tokens=3, output_tokens=1, target_passes=1)
ENDED: tuple[Payload, ...] = (*RUNNING, Closed(reason=FINISH_REASON_STOP, usage=BILL))

REFUSED = [
    ("a first record that is not Opened", EMPTY, ASSIGNED, errors.NotOpened),
    ("Cancelled before Opened", EMPTY, CANCELLED, errors.NotOpened),
    ("a second Opened", RUNNING, OPENED, errors.OpenedTwice),
    ("a second Opened after the end", ENDED, OPENED, errors.OpenedTwice),
    ("tokens of a request that nobody owns", (OPENED,), extended(0, 1, epoch=0), errors.WrongEpoch),
    ("tokens of an older epoch", (*RUNNING, Assigned(epoch=2)), extended(1, 1), errors.WrongEpoch),
    ("tokens of an epoch to come", RUNNING, extended(1, 1, epoch=2), errors.WrongEpoch),
    ("an epoch that skips one", RUNNING, Assigned(epoch=3), errors.WrongEpoch),
    ("an epoch that repeats one", RUNNING, Assigned(epoch=1), errors.WrongEpoch),
    ("tokens over tokens", RUNNING, extended(0, 1), errors.WrongBase),
    ("tokens past a gap", RUNNING, extended(2, 1), errors.WrongBase),
    ("no tokens", RUNNING, extended(1), errors.EmptyExtension),
    ("more accepted than proposed", RUNNING, extended(1, 1, 2, drafted=1, accepted=2), errors.WrongCounts),
    ("more accepted than committed", RUNNING, extended(1, 1, drafted=3, accepted=2), errors.WrongCounts),
    ("cached tokens after an epoch's first pass", RUNNING, extended(1, 1, cached=1), errors.WrongCounts),
    ("more cached tokens than the prompt has", (OPENED, ASSIGNED), extended(0, 1, cached=4), errors.WrongCounts),
    ("fingerprints of different sizes", RUNNING, extended(1, 1, 2, prints=b"123"), errors.WrongCounts),
    ("a fingerprint too large", RUNNING, extended(1, 1, prints=bytes(257)), errors.WrongCounts),
    ("more tokens than asked for", RUNNING, extended(1, 1, 2, 3, 4, 5, 6), errors.TooManyTokens),
    ("tokens after Cancelled", STOPPED, extended(1, 1), errors.AfterCancelled),
    ("another target after Cancelled", STOPPED, Assigned(epoch=2), errors.AfterCancelled),
    ("Cancelled twice", STOPPED, CANCELLED, errors.AfterCancelled),
    ("tokens after Closed", ENDED, extended(1, 1), errors.AfterClosed),
    ("another target after Closed", ENDED, Assigned(epoch=2), errors.AfterClosed),
    ("Cancelled after Closed", ENDED, CANCELLED, errors.AfterClosed),
    ("Closed twice", ENDED, Closed(reason=FINISH_REASON_STOP, usage=BILL), errors.AfterClosed),
    ("a bill for a token too many", RUNNING, Closed(reason=FINISH_REASON_LENGTH, usage=Usage()), errors.WrongBill),
    ("an end without a reason", RUNNING, Closed(usage=BILL), errors.WrongReason),
    (
        "a cancellation unasked",
        RUNNING,
        Closed(reason=FINISH_REASON_CANCELLED, usage=BILL),
        errors.WrongReason,
    ),
    ("a reason that nobody knows", STOPPED, Closed(reason=99, usage=BILL), errors.WrongReason),  # type: ignore[arg-type]
    ("a cancellation hidden", STOPPED, Closed(reason=FINISH_REASON_STOP, usage=BILL), errors.WrongReason),
]


@pytest.mark.parametrize(("before", "payload", "error"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_record_that_may_not_follow_is_refused_and_the_log_stays(
    before: tuple[Payload, ...], payload: Payload, error: type[errors.LogError]
) -> None:
    log = log_of(*before)
    tokens = log.token_ids
    with pytest.raises(error):
        follow(log, payload)
    assert log.token_ids == tokens


def test_only_the_record_that_names_the_last_one_follows_it() -> None:
    log = log_of(OPENED)
    with pytest.raises(errors.BrokenChain) as broken:
        log.apply(9, encode("r1", b"", ASSIGNED))
    assert broken.value.evidence == {"sequence": 9, "found": b"", "expected": log.digest}
    assert log.digest.hex() in str(broken.value)
    assert log.digest == record_digest(encode("r1", b"", OPENED)) == sha256(encode("r1", b"", OPENED)).digest()


def test_a_record_of_another_request_is_refused() -> None:
    with pytest.raises(errors.WrongRequest) as wrong:
        LogState("r1").apply(1, encode("r2", b"", OPENED))
    assert wrong.value.evidence == {"found": "r2", "expected": "r1"}


@pytest.mark.parametrize("sequence", [1, 2])
def test_a_sequence_that_does_not_increase_is_refused(sequence: int) -> None:
    log = log_of(OPENED)
    with pytest.raises(errors.SequenceOrder):
        log.apply(sequence, encode("r1", log.digest, ASSIGNED))


@pytest.mark.parametrize("data", [b"\xff\xff", b"\x0a\x01\xff", b"", CommitRecord(request_id="r1").SerializeToString()])
def test_bytes_that_are_no_record_are_refused(data: bytes) -> None:
    with pytest.raises(errors.MalformedRecord):
        LogState("r1").apply(1, data)


@given(st.binary(max_size=80))
def test_whatever_the_bytes_only_a_log_error_comes_out(data: bytes) -> None:
    with pytest.raises(errors.LogError):
        log_of(OPENED, ASSIGNED).apply(99, data)


@given(request_id=st.text(max_size=5), previous=st.binary(max_size=32), token_ids=st.lists(st.integers(0, 2**32 - 1)))
def test_a_record_reads_back_as_it_was_written(request_id: str, previous: bytes, token_ids: list[int]) -> None:
    data = encode(request_id, previous, extended(0, *token_ids))
    record, payload = decode(data)
    assert (record.request_id, record.previous_sha256, payload) == (request_id, previous, extended(0, *token_ids))
    assert data == encode(request_id, previous, extended(0, *token_ids))


def test_the_bytes_of_a_record_never_change() -> None:
    """They are hashed and kept: this is the format, not an implementation."""
    data = encode("r1", b"\1\2", extended(3, 7, 300, drafted=2, accepted=1))
    assert data.hex() == "0a0272311202010" + "22a0d080110031a0307ac0220022801"


def test_each_token_has_the_fingerprint_that_was_committed_with_it() -> None:
    log = log_of(OPENED, ASSIGNED, extended(0, 10, 11, prints=b"aabb"), Assigned(epoch=2, instance="t2"))
    log = follow(log, extended(2, 12, epoch=2, prints=b"cc"))
    assert log.fingerprints == (b"aa", b"bb", b"cc")


@pytest.mark.parametrize("other", [b"", b"c", b"cccc"], ids=["none", "smaller", "larger"])
@pytest.mark.parametrize("late", [False, True], ids=["first", "then"])
def test_a_log_whose_targets_made_different_fingerprints_has_none(other: bytes, late: bool) -> None:
    prints = (b"aabb", other) if late else (other * 2, b"cc")
    log = log_of(OPENED, ASSIGNED, extended(0, 10, 11, prints=prints[0]), extended(2, 12, prints=prints[1]))
    assert log.fingerprints == ()
    assert follow(log, extended(3, 13, prints=prints[1])).fingerprints == ()
    assert log.token_ids == (10, 11, 12)


def test_older_states_stay_as_they_were_while_newer_ones_share_their_tokens() -> None:
    one = Tokens().extended([1, 2], 1)
    two = one.extended([3], 0)
    other = one.extended([4], 1)
    assert (one.ids(), two.ids(), other.ids()) == ((1, 2), (1, 2, 3), (1, 2, 4))
    assert (two.proposed(1), other.proposed(1)) == ((False, False), (False, True))
    assert two._ids is one._ids
    assert other._ids is not one._ids
    assert one == Tokens().extended([1], 1).extended([2], 0)
    assert len({one, two, other, Tokens().extended([1, 2], 1)}) == 3


def test_older_states_keep_their_fingerprints() -> None:
    one = Tokens().extended([1, 2], 0, b"aabb")
    two, other = one.extended([3], 0, b"cc"), one.extended([3], 0, b"dd")
    assert (one.fingerprints(), two.fingerprints()) == ((b"aa", b"bb"), (b"aa", b"bb", b"cc"))
    assert other.fingerprints() == (b"aa", b"bb", b"dd")
    assert len({two, other, one.extended([3], 0)}) == 3
