"""The ledger, in SQLite and in a real PostgreSQL."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from postgres import postgres
from sqlalchemy import create_engine, text

from countersign.services.auditor.ledger import MOST_EVIDENCE, PAGE, Ledger, Logged
from countersign.services.runtime.errors import DataLoss, FailedPrecondition, Unavailable
from countersign.verify.equivocation import Equivocation
from countersign.verify.log.checkpoint import Checkpoint, sign
from countersign.verify.testing import signing_key

_numbers = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/folder/ledger.db"
    server: str = request.getfixturevalue("server")
    name = f"test_{next(_numbers)}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as db:
        db.execute(text(f"create database {name}"))
    engine.dispose()
    return server.replace("/postgres?", f"/{name}?")


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    ledger = Ledger.open(url)
    yield ledger
    ledger.close()


def entry(index: int) -> Logged:
    return Logged(index, index.to_bytes(32, "big"), f"r{index}")


def note(size: int, origin: str = "log.example", root: bytes = b"r" * 32) -> bytes:
    return sign(Checkpoint(origin, size, root), signing_key())


def test_what_was_entered_is_found_again_after_it_was_closed(ledger: Ledger, url: str) -> None:
    ledger.record(map(entry, range(3)))
    ledger.signed(3, note(3), [entry(1)])
    ledger.decided(1, "pass", b"verdict")
    ledger.close()
    again = Ledger.open(url)
    assert (again.size(), again.find(entry(2).digest)) == (3, entry(2))
    assert again.last_checkpoint() == (3, note(3))
    found = again.audit_of(entry(1).digest)
    assert found is not None
    assert (found.outcome, found.verdict, found.checkpoint) == ("pass", b"verdict", 3)
    again.close()


@pytest.mark.parametrize("second", [Logged(0, b"x" * 32, "r"), Logged(5, entry(0).digest, "r")])
def test_an_index_or_a_digest_twice_is_loss_and_nothing_of_the_batch_stays(ledger: Ledger, second: Logged) -> None:
    ledger.record([entry(0)])
    with pytest.raises(DataLoss, match="others than the log's"):
        ledger.record([entry(1), second])
    assert ledger.size() == 1


def test_a_checkpoint_and_its_draw_are_entered_both_or_neither(ledger: Ledger) -> None:
    ledger.record([entry(0)])
    ledger.signed(1, note(1), [entry(0)])
    with pytest.raises(Exception, match=r"UNIQUE|unique"):
        ledger.signed(2, note(2), [entry(0)])
    assert ledger.last_checkpoint() == (1, note(1))


def test_the_first_checkpoint_that_covers_an_entry_is_the_one_that_drew_it(ledger: Ledger) -> None:
    for size in (2, 5, 9):
        ledger.signed(size, note(size), [])
    found = [ledger.checkpoint_over(index) for index in (0, 1, 2, 4, 5, 8, 9)]
    assert [None if one is None else one[0] for one in found] == [2, 2, 5, 5, 9, 9, None]


def test_audits_come_in_the_order_of_the_log_when_they_are_due(ledger: Ledger) -> None:
    ledger.record(map(entry, range(4)))
    ledger.signed(4, note(4), map(entry, (1, 2, 3)))
    ledger.postpone(1, 500)
    due = [ledger.next_audit(now) for now in (0, 499, 500)]
    assert [None if one is None else (one.index, one.attempts) for one in due] == [(2, 0), (2, 0), (1, 1)]
    ledger.decided(2, "pass", b"v2")
    ledger.decided(3, "fail", b"v3")
    assert ledger.next_audit(499) is None
    assert [one.index for one in ledger.verdicts(-1, 10)] == [2, 3]
    assert [one.index for one in ledger.verdicts(2, 10)] == [3]
    assert [one.index for one in ledger.verdicts(-1, 10, "fail")] == [3]
    counts = ledger.counts()
    assert (counts.receipts, counts.waiting, counts.outcomes) == (4, 1, {"pass": 1, "fail": 1})


def test_what_was_decided_stays(ledger: Ledger) -> None:
    ledger.record([entry(0)])
    ledger.signed(1, note(1), [entry(0)])
    ledger.decided(0, "fail", b"first")
    ledger.decided(0, "pass", b"second")
    found = ledger.audit_of(entry(0).digest)
    assert found is not None
    assert (found.outcome, found.verdict) == ("fail", b"first")


def test_what_is_not_out_waits_until_exactly_that_is_out(ledger: Ledger) -> None:
    ledger.record([entry(0)])
    ledger.signed(1, note(1), [entry(0)])
    assert ledger.unpublished_checkpoints() == [(1, note(1))]
    assert ledger.unpublished_verdicts() == []
    ledger.cosigned(1, b"more")
    ledger.published_checkpoint(1, note(1))  # that note, while another has taken its place
    assert ledger.unpublished_checkpoints() == [(1, b"more")]
    ledger.published_checkpoint(1, b"more")
    ledger.decided(0, "pass", b"v")
    assert [one.index for one in ledger.unpublished_verdicts()] == [0]
    ledger.published_verdict(0)
    assert ledger.unpublished_checkpoints() == []
    assert ledger.unpublished_verdicts() == []


def test_what_was_refused_is_counted_once(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.refuse(b"x" * 32, "r" * 1000, 7)
    assert ledger.counts().refused == 1


def test_of_two_that_saw_the_same_checkpoint_one_goes_on(ledger: Ledger) -> None:
    assert ledger.saw("log.example", None, b"first")
    assert not ledger.saw("log.example", None, b"other")
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda new=new: results.append(ledger.saw("log.example", b"first", new)))
        for new in (b"a", b"b")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False, True]
    assert ledger.last_seen("log.example") in (b"a", b"b")


def at_once(action: Callable[[], bool]) -> list[bool]:
    """What it gives in four threads."""
    results: list[bool] = []
    begin = threading.Barrier(4)

    def run() -> None:
        begin.wait()
        results.append(action())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(results)


def test_of_threads_that_see_a_log_or_its_lie_first_one_is_first_and_none_breaks(ledger: Ledger) -> None:
    for size in range(1, 9):
        conflict = Equivocation(note(size), note(size, root=b"q" * 32))
        once = [False, False, False, True]
        assert at_once(lambda conflict=conflict: ledger.keep(conflict, "log.example", b"signed", 1)) == once  # type: ignore[misc]
        assert at_once(lambda size=size: ledger.saw(f"log.example/{size}", None, b"first")) == once  # type: ignore[misc]


def test_a_log_cannot_fill_the_ledger_with_evidence_against_itself(ledger: Ledger) -> None:
    for size in range(1, MOST_EVIDENCE + 5):
        ledger.keep(Equivocation(note(size), note(size, root=b"q" * 32)), "log.example", b"%d" % size, size)
    assert ledger.conflicts("log.example")[0] == b"1"
    assert ledger.counts().conflicts == MOST_EVIDENCE
    assert ledger.keep(Equivocation(note(1), note(1, root=b"p" * 32)), "other.example", b"other", 1)


def test_evidence_is_kept_once(ledger: Ledger) -> None:
    conflict = Equivocation(note(1), note(1, root=b"q" * 32))
    assert [ledger.keep(conflict, "log.example", b"signed", now) for now in (1, 2)] == [True, False]
    assert ledger.conflicts() == ledger.conflicts("log.example") == [b"signed"]
    assert ledger.conflicts("other") == []
    assert ledger.unpublished_conflicts() == [(conflict.digest(), b"signed")]


def test_more_entries_than_a_page_are_found(ledger: Ledger) -> None:
    ledger.record(map(entry, range(PAGE + 1)))
    assert len(ledger.known([entry(index).digest for index in range(PAGE)])) == PAGE
    assert ledger.size() == PAGE + 1


def test_tables_of_a_newer_release_are_refused(ledger: Ledger, url: str) -> None:
    ledger.close()
    engine = create_engine(url)
    with engine.begin() as db:
        db.execute(text("update schema set version = 99"))
    engine.dispose()
    with pytest.raises(FailedPrecondition, match="version 99") as refusal:
        Ledger.open(url)
    assert refusal.value.reason == "LEDGER_UNUSABLE"


@pytest.mark.parametrize(
    "url", ["no url", "sqlite:////proc/nowhere/ledger.db", "postgresql+psycopg://auditor:geheim@/x?host=/nowhere"]
)
def test_a_ledger_that_cannot_be_used_is_a_typed_error_without_its_password(url: str) -> None:
    with pytest.raises(FailedPrecondition, match=r"auditor\.ledger") as refusal:
        Ledger.open(url)
    assert "geheim" not in str(refusal.value)


def test_a_database_that_goes_away_is_unavailable_and_found_again() -> None:
    with postgres() as url:
        ledger = Ledger.open(url)
        ledger.record([entry(0)])
    with pytest.raises(Unavailable) as lost:
        ledger.size()
    assert lost.value.reason == "LEDGER_UNAVAILABLE"
    ledger.close()
