"""Ed25519 key files: the signing key of a target, the public keys that an auditor trusts."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from countersign.verify.cose import key_id
from countersign.verify.errors import KeyFileError

MAX_KEY_FILE_BYTES = 4096
_RAW_SIZE = 32


def key_id_text(key: Ed25519PublicKey) -> str:
    """The key id as people compare it: "ed25519:" and 64 hex digits."""
    return f"ed25519:{key_id(key).hex()}"


def load_or_create_signing_key(path: Path) -> Ed25519PrivateKey:
    """The signing key in ``path`` (PEM, PKCS #8), made with mode 0600 if there is none.

    Processes that start together all get the same key: the file is linked into place whole, and who comes second reads
    it.

    Raises:
        KeyFileError: it cannot be read or written, holds something else, or others may read it.
    """
    try:
        if not path.exists():
            _create(path)
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise KeyFileError(f"{path}: others may read this signing key; run: chmod 600 {path}, or replace it")
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from error
    data = _read(path)
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{path}: not a PEM file with an Ed25519 private key without a password") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path}: not an Ed25519 key")
    return key


def write_public(path: Path, key: Ed25519PublicKey) -> None:
    """Writes the public key as PEM, in place of what was there.

    Raises:
        KeyFileError: it cannot be written.
    """
    data = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = _write_beside(path, data, 0o644)
        fresh.replace(path)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from error


def load_public(path: Path) -> Ed25519PublicKey:
    """The public key in ``path``: PEM, 32 raw bytes, or 64 hex digits.

    Raises:
        KeyFileError: it cannot be read or holds something else.
    """
    data = _read(path)
    try:
        return Ed25519PublicKey.from_public_bytes(data if len(data) == _RAW_SIZE else bytes.fromhex(data.decode()))
    except ValueError:
        pass  # neither raw nor hex: PEM is left
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{path}: not an Ed25519 public key (PEM, 32 raw bytes or 64 hex digits)") from error
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(f"{path}: not an Ed25519 key")
    return key


def _create(path: Path) -> None:
    data = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = _write_beside(path, data, 0o600)
    try:
        os.link(fresh, path)
    except FileExistsError:
        return  # another process was first: its key is the key
    finally:
        fresh.unlink()


def _write_beside(path: Path, data: bytes, mode: int) -> Path:
    """A complete file next to ``path``, on the disk before anyone can see it under its name."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    return fresh


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from error
    if len(data) > MAX_KEY_FILE_BYTES:
        raise KeyFileError(f"{path}: too large for a key file")
    return data
