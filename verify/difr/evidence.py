"""Evidence against one provider over many answers: for what no single answer shows.

For each test of ``verdict`` there is a wealth that starts at 1, is bet on the provider being dishonest, and does not
grow on average where the provider is honest (an e-process). By Ville's inequality it ever reaches 1/level with a chance
of at most ``level``, so that an auditor may look after each answer, stop when it likes, and go on later.

    counts    wealth = mean over rates p above the honest rate r of (p/r)^k ((1-p)/(1-r))^(n-k), k of n tokens
    mean      wealth = mean over bets b of the product of 1 + b (x - m), x the clipped score, m its honest mean
              (Waudby-Smith and Ramdas, arXiv 2010.09686)

The evidence is the mean of all wealths, which is one too. Honest rates are averages over the texts of the calibration;
other texts may be harder, so that twice as much counts as honest here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from countersign.verify.difr.verdict import CLIP, FALSE_POSITIVES, Tally, Thresholds

HEADROOM = 2.0
"""Honest rates count as so much more."""

STEPS = 12
"""Alternatives of each test: each half as far from the honest rate as the one before."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the answers so far amount to. ``bets``: log wealth of each bet on the mean."""

    thresholds: Thresholds
    tally: Tally
    answers: int = 0
    bets: tuple[float, ...] = (0.0,) * STEPS

    @staticmethod
    def none(thresholds: Thresholds) -> Evidence:
        """Before the first answer."""
        return Evidence(thresholds, Tally(0, 0, (0,) * len(thresholds.limits), 0.0))

    def add(self, scores: Sequence[float]) -> Evidence:
        """One more answer, scored with the slack of the thresholds."""
        clipped = [min(score, CLIP) if math.isfinite(score) else CLIP for score in scores]
        return dataclasses.replace(
            self,
            tally=self.tally + Tally.of(scores, self.thresholds),
            answers=self.answers + 1,
            bets=tuple(wealth + gain for wealth, gain in zip(self.bets, self._gains(clipped), strict=True)),
        )

    @property
    def log(self) -> float:
        """The natural logarithm of the evidence; infinite once something impossible was seen."""
        tests = [self._counted(self.tally.outside, self.thresholds.outside)]
        tests += [
            self._counted(count, limit.rate)
            for count, limit in zip(self.tally.above, self.thresholds.limits, strict=True)
        ]
        return _log_mean((*tests, _log_mean(self.bets)))

    def refuted(self, level: float = FALSE_POSITIVES) -> bool:
        """Whether it is more than honest providers ever give, but for a chance of ``level``."""
        return self.log >= -math.log(level)

    def _counted(self, count: int, rate: float) -> float:
        size, rate = self.tally.size, min(HEADROOM * rate, 1.0)
        if rate >= 1:
            return 0.0
        if rate == 0 and count:
            return math.inf
        return _log_mean(
            (count * math.log(other / rate) if count else 0.0) + (size - count) * math.log((1 - other) / (1 - rate))
            for other in _alternatives(rate)
        )

    def _gains(self, clipped: Iterable[float]) -> Iterator[float]:
        """Of each bet on these numbers."""
        mean = HEADROOM * self.thresholds.mean
        values = list(clipped)
        for step in range(STEPS):
            # Nothing is left of a bet of 1/mean where the score is 0.
            bet = 0.5**step * 0.5 / max(mean, 1e-4)
            yield math.fsum(math.log1p(bet * (value - mean)) for value in values)


def _alternatives(rate: float) -> Iterator[float]:
    return (rate + (1 - rate) * 0.5**step for step in range(1, STEPS + 1))


def _log_mean(logs: Iterable[float]) -> float:
    """Of numbers given by their logarithms."""
    values = list(logs)
    most = max(values)
    if math.isinf(most):
        return most
    return most + math.log(math.fsum(math.exp(value - most) for value in values) / len(values))
