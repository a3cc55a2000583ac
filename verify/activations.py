"""Activation-DiFR: were these tokens sampled from states that the reference weights give? (arXiv 2511.20621)

    v = h Q,   d = |v - v'| / (|h'| sqrt(k / H))

h (H) is the state that the head takes, Q (H, k) the orthonormal projection that the receipt names, v the provider's
fingerprint and v' the reference's, both in fp16, of the same token: one teacher-forced pass over prompt and claimed
output gives all h'. Q shrinks a distance by sqrt(k / H) on average, so that d, without a unit, is about the relative
change of the whole state, whatever k and the model.

The states of one position see each token and all weights, and no noise hides them: two fingerprints show what takes the
tokens themselves hundreds. But they only tell that somebody has computed the declared model over this text. That the
text was sampled from it is for the token level to say; neither replaces the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from countersign.kernels.fingerprint import Fingerprinter
from countersign.services.engine.errors import EngineError
from countersign.services.engine.model import Model
from countersign.verify.arithmetic import arithmetic_of
from countersign.verify.difr.level import Reference, check_comparable
from countersign.verify.difr.profile import SAME_BITS
from countersign.verify.difr.scores import Kept, teacher_forced
from countersign.verify.difr.statistics import binomial_tail, mean_chance, mean_limit, tokens_needed
from countersign.verify.errors import NotCheckable, OpeningMismatch
from countersign.verify.fingerprints import Challenge, Opening, check, decode, none_committed
from countersign.verify.payload import Receipt
from countersign.verify.receipt import Openings

__all__ = [
    "OTHER",
    "SAME",
    "ActivationReport",
    "Challenge",
    "Tolerance",
    "audit_activations",
    "distance",
    "distances",
    "judge",
    "states_of",
    "tolerance_of",
]

CLIP = 0.5
"""Distances are clipped here before the mean."""

FALSE_POSITIVES = 1e-3
"""Chance that an honest answer is refused, both tests together."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What honest fingerprints stay within.

    Attributes:
        distance: A larger one exceeds what the arithmetic explains.
        rate: Share of positions that may exceed it. At 0 not one may.
        mean: Of the clipped distances.
        source: Where these numbers come from, for people.
    """

    distance: float
    rate: float
    mean: float
    source: str


SAME = Tolerance(1e-4, 0.0, 1e-5, "the same arithmetic gives the same bits")
"""For native code, whose bits depend neither on the machine nor on the batch."""

OTHER: dict[Literal["fp32", "bf16"], Tolerance] = {
    # Executors in fp32 differ in the last bit of fp16 now and then: at most 7e-4 was seen. With 8-bit weights 0.012.
    "fp32": Tolerance(3e-3, 0.0, 2e-4, "other arithmetic in fp32, on the demo model"),
    # At most 0.023 was seen at k = 8; weights of 4 bits begin at 0.1.
    "bf16": Tolerance(0.05, 0.01, 0.02, "other arithmetic in bf16, on the demo model"),
}
"""By the dtype that the receipt declares, where provider and reference compute otherwise."""


@dataclass(frozen=True, slots=True)
class ActivationReport:
    """How the level ended, why it refuses (nothing if it does not), the figures, and each opened position's d."""

    outcome: Literal["pass", "fail", "inconclusive"]
    failures: tuple[str, ...]
    figures: dict[str, float]
    source: str
    distances: tuple[float, ...] = ()


def audit_activations(
    reference: Reference, receipt: Receipt, openings: Openings, challenge: Challenge, kept: Kept | None = None
) -> ActivationReport:
    """The activation level for a receipt whose openings were found to be the signed ones. ``kept``: see ``states_of``.

    Raises:
        NotCheckable: no fingerprints, no positions, other weights, or a text that the reference cannot compute.
        Inconsistent, OpeningMismatch, Malformed: the answer does not open what was signed and drawn.
    """
    signed = receipt.evidence.activations
    if signed is None:
        raise none_committed()
    check_comparable(reference, receipt)
    positions = challenge.positions
    if not positions or positions[-1] >= signed.count:
        raise NotCheckable("no position of the answer was drawn", drawn=len(positions), tokens=signed.count)
    if challenge.answer is None:
        raise OpeningMismatch(
            "the provider withholds its fingerprints: nothing was opened before the deadline", drawn=len(positions)
        )
    answer = decode(challenge.answer)
    check(receipt, answer, positions)
    try:
        found = distances(reference.model, openings, answer.openings, signed.seed, signed.size, kept)
    except (EngineError, ValueError) as error:
        raise NotCheckable(f"the reference cannot compute these fingerprints: {error}") from error
    report = judge(found, tolerance_of(reference, receipt), complete=len(positions) == signed.count)
    sizes = {"fingerprint_size": float(signed.size), "answer_bytes": float(len(challenge.answer))}
    return ActivationReport(report.outcome, report.failures, {**report.figures, **sizes}, report.source, tuple(found))


