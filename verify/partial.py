"""Openings that leave tokens hidden: each opened token with its own salt, and hashes for the rest of the tree.

The salt key would open everything: with it, a hidden token is found by trying the vocabulary. So a client whose
answer holds hidden tokens gets the salts of what it may see. It then knows that the prompt and the tokens it saw are
the signed ones, and stand where the receipt says. It does not know that a hidden leaf holds a token at all: whoever
builds the tree may put any 32 bytes there. A challenge (``coin``) or full openings show that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from countersign.verify import multiproof
from countersign.verify import openings as full
from countersign.verify.errors import Malformed
from countersign.verify.multiproof import Run
from countersign.verify.openings import MAX_STOPS, Openings, pack_ids, token_leaf, token_leaves, token_salt, unpack_ids

SALT_SIZE = 32


@dataclass(frozen=True, slots=True)
class LeafOpenings:
    """Some tokens of an output: their ids and salts in order, and the hashes of ``multiproof`` for the others."""

    token_ids: tuple[int, ...] = field(repr=False)
    salts: tuple[bytes, ...] = field(repr=False)
    hashes: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class PartialOpenings:
    """What the client of an answer with hidden tokens gets. ``leaves`` are the visible tokens."""

    prompt_token_ids: tuple[int, ...] = field(repr=False)
    stop: tuple[str, ...] = field(repr=False)
    prompt_salt: bytes = field(repr=False)
    stop_salt: bytes = field(repr=False)
    leaves: LeafOpenings = field(repr=False)


Disclosure: TypeAlias = Openings | PartialOpenings


def open_leaves(request_id: str, token_ids: Sequence[int], salt_key: bytes, runs: Sequence[Run]) -> LeafOpenings:
    """Opens the tokens of ``runs`` and nothing else. Raises Malformed where the runs do not fit."""
    positions = [position for start, stop in runs for position in range(start, stop)]
    return LeafOpenings(
        hashes=tuple(multiproof.hashes(token_leaves(request_id, token_ids, salt_key), runs)),
        token_ids=tuple(token_ids[position] for position in positions),
        salts=tuple(token_salt(salt_key, position) for position in positions),
    )


def opened_root(request_id: str, size: int, runs: Sequence[Run], opened: LeafOpenings) -> bytes:
    """The root of the tree of ``size`` tokens in which the tokens of ``runs`` are the opened ones.

    Raises:
        Malformed: the openings do not fit the runs, or the runs the size.
        OpeningMismatch: the hashes do not fit a tree of that size.
    """
    asked = multiproof.total(runs)  # before anything that large is made: the size is a stranger's
    if not asked == len(opened.token_ids) == len(opened.salts):
        raise Malformed("another number of tokens or salts is opened", asked=asked, opened=len(opened.token_ids))
    positions = (position for start, stop in runs for position in range(start, stop))
    leaves = [
        token_leaf(request_id, position, token, salt)
        for position, token, salt in zip(positions, opened.token_ids, opened.salts, strict=True)
    ]
    return multiproof.root(size, runs, leaves, opened.hashes)


def withhold(openings: Openings, request_id: str, visible: Sequence[Run]) -> PartialOpenings:
    """Of full openings the part that opens the visible tokens only."""
    return PartialOpenings(
        prompt_token_ids=openings.prompt_token_ids,
        stop=openings.stop,
        prompt_salt=full.prompt_salt(openings.salt_key),
        stop_salt=full.stop_salt(openings.salt_key),
        leaves=open_leaves(request_id, openings.output_token_ids, openings.salt_key, visible),
    )


def to_cbor(disclosed: Disclosure) -> dict[str, object]:
    """The map that travels in the unprotected header."""
    if isinstance(disclosed, Openings):
        return full.to_cbor(disclosed)
    return {
        "prompt": pack_ids(disclosed.prompt_token_ids),
        "stop": list(disclosed.stop),
        "prompt_salt": disclosed.prompt_salt,
        "stop_salt": disclosed.stop_salt,
        **leaves_to_cbor(disclosed.leaves),
    }


def from_cbor(value: object) -> Disclosure:
    """What ``to_cbor`` wrote.

    Raises:
        Malformed: anything else.
    """
    match value:
        case {
            "prompt": bytes(prompt),
            "stop": list(stop),
            "prompt_salt": bytes(prompt_salt),
            "stop_salt": bytes(stop_salt),
            **leaves,
        }:
            texts = tuple(text for text in stop if isinstance(text, str))
            plain = len(texts) == len(stop) <= MAX_STOPS and "" not in texts
            if not plain or not len(prompt_salt) == len(stop_salt) == SALT_SIZE:
                raise Malformed("the partial openings are not of the form that receipts use")
            return PartialOpenings(unpack_ids(prompt), texts, prompt_salt, stop_salt, leaves_from_cbor(leaves))
    return full.from_cbor(value)


def leaves_to_cbor(opened: LeafOpenings) -> dict[str, object]:
    """Token ids packed as u32, salts and hashes one after another, so that few CBOR items suffice."""
    return {
        "tokens": pack_ids(opened.token_ids),
        "salts": b"".join(opened.salts),
        "hashes": b"".join(opened.hashes),
    }


def leaves_from_cbor(value: object) -> LeafOpenings:
    """What ``leaves_to_cbor`` wrote.

    Raises:
        Malformed: anything else.
    """
    match value:
        case {"tokens": bytes(tokens), "salts": bytes(salts), "hashes": bytes(hashes), **more} if not more:
            return LeafOpenings(unpack_ids(tokens), _parts(salts), _parts(hashes))
    raise Malformed("the opened tokens are not of the form that receipts use")


def _parts(data: bytes) -> tuple[bytes, ...]:
    if len(data) % SALT_SIZE:
        raise Malformed("packed salts or hashes are not a multiple of 32 bytes", size=len(data))
    return tuple(data[start : start + SALT_SIZE] for start in range(0, len(data), SALT_SIZE))
