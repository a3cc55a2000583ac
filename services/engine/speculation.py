"""Verification of proposed tokens, a chain or a tree.

The target samples its own token after every proposal, each with the noise of its position; siblings share a position
and so its noise. The walk goes from the root to the child that equals the target's sample, as long as there is one.
What is emitted is therefore the target's sample at every position, whoever proposed, and proposals change only how
many come of one pass (seed-coupled speculation, Daliri, Musco and Suresh, arXiv 2408.07978; on trees each position's
noise is used once on the path that is taken).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from countersign.services.engine.errors import InvalidSpan
from countersign.services.engine.sampling import NOT_FINITE
from countersign.services.engine.step import depths


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens: a chain, or with ``parents`` a tree.

    parents[i] < i is the index of token i's parent, -1 stands for the last token known. Siblings differ.

    Raises:
        InvalidSpan: the parents are no such tree.
    """

    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.parents is None:
            return
        if len(self.parents) != len(self.token_ids):
            raise InvalidSpan(f"a tree of {len(self.token_ids)} tokens has {len(self.parents)} parents")
        if any(not -1 <= parent < index for index, parent in enumerate(self.parents)):
            raise InvalidSpan("a parent in a tree of proposals does not stand before its child")
        if len(set(zip(self.parents, self.token_ids, strict=True))) < len(self.token_ids):
            raise InvalidSpan("two siblings in a tree of proposals are the same token")

    def __len__(self) -> int:
        return len(self.token_ids)

    def depths(self) -> Sequence[int]:
        """Of each token, 0 for children of the last known token."""
        if self.parents is None:
            return range(len(self.token_ids))
        return depths(self.parents)

    def cut(self, count: int) -> Draft:
        """Its first ``count`` tokens."""
        if count >= len(self.token_ids):
            return self
        return Draft(self.token_ids[:count], None if self.parents is None else self.parents[:count])

    def shallow(self, levels: int) -> Draft:
        """Its tokens before the first that has ``levels`` others above it."""
        return self.cut(next((index for index, depth in enumerate(self.depths()) if depth >= levels), len(self)))


@dataclass(frozen=True, slots=True)
class Walk:
    """What a pass settles: the tokens emitted, and the accepted proposals by index. One more token is emitted than
    proposals are accepted, or just as many if the last one's logits are not finite.
    """

    token_ids: tuple[int, ...]
    path: tuple[int, ...]

    @property
    def finite(self) -> bool:
        """Whether every set of logits that was reached could be sampled."""
        return len(self.token_ids) > len(self.path)


def walk(draft: Draft, sampled: Sequence[int]) -> Walk:
    """Follows the target's samples through a draft.

    Args:
        draft: n proposals.
        sampled: n + 1 tokens: the target's sample after the last known token, then after each proposal; NOT_FINITE
            where there is none.

    Raises:
        ValueError: the number of samples is wrong.
    """
    if len(sampled) != len(draft) + 1:
        raise ValueError(f"{len(draft)} proposals need {len(draft) + 1} samples, not {len(sampled)}")
    tokens: list[int] = []
    path: list[int] = []
    node = -1
    while (token := sampled[node + 1]) != NOT_FINITE:
        tokens.append(token)
        child = _child(draft, node, token)
        if child is None:
            break
        path.append(child)
        node = child
    return Walk(tuple(tokens), tuple(path))


def _child(draft: Draft, node: int, token: int) -> int | None:
    if draft.parents is None:
        following = node + 1
        return following if following < len(draft) and draft.token_ids[following] == token else None
    for index in range(node + 1, len(draft)):
        if draft.parents[index] == node and draft.token_ids[index] == token:
            return index
    return None
