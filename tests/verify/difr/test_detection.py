"""AUC, power and runs, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify.difr.detection import Detector, auc, interval, power
from countersign.verify.difr.verdict import CLIP, THRESHOLDS, Tally, chance

numbers = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=30).map(np.array)


@given(numbers, numbers)
def test_the_auc_is_the_share_of_pairs_in_order_ties_halved(honest: np.ndarray, dishonest: np.ndarray) -> None:
    pairs = [(d > h) + (d == h) / 2 for d in dishonest for h in honest]
    assert auc(honest, dishonest) == pytest.approx(sum(pairs) / len(pairs))


@given(numbers, numbers)
def test_power_is_what_lies_above_all_but_a_hundredth_of_the_honest(honest: np.ndarray, dishonest: np.ndarray) -> None:
    found = power(honest, dishonest)
    assert 0 <= found <= 1
    # At most the allowed share of honest runs lies above the limit that was taken.
    assert power(honest, honest) <= 0.01
    assert found >= float((dishonest > honest.max()).mean())


def test_at_one_per_cent_false_as_many_honest_runs_are_above() -> None:
    honest = np.arange(1000.0)
    assert power(honest, np.array([988.0, 989.5, 990.5, 2000.0])) == 0.5
    assert auc(honest, honest + 1000) == 1


def test_an_interval_holds_the_auc_and_more_runs_draw_it_closer() -> None:
    draws = np.random.default_rng(1)
    wide, narrow = (interval(draws.normal(size=size), draws.normal(size=size) + 1) for size in (30, 3000))
    true = 0.5 * (1 + math.erf(1 / 2))  # of two normal variables a unit apart
    assert narrow[0] < true < narrow[1]
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 3


def test_runs_are_disjoint_in_order_and_over_answers_only_where_they_are_longer() -> None:
    answers = np.arange(12.0).reshape(3, 4)
    detector = Detector(answers / 100, THRESHOLDS["bf16"])
    assert detector.means(3) == pytest.approx(np.array([0.01, 0.05, 0.09]))  # the last of each answer is left out
    assert detector.means(6) == pytest.approx(np.array([0.025, 0.085]))


def test_a_run_is_found_by_the_chance_of_its_tally() -> None:
    limits = THRESHOLDS["bf16"]
    answers = np.array([[0.0, 0.3, math.inf, 0.01], [0.0, 0.0, 0.0, 0.0]])
    found = Detector(answers, limits).found(4)
    wanted = [-math.log10(chance(Tally.of(answer.tolist(), limits), limits)) for answer in answers]
    assert found == pytest.approx(np.array(wanted))
    assert found[0] > found[1] == 0
    assert Detector(answers, limits).means(4)[0] == pytest.approx((0.3 + CLIP + 0.01) / 4)


def test_where_there_is_no_run_nothing_is_said() -> None:
    honest, none = np.array([0.0, 1.0]), np.array([])
    assert math.isnan(auc(honest, none))
    assert math.isnan(power(honest, none))
