"""Bounds on chances, against sums and simulations."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify.difr.statistics import (
    binomial_tail,
    fewest_too_many,
    mean_chance,
    mean_limit,
    tokens_needed,
    upper_mean,
    upper_rate,
)


@given(st.integers(1, 40), st.floats(0.001, 0.5), st.data())
def test_the_binomial_tail_is_the_sum_of_its_chances(size: int, rate: float, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, size))
    exact = math.fsum(math.comb(size, k) * rate**k * (1 - rate) ** (size - k) for k in range(count, size + 1))
    assert binomial_tail(count, size, rate) == pytest.approx(exact, rel=1e-9)


def test_at_rate_nothing_one_is_too_many_and_none_never_is() -> None:
    assert binomial_tail(0, 10, 0.0) == 1
    assert binomial_tail(1, 10, 0.0) == 0
    assert fewest_too_many(10, 0.0, 1e-3) == 1
    assert fewest_too_many(10, 0.01, 1e-3) == 3


@given(st.integers(1, 300), st.floats(0, 0.9), st.sampled_from([1e-2, 1e-3, 1e-4]))
def test_the_fewest_too_many_is_improbable_and_one_less_is_not(size: int, rate: float, level: float) -> None:
    count = fewest_too_many(size, rate, level)
    assert binomial_tail(count - 1, size, rate) >= level
    if count <= size:
        assert binomial_tail(count, size, rate) < level


@given(st.integers(1, 2000), st.data())
def test_a_rate_lies_below_its_bound_and_more_tokens_draw_it_closer(size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, size))
    high = upper_rate(count, size, 1e-3)
    assert count / size <= high
    assert upper_rate(10 * count, 10 * size, 1e-3) <= high + 1e-12


def test_none_among_n_bounds_the_rate_by_the_rule_of_three() -> None:
    assert upper_rate(0, 1000, 0.05) == pytest.approx(3 / 1000, rel=0.01)


@pytest.mark.parametrize("expected", [0.1, 1, 3, 4.9, 7, 12, 40, 300])
@pytest.mark.parametrize("level", [0.05, 1e-3])
def test_a_true_mean_is_above_its_bound_no_more_often_than_said(expected: float, level: float) -> None:
    """Numbers that are 0 or the most, which spread as widely as can be."""
    size, most = 5000, 0.5
    rate = expected / size
    low = 0  # the first count that does not refute the true mean
    while upper_mean(low * most / size, most, size, level) < rate * most:
        low += 1
    assert 1 - binomial_tail(low, size, rate) <= level


@given(st.floats(0, 0.5), st.integers(1, 10_000))
def test_the_bound_of_a_mean_is_within_what_there_is_and_more_numbers_draw_it_closer(found: float, size: int) -> None:
    assert found <= upper_mean(found, 0.5, size, 1e-3) <= 0.5
    assert upper_mean(found, 0.5, 10 * size, 1e-3) <= upper_mean(found, 0.5, size, 1e-3) + 1e-12


@given(st.floats(0, 0.1), st.integers(1, 10_000), st.sampled_from([1e-2, 1e-4]))
def test_at_the_limit_of_a_mean_its_chance_is_the_level(mean: float, size: int, level: float) -> None:
    assert mean_chance(mean_limit(mean, 0.5, size, level), mean, 0.5, size) == pytest.approx(level, rel=1e-6)


def test_means_above_their_limit_are_as_rare_as_said() -> None:
    drawn, mean, size = random.Random(0), 0.01, 50
    over = sum(
        sum(0.5 if drawn.random() < mean / 0.5 else 0.0 for _ in range(size)) / size > mean_limit(mean, 0.5, size, 0.05)
        for _ in range(2000)
    )
    assert over / 2000 <= 0.05


@pytest.mark.parametrize(("rate", "share"), [(0.0, 0.1), (0.01, 0.1), (0.02, 0.05)])
def test_so_many_tokens_give_the_power_that_was_asked_for(rate: float, share: float) -> None:
    size = tokens_needed(rate, 1e-3, share, 0.9)
    assert binomial_tail(fewest_too_many(size, rate, 1e-3), size, share) >= 0.9
    assert binomial_tail(fewest_too_many(size // 2, rate, 1e-3), size // 2, share) < 0.9


def test_no_number_of_tokens_tells_what_honest_answers_do_too() -> None:
    with pytest.raises(ValueError, match="cannot be told"):
        tokens_needed(0.1, 1e-3, 0.1, 0.9)
