"""COSE Receipts (RFC 9942): proofs of a transparency log that stand alone, signed by the log.

    18([ << {1: -8, 4: key id, 395: 1, -70602: tree size} >>,                       protected header, signed
         {396: {-1: [<< [tree size, leaf index, [hash, ...]] >>]}},                 of inclusion
      or {396: {-2: [<< [tree size 1, tree size 2, [hash, ...]] >>]}},              of consistency
         nil, signature of 64 bytes ])

395: 1 says RFC9162_SHA256. The payload is the root, of the newer tree for consistency, and detached: who checks must
compute it from the proof. RFC 9942 signs the root alone, but one root has proofs for several sizes and places
(leaf 2 of 3 hashes as leaf 1 of 2 does), so ours sign the size as well; other readers pass that header over.

The RFC's CDDL asks for at least one hash in a path. A tree of one leaf has none: its path is written as an empty array.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from countersign.verify import cbor, merkle
from countersign.verify.cose import ALG, EDDSA, KEY_ID_SIZE, KID, SIGN1_TAG, encode1, key_id, sign1, verify1
from countersign.verify.errors import Inconsistent, Malformed, Untrusted
from countersign.verify.log.tiles import MAX_LEAVES

MAX_BYTES = 4096

_VDS, _VDP, _RFC9162_SHA256 = 395, 396, 1
_TREE_SIZE = -70602  # of the range for private use

Kind = Literal["inclusion", "consistency"]


@dataclass(frozen=True, slots=True)
class CoseReceipt:
    """A proof taken apart, nothing verified.

    Attributes:
        kind: What it proves.
        key_id: Whose key it says has signed it.
        size: Leaves of the tree; of the newer one for consistency.
        place: The leaf's index; the size of the older tree for consistency.
        path: The proof's hashes of 32 bytes.
        protected: The protected header's bytes.
        signature: Of 64 bytes.
    """

    kind: Kind
    key_id: bytes
    size: int
    place: int
    path: tuple[bytes, ...]
    protected: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Included:
    """What a receipt of inclusion proved: this entry is that leaf of the tree with this root."""

    key_id: bytes
    size: int
    index: int
    root: bytes


def prove_inclusion(root: bytes, size: int, index: int, path: Sequence[bytes], key: Ed25519PrivateKey) -> bytes:
    """The signed receipt that leaf ``index`` is in the tree of ``size`` with that root."""
    return _sign(-1, [size, index, list(path)], size, root, key)


def prove_consistency(root: bytes, old: int, new: int, path: Sequence[bytes], key: Ed25519PrivateKey) -> bytes:
    """The signed receipt that the tree of ``new`` leaves, with that root, begins with the tree of ``old``."""
    return _sign(-2, [old, new, list(path)], new, root, key)


def parse(data: bytes) -> CoseReceipt:
    """Takes a receipt apart and believes nothing.

    Raises:
        Malformed: not a receipt of at most 4 KiB with one proof, in its one encoding.
    """
    if len(data) > MAX_BYTES:
        raise Malformed("larger than any COSE receipt", size=len(data), limit=MAX_BYTES)
    match cbor.loads(data, tag=SIGN1_TAG):
        case [bytes(protected), {396: {**proofs}, **more}, None, bytes(signature)] if len(proofs) == 1 and not more:
            signer, size = _signer(protected)
            return _proof(proofs, size, signer, protected, signature)
    raise Malformed("not a COSE receipt: a COSE_Sign1 with one proof and a detached payload")


def verify_inclusion(data: bytes, leaf: bytes, keys: Iterable[Ed25519PublicKey]) -> Included:
    """That the entry with this leaf hash is in the tree of a trusted log.

    Raises:
        Malformed: it cannot be read, or proves something else.
        Untrusted: it says that another key has signed it.
        Inconsistent: the proof cannot be one of this place in a tree.
        BadSignature: the root it leads to from this leaf is not the one that was signed.
    """
    receipt = parse(data)
    key = _trusted(receipt, "inclusion", keys)
    root = merkle.root_of_inclusion(leaf, receipt.place, receipt.size, receipt.path)
    if root is None:
        raise Inconsistent("the inclusion proof does not fit its place", leaf=receipt.place, size=receipt.size)
    verify1(receipt.protected, root, receipt.signature, key)
    return Included(receipt.key_id, receipt.size, receipt.place, root)


def verify_consistency(data: bytes, old_root: bytes, keys: Iterable[Ed25519PublicKey]) -> tuple[int, int, bytes]:
    """That a trusted log's tree with ``old_root`` is the beginning of its newer one: sizes of both, root of the newer.

    Raises:
        Malformed: it cannot be read, or proves something else.
        Untrusted: it says that another key has signed it.
        Inconsistent: the proof does not begin at this root.
        BadSignature: the root it leads to is not the one that was signed.
    """
    receipt = parse(data)
    key = _trusted(receipt, "consistency", keys)
    old, new = receipt.place, receipt.size
    steps = receipt.path if old & (old - 1) else (old_root, *receipt.path)
    roots = merkle.consistency_roots(old, new, steps)
    if roots is None or roots[0] != old_root:
        raise Inconsistent("the newer tree is not shown to begin with the older one", old=old, new=new)
    verify1(receipt.protected, roots[1], receipt.signature, key)
    return old, new, roots[1]


def _sign(kind: int, proof: list[object], size: int, root: bytes, key: Ed25519PrivateKey) -> bytes:
    header: dict[int, object] = {ALG: EDDSA, KID: key_id(key.public_key()), _VDS: _RFC9162_SHA256, _TREE_SIZE: size}
    protected, signature = sign1(header, root, key)
    return encode1(protected, {_VDP: {kind: [cbor.dumps(proof)]}}, None, signature)


def _signer(protected: bytes) -> tuple[bytes, int]:
    match cbor.loads(protected):
        case {1: -8, 4: bytes(kid), 395: 1, -70602: int(size), **more}:
            if len(kid) == KEY_ID_SIZE and not more and not isinstance(size, bool):
                return kid, size
    raise Malformed("the protected header is not EdDSA, a key id, RFC9162_SHA256 and a tree size")


def _proof(
    proofs: Mapping[object, object], size: int, signer: bytes, protected: bytes, signature: bytes
) -> CoseReceipt:
    ((label, encoded),) = proofs.items()
    match encoded:
        case [bytes(proof)] if label in (-1, -2):
            kind: Kind = "inclusion" if label == -1 else "consistency"
            place, path = _numbers(cbor.loads(proof), size, kind)
            return CoseReceipt(kind, signer, size, place, path, protected, signature)
    raise Malformed("a COSE receipt holds one proof, of inclusion or of consistency")


def _numbers(proof: object, size: int, kind: Kind) -> tuple[int, tuple[bytes, ...]]:
    """The place and the path of a proof for the signed size."""
    match proof:
        case [int(first), int(second), list(path)] if not isinstance(first, bool) and not isinstance(second, bool):
            tree, place = (first, second) if kind == "inclusion" else (second, first)
            hashes = tuple(part for part in path if isinstance(part, bytes) and len(part) == merkle.HASH_SIZE)
            if len(hashes) == len(path) <= merkle.MAX_PATH and tree == size and 0 <= place < size < MAX_LEAVES:
                return place, hashes
    raise Malformed("the proof is not two numbers that fit the signed tree size, and at most 64 hashes")


def _trusted(receipt: CoseReceipt, kind: Kind, keys: Iterable[Ed25519PublicKey]) -> Ed25519PublicKey:
    if receipt.kind != kind:
        raise Malformed(f"a COSE receipt of {receipt.kind}, not of {kind}")
    for key in keys:
        if key_id(key) == receipt.key_id:
            return key
    raise Untrusted("the proof is signed by a log that is not trusted", signer=receipt.key_id)
