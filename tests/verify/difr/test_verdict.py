"""Scores and thresholds to verdicts, with no model."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify.difr.verdict import CLIP, FALSE_POSITIVES, THRESHOLDS, Limit, Power, Tally, Thresholds, judge
from countersign.verify.difr.verdict import chance as chance_of

FP32, BF16 = THRESHOLDS["fp32"], THRESHOLDS["bf16"]
EXACT = Thresholds((Limit(0.0, 0.0),), 0.0, 0.0, 0.0, "exact")

scores = st.lists(
    st.one_of(st.just(0.0), st.floats(0, 5), st.just(math.inf), st.just(math.nan)), min_size=1, max_size=200
)
thresholds = st.sampled_from([FP32, BF16, EXACT])


def test_in_fp32_one_token_beyond_the_tolerance_is_enough() -> None:
    honest = [0.0] * 9999
    assert judge([*honest, 1e-3], FP32).outcome == "pass"
    assert len(judge([*honest, 1.01e-3], FP32).failures) == 1
    assert len(judge([*honest, math.inf], FP32).failures) == 1


def test_where_the_arithmetic_is_the_same_the_smallest_score_is_enough() -> None:
    assert judge([0.0] * 9999, EXACT).outcome == "pass"
    assert judge([0.0] * 9999 + [1e-12], EXACT).outcome == "fail"


def test_in_bf16_it_takes_more_outliers_than_chance_explains() -> None:
    assert judge([0.0] * 98 + [0.4, math.inf], BF16).failures == ()
    assert judge([0.0] * 90 + [0.3] * 10, BF16).failures[0].startswith("10 of 100 tokens lose")
    assert judge([0.0] * 993 + [math.inf] * 7, BF16).failures == ()
    assert "drawn" in judge([0.0] * 965 + [math.inf] * 35, BF16).failures[0]


def test_an_answer_repaired_to_stay_below_the_tolerance_is_found_by_how_often_it_differs() -> None:
    verdict = judge([0.0] * 240 + [0.2] * 60, BF16)
    assert verdict.figures["exceedances"] == 0
    assert verdict.failures[0] == "60 of 300 tokens lose against the reference's choice by more than 0"


def test_many_small_deviations_are_found_by_the_mean_alone() -> None:
    lax = Thresholds((Limit(0.25, 0.01),), 0.01, 0.005, 0.0, "")
    verdict = judge([0.04] * 1000, lax)
    assert verdict.figures["exceedances"] == 0
    assert len(verdict.failures) == 1
    assert "mean" in verdict.failures[0]


def test_one_token_in_a_hundred_is_found_where_the_mean_sees_nothing() -> None:
    sparse = [3.0 if i % 100 == 0 else 0.0 for i in range(300)]
    calibrated = Thresholds((Limit(1.0, 1e-4),), 1e-4, 0.005, 0.0, "")
    verdict = judge(sparse, calibrated)
    assert verdict.figures["mean_score"] < verdict.figures["mean_threshold"]
    assert verdict.failures == ("3 of 300 tokens lose against the reference's choice by more than 1",)


def test_one_wild_score_counts_in_the_mean_as_much_as_the_clip() -> None:
    figures = judge([1e9, 0.0, math.inf, 0.0], Thresholds((Limit(1.0, 0.5),), 0.5, 1.0, 0.0, "")).figures
    assert figures["mean_score"] == 2 * CLIP / 4
    assert figures["max_score"] == 1e9


@given(scores, thresholds)
def test_what_is_not_a_number_counts_as_out_of_support(answer: list[float], limits: Thresholds) -> None:
    plain = [math.inf if math.isnan(score) else score for score in answer]
    assert judge(answer, limits).failures == judge(plain, limits).failures
    if limits is not BF16 and any(math.isnan(score) for score in answer):
        assert judge(answer, limits).outcome == "fail"


@given(scores, thresholds)
def test_a_verdict_is_a_pass_only_with_enough_tokens_and_a_failure_with_any_number(
    answer: list[float], limits: Thresholds
) -> None:
    verdict, needed = judge(answer, limits), Power().tokens(limits)
    assert (verdict.outcome == "fail") == bool(verdict.failures)
    if not verdict.failures:
        enough = len(answer) >= needed and not limits.guessed
        assert verdict.outcome == ("pass" if enough else "inconclusive")


def test_room_that_nobody_has_measured_refuses_and_never_passes() -> None:
    """Else a provider would name an arithmetic that nobody knows, and have one token in 25 wherever it likes."""
    cheated = ([0.0] * 29 + [0.2]) * 30
    assert judge(cheated, BF16).failures == ()
    assert judge(cheated, BF16).outcome == "inconclusive"
    assert judge([0.0] * 900, dataclasses.replace(BF16, guessed=False)).outcome == "pass"
    assert judge([math.inf] * 900, BF16).outcome == "fail"
    assert not FP32.guessed, "in fp32 it forgives nothing"


@given(scores, thresholds, st.data())
def test_a_worse_token_never_makes_a_verdict_better(
    answer: list[float], limits: Thresholds, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(answer) - 1))
    worse = [*answer[:at], math.inf if limits.outside == 0 else answer[at] + 1, *answer[at + 1 :]]
    if judge(answer, limits).outcome == "fail" and math.isfinite(answer[at]):
        assert judge(worse, limits).outcome == "fail"


@given(scores, thresholds)
def test_an_answer_is_refused_exactly_where_its_chance_is_below_the_false_positive_rate(
    answer: list[float], limits: Thresholds
) -> None:
    found = chance_of(Tally.of(answer, limits), limits)
    assert (found < FALSE_POSITIVES) == bool(judge(answer, limits).failures)


@given(scores, scores, thresholds)
def test_tallies_add_up(one: list[float], other: list[float], limits: Thresholds) -> None:
    whole, parts = Tally.of(one + other, limits), Tally.of(one, limits) + Tally.of(other, limits)
    assert (whole.size, whole.outside, whole.above) == (parts.size, parts.outside, parts.above)
    assert whole.clipped == pytest.approx(parts.clipped)


def test_more_power_takes_more_tokens() -> None:
    counts = [
        Power(share, chance).tokens(BF16) for share, chance in ((0.5, 0.9), (0.25, 0.9), (0.25, 0.99), (0.1, 0.99))
    ]
    assert counts == sorted(counts)
    assert counts[0] > 1
    assert Power(0.25, 0.9).tokens(EXACT) == 9  # 1 - 0.75^9 is the first above 0.9
