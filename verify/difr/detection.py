"""How well the verdict's statistic tells a dishonest provider's tokens from an honest one's, by how many there are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from countersign.verify.difr.verdict import CLIP, Tally, Thresholds, chance

Scores: TypeAlias = NDArray[np.float64]
"""(answers, tokens)."""


class Detector:
    """The scores of one provider, cut into runs."""

    def __init__(self, answers: Scores, limits: Thresholds) -> None:
        self._answers, self._limits = answers, limits

    @property
    def differing(self) -> float:
        """The share of tokens that the reference would not have sampled."""
        return float((self._answers > 0).mean())

    def found(self, size: int) -> Scores:
        """Of each run of ``size`` tokens, how improbable it is: -log10 of its chance."""
        most = 300.0
        return np.array([min(most, -math.log10(max(chance(t, self._limits), 10**-most))) for t in self._tallies(size)])

    def means(self, size: int) -> Scores:
        """The published statistic of each run."""
        means: Scores = self._runs(np.minimum(self._answers, CLIP), size).mean(axis=1)
        return means

    def _tallies(self, size: int) -> Iterator[Tally]:
        runs = self._runs(self._answers, size)
        finite = np.isfinite(runs)
        above = [((runs > limit.tolerance) & finite).sum(axis=1) for limit in self._limits.limits]
        clipped = np.minimum(runs, CLIP).sum(axis=1)
        for outside, total, *counts in zip((~finite).sum(axis=1), clipped, *above, strict=True):
            yield Tally(size, int(outside), tuple(int(count) for count in counts), float(total))

    @staticmethod
    def _runs(answers: Scores, size: int) -> Scores:
        """Within an answer where it is long enough, else over consecutive answers."""
        if size <= answers.shape[1]:
            return answers[:, : answers.shape[1] // size * size].reshape(-1, size)
        flat = answers.reshape(-1)
        return flat[: len(flat) // size * size].reshape(-1, size)


def auc(honest: Scores, dishonest: Scores) -> float:
    """The chance that a dishonest run has more than an honest one, ties halved; not a number where there is no run."""
    if not len(dishonest):
        return math.nan
    ordered = np.sort(honest)
    below, up_to = (np.searchsorted(ordered, dishonest, side=side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(honest))


def interval(honest: Scores, dishonest: Scores, rounds: int = 200) -> tuple[float, float]:
    """95 % of the AUC, by drawing the runs again."""
    draws = np.random.default_rng(0)
    again = [auc(draws.choice(honest, len(honest)), draws.choice(dishonest, len(dishonest))) for _ in range(rounds)]
    return float(np.quantile(again, 0.025)), float(np.quantile(again, 0.975))


def power(honest: Scores, dishonest: Scores, rate: float = 0.01) -> float:
    """The share of dishonest runs above all but ``rate`` of the honest ones; not a number where there is no run."""
    if not len(dishonest):
        return math.nan
    return float((dishonest > np.quantile(honest, 1 - rate, method="higher")).mean())
