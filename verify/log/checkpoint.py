"""Checkpoints: the size and root of a log, signed (c2sp.org/tlog-checkpoint, /signed-note, /tlog-cosignature).

    example.org/log                     origin                            the text, which is signed
    20852163                            size
    CsUYapGGPo4dkMgIAUqom/Xajj7h2fB...  root, base64
                                        an empty line
    — example.org/log Az3grlgtzPICa...  key name, base64(key id || signature)
    — witness.example.org jWbPPwAAA...  key name, base64(key id || u64 seconds || signature)

A log signs the text itself. A witness that found the log consistent with all it had seen signs "cosignature/v1", the
time and the text.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from countersign.verify.errors import BadSignature, Malformed, Untrusted
from countersign.verify.log.tiles import MAX_LEAVES
from countersign.verify.merkle import HASH_SIZE

MAX_NOTE_BYTES = 64 * 1024
MAX_SIGNATURES = 64
MAX_NAME_BYTES = 255
MAX_TEXT_BYTES = 4096

_KEY_ID = 4
_SIGNATURE = 64
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_LINE = re.compile(r"— ([^\s+]+) ([A-Za-z0-9+/]+={0,2})")


class KeyKind(IntEnum):
    """What a key signs: the number is the signed-note format's."""

    LOG = 1
    WITNESS = 4


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A log of this origin has ``size`` entries and this root (32 bytes)."""

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """The text that is signed.

        Raises:
            Malformed: it could not be read back.
        """
        root = base64.b64encode(self.root).decode()
        text = "".join(f"{line}\n" for line in (self.origin, str(self.size), root, *self.extensions)).encode()
        if Checkpoint.parse(text) != self:
            raise Malformed("a checkpoint that no one could read", origin=self.origin)
        return text

    @staticmethod
    def parse(text: bytes) -> Checkpoint:
        """The checkpoint of a note's text.

        Raises:
            Malformed: it is none.
        """
        lines = _printable(text, MAX_TEXT_BYTES).split("\n")
        if len(lines) < 4 or not all(lines[:-1]) or lines[-1]:
            raise Malformed("a checkpoint is an origin, a size, a root and a line feed after each")
        origin, size, root, *extensions = lines[:-1]
        if not _SIZE.fullmatch(size) or int(size) >= MAX_LEAVES:
            raise Malformed("the size of a checkpoint is no number of entries", size=size)
        digest = _base64(root)
        if len(digest) != HASH_SIZE:
            raise Malformed("the root of a checkpoint is not 32 bytes", size=len(digest))
        return Checkpoint(origin, int(size), digest, tuple(extensions))


@dataclass(frozen=True, slots=True)
class NoteKey:
    """A public key by the name that stands in signature lines."""

    name: str
    key: Ed25519PublicKey
    kind: KeyKind = KeyKind.LOG

    @property
    def id(self) -> bytes:
        """4 bytes that tell keys of one name apart."""
        data = self.name.encode() + b"\n" + bytes([self.kind]) + self.key.public_bytes_raw()
        return hashlib.sha256(data).digest()[:_KEY_ID]

    def encode(self) -> str:
        """As people hand it around: "name+hash+base64" (a vkey)."""
        data = base64.b64encode(bytes([self.kind]) + self.key.public_bytes_raw()).decode()
        return f"{self.name}+{self.id.hex()}+{data}"

    @staticmethod
    def parse(text: str) -> NoteKey:
        """What ``encode`` wrote.

        Raises:
            Malformed: anything else.
        """
        name, _, rest = text.partition("+") if len(text) <= 2 * MAX_NAME_BYTES else ("", "", "")
        hash_, _, data = rest.partition("+")
        raw = _base64(data)
        if len(raw) == 33 and raw[0] in (*KeyKind,) and _is_name(name):
            key = NoteKey(name, Ed25519PublicKey.from_public_bytes(raw[1:]), KeyKind(raw[0]))
            if key.id.hex() == hash_:
                return key
        raise Malformed("not a note key: name+hash+base64 of an Ed25519 key of type 1 or 4", key=text)


@dataclass(frozen=True, slots=True)
class NoteSignature:
    """A signature line, not verified. ``data`` is what follows the key id."""

    name: str
    key_id: bytes
    data: bytes

    def line(self) -> str:
        return f"— {self.name} {base64.b64encode(self.key_id + self.data).decode()}\n"


@dataclass(frozen=True, slots=True)
class Note:
    """A signed checkpoint taken apart, nothing verified. ``text`` is what was signed."""

    text: bytes
    checkpoint: Checkpoint
    signatures: tuple[NoteSignature, ...]

    def encode(self) -> bytes:
        """The note's bytes."""
        return self.text + b"\n" + "".join(signature.line() for signature in self.signatures).encode()


@dataclass(frozen=True, slots=True)
class Signer:
    """A key whose signature held. ``time`` is a witness's, in seconds since 1970."""

    key: NoteKey
    time: int | None = None


@dataclass(frozen=True, slots=True)
class Signed:
    """A checkpoint and the known keys that signed it, at least one."""

    checkpoint: Checkpoint
    signers: tuple[Signer, ...]


