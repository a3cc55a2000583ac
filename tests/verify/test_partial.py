"""Receipts of answers with hidden tokens: what a client can check, and what it must not learn."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify import envelope, multiproof, partial, payload
from countersign.verify.audit import LevelReport, audit
from countersign.verify.coin import challenge, forgeries
from countersign.verify.coin.bill import Bill
from countersign.verify.coin.challenge import Demand
from countersign.verify.coin.counting import Drawn
from countersign.verify.errors import Inconsistent, Malformed, OpeningMismatch, VerificationError
from countersign.verify.openings import MAX_STOPS, salted_prompt, salted_stop
from countersign.verify.receipt import (
    HiddenMarkers,
    Openings,
    PartialOpenings,
    Receipt,
    ReceiptVerifier,
    attach,
    build_output,
    parse,
    sign,
    strip,
    withheld,
)
from countersign.verify.testing import SALT_KEY, example_receipt, signing_key

KEY = signing_key(1)
VERIFIER = ReceiptVerifier([KEY.public_key()])
MARKERS = HiddenMarkers(1, 2)
OUTPUT = (9, 1, 70_001, 70_002, 70_003, 2, 8, 7, 6)


def example(output: tuple[int, ...] = OUTPUT) -> tuple[Receipt, Openings]:
    return example_receipt(output=output, hidden=MARKERS, stop=["\n\n"])


def client_copy(output: tuple[int, ...] = OUTPUT) -> bytes:
    receipt, opened = example(output)
    return attach(strip(sign(receipt, opened, KEY)), withheld(receipt, opened))


def forge(receipt: Receipt, opened: partial.Disclosure) -> bytes:
    """Signs without asking whether a verifier would take it."""
    return envelope.seal(payload.encode(receipt), opened, KEY).encode()


def opened_partially(data: bytes) -> PartialOpenings:
    disclosed = parse(data).openings
    assert isinstance(disclosed, PartialOpenings)
    return disclosed


def test_a_client_sees_the_visible_tokens_and_checks_them_against_the_signed_root() -> None:
    signed = VERIFIER.form(client_copy())
    disclosed = VERIFIER.count(signed)
    assert isinstance(disclosed, PartialOpenings)
    assert disclosed.leaves.token_ids == (9, 8, 7, 6)
    assert signed.receipt.output.hidden == 5


def test_a_client_s_receipt_holds_neither_the_salt_key_nor_a_hidden_token() -> None:
    data = client_copy()
    assert SALT_KEY not in data
    for hidden in (70_001, 70_002, 70_003):
        assert hidden.to_bytes(4, "big") not in data


def test_answers_without_hidden_tokens_are_opened_whole() -> None:
    receipt, opened = example((9, 8, 7))
    assert withheld(receipt, opened) is opened


@given(st.lists(st.sampled_from([1, 2, 5, 6]), min_size=1, max_size=40).map(tuple))
def test_partial_openings_fit_whatever_a_model_says(output: tuple[int, ...]) -> None:
    receipt, opened = example(output)
    VERIFIER.count(VERIFIER.form(attach(strip(sign(receipt, opened, KEY)), withheld(receipt, opened))))


def test_a_changed_byte_anywhere_is_refused() -> None:
    data = client_copy()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        with pytest.raises(VerificationError):
            VERIFIER.count(VERIFIER.form(bytes(flipped)))


@pytest.mark.parametrize("more", [1, 5, 100, 2**20])
def test_hidden_tokens_that_are_claimed_on_top_do_not_fit_the_client_s_openings(more: int) -> None:
    """The tree is that of the true answer; the counts are not."""
    receipt, opened = example()
    first, hidden, last = receipt.output.segments
    output = replace(
        receipt.output,
        tokens=receipt.output.tokens + more,
        hidden=receipt.output.hidden + more,
        segments=(first, replace(hidden, tokens=hidden.tokens + more), last),
    )
    request = replace(receipt.request, max_tokens=output.tokens)
    evidence = replace(receipt.evidence, passes=output.tokens)
    inflated = replace(receipt, output=output, request=request, evidence=evidence)
    with pytest.raises(OpeningMismatch):
        VERIFIER.count(VERIFIER.form(forge(inflated, withheld(receipt, opened))))


def test_a_segment_that_begins_with_a_marker_cannot_be_sold_as_visible() -> None:
    receipt, opened = example()
    output = build_output("example-1", OUTPUT, SALT_KEY, finish_reason="length")
    claimed = replace(receipt, output=output)
    with pytest.raises(OpeningMismatch, match="segments"):
        VERIFIER.count(VERIFIER.form(forge(claimed, opened)))
    everything = partial.withhold(opened, "example-1", [(0, len(OUTPUT))])
    with pytest.raises(OpeningMismatch, match="begins a hidden segment"):
        VERIFIER.count(VERIFIER.form(forge(claimed, everything)))


def test_an_answer_to_a_prompt_that_ends_inside_a_thought_cannot_begin_as_visible() -> None:
    """Full openings show that by the markers; a client has the prompt as well."""
    receipt, opened = example_receipt(prompt=(5, 1), output=(9, 8, 2, 7), hidden=MARKERS)
    thought, _ = receipt.output.segments
    visible, hidden = replace(thought, kind="visible", tokens=2), replace(thought, tokens=2)
    honest = partial.withhold(opened, "example-1", [(3, 4)])
    VERIFIER.count(VERIFIER.form(forge(receipt, honest)))
    turned = replace(receipt.output, segments=(visible, hidden), hidden=2, visible=2)
    sold = partial.withhold(opened, "example-1", [(0, 2)])
    with pytest.raises(OpeningMismatch, match="begins as visible"):
        VERIFIER.count(VERIFIER.form(forge(replace(receipt, output=turned), sold)))


def test_a_salt_does_not_swallow_a_stop_string() -> None:
    """A longer salt, and a shorter one beside it: the same digest would open as two lists of stop strings."""
    receipt, opened = example()
    salt, swallowed = bytes(32), b"\0\0\0\2ab"
    short = bytes(32 - len(swallowed))
    request = replace(
        receipt.request,
        stop=salted_stop(["ab", "cd"], salt),
        prompt=salted_prompt(opened.prompt_token_ids, short),
    )
    assert salted_stop(["cd"], salt + swallowed) == request.stop
    two_ways = replace(
        partial.withhold(opened, "example-1", [(0, 1), (6, 9)]),
        stop=("cd",),
        stop_salt=salt + swallowed,
        prompt_salt=short,
    )
    with pytest.raises(Malformed):
        VERIFIER.count(VERIFIER.form(forge(replace(receipt, request=request), two_ways)))


def test_more_stop_strings_than_any_request_has_are_malformed() -> None:
    """Of partial openings as of full ones."""
    most = partial.to_cbor(replace(partial.withhold(example()[1], "example-1", [(0, 1)]), stop=("x",) * MAX_STOPS))
    assert isinstance(partial.from_cbor(most), PartialOpenings)
    with pytest.raises(Malformed):
        partial.from_cbor({**most, "stop": ["x"] * (MAX_STOPS + 1)})


def test_hidden_tokens_without_markers_contradict_the_receipt() -> None:
    receipt, opened = example()
    plain = replace(receipt, request=dataclasses.replace(receipt.request, hidden=None))
    with pytest.raises(Inconsistent, match="without markers"):
        sign(plain, opened, KEY)


def test_one_token_cannot_be_both_markers() -> None:
    with pytest.raises(Inconsistent, match="marker"):
        sign(*example_receipt(hidden=HiddenMarkers(1, 1)), KEY)


def test_the_audit_of_a_client_s_receipt_says_what_nobody_has_counted() -> None:
    report = audit(client_copy(), trusted_keys=[KEY.public_key()], reference=None)
    assert [(level.level, level.outcome) for level in report.levels][:3] == [
        ("form", "pass"),
        ("count", "inconclusive"),
        ("tokens", "inconclusive"),
    ]
    assert report.verdict == "inconclusive"
    assert report.levels[1].figures["hidden_tokens"] == 5
    assert "hidden tokens are not disclosed" in report.levels[2].summary


def drawn(leaves: int, name: forgeries.Name | None = None) -> tuple[bytes, Drawn]:
    """A client's copy with 40 hidden tokens, or 40 and 60 that are not there, and the provider's answer to a draw."""
    receipt, opened = example((1, *range(5000, 5038), 2, 8, 7))
    data = attach(strip(sign(receipt, opened, KEY)), withheld(receipt, opened))
    beacon, demand = bytes(range(32)), Demand(leaves=leaves)
    if name is None:
        response = challenge.respond("example-1", opened, challenge.draw(parse(data), beacon, demand))
        return data, Drawn(beacon, demand, challenge.encode(response))
    forged = forgeries.forge(name, receipt, opened, (0, 40), 60)
    visible = [(100, 102)]
    hashes = tuple(multiproof.hashes(forged.leaves, visible))
    shown = partial.LeafOpenings(tuple(forged.token_ids[100:]), tuple(forged.salts[100:]), hashes)
    changed = replace(
        forged.receipt,
        request=replace(receipt.request, max_tokens=102),
        evidence=replace(receipt.evidence, passes=102),
    )
    data = forge(changed, replace(partial.withhold(opened, "example-1", [(40, 42)]), leaves=shown))
    response = forged.respond(challenge.draw(parse(data), beacon, demand))
    return data, Drawn(beacon, demand, challenge.encode(response))


def counted(data: bytes, answer: Drawn) -> LevelReport:
    report = audit(data, trusted_keys=[KEY.public_key()], reference=None, levels=["count"], drawn=answer)
    return report.levels[-1]


def test_a_client_counts_hidden_tokens_by_a_draw() -> None:
    level = counted(*drawn(16))
    assert (level.level, level.outcome) == ("count", "pass")
    assert level.figures["opened_leaves"] == 16
    assert math.isclose(level.figures["power"], 1 - math.comb(30, 16) / math.comb(40, 16))


def test_a_draw_of_few_leaves_is_too_little_to_say() -> None:
    level = counted(*drawn(3))
    assert level.outcome == "inconclusive"
    assert level.figures["power"] < 0.9


def test_empty_leaves_among_the_hidden_are_met_by_a_draw() -> None:
    data, answer = drawn(16, "empty")
    assert audit(data, trusted_keys=[KEY.public_key()], reference=None, levels=["count"]).verdict == "inconclusive"
    assert counted(data, answer).outcome == "fail"


def test_the_answer_to_another_draw_is_refused() -> None:
    data, answer = drawn(16)
    assert counted(data, replace(answer, beacon=bytes(32))).outcome == "fail"
    assert counted(data, replace(answer, demand=Demand(leaves=15))).outcome == "fail"
    assert counted(data, replace(answer, demand=Demand(leaves=2**32))).outcome == "fail"
    assert counted(data, replace(answer, openings=b"")).outcome == "fail"


@pytest.mark.parametrize("disclosed", ["all", "visible", "nothing"])
def test_a_bill_for_more_than_the_receipt_s_tokens_fails_the_count(disclosed: str) -> None:
    whole = sign(*example(), KEY)
    data = {"all": whole, "visible": client_copy(), "nothing": strip(whole)}[disclosed]
    for billed, outcome in (
        (len(OUTPUT), "pass" if disclosed == "all" else "inconclusive"),
        (len(OUTPUT) + 1, "fail"),
    ):
        report = audit(data, trusted_keys=[KEY.public_key()], reference=None, levels=["count"], bill=Bill(billed))
        assert report.verdict == outcome


def test_an_auditor_with_full_openings_counts_the_hidden_tokens() -> None:
    report = audit(sign(*example(), KEY), trusted_keys=[KEY.public_key()], reference=None, levels=["count"])
    assert report.verdict == "pass"
    assert report.levels[1].figures["hidden_tokens"] == 5


def test_a_forged_visible_token_fails_the_audit() -> None:
    disclosed = opened_partially(client_copy())
    forged = replace(disclosed, leaves=replace(disclosed.leaves, token_ids=(9, 8, 7, 5)))
    report = audit(forge(example()[0], forged), trusted_keys=[KEY.public_key()], reference=None)
    assert report.verdict == "fail"


def test_an_empty_stop_string_is_refused_in_partial_openings_too() -> None:
    receipt, opened = example()
    data = forge(receipt, replace(partial.withhold(opened, receipt.request_id, ()), stop=("x", "")))
    with pytest.raises(Malformed, match="partial openings"):
        parse(data)
