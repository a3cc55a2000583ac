"""Commit first, open second: what a provider can and cannot answer once its receipt is signed."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import struct
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify import cbor
from countersign.verify.errors import Inconsistent, Malformed, NotCheckable, OpeningMismatch, VerificationError
from countersign.verify.fingerprints import MAX_OPENED, Answer, Opening, check, commit, decode, encode, open_positions
from countersign.verify.payload import Activations, Receipt
from countersign.verify.receipt import sign
from countersign.verify.testing import SALT_KEY, example_receipt, signing_key

SIZE, TOKENS = 8, 21
PRINTS = [hashlib.sha256(b"print %d" % i).digest()[: 2 * SIZE] for i in range(TOKENS)]


def receipt_of(prints: Sequence[bytes] = PRINTS, request_id: str = "example-1") -> Receipt:
    receipt, _ = example_receipt(output=range(len(prints) or TOKENS), request_id=request_id)
    evidence = dataclasses.replace(receipt.evidence, activations=commit(request_id, prints, SALT_KEY))
    return dataclasses.replace(receipt, evidence=evidence)


RECEIPT = receipt_of()


def opened(*positions: int) -> Answer:
    return open_positions("example-1", PRINTS, SALT_KEY, positions)


@given(st.lists(st.integers(0, TOKENS - 1), unique=True).map(sorted))
def test_what_was_committed_opens_at_any_positions_and_travels(positions: list[int]) -> None:
    answer = decode(encode(opened(*positions)))
    assert answer == opened(*positions)
    check(RECEIPT, answer, positions)
    assert [each.fingerprint for each in answer.openings] == [PRINTS[i] for i in positions]


def test_leaves_and_salts_are_those_of_the_specification() -> None:
    domain = b"countersign/activation/v1"
    prints = PRINTS[:1]
    salt = hmac.digest(SALT_KEY, domain + struct.pack(">Q", 0), "sha256")
    entry = domain + b"\x02id" + struct.pack(">QH", 0, 16) + prints[0] + salt
    expected = Activations("difr/v1", SIZE, "fp16", 0x636F756E74657273, 1, hashlib.sha256(b"\0" + entry).digest())
    assert commit("id", prints, SALT_KEY) == expected
    assert open_positions("id", prints, SALT_KEY, [0]).openings[0].salt == salt


def test_no_fingerprints_are_not_committed_to() -> None:
    assert commit("id", [], SALT_KEY) is None
    with pytest.raises(NotCheckable, match="commits to no activation fingerprints"):
        check(receipt_of([]), opened(), ())


@pytest.mark.parametrize("prints", [[b"123"], [b"12", b"1234"]], ids=["odd", "different"])
def test_fingerprints_that_are_no_fp16_rows_of_one_size_are_not_committed_to(prints: list[bytes]) -> None:
    with pytest.raises(ValueError, match="as many for each token"):
        commit("id", prints, SALT_KEY)


def changed(answer: Answer, at: int, **parts: bytes | int) -> Answer:
    """The same, but for one opening's parts."""
    openings = [dataclasses.replace(each, **parts) if i == at else each for i, each in enumerate(answer.openings)]  # type: ignore[arg-type]
    return dataclasses.replace(answer, openings=tuple(openings))


def only(answer: Answer, *at: int) -> Answer:
    """These of its openings."""
    return dataclasses.replace(answer, openings=tuple(answer.openings[i] for i in at))


