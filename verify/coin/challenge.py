"""Counting hidden tokens without seeing them all (CoIn, arXiv 2505.13778, with token ids in place of embeddings).

The provider has signed a tree of n leaves, then positions among the hidden ones are drawn in public (``sampling``):
single leaves, and whole blocks of consecutive tokens. It answers with their ids, their salts and the hashes of the
rest, and whoever has the receipt checks that. A leaf that holds no token cannot be opened: where a share f of the
hidden leaves is empty, k drawn leaves miss that with chance (1 - f)^k. What the opened tokens say is for later levels.

A position is hashed into its leaf, and so is the request: no leaf is good for another place or another answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from countersign.verify import cbor, multiproof, sampling
from countersign.verify.errors import Malformed, OpeningMismatch
from countersign.verify.multiproof import Run
from countersign.verify.openings import Openings
from countersign.verify.partial import (
    LeafOpenings,
    leaves_from_cbor,
    leaves_to_cbor,
    open_leaves,
    opened_root,
)
from countersign.verify.receipt import SignedReceipt
from countersign.verify.segments import hidden_runs

BLOCK_TOKENS = 256
MAX_RESPONSE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Demand:
    """How much is drawn. ``context``: a block comes with all hidden tokens before it, so that a reference can judge it.

    Raises:
        ValueError: a number is negative, or a block is empty.
    """

    leaves: int = 8
    blocks: int = 0
    block_tokens: int = BLOCK_TOKENS
    context: bool = False

    def __post_init__(self) -> None:
        if self.leaves < 0 or self.blocks < 0 or self.block_tokens < 1:
            raise ValueError(f"{self.leaves} leaves and {self.blocks} blocks of {self.block_tokens} tokens")


@dataclass(frozen=True, slots=True)
class Challenge:
    """What to open: ``leaves`` drawn alone, ``blocks`` drawn whole, ``runs``: these, the context and the last leaf."""

    leaves: tuple[int, ...]
    blocks: tuple[Run, ...]
    runs: tuple[Run, ...]


def draw(signed: SignedReceipt, beacon: bytes, demand: Demand) -> Challenge:
    """What the provider has to open, once ``beacon`` is known (see ``sampling``); the same for everybody.

    Blocks lie within one hidden segment each, whose last block may be shorter. The output's last leaf is always
    opened, hidden or not: it pins the size, as paths of early leaves fit trees of several sizes. Nothing here grows
    with the number of tokens that the receipt claims.

    Raises:
        ValueError: the beacon has not 32 bytes.
    """
    output, hidden = signed.receipt.output, hidden_runs(signed.receipt.output.segments)
    size = demand.block_tokens
    ranks = sampling.positions("leaves", beacon, signed.digest, output.hidden, demand.leaves)
    leaves = tuple(start for start, _ in _picked(hidden, ranks, 1))
    count = sum(-(-(stop - start) // size) for start, stop in hidden)
    blocks = tuple(_picked(hidden, sampling.positions("blocks", beacon, signed.digest, count, demand.blocks), size))
    context = [(start, min(stop, blocks[-1][1])) for start, stop in hidden] if demand.context and blocks else []
    last = [(output.tokens - 1, output.tokens)] if output.tokens else []
    opened = [*blocks, *(run for run in context if run[0] < run[1]), *((leaf, leaf + 1) for leaf in leaves), *last]
    return Challenge(leaves, blocks, tuple(multiproof.union(opened)))


def respond(request_id: str, openings: Openings, challenge: Challenge) -> LeafOpenings:
    """The provider's side. Raises Malformed when the challenge is of another output."""
    return open_leaves(request_id, openings.output_token_ids, openings.salt_key, challenge.runs)


def check(signed: SignedReceipt, challenge: Challenge, response: LeafOpenings) -> dict[int, int]:
    """The opened tokens by position, each now known to be the one signed for at that place.

    Raises:
        Malformed: another number of tokens is opened than was asked for.
        OpeningMismatch: they are not of what was signed.
    """
    output = signed.receipt.output
    root = opened_root(signed.receipt.request_id, output.tokens, challenge.runs, response)
    if root != output.root:
        raise OpeningMismatch("the opened hidden tokens are not the signed ones", signed=output.root, opened=root)
    positions = (position for start, stop in challenge.runs for position in range(start, stop))
    return dict(zip(positions, response.token_ids, strict=True))


def encode(response: LeafOpenings) -> bytes:
    """The response as it travels: deterministic CBOR."""
    return cbor.dumps(leaves_to_cbor(response))


def decode(data: bytes) -> LeafOpenings:
    """What ``encode`` wrote.

    Raises:
        Malformed: anything else.
    """
    if len(data) > MAX_RESPONSE_BYTES:
        raise Malformed("larger than any response", limit=MAX_RESPONSE_BYTES)
    return leaves_from_cbor(cbor.loads(data))


def _picked(runs: Sequence[Run], ranks: Sequence[int], size: int) -> Iterator[Run]:
    """Of the runs cut into blocks of ``size``, the ``ranks``-th (rising)."""
    passed, queue = 0, iter(runs)
    start = stop = 0
    for rank in ranks:
        while rank - passed >= (blocks := -(-(stop - start) // size)):
            passed += blocks
            start, stop = next(queue)
        first = start + (rank - passed) * size
        yield first, min(first + size, stop)
