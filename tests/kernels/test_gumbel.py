"""The sampler against a slow reading of its definition, in Python integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from countersign.kernels import gumbel

MASK = 0xFFFFFFFF


def slow_philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def slow_gumbel(seed: int, position: int, token_id: int) -> float:
    o0, o1, _, _ = slow_philox((position, token_id, 0, 0), (seed & MASK, seed >> 32))
    u = (((o0 | o1 << 32) >> 12) + 0.5) / 2**52
    return -math.log(-math.log1p(-u))


def slow_allowed(logits: Sequence[float], temperature: float, top_k: int, top_p: float) -> list[int]:
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k:
        order = order[:top_k]
    if top_p == 1:
        return sorted(order)
    weights = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
    total, cumulative, kept = sum(weights), 0.0, []
    for i, weight in zip(order, weights, strict=True):
        kept.append(i)
        cumulative += weight
        # A prefix that reaches top_p to the last bit or misses it by one is a question of rounding, not of the rule.
        assume(not math.isclose(cumulative, top_p * total, rel_tol=1e-12))
        if cumulative >= top_p * total:
            break
    return sorted(kept)


class Mask(NamedTuple):
    temperature: float
    top_k: int
    top_p: float


def slow_sample(logits: Sequence[float], position: int, mask: Mask, seed: int) -> int:
    temperature, top_k, top_p = mask
    if temperature == 0:
        return max(range(len(logits)), key=lambda i: (logits[i], -i))
    kept = slow_allowed(logits, temperature, top_k, top_p)
    return max(kept, key=lambda i: (logits[i] + temperature * slow_gumbel(seed, position, i), -i))


def words(*values: int) -> tuple[gumbel.Words, ...]:
    return tuple(np.array([value], dtype=np.uint64) for value in values)


# Few distinct logits, so that ties are the rule and not the exception.
LOGITS = st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats(-60, 60, width=32)), min_size=1, max_size=60)
SEEDS = st.integers(0, 2**64 - 1)
POSITIONS = st.integers(0, 2**32 - 1)
TOP_P = st.sampled_from((0.05, 0.3, 0.55, 0.9, 0.99, 1.0))
TEMPERATURES = st.sampled_from((1e-16, 0.01, 0.3, 0.8, 1.0, 2.5))
MASKS = st.builds(Mask, st.one_of(st.just(0.0), TEMPERATURES), st.integers(0, 70), TOP_P)


def test_philox_of_zero_gives_the_published_words() -> None:
    zero = np.zeros(1, dtype=np.uint64)
    got = gumbel.philox4x32((zero, zero, zero, zero), (0, 0))
    assert [int(word[0]) for word in got] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@given(st.tuples(*[st.integers(0, MASK)] * 4), st.tuples(*[st.integers(0, MASK)] * 2))
def test_philox_agrees_with_python_integers(counter: tuple[int, ...], key: tuple[int, int]) -> None:
    c0, c1, c2, c3 = words(*counter)
    assert [int(word[0]) for word in gumbel.philox4x32((c0, c1, c2, c3), key)] == slow_philox(counter, key)


@pytest.mark.parametrize(
    ("seed", "position", "token_id", "expected"),
    [(42, 7, 1234, -0.3695411065692841), (42, 100000, 151935, -1.1451155692972863)],
)
def test_noise_has_the_known_answers(seed: int, position: int, token_id: int, expected: float) -> None:
    assert gumbel.gumbel(seed, position, np.array([token_id]))[0] == pytest.approx(expected, rel=4e-16)


def test_noise_of_a_token_does_not_depend_on_its_neighbours() -> None:
    whole = gumbel.gumbel(2**63 + 5, 99, np.arange(20_000))
    some = np.array([3, 8191, 8192, 19_999])
    assert np.array_equal(gumbel.gumbel(2**63 + 5, 99, some), whole[some])


def test_noise_stays_inside_the_bounds_that_pruning_relies_on() -> None:
    smallest, largest = 0.5 / 2**52, (2**52 - 0.5) / 2**52
    assert -math.log(-math.log1p(-smallest)) < gumbel.G_MAX
    assert -math.log(-math.log1p(-largest)) > gumbel.G_MIN


@pytest.mark.parametrize(("seed", "position"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**32)])
def test_a_seed_or_position_that_does_not_fit_its_words_is_refused(seed: int, position: int) -> None:
    with pytest.raises(ValueError, match="unsigned"):
        gumbel.gumbel(seed, position, np.array([0]))


@given(LOGITS, TEMPERATURES, st.integers(0, 70), TOP_P)
def test_the_mask_is_top_k_then_top_p_with_ties_to_the_lower_id(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    expected = slow_allowed(logits, temperature, top_k, top_p)
    got = gumbel.allowed(np.array(logits), temperature=temperature, top_k=top_k, top_p=top_p)
    assert got.tolist() == expected


def test_top_p_counts_probability_among_the_survivors_of_top_k() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    assert gumbel.allowed(logits, temperature=1.0, top_k=0, top_p=0.5).tolist() == [0, 1]
    assert gumbel.allowed(logits, temperature=1.0, top_k=2, top_p=0.5).tolist() == [0]


def test_a_prefix_that_reaches_top_p_exactly_is_enough() -> None:
    assert gumbel.allowed(np.zeros(4), temperature=1.0, top_k=0, top_p=0.5).tolist() == [0, 1]


def test_top_p_just_below_one_still_drops_the_tail() -> None:
    logits = np.log(np.array([0.003, 0.992, 0.005]))
    assert gumbel.allowed(logits, temperature=1.0, top_k=3, top_p=0.99).tolist() == [1]
    assert gumbel.allowed(logits, temperature=1.0, top_k=3, top_p=0.995).tolist() == [1, 2]


def test_tokens_ruled_out_beforehand_are_never_allowed() -> None:
    logits = np.array([-math.inf, 1.0, -math.inf, 0.0])
    for top_k, top_p in ((0, 1.0), (3, 1.0), (3, 0.99)):
        assert gumbel.allowed(logits, temperature=1.0, top_k=top_k, top_p=top_p).tolist() == [1, 3]


@settings(max_examples=300)
@given(LOGITS, POSITIONS, MASKS, SEEDS)
def test_sampling_agrees_with_the_definition(logits: list[float], position: int, mask: Mask, seed: int) -> None:
    temperature, top_k, top_p = mask
    token = gumbel.sample(np.array(logits), position, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    assert token == slow_sample(logits, position, mask, seed)


@pytest.mark.parametrize("vocabulary", [4096, 128_256])
def test_pruning_changes_no_token_of_a_large_vocabulary(vocabulary: int) -> None:
    logits = np.random.default_rng(vocabulary).normal(0, 6, vocabulary)
    for position in range(12):
        ids, scores = gumbel.perturbed(logits, position, temperature=0.8, top_k=0, top_p=1.0, seed=1)
        assert ids.size == vocabulary
        token = gumbel.sample(logits, position, temperature=0.8, top_k=0, top_p=1.0, seed=1)
        assert token == ids[np.argmax(scores)]


def test_a_token_far_below_the_largest_logit_can_win() -> None:
    logits = np.full(128_256, -12.0)
    logits[77] = 0.0
    tokens = [gumbel.sample(logits, position, temperature=1.0, top_k=0, top_p=1.0, seed=3) for position in range(8)]
    for position, token in enumerate(tokens):
        assert token == np.argmax(logits + gumbel.gumbel(3, position, np.arange(128_256)))
    assert 0 < tokens.count(77) < 8


def test_frequencies_follow_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1]))
    draws = [
        gumbel.sample(2 * logits, position, temperature=2.0, top_k=0, top_p=1.0, seed=7) for position in range(4000)
    ]
    observed = np.bincount(draws, minlength=4)
    expected = 4000 * np.exp(logits)
    # Chi-squared with 3 degrees of freedom; the draws are fixed by the seed, so this either always passes or never.
    assert float(((observed - expected) ** 2 / expected).sum()) < 11.34


def test_greedy_takes_the_lower_of_two_equal_logits_whatever_the_mask() -> None:
    logits = np.array([0.0, 5.0, 5.0, 1.0])
    assert gumbel.sample(logits, 3, temperature=0.0, top_k=2, top_p=0.1, seed=0) == 1
    ids, scores = gumbel.perturbed(logits, 3, temperature=0.0, top_k=3, top_p=1.0, seed=0)
    assert ids.tolist() == [1, 2, 3]
    assert scores.tolist() == [5.0, 5.0, 1.0]
