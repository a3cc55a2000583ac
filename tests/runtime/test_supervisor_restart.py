"""The restart policy, driven by events; no process and no clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.services.runtime.restart import MISCONFIGURED, GiveUp, Limits, RestartPolicy, Start

TIMES = st.lists(st.floats(0, 100), min_size=1, max_size=40)


def delay(effect: Start | GiveUp, since: float) -> float:
    assert isinstance(effect, Start)
    return effect.at - since


def healthy_policy() -> RestartPolicy:
    policy = RestartPolicy()
    policy.healthy("kv", at=0.0)
    return policy


def test_delays_double_from_a_fifth_of_a_second_up_to_five_seconds() -> None:
    policy = healthy_policy()
    policy.exited("kv", 1, at=100.0)  # steady until then: a clean record
    delays = [delay(policy.exited("kv", 1, at=100.0), since=100.0) for _ in range(6)]
    assert delays == pytest.approx([0.4, 0.8, 1.6, 3.2, 5.0, 5.0])


def test_a_process_that_was_never_healthy_is_given_up_after_its_attempts() -> None:
    policy = RestartPolicy(Limits(attempts=3))
    assert policy.exited("kv", 1, at=0.0) == Start("kv", at=0.2)
    assert policy.exited("kv", 1, at=1.0) == Start("kv", at=1.4)
    assert policy.exited("kv", 9, at=2.0) == GiveUp("kv", code=9, failures=3)


def test_a_process_that_is_configured_wrongly_is_given_up_at_once_unless_it_was_healthy_before() -> None:
    assert RestartPolicy(Limits(attempts=3)).exited("kv", MISCONFIGURED, at=0.0) == GiveUp("kv", code=2, failures=1)
    assert healthy_policy().exited("kv", MISCONFIGURED, at=1.0) == Start("kv", at=1.2)


@given(TIMES)
def test_a_process_that_has_been_healthy_once_is_never_given_up(gaps: list[float]) -> None:
    policy, now = healthy_policy(), 0.0
    for gap in gaps:
        now += gap
        assert 0.2 - 1e-9 <= delay(policy.exited("kv", 1, at=now), since=now) <= 5.0 + 1e-9


def test_steady_health_clears_the_record_and_a_short_one_does_not() -> None:
    policy = healthy_policy()
    policy.exited("kv", 1, at=1.0)
    policy.healthy("kv", at=2.0)
    assert delay(policy.exited("kv", 1, at=11.9), since=11.9) == pytest.approx(0.4)
    policy.healthy("kv", at=20.0)
    assert delay(policy.exited("kv", 1, at=30.0), since=30.0) == pytest.approx(0.2)


def test_failures_of_one_process_do_not_count_for_another() -> None:
    policy = RestartPolicy(Limits(attempts=2))
    assert isinstance(policy.exited("kv", 1, at=0.0), Start)
    assert isinstance(policy.exited("draft", 1, at=0.0), Start)
    assert isinstance(policy.exited("kv", 1, at=0.0), GiveUp)


def test_an_orderly_end_that_nobody_asked_for_is_an_end_like_any_other() -> None:
    assert healthy_policy().exited("kv", 0, at=1.0) == Start("kv", at=1.2)


@given(st.integers(1, 10**9))
def test_the_delay_after_any_number_of_failures_is_finite(failures: int) -> None:
    assert 0.2 <= Limits().delay(failures) <= 5.0
