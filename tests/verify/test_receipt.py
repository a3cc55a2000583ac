"""The threats to a receipt, one test each."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from collections.abc import Callable
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cwt import COSE, COSEKey
from hypothesis import given, settings
from hypothesis import strategies as st

from countersign.verify import cbor, cose, envelope, merkle, openings, payload
from countersign.verify.errors import (
    BadSignature,
    Inconsistent,
    Malformed,
    NotCheckable,
    OpeningMismatch,
    Untrusted,
    VerificationError,
)
from countersign.verify.receipt import (
    Disclosure,
    Openings,
    Receipt,
    ReceiptVerifier,
    attach,
    parse,
    prompt_digest,
    receipt_digest,
    sign,
    stop_digest,
    strip,
)
from countersign.verify.testing import SALT_KEY, example_receipt, signing_key

KEY, OTHER_KEY = signing_key(1), signing_key(2)
VERIFIER = ReceiptVerifier([KEY.public_key()])


def example() -> bytes:
    return sign(*example_receipt(stop=["\n\n"]), KEY)


def check(data: bytes) -> Disclosure:
    return VERIFIER.count(VERIFIER.form(data))


def forge(receipt: Receipt, opened: Openings | None = None, key: Ed25519PrivateKey = KEY) -> bytes:
    """Signs without asking whether the verifier would take it."""
    return envelope.seal(payload.encode(receipt), opened, key).encode()


def forge_payload(change: Callable[[dict[str, Any]], object]) -> bytes:
    """Signs a payload that was changed as plain CBOR."""
    claims = cbor2.loads(payload.encode(example_receipt()[0]))
    change(claims)
    return envelope.seal(cbor2.dumps(claims, canonical=True), None, KEY).encode()


def pieces(data: bytes) -> list[Any]:
    value: list[Any] = cbor2.loads(data).value
    return value


def assemble(parts: list[Any]) -> bytes:
    return cbor2.dumps(cbor2.CBORTag(18, parts), canonical=True)


def test_what_was_signed_is_read_back_whole() -> None:
    receipt, opened = example_receipt(stop=["\n\n", "é"], stop_token_ids=[9])
    signed = VERIFIER.form(sign(receipt, opened, KEY))
    assert signed.receipt == receipt
    assert VERIFIER.count(signed) == opened


def test_another_cose_library_call_verifies_the_signature() -> None:
    key = COSEKey.new({1: 1, -1: 6, -2: KEY.public_key().public_bytes_raw(), 2: cose.key_id(KEY.public_key())})
    assert COSE.new().decode(strip(example()), key) == payload.encode(example_receipt(stop=["\n\n"])[0])


def test_a_flipped_bit_anywhere_is_refused() -> None:
    data = example()
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(VerificationError):
                check(bytes(flipped))


def test_a_receipt_cut_off_anywhere_is_refused() -> None:
    data = example()
    for size in range(len(data)):
        with pytest.raises(Malformed):
            check(data[:size])


@pytest.mark.parametrize("tail", [b"\x00", b"\xf6", b"more"])
def test_bytes_after_the_end_are_refused(tail: bytes) -> None:
    with pytest.raises(Malformed):
        check(example() + tail)


@settings(max_examples=200)
@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: b"\xd2\x84" + tail))
def test_random_bytes_give_a_verification_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(VerificationError):
        check(data)


@settings(max_examples=300)
@given(st.data())
def test_mutated_receipts_give_a_verification_error_and_nothing_else(data: st.DataObject) -> None:
    original = example()
    mutant = original
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(mutant)))
        end = data.draw(st.integers(start, min(len(mutant), start + 12)))
        mutant = mutant[:start] + data.draw(st.binary(max_size=12)) + mutant[end:]
    if mutant == original:
        return
    with pytest.raises(VerificationError):
        check(mutant)


JSONLIKE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9) | st.integers(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200)
@given(st.data())
def test_any_value_in_any_place_of_a_signed_payload_gives_a_verification_error_or_reads_the_same(
    data: st.DataObject,
) -> None:
    """A hostile signer is trusted with its key, not with the shape of what it signs."""
    value = data.draw(JSONLIKE)

    def change(claims: dict[str, Any]) -> None:
        place = claims
        name = data.draw(st.sampled_from(sorted(claims)))
        if isinstance(claims[name], dict):
            place = claims[name]
            name = data.draw(st.sampled_from(sorted(place)))
        place[name] = value

    forged = forge_payload(change)
    try:
        signed = VERIFIER.form(forged)
    except VerificationError:
        return
    assert payload.encode(signed.receipt) == pieces(forged)[2]


@settings(max_examples=100)
@given(st.lists(JSONLIKE, min_size=4, max_size=4))
def test_any_values_in_the_envelope_give_a_verification_error(parts: list[Any]) -> None:
    with pytest.raises(VerificationError):
        check(assemble(parts))


@settings(max_examples=100)
@given(JSONLIKE)
def test_any_value_for_the_openings_gives_a_verification_error(value: object) -> None:
    protected, _, body, signature = pieces(example())
    with pytest.raises(VerificationError):
        check(assemble([protected, {-70600: value}, body, signature]))


def test_a_token_swapped_in_the_openings_is_refused() -> None:
    receipt, opened = example_receipt()
    for i in range(len(opened.output_token_ids)):
        tokens = list(opened.output_token_ids)
        tokens[i] += 1
        swapped = dataclasses.replace(opened, output_token_ids=tuple(tokens))
        with pytest.raises(OpeningMismatch, match="opened output"):
            check(forge(receipt, swapped))


def test_two_tokens_exchanged_in_the_openings_are_refused() -> None:
    receipt, opened = example_receipt()
    exchanged = dataclasses.replace(opened, output_token_ids=opened.output_token_ids[::-1])
    with pytest.raises(OpeningMismatch):
        check(forge(receipt, exchanged))


@pytest.mark.parametrize("output", [(4, 5, 6), (4, 5, 6, 7, 8), ()])
def test_openings_with_more_or_fewer_tokens_than_billed_are_refused(output: tuple[int, ...]) -> None:
    receipt, opened = example_receipt()
    with pytest.raises(OpeningMismatch, match="number of output tokens") as refusal:
        check(forge(receipt, dataclasses.replace(opened, output_token_ids=output)))
    assert refusal.value.evidence == {"signed": "4", "opened": str(len(output))}


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_token_ids": (1, 2, 4)},
        {"prompt_token_ids": (1, 2)},
        {"stop": ("x",)},
        {"stop": ()},
        {"salt_key": bytes(32)},
    ],
)
def test_another_prompt_stop_string_or_salt_in_the_openings_is_refused(change: dict[str, Any]) -> None:
    receipt, opened = example_receipt(stop=["\n\n"])
    with pytest.raises(OpeningMismatch):
        check(forge(receipt, dataclasses.replace(opened, **change)))


def test_an_empty_stop_string_is_refused_before_a_matcher_meets_it() -> None:
    """It would end every answer at its first token; the tokens level once ended with a ValueError."""
    with pytest.raises(Malformed, match="openings"):
        check(forge(*example_receipt(stop=["x", ""])))


def test_openings_of_another_request_are_refused() -> None:
    receipt, _ = example_receipt(request_id="mine")
    _, others = example_receipt(request_id="theirs", output=(4, 5, 6, 8))
    with pytest.raises(OpeningMismatch):
        check(forge(receipt, others))


def test_a_signature_replayed_on_another_receipt_is_refused() -> None:
    theirs = pieces(example())
    mine = pieces(sign(*example_receipt(request_id="mine"), KEY))
    with pytest.raises(BadSignature):
        check(assemble([*mine[:3], theirs[3]]))


def test_a_count_changed_and_signed_again_by_another_key_is_refused() -> None:
    receipt, _ = example_receipt()
    inflated = dataclasses.replace(receipt, evidence=dataclasses.replace(receipt.evidence, cached_prompt_tokens=1))
    with pytest.raises(Untrusted) as refusal:
        check(forge(inflated, key=OTHER_KEY))
    assert refusal.value.evidence["signer"] == cose.key_id(OTHER_KEY.public_key()).hex()


def test_another_keys_signature_under_the_trusted_key_id_is_refused() -> None:
    protected = cbor.dumps({1: -8, 3: envelope.CONTENT_TYPE, 4: cose.key_id(KEY.public_key())})
    body = payload.encode(example_receipt()[0])
    signature = OTHER_KEY.sign(cbor2.dumps(["Signature1", protected, b"", body]))
    with pytest.raises(BadSignature):
        VERIFIER.form(assemble([protected, {}, body, signature]))


def test_the_trusted_keys_signature_under_another_key_id_is_refused() -> None:
    protected = cbor.dumps({1: -8, 3: envelope.CONTENT_TYPE, 4: cose.key_id(OTHER_KEY.public_key())})
    body = payload.encode(example_receipt()[0])
    signature = KEY.sign(cbor2.dumps(["Signature1", protected, b"", body]))
    with pytest.raises(Untrusted):
        VERIFIER.form(assemble([protected, {}, body, signature]))


@pytest.mark.parametrize(
    "header",
    [
        {},
        {1: -8, 3: envelope.CONTENT_TYPE},
        {1: -7, 3: envelope.CONTENT_TYPE, 4: bytes(32)},
        {1: -8, 3: "application/cbor", 4: bytes(32)},
        {1: -8, 3: envelope.CONTENT_TYPE, 4: bytes(8)},
        {1: -8, 2: [9], 3: envelope.CONTENT_TYPE, 4: bytes(32), 9: 1},
        [1, 2],
        7,
    ],
)
def test_a_protected_header_that_says_anything_else_is_refused(header: object) -> None:
    _, _, body, signature = pieces(example())
    with pytest.raises(Malformed, match="protected header"):
        check(assemble([cbor2.dumps(header, canonical=True), {}, body, signature]))


@pytest.mark.parametrize("label", [1, 4, 395, -70602, "openings"])
def test_an_unknown_unprotected_header_is_refused(label: int | str) -> None:
    protected, _, body, signature = pieces(example())
    with pytest.raises(Malformed, match="unprotected header"):
        check(assemble([protected, {label: b""}, body, signature]))


def test_unknown_keys_in_a_signed_payload_are_refused() -> None:
    for change in (
        lambda claims: claims.update(discount=1),
        lambda claims: claims["model"].update(quantised=True),
        lambda claims: claims["usage"].update({"joules ": 1.0}),
    ):
        with pytest.raises(Malformed, match="keys"):
            VERIFIER.form(forge_payload(change))


def test_missing_keys_in_a_signed_payload_are_refused() -> None:
    whole = cbor2.loads(payload.encode(example_receipt()[0]))
    for name in whole:
        with pytest.raises(Malformed):
            VERIFIER.form(forge_payload(lambda claims, name=name: claims.pop(name)))  # type: ignore[misc]  # bound now


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        (None, "v", 2),
        (None, "v", True),
        (None, "request_id", "a b"),
        (None, "request_id", "a\n"),
        (None, "request_id", "a" * 65),
        ("model", "weights", bytes(31)),
        ("model", "name", "\x1b[2J"),
        ("model", "dtype", "int4"),
        ("request", "temperature", float("nan")),
        ("request", "temperature", float("inf")),
        ("request", "temperature", -0.1),
        ("request", "temperature", 1),
        ("request", "top_p", 0.0),
        ("request", "top_p", 1.5),
        ("request", "seed", -1),
        ("request", "max_tokens", 0),
        ("request", "prompt_tokens", 0),
        ("request", "stop_token_ids", [0] * 1025),
        ("request", "ignore_eos", 1),
        ("output", "tokens", True),
        ("output", "segments", [{"kind": "visible", "tokens": 0}]),
        ("output", "finish_reason", "bored"),
        ("usage", "joules", "plenty"),
        ("usage", "joules", float("nan")),
        ("usage", "joules", float("inf")),
    ],
)
def test_claims_outside_the_schema_are_refused(part: str | None, name: str, value: object) -> None:
    def change(claims: dict[str, Any]) -> None:
        (claims[part] if part else claims)[name] = value

    with pytest.raises((Malformed, Inconsistent)):
        VERIFIER.form(forge_payload(change))


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("output", {"hidden": 1}),
        ("output", {"visible": 3}),
        ("output", {"tokens": 3, "visible": 3}),
        ("output", {"segments": ()}),
        ("evidence", {"accepted": 5, "drafted": 5}),
        ("evidence", {"accepted": 3, "drafted": 2}),
        ("evidence", {"passes": 1}),
        ("evidence", {"passes": 5}),
        ("evidence", {"drafting": "off"}),
        ("evidence", {"cached_prompt_tokens": 4}),
        ("request", {"max_tokens": 3}),
        ("request", {"max_tokens": 5}),
        ("request", {"seed": None, "seed_source": "none"}),
        ("request", {"seed_source": "none"}),
        ("request", {"temperature": 0.0, "seed": None}),
        ("usage", {"finished_unix_ms": 0}),
    ],
)
def test_claims_that_contradict_each_other_are_refused(part: str, changes: dict[str, Any]) -> None:
    receipt, _ = example_receipt()
    changed = dataclasses.replace(getattr(receipt, part), **changes)
    with pytest.raises(Inconsistent):
        VERIFIER.form(forge(dataclasses.replace(receipt, **{part: changed})))


def test_claims_that_contradict_each_other_in_one_way_alone_are_refused_for_that() -> None:
    """None of these is caught by another rule."""
    receipt, _ = example_receipt(finish_reason="stop", max_tokens=9)
    output, evidence = receipt.output, receipt.evidence
    halves = (payload.Segment("visible", 2), payload.Segment("visible", 2))
    for changes, message in (
        ({"request": dataclasses.replace(receipt.request, max_tokens=3)}, "more tokens than max_tokens"),
        ({"output": dataclasses.replace(output, segments=halves)}, "in a row are of one kind"),
        (
            {"output": dataclasses.replace(output, tokens=5), "evidence": dataclasses.replace(evidence, passes=3)},
            "do not add up to the tokens",
        ),
    ):
        with pytest.raises(Inconsistent, match=message):
            VERIFIER.form(forge(dataclasses.replace(receipt, **changes)))


def test_a_stop_without_any_token_is_refused() -> None:
    receipt, opened = example_receipt(output=(), finish_reason="cancelled")
    check(sign(receipt, opened, KEY))
    output = dataclasses.replace(receipt.output, finish_reason="stop")
    with pytest.raises(Inconsistent):
        VERIFIER.form(forge(dataclasses.replace(receipt, output=output)))


def duplicate_key(body: bytes) -> bytes:
    return bytes([body[0] + 1]) + b"\x61v\x01" + body[1:]


def longer_number(body: bytes) -> bytes:
    return body.replace(b"\x61v\x01", b"\x61v\x18\x01")


def unsorted_keys(body: bytes) -> bytes:
    return body[:1] + body[4:] + body[1:4]


def unbounded_map(body: bytes) -> bytes:
    return b"\xbf" + body[1:] + b"\xff"


@pytest.mark.parametrize("twist", [duplicate_key, longer_number, unsorted_keys, unbounded_map])
def test_a_payload_in_another_encoding_of_the_same_claims_is_refused(twist: Callable[[bytes], bytes]) -> None:
    body = payload.encode(example_receipt()[0])
    assert body[1:4] == b"\x61v\x01"
    assert cbor2.loads(twist(body)) == cbor2.loads(body)
    with pytest.raises(Malformed):
        VERIFIER.form(envelope.seal(twist(body), None, KEY).encode())


def test_an_envelope_in_another_encoding_of_the_same_parts_is_refused() -> None:
    """Else one receipt would have many digests."""
    data = example()
    protected, unprotected, body, _ = pieces(data)
    longer = b"\xd2\x84\x59" + len(protected).to_bytes(2, "big") + data[4:]
    assert cbor2.loads(longer) == cbor2.loads(data)
    header = cbor2.loads(protected)
    unsorted = cbor2.dumps({label: header[label] for label in (4, 3, 1)})
    body_to_sign = cbor2.dumps(["Signature1", unsorted, b"", body])
    for forged in (longer, assemble([unsorted, unprotected, body, KEY.sign(body_to_sign)])):
        with pytest.raises(Malformed, match="deterministic form"):
            check(forged)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x81" * 100_000,
        b"\xa1\x00" * 50_000,
        b"\xd2" * 100_000,
        b"\x9f" * 1000,
        b"\x9b" + b"\xff" * 8,
        b"\xbb" + b"\xff" * 8,
        b"\x5b" + b"\xff" * 8,
        b"\x98\xff" + b"\x00" * 255,
        b"\xc4\x82\x1b\x7f\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\xd8\x23\x67(a+)+$(",
        b"\xd8\x1c\x81\xd8\x1d\x00",
        b"\x99\xff\xff" + b"\x00" * 65535,
    ],
)
def test_a_bomb_is_refused_in_every_place(bomb: bytes) -> None:
    protected, _, body, signature = pieces(example())
    head = b"\xd2\x84"
    parts: list[object] = [protected, {}, body, signature]
    whole = [cbor2.dumps(part, canonical=True) for part in parts]
    wrapped = [
        bomb,
        b"\xd2" + bomb,
        *(head + b"".join([*whole[:i], bomb, *whole[i + 1 :]]) for i in range(4)),
        assemble([protected, {}, bomb, signature]),
        assemble([bomb, {}, body, signature]),
    ]
    for data in wrapped:
        with pytest.raises(Malformed):
            check(data)


def test_an_oversize_receipt_is_refused_unread() -> None:
    with pytest.raises(Malformed, match="larger than any receipt"):
        check(bytes(envelope.MAX_RECEIPT_BYTES + 1))


def test_an_oversize_payload_is_refused() -> None:
    protected, _, _, signature = pieces(example())
    with pytest.raises(Malformed, match="payload is larger"):
        check(assemble([protected, {}, bytes(envelope.MAX_PAYLOAD_BYTES + 1), signature]))


def test_stripping_takes_the_openings_and_leaves_signature_and_digest() -> None:
    data = example()
    bare = strip(data)
    assert parse(bare).openings is None
    assert VERIFIER.form(bare).receipt == VERIFIER.form(data).receipt
    assert receipt_digest(bare) == receipt_digest(data) == hashlib.sha256(bare).digest()
    with pytest.raises(NotCheckable):
        check(bare)


def test_only_its_own_openings_can_be_put_back() -> None:
    data = example()
    _, opened = example_receipt(stop=["\n\n"])
    assert attach(strip(data), opened) == data
    with pytest.raises(OpeningMismatch):
        attach(strip(data), dataclasses.replace(opened, output_token_ids=(4, 5, 6, 9)))


def test_a_stripped_receipt_does_not_tell_the_prompt_or_the_output() -> None:
    """Without salts, whoever guesses the text could confirm the guess from the digests."""
    bare = parse(strip(example())).receipt
    assert merkle.root([merkle.leaf_hash(openings.pack_ids([token])) for token in (4, 5, 6, 7)]) != bare.output.root
    assert prompt_digest((1, 2, 3), bytes(32)) != bare.request.prompt
    assert stop_digest((), SALT_KEY) != stop_digest((), bytes(32))


def test_without_any_trusted_key_a_true_receipt_is_not_checkable_and_nonsense_is_still_refused() -> None:
    nobody = ReceiptVerifier([])
    with pytest.raises(NotCheckable):
        nobody.form(example())
    with pytest.raises(Malformed):
        nobody.form(b"nonsense")


def test_the_verifiers_own_rules_hold_before_anything_is_signed() -> None:
    receipt, opened = example_receipt()
    with pytest.raises(OpeningMismatch):
        sign(receipt, dataclasses.replace(opened, output_token_ids=(4, 5, 6, 9)), KEY)
    with pytest.raises(Inconsistent):
        sign(dataclasses.replace(receipt, output=dataclasses.replace(receipt.output, hidden=1)), opened, KEY)


@pytest.mark.parametrize("signed", [2, 4, 2**32 - 1])
def test_another_number_of_prompt_tokens_than_the_opened_ones_cannot_be_billed(signed: int) -> None:
    """The digest says which tokens the prompt has, the count beside it what is paid."""
    receipt, opened = example_receipt()
    billed = dataclasses.replace(receipt, request=dataclasses.replace(receipt.request, prompt_tokens=signed))
    with pytest.raises(OpeningMismatch, match="another length"):
        check(envelope.seal(payload.encode(billed), opened, KEY).encode())


def test_hidden_tokens_are_counted_and_signed_for_like_the_others() -> None:
    receipt, opened = example_receipt(output=(5, 6, 4, 7), hidden=payload.HiddenMarkers(5, 4))
    assert (receipt.output.hidden, receipt.output.visible) == (3, 1)
    check(sign(receipt, opened, KEY))


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20), st.data())
def test_one_token_can_be_opened_alone(tokens: list[int], data: st.DataObject) -> None:
    tokens = [*tokens, 7]
    leaves = openings.token_leaves("r", tokens, SALT_KEY)
    index = data.draw(st.integers(0, len(tokens) - 1))
    leaf = openings.token_leaf("r", index, tokens[index], openings.token_salt(SALT_KEY, index))
    path = merkle.inclusion_path(leaves, index)
    assert merkle.verify_inclusion(leaf, index, len(tokens), path, merkle.root(leaves))


def test_leaves_and_digests_are_made_as_documented() -> None:
    """Written out here once more, so that they cannot change unnoticed: old receipts must stay checkable."""
    salt = hmac.digest(SALT_KEY, (1).to_bytes(8, "big"), "sha256")
    assert openings.token_salt(SALT_KEY, 1) == salt
    entry = b"countersign/token/v1" + b"\x03abc" + (1).to_bytes(8, "big") + (515).to_bytes(4, "big") + salt
    assert openings.token_leaf("abc", 1, 515, salt) == hashlib.sha256(b"\x00" + entry).digest()
    domain = b"countersign/prompt/v1"
    prompt = domain + hmac.digest(SALT_KEY, domain, "sha256") + b"\x00\x00\x01\x02"
    assert prompt_digest((258,), SALT_KEY) == hashlib.sha256(prompt).digest()
    domain = b"countersign/stop/v1"
    stop = domain + hmac.digest(SALT_KEY, domain, "sha256") + b"\x00\x00\x00\x02\xc3\xa9\x00\x00\x00\x01a"
    assert stop_digest(("é", "a"), SALT_KEY) == hashlib.sha256(stop).digest()


def test_an_error_shows_no_control_characters_of_a_hostile_receipt() -> None:
    shown = str(Malformed("refused", cause="\x1b[2J\n\x9b" * 100, key=b"\x00\xff"))
    assert shown.isprintable()
    assert "key: 00ff" in shown
    assert len(shown) < 150


def test_the_error_of_a_hostile_receipt_cannot_steer_the_terminal() -> None:
    with pytest.raises(Malformed) as refusal:
        VERIFIER.form(forge_payload(lambda claims: claims["model"].update(dtype="\x1b[2J" * 1000)))
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 300
