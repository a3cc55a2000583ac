from __future__ import annotations

import dataclasses
import hashlib

import cbor2
import pytest

from countersign.verify import cbor, equivocation, sampling, statement, verdict
from countersign.verify.errors import BadSignature, Inconsistent, Malformed, Untrusted
from countersign.verify.log.checkpoint import Checkpoint, KeyKind, NoteKey, cosign, sign
from countersign.verify.testing import signing_key
from countersign.verify.verdict import Finding, Verdict, beacon_of, share_of

ORIGIN = "log.example/receipts"
LOG, AUDITOR, WITNESS = signing_key(1), signing_key(2), signing_key(3)
LOG_KEY = NoteKey(ORIGIN, LOG.public_key())


def note(share: str = "0.5", size: int = 8) -> bytes:
    return sign(Checkpoint(ORIGIN, size, b"r" * 32, (f"countersign-share {share}",)), LOG)


def digests(*, drawn: bool) -> list[bytes]:
    """Of receipts that the checkpoint draws, or does not."""
    beacon = beacon_of(note(), LOG_KEY)
    every = (hashlib.sha256(b"%d" % number).digest() for number in range(40))
    return [digest for digest in every if sampling.selected(beacon, digest, 0.5) is drawn]


def example(**changes: object) -> Verdict:
    findings = (
        Finding("form", "pass", "signed"),
        Finding("tokens", "fail", "no", {"mean_score": 0.5, "worst": float("inf")}),
    )
    made = Verdict(digests(drawn=True)[0], "r1", "fail", findings, 3, note(), 1_750_000_000_000)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_a_verdict_reads_back_and_repeats_its_draw() -> None:
    signed = example().sign(AUDITOR)
    again = verdict.verify(signed, [AUDITOR.public_key()])
    assert again == example()
    again.was_drawn(LOG_KEY)


def test_only_the_trusted_auditors_word_counts() -> None:
    signed = example().sign(AUDITOR)
    with pytest.raises(Untrusted):
        verdict.verify(signed, [LOG.public_key()])
    changed = signed.replace(b"dfail", b"dpass", 1)
    assert changed != signed
    with pytest.raises(BadSignature):
        verdict.verify(changed, [AUDITOR.public_key()])


def test_a_statement_of_another_kind_is_no_verdict_whatever_it_says() -> None:
    """One key signs verdicts and evidence."""
    body = cbor.loads(cbor2.loads(example().sign(AUDITOR)).value[2])
    for kind in (equivocation.CONTENT_TYPE, ""):
        with pytest.raises(Malformed, match="another kind"):
            verdict.verify(statement.sign(body, kind, AUDITOR), [AUDITOR.public_key()])


def test_a_statement_larger_than_any_is_refused_unread() -> None:
    with pytest.raises(Malformed, match="larger than any statement"):
        verdict.verify(bytes(statement.MAX_STATEMENT_BYTES + 1), [AUDITOR.public_key()])


def test_a_receipt_that_was_not_drawn_or_not_covered_shows() -> None:
    with pytest.raises(Inconsistent, match="not drawn"):
        example(receipt=digests(drawn=False)[0]).was_drawn(LOG_KEY)
    with pytest.raises(Inconsistent, match="does not cover"):
        example(index=8).was_drawn(LOG_KEY)


def test_a_witness_that_cosigns_changes_no_draw() -> None:
    cosigned = cosign(note(), WITNESS, "witness.example", time=1)
    assert beacon_of(cosigned, LOG_KEY) == beacon_of(note(), LOG_KEY)
    with pytest.raises(Malformed, match="did not sign"):
        beacon_of(cosigned, NoteKey("witness.example", WITNESS.public_key(), KeyKind.LOG))


@pytest.mark.parametrize(("text", "share"), [("0.1", 0.1), ("1.0", 1.0), ("0.0", 0.0), ("1e-05", 1e-5)])
def test_the_share_is_part_of_what_the_log_signs(text: str, share: float) -> None:
    assert share_of(Checkpoint(ORIGIN, 1, b"r" * 32, ("other", f"countersign-share {text}"))) == share


@pytest.mark.parametrize("lines", [(), ("1.1",), ("nan",), ("-0.1",), ("0.1", "0.2"), (" 0.1",), ("0x1",)])
def test_without_one_share_there_is_no_draw(lines: tuple[str, ...]) -> None:
    stated = tuple(f"countersign-share {line}" for line in lines)
    with pytest.raises(Malformed, match="share"):
        share_of(Checkpoint(ORIGIN, 1, b"r" * 32, stated))


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"receipt": b"short"},
        {"outcome": "perhaps"},
        {"levels": [{"level": "form"}]},
        {"levels": [{"level": "form", "outcome": "pass", "summary": "", "figures": {"n": "x"}}]},
        {"log": {"index": -1, "checkpoint": b""}},
        {"more": 1},
    ],
)
def test_what_is_no_verdict_is_malformed_even_if_signed(change: dict[str, object]) -> None:
    whole = {
        "version": 1,
        "receipt": b"d" * 32,
        "request_id": "r",
        "outcome": "pass",
        "levels": [],
        "log": {"index": 0, "checkpoint": b""},
        "audited_unix_ms": 1,
    }
    key = [AUDITOR.public_key()]
    assert verdict.verify(statement.sign(whole, verdict.CONTENT_TYPE, AUDITOR), key).outcome == "pass"
    with pytest.raises(Malformed):
        verdict.verify(statement.sign(whole | change, verdict.CONTENT_TYPE, AUDITOR), key)
