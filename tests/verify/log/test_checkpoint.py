"""Checkpoints: read and written as C2SP has them, believed only with a signature that holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify.errors import BadSignature, Malformed, Untrusted, VerificationError
from countersign.verify.log import checkpoint as module
from countersign.verify.log.checkpoint import (
    Checkpoint,
    KeyKind,
    NoteKey,
    Signer,
    cosign,
    parse_note,
    sign,
    verify,
)
from countersign.verify.testing import signing_key

# The examples of c2sp.org/tlog-cosignature and c2sp.org/signed-note.
EXAMPLE = (
    "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
    "— example.com/behind-the-sofa "
    "Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
    "— witness.example.com/w1 "
    "jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==\n"
)
# golang.org/x/mod/sumdb/note: the key and note of its package example.
GO_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_TEXT = b"If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
GO_LINE = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="

ORIGIN = "log.example/receipts"
LOG, WITNESS = signing_key(1), signing_key(2)
LOG_KEY = NoteKey(ORIGIN, LOG.public_key())
WITNESS_KEY = NoteKey("witness.example", WITNESS.public_key(), KeyKind.WITNESS)
CHECKPOINT = Checkpoint(ORIGIN, 1234, bytes(range(32)))
NOTE = sign(CHECKPOINT, LOG)
COSIGNED = cosign(NOTE, WITNESS, "witness.example", time=1_750_000_000)

LINES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30)


def test_the_specifications_example_is_read_and_written_back() -> None:
    note = parse_note(EXAMPLE.encode())
    assert (note.checkpoint.origin, note.checkpoint.size) == ("example.com/behind-the-sofa", 20852163)
    assert note.checkpoint.root.hex().startswith("0ac5186a91863e8e1d90c808014aa89b")
    assert [line.name for line in note.signatures] == ["example.com/behind-the-sofa", "witness.example.com/w1"]
    assert int.from_bytes(note.signatures[1].data[:8], "big") == 1679315147
    assert note.encode() == EXAMPLE.encode()


def test_a_key_and_a_signature_of_the_go_implementation_hold() -> None:
    key = NoteKey.parse(GO_KEY)
    assert key.encode() == GO_KEY
    line = module._signature(f"— PeterNeumann {GO_LINE}")
    assert line.key_id == key.id
    module._verified(GO_TEXT, line, key)


def test_what_was_signed_is_read_back_with_its_signers() -> None:
    signed = verify(COSIGNED, [LOG_KEY, WITNESS_KEY])
    assert signed.checkpoint == CHECKPOINT
    assert signed.signers == (Signer(LOG_KEY), Signer(WITNESS_KEY, 1_750_000_000))
    assert verify(COSIGNED, [WITNESS_KEY]).signers == (Signer(WITNESS_KEY, 1_750_000_000),)


@given(st.builds(Checkpoint, LINES, st.integers(0, 2**63 - 1), st.binary(min_size=32, max_size=32), st.tuples(LINES)))
def test_any_checkpoint_is_read_back(checkpoint: Checkpoint) -> None:
    assert Checkpoint.parse(checkpoint.encode()) == checkpoint


def test_a_flipped_bit_anywhere_costs_a_signature_or_the_whole_note_and_never_changes_what_is_believed() -> None:
    """A line whose name or key id is touched is an unknown key's, which the format says to pass over."""
    names = {line.name + line.key_id.hex() for line in parse_note(COSIGNED).signatures}
    for position in range(len(COSIGNED)):
        for bit in range(8):
            flipped = bytearray(COSIGNED)
            flipped[position] ^= 1 << bit
            try:
                signed = verify(bytes(flipped), [LOG_KEY, WITNESS_KEY])
            except VerificationError:
                continue
            assert len(signed.signers) == 1
            assert signed.checkpoint == CHECKPOINT
            assert {line.name + line.key_id.hex() for line in parse_note(bytes(flipped)).signatures} != names


def test_a_note_that_no_trusted_key_signed_is_refused() -> None:
    stranger = NoteKey(ORIGIN, signing_key(3).public_key())
    for keys in ([], [stranger], [dataclasses.replace(LOG_KEY, name="elsewhere")], [WITNESS_KEY]):
        with pytest.raises(Untrusted):
            verify(NOTE, keys)


def test_a_log_signature_does_not_pass_for_a_cosignature_nor_the_other_way_round() -> None:
    """One key in both roles: its id tells them apart, and so do the bytes signed."""
    as_witness = NoteKey(ORIGIN, LOG.public_key(), KeyKind.WITNESS)
    with pytest.raises(Untrusted):
        verify(NOTE, [as_witness])
    (line,) = parse_note(NOTE).signatures
    disguised = dataclasses.replace(line, key_id=as_witness.id, data=bytes(8) + line.data)
    with pytest.raises(BadSignature):
        verify(dataclasses.replace(parse_note(NOTE), signatures=(disguised,)).encode(), [as_witness])


