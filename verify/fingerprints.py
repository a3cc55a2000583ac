"""Fingerprints of activations: committed to in the receipt, opened where somebody asks (Activation-DiFR).

The provider signs a Merkle root over the fingerprints of all output tokens; only then are positions drawn
(``sampling``), and it answers with what stands there. The fingerprint of output token i is that of the state that it
was sampled from, which is the last position before it: the last prompt token's for token 0. So the last token has one
too, though nothing was computed from it. Fingerprints are bytes here: ``activations`` knows what they mean.

    salt_i    HMAC-SHA256(salt_key, domain || u64(i))
    leaf i    SHA-256(0x00 || domain || u8(size of request_id) || request_id || u64(i) || u16(size) || bytes || salt_i)
    answer    CBOR [[[i, bytes, salt_i], ...] by rising i, the hashes of a multiproof (``multiproof``) joined]

All integers are big-endian, the fp16 numbers of a fingerprint little-endian. A leaf's salt opens that leaf and no
other; the fingerprints of a guessed text cannot be told from the root. This module needs neither torch nor the engine.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from countersign.verify import cbor, merkle, multiproof
from countersign.verify.errors import Inconsistent, Malformed, NotCheckable, OpeningMismatch
from countersign.verify.payload import Activations, Receipt

MAX_OPENED = 512
"""The most positions of one answer, four CBOR items each."""
MAX_ANSWER_BYTES = 1024 * 1024
MAX_FINGERPRINT_BYTES = 2 * 128
SEED = 0x636F756E74657273
"""Of the projection, the same for all receipts, so that nobody can look for one that hides a fault: "counters"."""

_DOMAIN = b"countersign/activation/v1"
_SALT_SIZE = 32


@dataclass(frozen=True, slots=True)
class Opening:
    """One fingerprint and its salt."""

    index: int
    fingerprint: bytes = field(repr=False)
    salt: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """Openings by rising index, and the hashes that bind them to the signed root."""

    openings: tuple[Opening, ...]
    proof: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Challenge:
    """The positions that were drawn after the receipt was signed, and the provider's answer.

    ``answer``: None where none came before the deadline.
    """

    positions: tuple[int, ...]
    answer: bytes | None


def activation_leaf(request_id: str, index: int, fingerprint: bytes, salt: bytes) -> bytes:
    """The leaf hash (32 bytes) of output token ``index``."""
    name = request_id.encode()
    entry = struct.pack(">B", len(name)) + name + struct.pack(">QH", index, len(fingerprint)) + fingerprint + salt
    return merkle.leaf_hash(_DOMAIN + entry)


def commit(request_id: str, fingerprints: Sequence[bytes], salt_key: bytes) -> Activations | None:
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
    return Activations("difr/v1", size // 2, "fp16", SEED, len(fingerprints), root)


def open_positions(request_id: str, fingerprints: Sequence[bytes], salt_key: bytes, positions: Sequence[int]) -> Answer:
    """The answer to a challenge; positions rise.

    Raises:
        Malformed: they do not, or there is no such token.
    """
    proof = multiproof.hashes(_leaves(request_id, fingerprints, salt_key), _runs(positions))
    return Answer(tuple(Opening(i, fingerprints[i], _salt(salt_key, i)) for i in positions), tuple(proof))


def encode(answer: Answer) -> bytes:
    """The answer's bytes."""
    openings = [[each.index, each.fingerprint, each.salt] for each in answer.openings]
    return cbor.dumps([openings, b"".join(answer.proof)])


def decode(data: bytes) -> Answer:
    """What ``encode`` wrote.

    Raises:
        Malformed: anything else, or more than ``MAX_OPENED`` positions.
    """
    if len(data) > MAX_ANSWER_BYTES:
        raise Malformed("larger than any answer to a challenge", limit=MAX_ANSWER_BYTES)
    match cbor.loads(data):
        case [[*items], bytes(proof)] if len(items) <= MAX_OPENED and len(proof) % merkle.HASH_SIZE == 0:
            hashes = (proof[at : at + merkle.HASH_SIZE] for at in range(0, len(proof), merkle.HASH_SIZE))
            return Answer(tuple(_opening(item) for item in items), tuple(hashes))
    raise Malformed("not openings of fingerprints and their proof", most=MAX_OPENED)


def check(receipt: Receipt, answer: Answer, positions: Sequence[int]) -> None:
    """Whether this answer is of the receipt, and opens just what was asked for.

    Raises:
        NotCheckable: the receipt commits to no fingerprints.
        Inconsistent: their projection is one of the provider's own choice.
        Malformed, OpeningMismatch: something is missing, too much, or not what was signed.
    """
    signed = receipt.evidence.activations
    if signed is None:
        raise none_committed()
    if signed.seed != SEED:
        raise Inconsistent("the fingerprints are of a projection that the provider has chosen", seed=signed.seed)
    opened = answer.openings
    if [each.index for each in opened] != list(positions):
        raise OpeningMismatch("other positions are opened than were drawn", drawn=len(positions), opened=len(opened))
    if any(len(each.fingerprint) != 2 * signed.size for each in opened):
        raise OpeningMismatch("a fingerprint has another size than the signed ones", size=2 * signed.size)
    leaves = [activation_leaf(receipt.request_id, each.index, each.fingerprint, each.salt) for each in opened]
    if multiproof.root(signed.count, _runs(positions), leaves, answer.proof) != signed.root:
        raise OpeningMismatch("the opened fingerprints are not the signed ones", positions=len(positions))


def none_committed() -> NotCheckable:
    """What is to be said of a receipt without fingerprints."""
    return NotCheckable(
        "the receipt commits to no activation fingerprints",
        help="ask for answers of a target with target.fingerprints above 0",
    )


def _runs(positions: Sequence[int]) -> list[multiproof.Run]:
    """Raises Malformed where they do not rise."""
    if any(a >= b for a, b in pairwise(positions)):
        raise Malformed("the positions do not rise")
    return multiproof.union((position, position + 1) for position in positions)


def _leaves(request_id: str, fingerprints: Sequence[bytes], salt_key: bytes) -> list[bytes]:
    return [activation_leaf(request_id, i, each, _salt(salt_key, i)) for i, each in enumerate(fingerprints)]


def _salt(salt_key: bytes, index: int) -> bytes:
    return hmac.digest(salt_key, _DOMAIN + struct.pack(">Q", index), "sha256")


def _opening(item: object) -> Opening:
    match item:
        case [int(index), bytes(fingerprint), bytes(salt)] if type(index) is int and index >= 0:
            if len(salt) == _SALT_SIZE and len(fingerprint) <= MAX_FINGERPRINT_BYTES:
                return Opening(index, fingerprint, salt)
    raise Malformed("an opening of a fingerprint is not position, fingerprint and salt")
