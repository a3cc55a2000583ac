"""Count attacks: whatever a provider bills beyond the tokens it can open is found."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countersign.verify import envelope, payload
from countersign.verify.coin import bill, challenge, forgeries
from countersign.verify.coin.challenge import Demand
from countersign.verify.coin.counting import POWER, SHARE, met
from countersign.verify.errors import Inconsistent, Malformed, OpeningMismatch, VerificationError
from countersign.verify.payload import Receipt
from countersign.verify.receipt import HiddenMarkers, Openings, ReceiptVerifier, SignedReceipt, parse
from countersign.verify.testing import example_receipt, signing_key

KEY = signing_key(1)
MARKERS = HiddenMarkers(1, 2)
ALL = Demand(leaves=10_000)


def example(hidden: int = 30, request_id: str = "example-1") -> tuple[Receipt, Openings]:
    thought = tuple(1000 + i % 7 for i in range(hidden - 2))
    output = (5, 6, 1, *thought, 2, 7, 8)
    return example_receipt(output=output, hidden=MARKERS, request_id=request_id)


def signed_as_is(receipt: Receipt) -> SignedReceipt:
    """Signed without asking whether a verifier would take it."""
    return parse(envelope.seal(payload.encode(receipt), None, KEY).encode())


def beacon(number: int = 0) -> bytes:
    return hashlib.sha256(b"beacon %d" % number).digest()


DEMANDS = st.builds(
    Demand,
    leaves=st.integers(0, 40),
    blocks=st.integers(0, 6),
    block_tokens=st.integers(1, 12),
    context=st.booleans(),
)


@given(DEMANDS, st.integers(0, 100), st.integers(2, 60))
def test_an_honest_provider_can_open_whatever_is_drawn(demand: Demand, number: int, hidden: int) -> None:
    receipt, opened = example(hidden)
    signed = signed_as_is(receipt)
    asked = challenge.draw(signed, beacon(number), demand)
    response = challenge.decode(challenge.encode(challenge.respond("example-1", opened, asked)))
    found = challenge.check(signed, asked, response)
    assert all(opened.output_token_ids[position] == token for position, token in found.items())
    assert set(asked.leaves) <= set(found)
    assert len(asked.leaves) == min(demand.leaves, hidden)
    assert all(
        stop - start <= demand.block_tokens and set(range(start, stop)) <= set(found) for start, stop in asked.blocks
    )
    assert set(found) <= {*range(2, 2 + hidden), hidden + 3}, "but for the last, only hidden tokens are drawn"
    if demand.context and asked.blocks:
        assert set(range(2, asked.blocks[-1][1])) <= set(found)


def test_blocks_lie_within_one_hidden_segment_each() -> None:
    output = (1, 10, 11, 12, 2, 7, 7, 1, 20, 21, 2, 8)
    receipt, _ = example_receipt(output=output, hidden=MARKERS)
    asked = challenge.draw(signed_as_is(receipt), beacon(), Demand(leaves=0, blocks=99, block_tokens=4))
    assert asked.blocks == ((0, 4), (4, 5), (7, 11))


def test_another_beacon_draws_other_leaves_and_the_same_beacon_the_same() -> None:
    signed = signed_as_is(example(60)[0])
    draws = {challenge.draw(signed, beacon(i), Demand(leaves=8)).leaves for i in range(20)}
    assert len(draws) == 20
    assert challenge.draw(signed, beacon(3), Demand(leaves=8)).leaves in draws


@pytest.mark.parametrize("more", [1, 2, 30, 94, 222])
def test_the_last_leaf_is_always_opened(more: int) -> None:
    """Else the path of an early leaf would fit the true tree at several larger sizes too."""
    output = (1, *(1000 + i % 7 for i in range(33)))
    receipt, opened = example_receipt(output=output, hidden=MARKERS)
    honest = signed_as_is(receipt)
    asked = challenge.draw(honest, beacon(), Demand(leaves=1))
    assert len(output) - 1 in challenge.check(honest, asked, challenge.respond("example-1", opened, asked))
    forged = forgeries.forge("larger", receipt, opened, (0, 34), more)
    claimed = signed_as_is(forged.receipt)
    for number in range(20):
        asked = challenge.draw(claimed, beacon(number), Demand(leaves=1))
        with pytest.raises(VerificationError):
            challenge.check(claimed, asked, forged.respond(asked))


def test_every_hidden_leaf_is_drawn_equally_often() -> None:
    signed = signed_as_is(example(20)[0])
    counts = [0] * 24
    for number in range(2000):
        for leaf in challenge.draw(signed, beacon(number), Demand(leaves=2)).leaves:
            counts[leaf] += 1
    assert counts[:2] == counts[22:] == [0, 0]
    assert all(140 < count < 260 for count in counts[2:22]), "200 each, 4.4 standard deviations either way"


def inflated(name: forgeries.Name, hidden: int, more: int) -> forgeries.Forgery:
    return forgeries.forge(name, *example(hidden), (2, 2 + hidden), more)


@pytest.mark.parametrize("name", forgeries.NAMES)
@settings(max_examples=60, deadline=None)
@given(hidden=st.integers(5, 80), more=st.integers(1, 200))
def test_who_bills_tokens_without_leaves_cannot_open_the_whole(name: forgeries.Name, hidden: int, more: int) -> None:
    """Every attack, every time: with all leaves opened there is nowhere to hide."""
    forged = inflated(name, hidden, more)
    signed = signed_as_is(forged.receipt)
    asked = challenge.draw(signed, beacon(), ALL)
    with pytest.raises(VerificationError):
        challenge.check(signed, asked, forged.respond(asked))


@pytest.mark.parametrize("name", [name for name in forgeries.NAMES if name != "empty"])
@settings(max_examples=60, deadline=None)
@given(hidden=st.integers(5, 80), more=st.integers(1, 200), number=st.integers(0, 99))
def test_where_true_leaves_had_to_move_one_drawn_leaf_is_enough(
    name: forgeries.Name, hidden: int, more: int, number: int
) -> None:
    """The last leaf is opened with it, and knows its place and its request."""
    forged = inflated(name, hidden, more)
    signed = signed_as_is(forged.receipt)
    asked = challenge.draw(signed, beacon(number), Demand(leaves=1))
    with pytest.raises(VerificationError):
        challenge.check(signed, asked, forged.respond(asked))


def test_empty_leaves_are_missed_as_often_as_they_are_not_drawn() -> None:
    """30 true and 10 empty hidden leaves, 4 drawn: all four true with chance (30 29 28 27) / (40 39 38 37)."""
    forged = inflated("empty", 30, 10)
    signed = signed_as_is(forged.receipt)
    found = 0
    for number in range(400):
        asked = challenge.draw(signed, beacon(number), Demand(leaves=4))
        try:
            challenge.check(signed, asked, forged.respond(asked))
        except VerificationError:
            found += 1
    assert abs(found / 400 - (1 - 30 * 29 * 28 * 27 / (40 * 39 * 38 * 37))) < 0.1


def test_whoever_says_how_many_leaves_it_opens_cannot_say_so_that_an_empty_one_is_left_out() -> None:
    """The deployment sets the number, once it has seen the beacon."""
    forged = inflated("empty", 96, 32)
    signed = signed_as_is(forged.receipt)
    enough = [count for count in range(1, 33) if met(128, count, SHARE) >= POWER]
    passed = 0
    for number in range(300):
        for count in enough:
            asked = challenge.draw(signed, beacon(number), Demand(leaves=count))
            if not any(2 + 96 <= leaf < 2 + 128 for leaf in asked.leaves):
                passed += 1
                break
    assert passed / 300 <= 1 - POWER + 0.05


def test_segments_that_do_not_add_up_are_no_receipt() -> None:
    receipt, _ = example()
    first, hidden, last = receipt.output.segments
    output = replace(receipt.output, segments=(first, replace(hidden, tokens=hidden.tokens + 1), last))
    data = envelope.seal(payload.encode(replace(receipt, output=output)), None, KEY).encode()
    with pytest.raises(Inconsistent, match="segments"):
        ReceiptVerifier([KEY.public_key()]).form(data)


@settings(max_examples=200)
@given(st.data())
def test_a_mutated_response_is_refused_with_a_verification_error(data: st.DataObject) -> None:
    receipt, opened = example()
    signed = signed_as_is(receipt)
    asked = challenge.draw(signed, beacon(), Demand(leaves=3, blocks=1, block_tokens=4))
    good = challenge.encode(challenge.respond("example-1", opened, asked))
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 8)))
    bad = good[:start] + data.draw(st.binary(max_size=8)) + good[end:]
    if bad == good:
        return
    with pytest.raises(VerificationError):
        challenge.check(signed, asked, challenge.decode(bad))


def test_a_claim_of_billions_of_hidden_tokens_costs_nothing_to_refuse() -> None:
    receipt, opened = example()
    first, hidden, last = receipt.output.segments
    segments = (first, replace(hidden, tokens=2**32 - 5), last)
    output = replace(receipt.output, tokens=2**32 - 1, hidden=2**32 - 5, segments=segments)
    signed = signed_as_is(replace(receipt, output=output))
    asked = challenge.draw(signed, beacon(), Demand(leaves=8, blocks=2, context=True))
    with pytest.raises(Malformed):
        challenge.check(signed, asked, challenge.respond("example-1", opened, replace(asked, runs=((2, 5),))))


def test_a_response_of_another_size_is_refused() -> None:
    receipt, opened = example()
    signed = signed_as_is(receipt)
    asked = challenge.draw(signed, beacon(), Demand(leaves=3))
    response = challenge.respond("example-1", opened, asked)
    with pytest.raises(OpeningMismatch):
        challenge.check(signed, asked, replace(response, hashes=response.hashes[:-1]))


@pytest.mark.parametrize("numbers", [(-1, 0, 1), (0, -1, 1), (0, 0, 0)])
def test_a_demand_for_less_than_nothing_is_an_error(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="leaves"):
        Demand(*numbers)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("request", {"request_id": "example-2"}),
        ("prompt tokens", {"prompt_tokens": 4}),
        ("output tokens", {"output_tokens": 35}),
        ("hidden tokens", {"hidden_tokens": 31}),
    ],
)
def test_a_bill_for_anything_else_than_the_receipt_s_tokens_is_refused(name: str, changed: dict[str, object]) -> None:
    receipt, _ = example()
    honest = bill.Bill(34, 3, 30, "example-1")
    bill.check(receipt, honest)
    bill.check(receipt, bill.Bill(34))
    with pytest.raises(Inconsistent, match=name):
        bill.check(receipt, replace(honest, **changed))  # type: ignore[arg-type]