def test_the_time_of_a_cosignature_is_signed() -> None:
    log, witness = parse_note(COSIGNED).signatures
    later = dataclasses.replace(witness, data=(1_750_000_001).to_bytes(8, "big") + witness.data[8:])
    with pytest.raises(BadSignature):
        verify(dataclasses.replace(parse_note(COSIGNED), signatures=(log, later)).encode(), [WITNESS_KEY])


def test_a_bad_line_of_a_known_key_spoils_the_note_although_another_holds() -> None:
    log, witness = parse_note(COSIGNED).signatures
    broken = dataclasses.replace(witness, data=witness.data[:-1] + bytes([witness.data[-1] ^ 1]))
    note = dataclasses.replace(parse_note(COSIGNED), signatures=(log, broken)).encode()
    assert verify(note, [LOG_KEY]).checkpoint == CHECKPOINT
    with pytest.raises(BadSignature):
        verify(note, [LOG_KEY, WITNESS_KEY])


def test_a_key_that_signs_twice_is_not_counted_twice() -> None:
    twice = cosign(COSIGNED, WITNESS, "witness.example", time=1_750_000_001)
    with pytest.raises(Malformed, match="twice"):
        verify(twice, [LOG_KEY, WITNESS_KEY])


@pytest.mark.parametrize(
    "change",
    [
        lambda note: note.replace(b"1234\n", b"01234\n"),
        lambda note: note.replace(b"1234\n", b"-1234\n"),
        lambda note: note.replace(b"1234\n", b"9223372036854775808\n"),
        lambda note: note.replace(b"1234\n", b"99999999999999999999999\n"),
        lambda note: note.replace(b"1234\n", "١٢٣٤\n".encode()),
        lambda note: note.replace(b"1234\n", b"1234 \n"),
        lambda note: note.replace(b"1234\n", b"\n"),
        lambda note: note.replace(b"Hh8=\n", b"Hh9=\n"),  # bits left over
        lambda note: note.replace(b"Hh8=\n", b"Hh8\n"),
        lambda note: note.replace(b"Hh8=\n", b"\n"),
        lambda note: note.replace(b"\n", b"\r\n"),
        lambda note: note.replace(b"\n\n", b"\n"),
        lambda note: note[:-1],
        lambda note: note + b"\n",
        lambda note: note + b"more\n",
        lambda note: note.replace("— ".encode(), b"- "),
        lambda note: note.replace(b"log.example/receipts ", b"log+example/receipts "),
        lambda note: note.replace(b"log.example/receipts ", b"log example/receipts "),
        lambda note: note.replace(b"1234\n", b"12\x0034\n"),
        lambda note: note.replace(b"1234\n", b"12\xff34\n"),
        lambda note: note + note.rpartition(b"\n\n")[2] * module.MAX_SIGNATURES,
        lambda note: b"x" * module.MAX_TEXT_BYTES + note,
        lambda note: note + b"x" * module.MAX_NOTE_BYTES,
        lambda note: b"",
    ],
)
def test_a_note_in_another_form_is_refused(change: Callable[[bytes], bytes]) -> None:
    assert change(NOTE) != NOTE
    with pytest.raises(Malformed):
        parse_note(change(NOTE))


@given(st.binary(max_size=300) | st.binary(max_size=60).map(lambda data: data + b"\n\n" + NOTE[-120:]))
def test_random_bytes_give_a_verification_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(VerificationError):
        verify(data, [LOG_KEY])


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\nb", "a\u2003b", "x" * 256])
def test_a_name_that_could_not_be_read_back_is_never_signed_under(name: str) -> None:
    with pytest.raises(Malformed):
        sign(CHECKPOINT, LOG, name)
    with pytest.raises(Malformed):
        cosign(NOTE, WITNESS, name, time=1)


@pytest.mark.parametrize("origin", ["", "two\nlines", "bell\a"])
def test_an_origin_that_could_not_be_read_back_is_never_signed(origin: str) -> None:
    with pytest.raises(Malformed):
        sign(Checkpoint(origin, 1, bytes(32)), LOG, "name")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "name+00000000+",
        GO_KEY[:-4],
        GO_KEY.replace("c74f", "c74e"),
        "+" + GO_KEY,
        GO_KEY * 50,
        "\udcff" + GO_KEY,
    ],
)
def test_a_damaged_key_is_refused(text: str) -> None:
    with pytest.raises(Malformed):
        NoteKey.parse(text)


def test_a_key_of_another_algorithm_is_refused() -> None:
    key = NoteKey("name", Ed25519PublicKey.from_public_bytes(bytes(range(32))))
    assert NoteKey.parse(key.encode()) == key
    with pytest.raises(Malformed):
        NoteKey.parse(key.encode().replace("+AQ", "+Ag"))
