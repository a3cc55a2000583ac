"""Block keys: the format, byte for byte, and that no two inputs share one."""

from __future__ import annotations

import json
import struct
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.protocol.keys import BLOCK_TOKENS, block_key, chain_keys, root_key

WEIGHTS = bytes(range(32))
ROOT = root_key(WEIGHTS, "fp32/v1", "acme")


def test_the_root_key_is_the_hash_of_its_written_out_encoding() -> None:
    written = b"countersign/kv/root/v1\0" + b"\x20\0\0\0" + WEIGHTS + b"\7\0\0\0fp32/v1" + b"\4\0\0\0acme"
    assert sha256(written).digest() == ROOT
    assert ROOT.hex() == "d491f4de2ffa9ba08637175ad7c0e1be1bcc8d4f5e8e7972c2293c21bb8798a3"


def test_a_block_key_is_the_hash_of_its_written_out_encoding() -> None:
    ids = b"\1\0\0\0" + b"\x2c\1\0\0" + b"\xff\xff\xff\xff"
    key = block_key(ROOT, [1, 300, 2**32 - 1])
    assert key == sha256(b"countersign/kv/block/v1\0" + ROOT + b"\3\0\0\0" + ids).digest()
    assert key.hex() == "7d2bf161b72d0bcf04d215c7496b9965b1fb27fa3b687a594399c53e9355caa0"


def test_a_chain_has_a_key_for_each_full_block_and_none_for_the_rest() -> None:
    token_ids = list(range(40))
    first = block_key(ROOT, token_ids[:16])
    assert chain_keys(ROOT, token_ids) == [first, block_key(first, token_ids[16:32])]
    assert chain_keys(ROOT, token_ids[:15]) == []
    assert chain_keys(ROOT, token_ids[:16]) == [first]


VECTORS = json.loads((Path(__file__).parent / "keys.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['tenant']}-{len(vector['token_ids'])}")
def test_keys_are_those_of_the_vectors_that_other_languages_check_too(vector: dict[str, Any]) -> None:
    root = root_key(bytes.fromhex(vector["weights_sha256"]), vector["cache_format"], vector["tenant"])
    assert root.hex() == vector["root"]
    assert [key.hex() for key in chain_keys(root, vector["token_ids"])] == vector["blocks"]


def test_no_vector_shares_a_key_with_another_chain() -> None:
    roots = [vector["root"] for vector in VECTORS]
    assert len(set(roots)) == 5


def test_a_root_without_a_tenant_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a tenant"):
        root_key(WEIGHTS, "fp32/v1", "")


tenants = st.text(min_size=1, max_size=4)
root_inputs = st.tuples(st.binary(max_size=4), st.text(max_size=4), tenants)


@given(root_inputs, root_inputs)
def test_two_roots_are_equal_only_if_all_they_depend_on_is(
    one: tuple[bytes, str, str], other: tuple[bytes, str, str]
) -> None:
    assert (root_key(*one) == root_key(*other)) == (one == other)


@given(weights=st.binary(max_size=2), parts=st.text(min_size=2, max_size=6), cut=st.integers(0, 4))
def test_no_part_of_the_root_flows_into_the_next(weights: bytes, parts: str, cut: int) -> None:
    cut = min(cut, len(parts) - 1)
    moved = root_key(weights, parts[:cut], parts[cut:])
    assert (moved == root_key(weights, parts[:-1], parts[-1:])) == (cut == len(parts) - 1)


def test_a_key_that_is_no_hash_and_ids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 5"):
        block_key(b"short", [1])
    for token_id in (-1, 2**32):
        with pytest.raises(struct.error):
            block_key(ROOT, [token_id])


def test_a_block_is_a_page_of_the_engines_cache() -> None:
    assert BLOCK_TOKENS == PAGE_TOKENS
