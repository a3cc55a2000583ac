"""Scores and thresholds to a verdict: the one place where it is decided.

    fail           a test refuses: what was found happens to honest answers with a chance below ``FALSE_POSITIVES``
    inconclusive   none does, and there are fewer tokens than the power that is asked for takes, or the thresholds leave
                   room that nobody has measured honest answers to need
    pass           none does, and there are enough

A failure is one however few tokens there are; only the lack of one needs enough of them to mean something. The tests
share the chance of a false positive evenly:

    out of support    tokens that could not have been drawn at all
    exceedances       tokens whose score is above a tolerance, for each tolerance: finds few large deviations, and with
                      the small tolerances many that all stay below what one token may deviate (the repair attack)
    mean              of the clipped scores: finds many small deviations
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from countersign.verify.difr.statistics import binomial_tail, mean_chance, mean_limit, tokens_needed

CLIP = 0.5
"""Scores are clipped here before the mean, so that one wild token does not hide the rest (DiFR's own value)."""

FALSE_POSITIVES = 1e-3
"""Chance that an answer of a provider as honest as those of the thresholds is refused, all tests together."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The share ``rate`` of an honest answer's tokens may score above ``tolerance`` logits. At 0 not one may."""

    tolerance: float
    rate: float


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What honest answers stay within, in logits and shares of tokens.

    Attributes:
        limits: By rising tolerance.
        outside: Share of tokens that may be out of support.
        mean: Of the clipped scores.
        slack: With which the scores are to be computed, see ``scores``.
        source: Where these numbers come from, for people.
        guessed: Nobody has measured that honest answers need so much room. Enough to refuse, not to pass.
    """

    limits: tuple[Limit, ...]
    outside: float
    mean: float
    slack: float
    source: str
    guessed: bool = False

    @property
    def level(self) -> float:
        """The chance of a false positive that each test may have."""
        return FALSE_POSITIVES / (len(self.limits) + 2)


THRESHOLDS: dict[Literal["fp32", "bf16"], Thresholds] = {
    # The same weights in fp32 on other batches or machines differ by about 1e-5, a hundredth of this.
    "fp32": Thresholds((Limit(1e-3, 0.0),), 0.0, 2e-4, 1e-3, "reasoned, not calibrated"),
    # bf16 carries 8 bits: honest providers match more than 98 % of tokens (DiFR, abstract), the rest are near ties.
    "bf16": Thresholds((Limit(0.0, 0.04), Limit(0.25, 0.01)), 0.01, 0.02, 0.05, "reasoned, not calibrated", True),
}
"""By the dtype that the receipt declares, where the reference has no profile, or none of the arithmetic that the
receipt names. That name is the provider's to choose: what forgives nothing in fp32 may pass, the room for bf16 may not.
"""


@dataclass(frozen=True, slots=True)
class Power:
    """What an audit must be able to see before it says pass: deviations at this share of tokens, with this chance."""

    share: float = 0.25
    chance: float = 0.9

    def tokens(self, thresholds: Thresholds) -> int:
        """How many that takes, if each deviation is above the largest tolerance."""
        rate = thresholds.limits[-1].rate
        return tokens_needed(rate, thresholds.level, max(self.share, min(2 * rate, 1.0)), self.chance)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How it ended, why it is refused (nothing if it is not), and the figures."""

    outcome: Literal["pass", "fail", "inconclusive"]
    failures: tuple[str, ...]
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Tally:
    """What the tests need of scores: how many tokens, out of support, above each tolerance; the clipped sum."""

    size: int
    outside: int
    above: tuple[int, ...]
    clipped: float

    @staticmethod
    def of(scores: Sequence[float], thresholds: Thresholds) -> Tally:
        """Of the scores of one answer or many. What is not a number counts as out of support: nothing may hide so."""
        supported = [score for score in scores if math.isfinite(score)]
        outside = len(scores) - len(supported)
        above = tuple(sum(score > limit.tolerance for score in supported) for limit in thresholds.limits)
        return Tally(len(scores), outside, above, outside * CLIP + math.fsum(min(score, CLIP) for score in supported))

    def __add__(self, other: Tally) -> Tally:
        above = tuple(a + b for a, b in zip(self.above, other.above, strict=True))
        return Tally(self.size + other.size, self.outside + other.outside, above, self.clipped + other.clipped)

    @property
    def mean(self) -> float:
        return self.clipped / self.size


def judge(scores: Sequence[float], thresholds: Thresholds, power: Power = Power()) -> Verdict:
    """The verdict over the scores of one answer, of which there is at least one."""
    tally = Tally.of(scores, thresholds)
    failures = tuple(_refusals(tally, thresholds))
    needed = power.tokens(thresholds)
    enough = tally.size >= needed and not thresholds.guessed
    outcome: Literal["pass", "fail", "inconclusive"] = "pass" if enough else "inconclusive"
    return Verdict("fail" if failures else outcome, failures, _figures(scores, tally, thresholds, needed))


def chance(tally: Tally, thresholds: Thresholds) -> float:
    """A bound on the chance of what was found, or worse, where the provider is honest: the least of all tests', times
    their number.
    """
    tests = list(_tests(tally, thresholds))
    return min(1.0, min(test.chance for test in tests) * len(tests))


@dataclass(frozen=True, slots=True)
class _Test:
    """The chance that honest answers give as much, and what was found."""

    kind: Literal["outside", "above", "mean"]
    chance: float
    found: str


def _tests(tally: Tally, thresholds: Thresholds) -> Iterator[_Test]:
    size, level = tally.size, thresholds.level
    outside = f"{tally.outside} of {size} tokens could not have been drawn at all"
    yield _Test("outside", binomial_tail(tally.outside, size, thresholds.outside), outside)
    for count, limit in zip(reversed(tally.above), reversed(thresholds.limits), strict=True):
        lost = f"{count} of {size} tokens lose against the reference's choice by more than {limit.tolerance:g}"
        yield _Test("above", binomial_tail(count, size, limit.rate), lost)
    mean = f"the mean score {tally.mean:.4f} is above {mean_limit(thresholds.mean, CLIP, size, level):.4g}"
    yield _Test("mean", mean_chance(tally.mean, thresholds.mean, CLIP, size), mean)


def _refusals(tally: Tally, thresholds: Thresholds) -> Iterable[str]:
    """What is wrong; of the tolerances that are exceeded too often only the largest, which tells most."""
    found: dict[str, str] = {}
    for test in _tests(tally, thresholds):
        if test.chance < thresholds.level:
            found.setdefault(test.kind, test.found)
    return found.values()


def _figures(scores: Sequence[float], tally: Tally, thresholds: Thresholds, needed: int) -> dict[str, float]:
    return {
        "sample_size": float(tally.size),
        "tokens_needed": float(needed),
        "exact_matches": float(sum(score == 0 for score in scores)),
        "mean_score": tally.mean,
        "max_score": max((score for score in scores if math.isfinite(score)), default=0.0),
        "exceedances": float(tally.above[-1]),
        "out_of_support": float(tally.outside),
        "tolerance": thresholds.limits[-1].tolerance,
        "rate_threshold": thresholds.limits[-1].rate,
        "mean_threshold": mean_limit(thresholds.mean, CLIP, tally.size, thresholds.level),
        "false_positive_rate": FALSE_POSITIVES,
    }
