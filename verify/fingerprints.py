"""Fingerprints of activations: committed to in the receipt, opened where somebody asks (Activation-DiFR).

The provider signs a Merkle root over the fingerprints of all output tokens; only then are positions drawn
(``sampling``), and it answers with what stands there. The fingerprint of output token i is that of the state that it
was sampled from, which is the last position before it: the last prompt token's for token 0. So the last token has one
too, though nothing was computed from it. Fingerprints are bytes here: ``activations`` knows what they mean.

    salt_i    HMAC-SHA256(salt_key, domain || u64(i))
    leaf i    SHA-256(0x00 || domain || u8(size of request_id) || request_id || u64(i) || u16(size) || bytes || salt_i)
    answer    CBOR [[i, bytes, salt_i, path], ...] by rising i; path: the hashes up to the root, lowest first, joined

All integers are big-endian, the fp16 numbers of a fingerprint little-endian. A leaf's salt opens that leaf and no
other; the fingerprints of a guessed text cannot be told from the root. This module needs neither torch nor the engine.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from countersign.verify import cbor, merkle
from countersign.verify.errors import Malformed, NotCheckable, OpeningMismatch
from countersign.verify.payload import Activations, Receipt

MAX_OPENED = 512
"""The most positions of one answer, five CBOR items each."""
MAX_ANSWER_BYTES = 4 * 1024 * 1024
SEED = 0x636F756E74657273
"""Of the projection, the same for all receipts, so that nobody can look for one that hides a fault: "counters"."""

_DOMAIN = b"countersign/activation/v1"
_SALT_SIZE = 32


@dataclass(frozen=True, slots=True)
class Opening:
    """One fingerprint and what binds it to the signed root."""

    index: int
    fingerprint: bytes = field(repr=False)
    salt: bytes = field(repr=False)
    path: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Challenge:
    """The positions that were drawn after the receipt was signed, and the provider's answer .

    ``answer``: None where none came before the deadline.
    """

    positions: tuple[int, ...]
    answer: bytes | None


def activation_leaf(request_id: str, index: int, fingerprint: bytes, salt: bytes) -> bytes:
    """The leaf hash (32 bytes) of output token ``index``."""
    name = request_id.encode()
    entry = struct.pack(">B", len(name)) + name + struct.pack(">QH", index, len(fingerprint)) + fingerprint + salt
    return merkle.leaf_hash(_DOMAIN + entry)


def commit(request_id: str, fingerprints: Sequence[bytes], salt_key: bytes, seed: int = SEED) -> Activations | None:
    """What the receipt says of the fingerprints of all output tokens, in order; None where there are none.

    Raises:
        ValueError: they have different sizes, or an odd one.
    """
    if not fingerprints:
        return None
    size = len(fingerprints[0])
    if size % 2 or any(len(each) != size for each in fingerprints):
        raise ValueError("fingerprints are fp16 numbers, as many for each token")
    root = merkle.root(_leaves(request_id, fingerprints, salt_key))
    return Activations("difr/v1", size // 2, "fp16", seed, len(fingerprints), root)


def open_positions(
    request_id: str, fingerprints: Sequence[bytes], salt_key: bytes, positions: Sequence[int]
) -> tuple[Opening, ...]:
    """The answer to a challenge. Raises IndexError where there is no such token."""
    leaves = _leaves(request_id, fingerprints, salt_key)
    return tuple(
        Opening(i, fingerprints[i], _salt(salt_key, i), tuple(merkle.inclusion_path(leaves, i))) for i in positions
    )


def encode(openings: Sequence[Opening]) -> bytes:
    """The answer's bytes."""
    return cbor.dumps([[each.index, each.fingerprint, each.salt, b"".join(each.path)] for each in openings])


def decode(data: bytes) -> tuple[Opening, ...]:
    """What ``encode`` wrote.

    Raises:
        Malformed: anything else, or more than ``MAX_OPENED`` positions.
    """
    if len(data) > MAX_ANSWER_BYTES:
        raise Malformed("larger than any answer to a challenge", limit=MAX_ANSWER_BYTES)
    match cbor.loads(data):
        case [*items] if len(items) <= MAX_OPENED:
            return tuple(_opening(item) for item in items)
    raise Malformed("not a list of openings of fingerprints", most=MAX_OPENED)


def check(receipt: Receipt, openings: Sequence[Opening], positions: Sequence[int]) -> None:
    """Whether these openings are of the receipt, and just those that were asked for.

    Raises:
        NotCheckable: the receipt commits to no fingerprints.
        OpeningMismatch: something is missing, too much, or not what was signed.
    """
    signed = receipt.evidence.activations
    if signed is None:
        raise NotCheckable(
            "the receipt commits to no activation fingerprints",
            help="ask for answers of a target with target.fingerprints above 0",
        )
    if [each.index for each in openings] != list(positions):
        raise OpeningMismatch("other positions are opened than were drawn", drawn=len(positions), opened=len(openings))
    for each in openings:
        leaf = activation_leaf(receipt.request_id, each.index, each.fingerprint, each.salt)
        if len(each.fingerprint) != 2 * signed.size or not merkle.verify_inclusion(
            leaf, each.index, signed.count, each.path, signed.root
        ):
            raise OpeningMismatch("an opened fingerprint is not the signed one", position=each.index)


def _leaves(request_id: str, fingerprints: Sequence[bytes], salt_key: bytes) -> list[bytes]:
    return [activation_leaf(request_id, i, each, _salt(salt_key, i)) for i, each in enumerate(fingerprints)]


def _salt(salt_key: bytes, index: int) -> bytes:
    return hmac.digest(salt_key, _DOMAIN + struct.pack(">Q", index), "sha256")


def _opening(item: object) -> Opening:
    match item:
        case [int(index), bytes(fingerprint), bytes(salt), bytes(path)] if (
            type(index) is int and index >= 0 and len(salt) == _SALT_SIZE and len(path) % merkle.HASH_SIZE == 0
        ):
            if len(fingerprint) <= 2 * 128 and len(path) <= merkle.MAX_PATH * merkle.HASH_SIZE:
                hashes = (path[at : at + merkle.HASH_SIZE] for at in range(0, len(path), merkle.HASH_SIZE))
                return Opening(index, fingerprint, salt, tuple(hashes))
    raise Malformed("an opening of a fingerprint is not position, fingerprint, salt and path")
