"""Evidence over many answers: rarely against the honest however often one looks, in time against the others."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify.difr.evidence import HEADROOM, Evidence
from countersign.verify.difr.verdict import Limit, Thresholds, judge

NEAR = Thresholds((Limit(0.0, 0.01), Limit(0.25, 1e-4)), 1e-4, 5e-4, 0.05, "")
EXACT = Thresholds((Limit(0.0, 0.0),), 0.0, 0.0, 0.0, "")
LEVEL = 0.05


def answer(drawn: random.Random, share: float, score: float, size: int = 50) -> list[float]:
    return [score if drawn.random() < share else 0.0 for _ in range(size)]


@pytest.mark.parametrize(
    ("share", "score"),
    [(HEADROOM * share, score) for share, score in [(0.01, 0.04), (1e-4, 0.4), (1e-4, math.inf), (2.5e-3, 0.2)]],
)
def test_honest_providers_at_the_very_limit_are_refuted_no_more_often_than_said_whenever_one_looks(
    share: float, score: float
) -> None:
    refuted, runs = 0, 150
    for seed in range(runs):
        drawn, evidence = random.Random(seed), Evidence.none(NEAR)
        looks = []
        for _ in range(40):
            evidence = evidence.add(answer(drawn, share, score))
            looks.append(evidence.refuted(LEVEL))
        refuted += any(looks)
    assert refuted / runs <= LEVEL


@pytest.mark.parametrize(("share", "score"), [(0.035, 0.04), (0.003, 0.4), (0.003, math.inf)])
def test_faults_that_no_single_answer_shows_are_refuted_in_time(share: float, score: float) -> None:
    drawn, evidence = random.Random(1), Evidence.none(NEAR)
    passed = 0
    while not evidence.refuted() and evidence.answers < 400:
        fresh = answer(drawn, share, score)
        passed += judge(fresh, NEAR).outcome != "fail"
        evidence = evidence.add(fresh)
    assert evidence.refuted()
    assert passed > evidence.answers / 2


@pytest.mark.parametrize("score", [0.01, 0.4, math.inf])
def test_who_uses_the_room_of_every_answer_is_refuted_by_ten_of_them(score: float) -> None:
    size, room = 300, 0
    while not judge([score] * (room + 1) + [0.0] * (size - room - 1), NEAR).failures:
        room += 1
    assert room > 0
    evidence = Evidence.none(NEAR)
    for _ in range(10):
        evidence = evidence.add([score] * room + [0.0] * (size - room))
    assert evidence.refuted()


def test_where_the_arithmetic_is_the_same_one_token_refutes_for_ever() -> None:
    evidence = Evidence.none(EXACT).add([0.0] * 1000)
    assert not evidence.refuted()
    evidence = evidence.add([0.0, 1e-9])
    assert evidence.log == math.inf
    assert evidence.add([0.0] * 100_000).refuted()


def test_evidence_starts_at_nothing_and_honest_answers_lessen_it() -> None:
    evidence = Evidence.none(NEAR)
    assert evidence.log == pytest.approx(0)
    assert evidence.add([0.0] * 100).log < 0


answers = st.lists(
    st.lists(st.sampled_from([0.0, 0.01, 0.3, 2.0, math.inf, math.nan]), min_size=1, max_size=20),
    min_size=1,
    max_size=5,
)


@given(answers)
def test_how_tokens_are_cut_into_answers_does_not_matter(parts: list[list[float]]) -> None:
    whole, pieces = Evidence.none(NEAR).add([score for part in parts for score in part]), Evidence.none(NEAR)
    for part in parts:
        pieces = pieces.add(part)
    assert whole.log == pytest.approx(pieces.log, rel=1e-9, abs=1e-9)
    assert not math.isnan(whole.log)


def test_the_rates_of_the_profile_are_taken_with_headroom() -> None:
    # Exactly as often as twice the honest rate says: no evidence, however long.
    evidence = Evidence.none(Thresholds((Limit(0.0, 0.01),), 1.0, 1.0, 0.0, ""))
    for _ in range(100):
        evidence = evidence.add([0.001] * int(100 * 0.01 * HEADROOM) + [0.0] * int(100 * (1 - 0.01 * HEADROOM)))
    assert not evidence.refuted()
