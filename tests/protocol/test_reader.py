"""What a router tells its client while it reads a log."""

from __future__ import annotations

import pytest

from countersign.services.protocol import errors
from countersign.services.protocol.commit import LogState, Payload, encode
from countersign.services.protocol.events import AssignedTo, CancelledByClient, Committed, Ended, Event
from countersign.services.protocol.reader import Reader
from countersign.v1.commit_pb2 import Assigned, Cancelled, Closed, Extended, Opened
from countersign.v1.sampling_pb2 import FINISH_REASON_CANCELLED, SamplingParams, Usage

USAGE = Usage(prompt_tokens=1, output_tokens=5, drafted_tokens=4, accepted_tokens=3, target_passes=2)
PAYLOADS: tuple[Payload, ...] = (
    Opened(model="m", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=6)),
    Assigned(epoch=1, instance="t1"),
    Extended(epoch=1, base=0, token_ids=[7, 8, 9], drafted=4, accepted=3),
    Extended(epoch=1, base=3, token_ids=[10, 11]),
    Cancelled(cause="bored"),
    Closed(reason=FINISH_REASON_CANCELLED, receipt_sha256=b"\7" * 32, usage=USAGE, message="so be it"),
)


def records() -> list[tuple[int, bytes]]:
    log, entries = LogState("r1"), []
    for payload in PAYLOADS:
        entries.append((log.sequence + 2, encode("r1", log.digest, payload)))
        log = log.apply(*entries[-1])
    return entries


def read(start: int) -> list[Event]:
    reader = Reader("r1", start=start)
    return [event for entry in records() for event in reader.entry(*entry)]


AFTER = [
    CancelledByClient("bored"),
    Ended(FINISH_REASON_CANCELLED, USAGE, b"\7" * 32, "so be it"),
]


def test_a_log_is_told_in_its_own_order() -> None:
    assert read(0) == [
        AssignedTo(1, "t1"),
        Committed(0, (7, 8, 9), 3),
        Committed(3, (10, 11), 0),
        *AFTER,
    ]


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (2, [Committed(2, (9,), 1), Committed(3, (10, 11), 0)]),
        (3, [Committed(3, (10, 11), 0)]),
        (4, [Committed(4, (11,), 0)]),
        (5, []),
        (9, []),
    ],
)
def test_a_client_that_has_some_tokens_gets_the_rest(start: int, told: list[Event]) -> None:
    assert read(start) == [AssignedTo(1, "t1"), *told, *AFTER]


def test_a_record_that_comes_twice_is_told_once() -> None:
    reader = Reader("r1")
    events = [event for entry in records() for _ in range(2) for event in reader.entry(*entry)]
    assert events == read(0)


def test_a_missing_record_is_noticed_and_can_be_read_again() -> None:
    reader = Reader("r1")
    entries = records()
    for entry in entries[:2]:
        reader.entry(*entry)
    with pytest.raises(errors.BrokenChain):
        reader.entry(*entries[3])
    assert reader.log.sequence == entries[1][0]
    assert reader.entry(*entries[2]) == [Committed(0, (7, 8, 9), 3)]
    assert reader.entry(*entries[3]) == [Committed(3, (10, 11), 0)]
