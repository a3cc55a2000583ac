"""What honest scores look like: counted on honest runs, signed, and turned into thresholds.

A profile is of one model. It has an entry for each pairing of a provider's arithmetic with a reference's, over the
conditions that were run (batch sizes, chunks, caches, ranks, devices), pooled: an auditor does not know which it was.

Where an entry is ``exact``, provider and reference compute the same bits on any machine (``SAME_BITS``): a single token
that the reference would not have sampled is a contradiction, however many were counted. Everywhere else counts become
upper confidence bounds on rates, also where none was found: torch's bits are those of a machine and of a release.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from countersign.verify import statement
from countersign.verify.arithmetic import Arithmetic
from countersign.verify.difr.statistics import upper_mean, upper_rate
from countersign.verify.difr.verdict import CLIP, Limit, Tally, Thresholds
from countersign.verify.errors import Malformed, NotCheckable
from countersign.verify.payload import Count, Digest, Name, UnixMilliseconds

CONTENT_TYPE = "application/vnd.countersign.difr-profile+cbor"

FILE, KEY_FILE = "difr-profile.cose", "difr-profile.pub"
"""Where a model's folder keeps its profile, and the key of who made it. Whoever gives you the weights gives you these
too: a profile of your own, under a key of your own, is one command away.
"""

TOLERANCES = (0.0, 1e-4, 1e-3, 1e-2, 0.05, 0.25, 1.0)
"""Logits above which scores are counted."""

CONFIDENCE = 1e-3
"""Chance that a true rate is above its bound."""

SAME_BITS = frozenset({"native"})
"""Executors whose bits depend neither on the machine nor on what else is computed. A release that changes them has to
give them another name: audits across releases rest on it.
"""

Logits = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Slack = Annotated[float, msgspec.Meta(ge=0, le=1)]


@dataclass(frozen=True, slots=True)
class Honest:
    """The scores of honest answers of ``provider`` under ``reference``. Raises ValueError: no honest run gives these.

    Attributes:
        conditions: What was run, for people.
        slack: With which they were scored, in logits.
        exact: Both compute the same bits on any machine, and no score was above 0.
        outside: Tokens out of support.
        above: Tokens in support that score above each of ``TOLERANCES``.
        clipped: Sum of the clipped scores.
        largest: The largest score in support.
    """

    provider: Arithmetic
    reference: Arithmetic
    conditions: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)]
    slack: Slack
    exact: bool
    answers: Count
    tokens: Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]
    outside: Count
    above: Annotated[tuple[Count, ...], msgspec.Meta(min_length=len(TOLERANCES), max_length=len(TOLERANCES))]
    clipped: Annotated[float, msgspec.Meta(ge=0, le=2**32)]
    largest: Logits

    def __post_init__(self) -> None:
        if max(self.outside, *self.above) > self.tokens or self.clipped > CLIP * self.tokens:
            raise ValueError(f"more than {self.tokens} tokens score above nothing")
        if self.above[-1] == self.tokens:
            raise ValueError("not one token is what the reference samples: that is no honest run of its model")

    def thresholds(self) -> Thresholds:
        """What an honest answer of this pairing stays within."""
        counted = f"{self.tokens} tokens of {self.answers} honest answers by {self.provider}"
        if self.exact:
            return Thresholds((Limit(0.0, 0.0),), 0.0, 0.0, 0.0, f"{counted}, all the reference's own choice")
        limits = tuple(
            Limit(tolerance, upper_rate(count, self.tokens, CONFIDENCE))
            for tolerance, count in zip(TOLERANCES, self.above, strict=True)
        )
        mean = upper_mean(self.clipped / self.tokens, CLIP, self.tokens, CONFIDENCE)
        return Thresholds(limits, upper_rate(self.outside, self.tokens, CONFIDENCE), mean, self.slack, counted)


@dataclass(frozen=True, slots=True)
class Profile:
    """Calibration of one model, by ``build`` of this software."""

    model: Name
    weights: Digest
    config: Digest
    tokenizer: Digest
    build: Name
    made_unix_ms: UnixMilliseconds
    entries: Annotated[tuple[Honest, ...], msgspec.Meta(max_length=64)]
    v: Literal[1] = 1

    def thresholds(self, provider: Arithmetic, reference: Arithmetic) -> Thresholds:
        """Raises NotCheckable when this pairing was not calibrated; says which were."""
        for entry in self.entries:
            if (entry.provider, entry.reference) == (provider, reference):
                return entry.thresholds()
        known = ", ".join(f"{entry.provider} under {entry.reference}" for entry in self.entries)
        raise NotCheckable(f"the profile has no honest runs of {provider} under {reference}; it has: {known}")


def counted(
    scores: Iterable[Sequence[float]],
    provider: Arithmetic,
    reference: Arithmetic,
    conditions: Sequence[str],
    slack: float,
) -> Honest:
    """The entry over honest answers, each given by its tokens' scores.

    Raises:
        ValueError: there is no token at all.
    """
    answers = [list(answer) for answer in scores]
    flat = [score for answer in answers for score in answer]
    if not flat:
        raise ValueError("no honest token was scored")
    grid = Thresholds(tuple(Limit(tolerance, 0.0) for tolerance in TOLERANCES), 0.0, 0.0, slack, "")
    tally = Tally.of(flat, grid)
    return Honest(
        provider,
        reference,
        tuple(conditions),
        slack=slack,
        exact=provider == reference and provider.executor in SAME_BITS and not any(flat),
        answers=len(answers),
        tokens=tally.size,
        outside=tally.outside,
        above=tally.above,
        clipped=tally.clipped,
        largest=max((score for score in flat if math.isfinite(score)), default=0.0),
    )


def check_model(profile: Profile, weights: bytes, config: bytes, tokenizer: bytes) -> None:
    """Raises NotCheckable when the profile is of another model, and says of what it differs."""
    for name, wanted, found in (
        ("weights", weights, profile.weights),
        ("config", config, profile.config),
        ("tokenizer", tokenizer, profile.tokenizer),
    ):
        if wanted != found:
            raise NotCheckable(
                f"it was made for other {name}, of the model {profile.model}", wanted=wanted, found=found
            )


def sign(profile: Profile, key: Ed25519PrivateKey) -> bytes:
    """The signed profile."""
    return statement.sign(dataclasses.asdict(profile), CONTENT_TYPE, key)


def verify(data: bytes, trusted_keys: Iterable[Ed25519PublicKey]) -> Profile:
    """The profile that a trusted key has signed.

    Raises:
        VerificationError: it is none, or the signature is not theirs.
    """
    try:
        return msgspec.convert(
            statement.verify(data, CONTENT_TYPE, trusted_keys), Profile, strict=True, builtin_types=(bytes,)
        )
    except msgspec.ValidationError as error:
        raise Malformed("the payload does not fit the schema of profiles", cause=error) from error