FORGERIES: dict[str, Callable[[Answer], Answer]] = {
    "another fingerprint": lambda answer: changed(answer, 0, fingerprint=bytes(2 * SIZE)),
    "another position's fingerprint": lambda answer: changed(answer, 0, fingerprint=PRINTS[11]),
    "another position's salt": lambda answer: changed(answer, 0, salt=answer.openings[1].salt),
    "another position, renamed": lambda _: changed(opened(2, 7, 12), 0, index=3),
    "a hash changed": lambda answer: dataclasses.replace(answer, proof=(bytes(32), *answer.proof[1:])),
    "a hash left out": lambda answer: dataclasses.replace(answer, proof=answer.proof[:-1]),
    "a hash more": lambda answer: dataclasses.replace(answer, proof=(*answer.proof, bytes(32))),
    "one position left out": lambda answer: only(answer, 1, 2),
    "one position more": lambda _: opened(3, 7, 12, 20),
    "positions of its own choice": lambda _: opened(0, 1, 2),
    "one position twice": lambda answer: only(answer, 0, 0, 1, 2),
    "another order": lambda answer: only(answer, 2, 1, 0),
    "another request's": lambda _: open_positions("example-2", PRINTS, SALT_KEY, [3, 7, 12]),
    "another key's": lambda _: open_positions("example-1", PRINTS, bytes(32), [3, 7, 12]),
    "longer numbers": lambda answer: changed(answer, 0, fingerprint=PRINTS[3] + b"\0\0"),
    "another tree": lambda _: open_positions("example-1", PRINTS[:-1], SALT_KEY, [3, 7, 12]),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_an_answer_that_was_not_committed_to_is_refused(name: str) -> None:
    positions = [3, 7, 12]
    check(RECEIPT, opened(*positions), positions)
    with pytest.raises(OpeningMismatch):
        check(RECEIPT, FORGERIES[name](opened(*positions)), positions)


@pytest.mark.parametrize("positions", [(3, 3), (7, 3), (TOKENS,), (-1, 3)])
def test_positions_that_do_not_rise_within_the_answer_are_not_opened(positions: tuple[int, ...]) -> None:
    with pytest.raises(Malformed):
        opened(*positions)


def test_a_projection_of_the_providers_own_choice_is_refused() -> None:
    """Its seed is 64 bits to search for one that hides a fault."""
    activations = RECEIPT.evidence.activations
    assert activations is not None
    chosen = dataclasses.replace(activations, seed=activations.seed + 1)
    receipt = dataclasses.replace(RECEIPT, evidence=dataclasses.replace(RECEIPT.evidence, activations=chosen))
    with pytest.raises(Inconsistent, match="provider has chosen"):
        check(receipt, opened(3, 7, 12), [3, 7, 12])


def test_an_answer_is_shorter_than_a_path_for_each_position() -> None:
    prints = PRINTS[:1] * 300
    drawn = range(0, 300, 19)
    size = len(encode(open_positions("example-1", prints, SALT_KEY, drawn)))
    assert size < len(drawn) * (2 * SIZE + 32 + 6 * 32)


def test_a_receipt_with_another_number_of_fingerprints_than_tokens_is_never_signed() -> None:
    receipt, openings = example_receipt(output=range(TOKENS))
    fewer = commit("example-1", PRINTS[:-1], SALT_KEY)
    wrong = dataclasses.replace(receipt, evidence=dataclasses.replace(receipt.evidence, activations=fewer))
    with pytest.raises(Inconsistent, match="another number of fingerprints"):
        sign(wrong, openings, signing_key())
    right = dataclasses.replace(receipt, evidence=dataclasses.replace(receipt.evidence, activations=commit(
        "example-1", PRINTS, SALT_KEY
    )))  # fmt: skip
    assert sign(right, openings, signing_key())


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        [[], b"", b""],
        [[], bytes(33)],
        [[1], b""],
        [[[0, b""]], b""],
        [[[0, b"", bytes(32), b""]], b""],
        [[[-1, b"12", bytes(32)]], b""],
        [[[True, b"12", bytes(32)]], b""],
        [[[0, b"12", bytes(31)]], b""],
        [[[0, bytes(258), bytes(32)]], b""],
        [[[i, b"12", bytes(32)] for i in range(MAX_OPENED + 1)], b""],
    ],
)
def test_what_is_no_answer_is_malformed(answer: object) -> None:
    with pytest.raises(Malformed):
        decode(cbor.dumps(answer))


def test_the_largest_answer_is_read_and_a_larger_one_is_not_looked_at() -> None:
    most = Answer(tuple(Opening(i, bytes(256), bytes(32)) for i in range(MAX_OPENED)), (bytes(32),) * 24 * MAX_OPENED)
    assert decode(encode(most)) == most
    with pytest.raises(Malformed, match="larger than any answer"):
        decode(bytes(1024 * 1024 + 1))


@given(st.binary(max_size=300), st.integers(0, 250), st.binary(max_size=4))
def test_only_a_verification_error_escapes_whatever_the_bytes(noise: bytes, at: int, splice: bytes) -> None:
    good = encode(opened(3, 7))
    for data in (noise, good[:at] + splice + good[at + len(splice) :]):
        try:
            check(RECEIPT, decode(data), [3, 7])
        except VerificationError:
            continue
        assert data == good
