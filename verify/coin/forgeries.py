"""How a provider could bill hidden tokens for which it has no leaves: the count attacks.

Each signs ``more`` hidden tokens than there are, all in the last hidden segment's place, and keeps what it needs to
answer a challenge as well as it can. None can open everything.

    larger      the true tree, and a larger count; what lies beyond is opened as its last token
    doubled     some leaves stand in the tree twice, and are opened as what they are copies of
    reversed    the hidden leaves backwards, and some of them again
    borrowed    the tree of another request
    empty       hashes of nothing, which leave every true leaf before them in its place
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from countersign.verify import merkle, multiproof
from countersign.verify.coin.challenge import Challenge
from countersign.verify.multiproof import Run
from countersign.verify.openings import Openings, token_leaves, token_salt
from countersign.verify.partial import LeafOpenings
from countersign.verify.payload import Receipt, Segment

Name = Literal["larger", "doubled", "reversed", "borrowed", "empty"]
NAMES: tuple[Name, ...] = get_args(Name)


@dataclass(frozen=True, slots=True)
class Forgery:
    """A receipt that bills too much, and the leaves, token ids and salts that its maker has for it."""

    receipt: Receipt
    leaves: Sequence[bytes]
    token_ids: Sequence[int]
    salts: Sequence[bytes]

    def respond(self, challenge: Challenge) -> LeafOpenings:
        """The answer that fits its own tree, as far as that reaches."""
        positions = [position for start, stop in challenge.runs for position in range(start, stop)]
        beyond = max(0, positions[-1] + 1 - len(self.leaves))
        return LeafOpenings(
            tuple(self.token_ids[position] for position in positions),
            tuple(self.salts[position] for position in positions),
            tuple(multiproof.hashes([*self.leaves, *[self.leaves[-1]] * beyond], challenge.runs)),
        )


def forge(name: Name, receipt: Receipt, openings: Openings, hidden: Run, more: int) -> Forgery:
    """``hidden`` is the run of tokens that is said to be longer by ``more``; the receipt is not signed again."""
    (start, stop), size, key = hidden, receipt.output.tokens, openings.salt_key
    spare = [start + i % (stop - start) for i in range(more)]
    match name:
        case "larger":
            order = [*range(size), *[size - 1] * more]
        case "reversed":
            order = [*range(start), *reversed(range(start, stop)), *spare, *range(stop, size)]
        case _:
            order = [*range(stop), *spare, *range(stop, size)]
    ids = [openings.output_token_ids[at] for at in order]
    salts = [token_salt(key, at) for at in order]
    leaves = token_leaves(receipt.request_id, openings.output_token_ids, key)
    if name in {"doubled", "reversed"}:
        leaves = [leaves[at] for at in order]
    elif name != "larger":
        salts = [token_salt(key, at) for at in range(size + more)]
        leaves = token_leaves(receipt.request_id[:-1] + "~" if name == "borrowed" else receipt.request_id, ids, key)
    if name == "empty":
        leaves[stop : stop + more] = [hashlib.sha256(b"nothing %d" % at).digest() for at in range(more)]
    return Forgery(_longer(receipt, hidden, more, merkle.root(leaves)), leaves, ids, salts)


def _longer(receipt: Receipt, hidden: Run, more: int, root: bytes) -> Receipt:
    output = receipt.output
    segments, position = list[Segment](), 0
    for segment in output.segments:
        grows = (position, position + segment.tokens) == hidden
        segments.append(replace(segment, tokens=segment.tokens + more) if grows else segment)
        position += segment.tokens
    changed = replace(
        output, root=root, tokens=output.tokens + more, hidden=output.hidden + more, segments=tuple(segments)
    )
    return replace(receipt, output=changed)
