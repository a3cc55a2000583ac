"""Verification of a chain of proposed tokens.

The target samples its own token at each position, with that position's noise; a proposal that equals it lets the walk
go on. What is emitted is therefore the target's sample at every position, whoever proposed, and proposals change only
how many come of one pass (seed-coupled speculation, Daliri, Musco and Suresh, arXiv 2408.07978).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from countersign.services.engine.errors import NonFiniteLogits
from countersign.services.engine.sampling import Sampling, sample


def accept_chain(logits: Tensor, position: int, draft: Sequence[int], sampling: Sampling) -> Iterator[int]:
    """Yields the tokens at ``position``, ``position + 1``, ... that one pass settles: every accepted proposal, then
    one more.

    Lazy: a row is sampled when its token is asked for, so that a caller who stops at an end token pays for no more,
    and rows after a rejected proposal are never looked at.

    Args:
        logits: (len(draft) + 1, V); row j follows the first j proposals.
        position: absolute position that row 0 decides.
        draft: proposed tokens.
        sampling: the request's.

    Raises:
        NonFiniteLogits: a row that was reached is not finite; ``position`` and ``row`` say which.
        ValueError: the number of rows is wrong.
    """
    if logits.shape[0] != len(draft) + 1:
        raise ValueError(f"{len(draft)} proposals need {len(draft) + 1} rows of logits, not {logits.shape[0]}")
    for j, row in enumerate(logits):
        try:
            token = sample(row, position + j, sampling)
        except NonFiniteLogits as error:
            raise NonFiniteLogits(error.position, j) from error
        yield token
        if j == len(draft) or token != draft[j]:
            return
