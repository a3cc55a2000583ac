"""The public draw: fixed by its inputs, fair, and the same for whoever repeats it."""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify.sampling import Purpose, beacon, draws_needed, positions, selected

BEACON = beacon(b"countersign.example/log\n7\nroot\n", b"signature")
DIGESTS = [hashlib.sha256(bytes([i % 256, i // 256])).digest() for i in range(4000)]


def test_the_draw_is_the_one_that_the_specification_gives() -> None:
    # Written out once more from the docstring: another implementation must come to the same numbers.
    text = b"countersign.example/log\n7\nroot\n"
    by_hand = hashlib.sha256(b"countersign/beacon/v1" + struct.pack(">I", len(text)) + text + b"signature").digest()
    assert by_hand == BEACON
    seed = hashlib.sha256(b"countersign/draw/v1" + b"\x0bactivations" + by_hand + DIGESTS[0]).digest()
    words = struct.unpack(">4Q", hashlib.sha256(seed + bytes(8)).digest())
    order = list(range(100))
    for place in range(3):
        taken = place + words[place] % (100 - place)
        order[place], order[taken] = order[taken], order[place]
    assert positions("activations", BEACON, DIGESTS[0], 100, 3) == tuple(sorted(order[:3]))


def test_known_answers_stay_what_they_are() -> None:
    # Verdicts of years ago name their positions by the beacon alone.
    assert positions("activations", BEACON, DIGESTS[0], 300, 4) == (2, 100, 112, 152)
    assert positions("leaves", BEACON, DIGESTS[0], 300, 4) == (47, 82, 115, 124)
    assert [selected(BEACON, digest, 0.5) for digest in DIGESTS[:8]] == [0, 0, 1, 0, 1, 0, 0, 0]


@given(population=st.integers(0, 300), count=st.integers(0, 320), which=st.integers(0, 3999))
def test_positions_are_different_ascending_and_of_the_population(population: int, count: int, which: int) -> None:
    drawn = positions("leaves", BEACON, DIGESTS[which], population, count)
    assert len(drawn) == min(count, population)
    assert list(drawn) == sorted(set(drawn))
    assert all(0 <= position < population for position in drawn)


@given(population=st.integers(0, 60), which=st.integers(0, 3999))
def test_fewer_positions_are_among_more(population: int, which: int) -> None:
    draws = [set(positions("leaves", BEACON, DIGESTS[which], population, count)) for count in range(population + 2)]
    assert all(fewer <= more for fewer, more in pairwise(draws))


def test_every_set_of_positions_is_as_likely() -> None:
    sets = Counter(positions("blocks", BEACON, digest, 5, 2) for digest in DIGESTS)
    expected = len(DIGESTS) / 10
    assert len(sets) == 10
    # Chi-square with 9 degrees of freedom: above 33 once in 7,000 runs of a fair draw; these digests are fixed.
    assert sum((count - expected) ** 2 / expected for count in sets.values()) < 33


def test_the_share_of_receipts_is_the_one_asked_for() -> None:
    share = sum(selected(BEACON, digest, 0.25) for digest in DIGESTS) / len(DIGESTS)
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(DIGESTS))
    assert all(selected(BEACON, digest, 1.0) for digest in DIGESTS)
    assert not any(selected(BEACON, digest, 0.0) for digest in DIGESTS)


def test_who_is_audited_at_a_share_is_audited_at_a_larger_one() -> None:
    few = {digest for digest in DIGESTS if selected(BEACON, digest, 0.1)}
    assert few <= {digest for digest in DIGESTS if selected(BEACON, digest, 0.3)}


@pytest.mark.parametrize(
    "other",
    [
        positions("leaves", BEACON, DIGESTS[0], 10_000, 8),
        positions("activations", beacon(b"x", b"signature"), DIGESTS[0], 10_000, 8),
        positions("activations", BEACON, DIGESTS[1], 10_000, 8),
    ],
    ids=["purpose", "beacon", "receipt"],
)
def test_purpose_beacon_and_receipt_each_change_the_draw(other: tuple[int, ...]) -> None:
    assert positions("activations", BEACON, DIGESTS[0], 10_000, 8) != other


def test_text_and_signature_of_a_checkpoint_do_not_run_into_each_other() -> None:
    assert beacon(b"ab", b"c") != beacon(b"a", b"bc")


def test_so_many_draws_find_a_rare_cheat() -> None:
    assert draws_needed(0.01, 0.99) == 459
    assert 1 - 0.99**459 >= 0.99 > 1 - 0.99**458


@pytest.mark.parametrize(("share", "power"), [(0, 0.5), (1, 0.5), (0.5, 0), (0.5, 1), (math.nan, 0.5)])
def test_draws_for_no_share_or_for_certainty_are_refused(share: float, power: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        draws_needed(share, power)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_outside_0_and_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        selected(BEACON, DIGESTS[0], share)


@pytest.mark.parametrize("purpose", ["receipts", "leaves"])
def test_what_is_no_digest_is_refused(purpose: Purpose) -> None:
    with pytest.raises(ValueError, match="not 32 each"):
        positions(purpose, b"short", DIGESTS[0], 4, 1)
    with pytest.raises(ValueError, match="-1 positions"):
        positions(purpose, BEACON, DIGESTS[0], 4, -1)
