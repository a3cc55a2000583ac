"""When a router that follows a log asks its target, moves the request, or closes it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.services.protocol.commit import LogState, Payload, encode
from countersign.services.protocol.custody import DEADLINE_GRACE_MS, MAX_SILENCE_MS, SILENCE_MS, Custody, Verdict
from countersign.v1.commit_pb2 import Assigned, Cancelled, Closed, Extended, Opened
from countersign.v1.sampling_pb2 import FINISH_REASON_STOP, SamplingParams

DEADLINE = 60_000
OPENED = Opened(
    model="m", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=6), deadline_unix_ms=DEADLINE, opened_unix_ms=5
)
ASSIGNED = Assigned(epoch=1, instance="t1")
TOKEN = Extended(epoch=1, base=0, token_ids=[7])


def log_of(*payloads: Payload) -> LogState:
    log = LogState("r1")
    for number, payload in enumerate(payloads, start=1):
        log = log.apply(number, encode("r1", log.digest, payload))
    return log


RUNNING = log_of(OPENED, ASSIGNED, TOKEN)


def test_a_log_that_grows_is_left_alone() -> None:
    custody = Custody(0)
    for now in range(0, 10_000, SILENCE_MS - 1):
        custody.grew(now)
        assert custody.verdict(now + SILENCE_MS - 1, RUNNING, live=True) is Verdict.WAIT


def test_the_target_of_a_silent_log_is_asked_and_believed() -> None:
    custody = Custody(0)
    assert custody.verdict(SILENCE_MS, RUNNING, live=True) is Verdict.ASK
    custody.answered(SILENCE_MS, RUNNING.epoch, held=True)
    assert custody.verdict(2 * SILENCE_MS - 1, RUNNING, live=True) is Verdict.WAIT
    assert custody.verdict(2 * SILENCE_MS, RUNNING, live=True) is Verdict.ASK


def test_a_target_that_does_not_answer_loses_the_request() -> None:
    custody = Custody(0)
    custody.answered(SILENCE_MS, RUNNING.epoch, held=False)
    assert custody.verdict(SILENCE_MS, RUNNING, live=True) is Verdict.MOVE


def test_what_a_target_did_not_answer_is_forgotten_when_its_log_grows() -> None:
    custody = Custody(0)
    custody.answered(SILENCE_MS, RUNNING.epoch, held=False)
    custody.grew(SILENCE_MS + 1)
    assert custody.verdict(SILENCE_MS + 2, RUNNING, live=True) is Verdict.WAIT


def test_a_target_that_has_withdrawn_loses_the_request_at_once() -> None:
    assert Custody(0).verdict(1, RUNNING, live=False) is Verdict.MOVE


def test_nothing_is_moved_while_the_registry_cannot_be_seen() -> None:
    assert Custody(0).verdict(SILENCE_MS - 1, RUNNING, live=None) is Verdict.WAIT


def test_a_request_that_was_opened_and_never_assigned_is_placed_after_a_silence() -> None:
    opened = log_of(OPENED)
    assert Custody(0).verdict(SILENCE_MS - 1, opened, live=False) is Verdict.WAIT
    assert Custody(0).verdict(SILENCE_MS, opened, live=False) is Verdict.MOVE


def test_a_move_is_given_time_to_show_in_the_log() -> None:
    custody = Custody(0)
    custody.moved(10, placed=True)
    assert custody.verdict(10 + SILENCE_MS - 1, RUNNING, live=False) is Verdict.WAIT
    assert custody.verdict(10 + SILENCE_MS, RUNNING, live=False) is Verdict.MOVE


def test_each_move_doubles_the_patience_up_to_a_limit() -> None:
    custody, seen = Custody(0), []
    for _ in range(8):
        custody.moved(0, placed=True)
        seen.append(custody.patience)
    assert seen[:3] == [2 * SILENCE_MS, 4 * SILENCE_MS, 8 * SILENCE_MS]
    assert seen[-1] == MAX_SILENCE_MS


def test_a_move_that_found_nobody_costs_no_patience() -> None:
    custody = Custody(0)
    custody.moved(0, placed=False)
    assert custody.patience == SILENCE_MS


@pytest.mark.parametrize("live", [True, False])
def test_past_its_deadline_a_request_is_closed(live: bool) -> None:
    late = DEADLINE + DEADLINE_GRACE_MS + 1
    assert Custody(0).verdict(late, RUNNING, live=live) is Verdict.CLOSE
    assert Custody(0).verdict(late - 1, RUNNING, live=live) is not Verdict.CLOSE


def test_a_target_that_still_commits_past_the_deadline_is_not_cut_off() -> None:
    late = DEADLINE + DEADLINE_GRACE_MS + 1
    assert Custody(late - 1).verdict(late, RUNNING, live=True) is Verdict.WAIT


def test_a_cancelled_request_whose_target_is_gone_is_closed() -> None:
    cancelled = log_of(OPENED, ASSIGNED, TOKEN, Cancelled(cause="bored"))
    assert Custody(0).verdict(1, cancelled, live=False) is Verdict.CLOSE
    assert Custody(0).verdict(1, cancelled, live=True) is Verdict.WAIT


@given(now=st.integers(0, 10**7), live=st.sampled_from([True, False, None]), held=st.booleans())
def test_nothing_is_done_about_a_closed_log(now: int, live: bool | None, held: bool) -> None:
    closed = log_of(OPENED, ASSIGNED, TOKEN, Closed(reason=FINISH_REASON_STOP, usage=RUNNING.usage()))
    custody = Custody(0)
    custody.answered(0, closed.epoch, held=held)
    assert custody.verdict(now, closed, live=live) is Verdict.WAIT
