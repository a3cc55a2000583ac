"""How improbable counts and means are where a provider is honest. Pure numbers; tokens count as independent.

Fixed samples are judged by the binomial tail and by Bernstein's inequality, true rates and means are bounded by Clopper
and Pearson's interval and by Hoeffding's first inequality; all of these hold at any sample size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache


def binomial_tail(count: int, size: int, rate: float) -> float:
    """The chance of ``count`` or more among ``size`` when each happens with chance ``rate``."""
    if count <= 0 or rate >= 1:
        return 1.0
    if rate <= 0 or count > size:
        return 0.0

    def log_chance(k: int) -> float:
        ways = math.lgamma(size + 1) - math.lgamma(k + 1) - math.lgamma(size - k + 1)
        return ways + k * math.log(rate) + (size - k) * math.log1p(-rate)

    # Past the mean each term is less than the one before it: the rest is soon nothing.
    total = 0.0
    for k in range(count, size + 1):
        term = math.exp(log_chance(k))
        total += term
        if k > size * rate and term < total * 1e-17:
            break
    return min(total, 1.0)


def fewest_too_many(size: int, rate: float, level: float) -> int:
    """The smallest count among ``size`` whose tail at ``rate`` is below ``level``; ``size + 1`` where none is."""
    low, high = 1, size + 1
    while low < high:
        middle = (low + high) // 2
        if binomial_tail(middle, size, rate) < level:
            high = middle
        else:
            low = middle + 1
    return low


def upper_rate(count: int, size: int, level: float) -> float:
    """The largest rate that ``count`` of ``size`` does not refute at ``level`` (Clopper and Pearson, one-sided)."""
    if count >= size:
        return 1.0
    return _last(lambda rate: 1 - binomial_tail(count + 1, size, rate) > level, count / size)


def upper_mean(found: float, most: float, size: int, level: float) -> float:
    """The largest mean of numbers from 0 to ``most`` that ``found``, the mean of ``size`` of them, does not refute.

    With p and q the means over ``most``, ``size`` numbers have a mean as low as p with a chance of at most
    exp(-size KL(p, q)) (Hoeffding 1963, theorem 1).
    """
    share = found / most
    if share >= 1:
        return most
    return most * _last(lambda other: size * _divergence(share, other) < -math.log(level), share)


def mean_chance(found: float, mean: float, most: float, size: int) -> float:
    """A bound on the chance that ``size`` numbers from 0 to ``most`` have a mean of ``found`` or more (Bernstein).

    A variable within these bounds whose expectation is ``mean`` has a variance of at most ``mean * most``.
    """
    excess = found - mean
    if excess <= 0:
        return 1.0
    return math.exp(-size * excess * excess / (2 * (mean * most + most * excess / 3)))


def mean_limit(mean: float, most: float, size: int, level: float) -> float:
    """The mean at which :func:`mean_chance` is ``level``."""
    log = -math.log(level)
    linear = most * log / 3
    return mean + (linear + math.sqrt(linear * linear + 2 * mean * most * log * size)) / size


@lru_cache(maxsize=256)
def tokens_needed(rate: float, level: float, share: float, chance: float) -> int:
    """How many tokens a test of ``rate`` takes to refuse with ``chance`` an answer that errs at ``share`` of them.

    Counts are whole numbers, so that a few sizes above it may fall short by a little.

    Raises:
        ValueError: the share is not above the rate, so that no number is enough.
    """
    if share <= rate:
        raise ValueError(f"deviations at a share of {share} cannot be told from honest ones at {rate}")

    def enough(size: int) -> bool:
        return binomial_tail(fewest_too_many(size, rate, level), size, share) >= chance

    low, high = 0, 1
    while not enough(high):
        low, high = high, high * 2
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _last(holds: Callable[[float], bool], first: float) -> float:
    """Where from ``first`` to 1 ``holds`` ends to be true, rounded up."""
    low, high = first, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


def _divergence(share: float, other: float) -> float:
    """Kullback and Leibler's, of a coin of ``share`` from one of ``other``, which lies from there to below 1."""
    if other >= 1:
        return math.inf
    seen = share * math.log(share / other) if share else 0.0
    return seen + (1 - share) * (math.log1p(-share) - math.log1p(-other))
