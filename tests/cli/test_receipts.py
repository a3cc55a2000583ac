"""``countersign receipts``: what is listed of a real stream, with the verdicts of auditors who are trusted."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.cells import cell_len
from rich.console import Console

from countersign.cli.receipts import Filters, Found, Row, report, search, unix_ms
from countersign.services.protocol.subjects import receipt_subject
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.config import NatsConfig
from countersign.services.runtime.errors import InvalidArgument
from countersign.services.runtime.journal import Journal
from countersign.services.runtime.nats_server import NatsServer
from countersign.verify.payload import FinishReason
from countersign.verify.receipt import receipt_digest, sign
from countersign.verify.testing import example_model, example_receipt, signing_key
from countersign.verify.verdict import Finding, Verdict

NOW = 1_750_000_000_000
AUDITOR, STRANGER = signing_key(2), signing_key(3)


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    async with NatsServer(tmp_path) as server:
        bus = await Bus.connect(server.url, "test")
        journal = Journal(bus)
        await journal.ensure_streams(NatsConfig())
        yield journal
        await bus.close()


async def publish(
    journal: Journal, request_id: str, *, ago_s: int = 0, model: str = "m", finish: FinishReason = "length"
) -> bytes:
    """As a target does; the receipt's digest."""
    receipt, _ = example_receipt(
        request_id=request_id, finish_reason=finish, model=replace(example_model(), name=model)
    )
    at = NOW - 1000 * ago_s
    receipt = replace(
        receipt,
        request=replace(receipt.request, opened_unix_ms=at - 500),
        usage=replace(receipt.usage, started_unix_ms=at - 400, finished_unix_ms=at),
    )
    data = sign(receipt, None, signing_key())
    await journal.append(receipt_subject(request_id), data, expected=0, timeout=5)
    return receipt_digest(data)


async def judge(
    journal: Journal, digest: bytes, outcome: str, key: Ed25519PrivateKey = AUDITOR, name: str = "a"
) -> None:
    findings = (Finding("form", "pass", "signed"), Finding("count", outcome, f"what makes it {outcome}"))
    verdict = Verdict(digest, "r", outcome, (*findings, Finding("tokens", "pass", "fine")), 0, b"note", NOW)
    await journal.append(f"cs.v1.verdict.{name}.{digest.hex()}", verdict.sign(key), expected=0, timeout=5)


async def listed(journal: Journal, limit: int = 20, **filters: object) -> Found:
    return await search(journal, Filters(**filters), limit, [AUDITOR.public_key()])  # type: ignore[arg-type]  # by name


def ids(found: Found) -> list[str]:
    return [row.request_id for row in found.rows]


async def test_receipts_come_newest_first_and_no_more_than_wanted(journal: Journal) -> None:
    for number in range(5):
        await publish(journal, f"r{number}", ago_s=10 - number)
    found = await listed(journal, limit=3)
    assert (ids(found), found.more) == (["r4", "r3", "r2"], True)
    all_of_them = await listed(journal, limit=5)
    assert (len(all_of_them.rows), all_of_them.more) == (5, False)
    row = found.rows[0]
    assert (row.model, row.prompt_tokens, row.output_tokens, row.seconds) == ("m", 3, 4, 0.5)
    assert (row.drafted, row.accepted, row.finish, row.verdict) == (4, 2, "length", "unknown")


async def test_each_filter_takes_what_fits(journal: Journal) -> None:
    await publish(journal, "old", ago_s=7200)
    await publish(journal, "other", ago_s=60, model="n")
    failed = await publish(journal, "failed", ago_s=50)
    await judge(journal, failed, "fail")
    passed = await publish(journal, "passed", ago_s=40, finish="cancelled")
    await judge(journal, passed, "pass")
    for filters, wanted in (
        ({}, ["passed", "failed", "other", "old"]),
        ({"model": "n"}, ["other"]),
        ({"finish": "cancelled"}, ["passed"]),
        ({"outcome": "fail"}, ["failed"]),
        ({"outcome": "none"}, ["other", "old"]),
        ({"since_ms": NOW - 3_600_000}, ["passed", "failed", "other"]),
        ({"until_ms": NOW - 55_000}, ["other", "old"]),
        ({"model": "n", "outcome": "fail"}, []),
    ):
        assert ids(await listed(journal, **filters)) == wanted, filters
    assert (await listed(journal, outcome="fail")).rows[0].why == "what makes it fail"


async def test_only_the_word_of_an_auditor_that_is_trusted_counts_and_the_worst_of_several(journal: Journal) -> None:
    digest = await publish(journal, "r")
    await judge(journal, digest, "fail", STRANGER, "stranger")
    assert (await listed(journal)).rows[0].verdict == "unknown"
    await judge(journal, digest, "pass", name="a")
    assert (await listed(journal)).rows[0].verdict == "pass"
    await judge(journal, digest, "fail", name="b")
    assert (await listed(journal)).rows[0].verdict == "fail"


async def test_what_is_no_receipt_is_counted_and_hides_nothing(journal: Journal) -> None:
    await publish(journal, "before")
    await journal.append(receipt_subject("rubbish"), b"\xff\x00rubbish", expected=0, timeout=5)
    await publish(journal, "after")
    found = await listed(journal)
    assert (ids(found), found.unreadable) == (["after", "before"], 1)


def test_times_are_spans_back_from_now_or_dates() -> None:
    assert [NOW - unix_ms(text, NOW) for text in ("90s", "15m", "2 h", "3d", "0s")] == [
        90_000, 900_000, 7_200_000, 259_200_000, 0
    ]  # fmt: skip
    assert unix_ms("2026-11-21T16:30:00+00:00", NOW) == datetime.fromisoformat("2026-11-21T16:30Z").timestamp() * 1000
    for wrong in ("", "soon", "1w", "99999999999d", "-1h", "2026-13-01", "١h"):
        with pytest.raises(InvalidArgument) as caught:
            unix_ms(wrong, NOW)
        assert caught.value.reason == "BAD_TIME"


ROW = Row(NOW, "r" * 64, "ab" * 32, "demo", "cd" * 32, 6, 400, 100, 460, 316, 0.856, "length", "fail", "what was wrong")


@pytest.mark.parametrize("width", [30, 60, 100, 160])
def test_the_table_fits_and_says_why_an_audit_failed(width: int) -> None:
    out = io.StringIO()
    report(
        Console(file=out, force_terminal=True, color_system=None, width=width), Found([ROW], more=True, unreadable=2)
    )
    lines = out.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    text = " ".join("".join(lines).split())
    assert "what was wrong" in text.replace("  ", " ") or width < 100
    assert "fail" in text
    assert "400 (100 hidden)" in text or width < 100


def test_nothing_found_is_said() -> None:
    out = io.StringIO()
    report(Console(file=out), Found([]))
    assert out.getvalue() == "no receipts fit\n"
