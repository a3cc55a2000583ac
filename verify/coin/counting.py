"""What drawn leaves say about the count of hidden tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, comb

from countersign.verify.coin import challenge
from countersign.verify.coin.challenge import Demand
from countersign.verify.errors import Malformed
from countersign.verify.receipt import SignedReceipt
from countersign.verify.sampling import DIGEST_SIZE

MAX_LEAVES = 4096
SHARE, POWER = 0.25, 0.9
"""Leaves are enough where a quarter of empty ones among the hidden would have been met with this chance."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A provider's answer to a draw: the beacon, chosen once the receipt was there, what it opens, and its openings."""

    beacon: bytes
    demand: Demand
    openings: bytes


@dataclass(frozen=True, slots=True)
class Count:
    """``opened`` of the hidden leaves, drawn by chance, hold tokens; ``power`` is the chance to meet an empty one if a
    quarter were.
    """

    opened: int
    power: float

    @property
    def enough(self) -> bool:
        return self.power >= POWER


def counted(signed: SignedReceipt, drawn: Drawn) -> Count:
    """The leaves of a draw, each found to hold the token that is opened.

    Raises:
        Malformed: the answer cannot be read, or does not fit the draw.
        OpeningMismatch: it is not of what was signed.
    """
    if len(drawn.beacon) != DIGEST_SIZE or drawn.demand.leaves > MAX_LEAVES:
        raise Malformed("this is no draw", beacon=len(drawn.beacon), leaves=drawn.demand.leaves)
    asked = challenge.draw(signed, drawn.beacon, drawn.demand)
    challenge.check(signed, asked, challenge.decode(drawn.openings))
    hidden, opened = signed.receipt.output.hidden, len(asked.leaves)
    return Count(opened, met(hidden, opened, SHARE))


def met(hidden: int, opened: int, share: float) -> float:
    """The chance that ``opened`` drawn ones of ``hidden`` leaves meet one of the ``share`` that are empty."""
    full = hidden - ceil(share * hidden)
    return 1 - comb(full, opened) / comb(hidden, opened) if hidden else 1.0
