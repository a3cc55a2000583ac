"""Proposals without a model: what followed the last tokens when they stood here before (prompt lookup decoding).

Text repeats itself: names, quotations, code. Where the last few tokens of a sequence have occurred in it, what came
after them then is a guess that costs nothing, and the target checks it like any other.
"""

from __future__ import annotations

from collections.abc import Sequence


class Lookup:
    """Where each run of ``size`` tokens of one growing sequence last ended. Tokens are only ever appended to it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, token_ids: Sequence[int], count: int) -> tuple[int, ...]:
        """Up to ``count`` tokens that may follow; none if the last ``size`` tokens stand here for the first time."""
        # The run at the end is not indexed yet: nothing has followed it.
        for start in range(self._indexed, len(token_ids) - self._size):
            self._after[tuple(token_ids[start : start + self._size])] = start + self._size
            self._indexed = start + 1
        found = self._after.get(tuple(token_ids[-self._size :]))
        return () if found is None else tuple(token_ids[found : found + count])
