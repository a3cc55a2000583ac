"""Deterministic CBOR: the one encoding of each value, and nothing that a receipt does not use."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify import cbor
from countersign.verify.errors import Malformed

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=9)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=6,
)


@given(VALUES)
def test_a_value_is_read_back_from_its_one_encoding(value: object) -> None:
    data = cbor.dumps(value)
    assert cbor.loads(data) == value


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (1000000000000, "1b000000e8d4a51000"),
        (-1000, "3903e7"),
        (1.5, "f93e00"),
        (100000.0, "fa47c35000"),
        (1.1, "fb3ff199999999999a"),
        ("\u6c34", "63e6b0b4"),
        ({"a": 1, "b": [2, 3]}, "a26161016162820203"),
        ([False, True, None], "83f4f5f6"),
    ],
)
def test_values_have_the_encodings_of_rfc_8949_appendix_a(value: object, data: str) -> None:
    assert cbor.dumps(value).hex() == data
    assert cbor.loads(bytes.fromhex(data)) == value


@pytest.mark.parametrize(
    "data",
    [
        "1801",  # 1 in two bytes
        "1900ff",  # 255 in three
        "fa3fc00000",  # 1.5 in 32 bits
        "fb3ff8000000000000",  # 1.5 in 64
        "580161",  # a length in two bytes
        "a2616201616101",  # keys not sorted
        "a2616101616102",  # a key twice
        "9803010203",  # an array's size in two bytes
    ],
)
def test_another_encoding_of_a_value_is_refused(data: str) -> None:
    cbor2.loads(bytes.fromhex(data))
    with pytest.raises(Malformed, match="deterministic form"):
        cbor.loads(bytes.fromhex(data))


@pytest.mark.parametrize(
    "data",
    ["c11a514b67b0", "c249010000000000000000", "d81c80", "d8236161", "d9d9f700", "f7", "e0", "f820", "d20100"],
    ids=[
        "date",
        "big number",
        "shared",
        "regular expression",
        "self-described",
        "undefined",
        "simple",
        "simple 32",
        "sign1",
    ],
)
def test_items_that_receipts_do_not_use_never_reach_the_decoder(data: str) -> None:
    with pytest.raises(Malformed, match="a kind of CBOR item"):
        cbor.loads(bytes.fromhex(data))


@pytest.mark.parametrize("data", ["9f01ff", "bf6161 01ff", "5f4161ff", "7f6161ff", "ff", "1c", "3e"])
def test_items_of_unbounded_length_are_refused(data: str) -> None:
    with pytest.raises(Malformed, match="unbounded"):
        cbor.loads(bytes.fromhex(data))


def test_depth_and_number_of_items_are_bounded() -> None:
    def nested(depth: int) -> bytes:
        return b"\x81" * depth + b"\x00"

    assert cbor.loads(nested(cbor.MAX_DEPTH)) is not None
    assert cbor.loads(cbor.dumps([0] * (cbor.MAX_ITEMS - 1))) is not None
    for data in (nested(cbor.MAX_DEPTH + 1), nested(10**6), cbor.dumps([0] * cbor.MAX_ITEMS), b"\x9a\xff\xff\xff\xff"):
        with pytest.raises(Malformed, match=r"too many CBOR items|too early"):
            cbor.loads(data)


@pytest.mark.parametrize("tail", [b"\x00", b"\xff", b"\x81" * 9])
def test_bytes_after_the_value_are_refused(tail: bytes) -> None:
    with pytest.raises(Malformed, match="bytes follow"):
        cbor.loads(b"\x01" + tail)


def test_a_tag_stands_where_it_is_asked_for_and_nowhere_else() -> None:
    assert cbor.loads(b"\xd2\x01", tag=18) == 1
    for data in (b"\x01", b"\xd1\x01", b"\xd2\xd2\x01", b"\xd8\x12\x01"):
        with pytest.raises(Malformed):
            cbor.loads(data, tag=18)


@given(st.binary(max_size=40))
def test_any_bytes_are_read_as_they_would_be_written_or_refused(data: bytes) -> None:
    try:
        value = cbor.loads(data)
    except Malformed:
        return
    assert cbor.dumps(value) == data
