"""Whether tokens are those that the tokenizer itself would write their text with.

Every text can be written in many more tokens than it needs, at the same face value ("Say Anything but This"; arXiv
2605.30040 overbilled visible text by half so). Honest models sample such a spelling now and then, so this is no proof:
the excess is counted, and noted where it is more than chance makes it. What the model has drawn and what not is for the
tokens level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from countersign.services.engine.text import Tokenizer
from countersign.verify.difr.statistics import binomial_tail

HONEST_RATE = 0.02
"""Tokens in excess that sampling makes, as a share; what it is of the demo pair, ``countersign bench coin`` tells."""
SIGNIFICANCE = 1e-3
"""If tokens in excess were independent. They come in runs: of honest thoughts 1 in 100 is noted (``bench coin``)."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """``tokens`` were billed for a text that needs ``needed``."""

    tokens: int
    needed: int

    @property
    def excess(self) -> int:
        return max(0, self.tokens - self.needed)

    @property
    def doubtful(self) -> bool:
        """More excess than honest sampling explains."""
        return self.excess > 0 and binomial_tail(self.excess, self.tokens, HONEST_RATE) < SIGNIFICANCE


def spelling(tokenizer: Tokenizer, token_ids: Sequence[int]) -> Spelling:
    """How many tokens the text of ``token_ids`` needs."""
    return Spelling(len(token_ids), len(tokenizer.canonical(token_ids)))
