from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from countersign.verify import keys
from countersign.verify.errors import KeyFileError
from countersign.verify.keys import key_id_text, load_or_create_signing_key, load_public, write_public
from countersign.verify.testing import signing_key


def _create(path: Path) -> bytes:
    return load_or_create_signing_key(path).private_bytes_raw()


def test_a_signing_key_is_made_once_readable_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "receipts.key"
    first = _create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert _create(path) == first
    assert [*path.parent.iterdir()] == [path]


def test_processes_that_start_together_get_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / "receipts.key"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        made = pool.map(_create, [path] * 4)
    assert len(set(made)) == 1


def test_the_process_that_comes_second_does_not_replace_the_key(tmp_path: Path) -> None:
    """It saw no file, made a key, and finds one there when it wants to put its own in place."""
    path = tmp_path / "receipts.key"
    first = _create(path)
    keys._create(path)
    assert _create(path) == first
    assert [*tmp_path.iterdir()] == [path]


def test_a_signing_key_that_others_may_read_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "receipts.key"
    _create(path)
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_or_create_signing_key(path)


def test_a_public_key_is_read_as_pem_as_raw_bytes_and_as_hex(tmp_path: Path) -> None:
    key = signing_key().public_key()
    write_public(tmp_path / "pem", key)
    (tmp_path / "raw").write_bytes(key.public_bytes_raw())
    (tmp_path / "hex").write_text(key.public_bytes_raw().hex() + "\n")
    for name in ("pem", "raw", "hex"):
        assert load_public(tmp_path / name).public_bytes_raw() == key.public_bytes_raw()


def test_a_new_public_key_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "receipts.pub"
    for number in (1, 2):
        write_public(path, signing_key(number).public_key())
    assert key_id_text(load_public(path)) == key_id_text(signing_key(2).public_key())
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("content", [b"", b"zz" * 32, b"-----BEGIN PUBLIC KEY-----\n", b"\xff" * 31, bytes(5000)])
def test_a_file_without_a_public_key_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.pub"
    path.write_bytes(content)
    with pytest.raises(KeyFileError, match=r"bad\.pub"):
        load_public(path)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(KeyFileError, match=path.name):
            load_public(path)
    with pytest.raises(KeyFileError, match=tmp_path.name):
        write_public(tmp_path, signing_key().public_key())


def test_keys_of_another_kind_are_refused(tmp_path: Path) -> None:
    other = generate_private_key(SECP256R1())
    private, public = tmp_path / "private", tmp_path / "public"
    private.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    private.chmod(0o600)
    public.write_bytes(other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(KeyFileError, match="not an Ed25519 key"):
        load_or_create_signing_key(private)
    with pytest.raises(KeyFileError, match="not an Ed25519 key"):
        load_public(public)