def parse_note(data: bytes) -> Note:
    """Takes a signed checkpoint apart and believes nothing.

    Raises:
        Malformed: it is none, in the one form that it may have.
    """
    text, gap, rest = _printable(data, MAX_NOTE_BYTES).rpartition("\n\n")
    lines = rest.split("\n")
    if not gap or lines[-1] or not 1 <= len(lines) - 1 <= MAX_SIGNATURES:
        raise Malformed("a signed note is a text, an empty line and signature lines", signatures=len(lines) - 1)
    body = (text + "\n").encode()
    return Note(body, Checkpoint.parse(body), tuple(_signature(line) for line in lines[:-1]))


def sign(checkpoint: Checkpoint, key: Ed25519PrivateKey, name: str | None = None) -> bytes:
    """The checkpoint as a note signed by its log, under its origin unless another name is given.

    Raises:
        Malformed: the checkpoint or the name could not be read back.
    """
    text = checkpoint.encode()
    signer = NoteKey(checkpoint.origin if name is None else name, key.public_key())
    if not _is_name(signer.name):
        raise Malformed("a key name has no spaces, no plus and at most 255 bytes", name=signer.name)
    return Note(text, checkpoint, (NoteSignature(signer.name, signer.id, key.sign(text)),)).encode()


def cosign(note: bytes, key: Ed25519PrivateKey, name: str, *, time: int) -> bytes:
    """The note with a witness's cosignature more. Who cosigns has checked the log's signature and its consistency.

    Args:
        note: A signed checkpoint.
        key: The witness's, used for nothing else.
        name: The witness's.
        time: Now, in seconds since 1970.

    Raises:
        Malformed: the note or the name cannot be read.
    """
    parsed, signer = parse_note(note), NoteKey(name, key.public_key(), KeyKind.WITNESS)
    if not _is_name(name):
        raise Malformed("a key name has no spaces, no plus and at most 255 bytes", name=name)
    data = struct.pack(">Q", time) + key.sign(_cosigned(parsed.text, time))
    return replace(parsed, signatures=(*parsed.signatures, NoteSignature(name, signer.id, data))).encode()


def verify(note: bytes, keys: Iterable[NoteKey]) -> Signed:
    """The checkpoint, if known keys signed it. Lines of unknown keys are passed over, as the format asks.

    Raises:
        Malformed: it is no signed checkpoint, or a key signed twice.
        BadSignature: the line of a known key is not its signature.
        Untrusted: no known key signed it.
    """
    parsed = parse_note(note)
    known = {(key.name, key.id): key for key in keys}
    found: dict[tuple[str, bytes], Signer] = {}
    for line in parsed.signatures:
        signer = line.name, line.key_id
        if signer not in known:
            continue
        if signer in found:
            raise Malformed("a key signed the note twice", name=line.name)
        found[signer] = _verified(parsed.text, line, known[signer])
    if not found:
        names = " ".join(line.name for line in parsed.signatures)
        raise Untrusted("no key that is trusted signed the checkpoint", signers=names)
    return Signed(parsed.checkpoint, tuple(found.values()))


def _verified(text: bytes, line: NoteSignature, key: NoteKey) -> Signer:
    time, signature, message = None, line.data, text
    if key.kind == KeyKind.WITNESS:
        time, signature = int.from_bytes(line.data[:8], "big"), line.data[8:]
        message = _cosigned(text, time)
    try:
        if len(signature) != _SIGNATURE:
            raise BadSignature("the signature has another length than Ed25519's", name=line.name)
        key.key.verify(signature, message)
    except InvalidSignature as error:
        raise BadSignature("the signature is not the key's over this checkpoint", name=line.name) from error
    return Signer(key, time)


def _cosigned(text: bytes, time: int) -> bytes:
    return b"cosignature/v1\ntime %d\n" % time + text


def _signature(line: str) -> NoteSignature:
    found = _LINE.fullmatch(line)
    data = _base64(found[2]) if found and _is_name(found[1]) else b""
    if found is None or len(data) <= _KEY_ID:
        raise Malformed("a signature line is a dash, a name and base64", line=line)
    return NoteSignature(found[1], data[:_KEY_ID], data[_KEY_ID:])


def _is_name(name: str) -> bool:
    return bool(re.fullmatch(r"[^\s+\x00-\x1f\ud800-\udfff]+", name)) and len(name.encode()) <= MAX_NAME_BYTES


def _base64(text: str) -> bytes:
    """Standard base64 with its padding, in the one form of the bytes."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Malformed("not base64", text=text) from error
    if base64.b64encode(data).decode() != text:
        raise Malformed("base64 with bits left over", text=text)
    return data


def _printable(data: bytes, limit: int) -> str:
    """UTF-8 without control characters other than line feeds."""
    if len(data) > limit:
        raise Malformed("larger than any checkpoint", size=len(data), limit=limit)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise Malformed("a note is UTF-8", cause=error) from error
    if any(character < " " and character != "\n" for character in text):
        raise Malformed("a note has no control characters")
    return text