def distances(
    model: Model, openings: Openings, opened: Sequence[Opening], seed: int, size: int, kept: Kept | None = None
) -> list[float]:
    """The distance d of each opened fingerprint, infinite where it is not a number. ``kept``: see ``states_of``.

    Raises:
        ValueError: the model has no projection of that size.
        EngineError: it cannot compute the text.
    """
    states = states_of(model, openings, [each.index for each in opened], kept)
    own = Fingerprinter(seed, model.config.hidden_size, size, model.team)(states)
    norms: list[float] = states.float().norm(dim=1).tolist()
    return [
        distance(each.fingerprint, expected, norm, model.config.hidden_size)
        for each, expected, norm in zip(opened, own, norms, strict=True)
    ]


def states_of(model: Model, openings: Openings, positions: Sequence[int], kept: Kept | None = None) -> torch.Tensor:
    """The states (positions, hidden) that the reference samples these output tokens from, over the claimed text.

    ``kept``: they may be here already, from the pass of the token level.
    """
    if kept is not None and all(position in kept.states for position in positions):
        return torch.stack([kept.states[position] for position in positions])
    first, last = min(positions), max(positions)
    tokens = (*openings.prompt_token_ids, *openings.output_token_ids[:last])
    own = Kept([position - first for position in positions])
    for _ in teacher_forced(model, tokens, last - first + 1, own):
        pass
    return torch.stack([own.states[position - first] for position in positions])


def distance(fingerprint: bytes, expected: np.ndarray, norm: float, hidden: int) -> float:
    """The d of one fingerprint; ``expected`` (k) and ``norm`` are the reference's."""
    claimed, own = np.frombuffer(fingerprint, dtype="<f2").astype(np.float64), expected.astype(np.float64)
    if not np.isfinite(claimed).all():
        return math.inf
    scale = norm * math.sqrt(len(own) / hidden)
    change = float(np.linalg.norm(claimed - own))
    return change / scale if scale > 0 else (0.0 if change == 0 else math.inf)


def judge(distances: Sequence[float], tolerance: Tolerance, *, complete: bool) -> ActivationReport:
    """The verdict over the distances at the positions drawn, at least one; ``complete``: they are all there are.

    A failure is one however few there are. To pass takes enough to find, nine times in ten, a provider that is
    dishonest at a quarter of the positions, or all positions and none of them too far away.
    """
    size, level = len(distances), FALSE_POSITIVES / 2
    exceeding = sum(not each <= tolerance.distance for each in distances)
    mean = math.fsum(min(each, CLIP) for each in distances) / size
    limit = mean_limit(tolerance.mean, CLIP, size, level)
    found = (
        (
            binomial_tail(exceeding, size, tolerance.rate) < level,
            f"{exceeding} of {size} fingerprints are further from the reference's than {tolerance.distance:g}",
        ),
        (
            mean_chance(mean, tolerance.mean, CLIP, size) < level,
            f"the mean distance {mean:.4f} is above {limit:.4g}",
        ),
    )
    failures = tuple(message for refused, message in found if refused)
    needed = tokens_needed(tolerance.rate, level, 0.25, 0.9)
    enough = size >= needed or (complete and not exceeding)
    figures = {
        "sample_size": float(size),
        "positions_needed": float(needed),
        "mean_distance": mean,
        "max_distance": max((each for each in distances if math.isfinite(each)), default=0.0),
        "exceedances": float(exceeding),
        "tolerance": tolerance.distance,
        "rate_threshold": tolerance.rate,
        "mean_threshold": limit,
        "false_positive_rate": FALSE_POSITIVES,
    }
    outcome: Literal["pass", "fail", "inconclusive"] = "fail" if failures else "pass" if enough else "inconclusive"
    return ActivationReport(outcome, failures, figures, tolerance.source)


def tolerance_of(reference: Reference, receipt: Receipt) -> Tolerance:
    """By what the receipt says computed it, and what the reference computes with."""
    if arithmetic_of(receipt) == reference.arithmetic and reference.arithmetic.executor in SAME_BITS:
        return SAME
    return OTHER[receipt.model.dtype]
