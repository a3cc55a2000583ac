"""What the auditor answers about its log, over real gRPC; and its audits, with a small real model."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from requests_done import Done, Entry, done

from countersign.services.auditor.case import CHALLENGED, Disclosed
from countersign.services.auditor.docket import Docket, wait_ms
from countersign.services.auditor.examiner import NICENESS, Examiner
from countersign.services.auditor.intake import Intake
from countersign.services.auditor.notary import Notary
from countersign.services.auditor.service import AuditorService, Books
from countersign.services.auditor.web import LogSite
from countersign.services.protocol.commit import LogState, encode
from countersign.services.protocol.subjects import request_of
from countersign.services.runtime.call import M
from countersign.services.runtime.config import AuditorConfig, Config
from countersign.services.runtime.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from countersign.services.runtime.rpc import Channel, RpcServer
from countersign.v1 import auditor_pb2 as pb
from countersign.v1.commit_pb2 import Cancelled, Closed
from countersign.verify import cose_receipt, merkle, verdict
from countersign.verify.activations import OTHER, SAME, Tolerance, judge
from countersign.verify.difr import load_reference
from countersign.verify.keys import write_public
from countersign.verify.log import checkpoint as notes
from countersign.verify.logged import openings_of
from countersign.verify.receipt import attach, parse, receipt_digest, strip
from countersign.verify.testing import Asked, generate, model_of, signing_key, write_tiny_model

PROMPT = tuple(range(60, 70))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def answers(model: Path) -> list[Done]:
    """Two honest answers; one of whose tokens one is another; one that was only claimed to be by this model."""
    reference = load_reference(model, "fp32")
    output, named = generate(reference, PROMPT, Asked(), 12), model_of(reference)
    changed = [*output[:3], (output[3] + 1) % 256, *output[4:]]
    return [
        done("honest-1", PROMPT, output, model=named),
        done("honest-2", PROMPT, output[:5], model=named),
        done("changed", PROMPT, changed, model=named),
        done("elsewhere", PROMPT, output),
    ]


class Auditor:
    """All of it but the bus."""

    def __init__(self, folder: Path, model: Path) -> None:
        write_public(folder / "keys" / "receipts.pub", signing_key().public_key())
        self.books = Books.open(Config(data_dir=folder))
        self.examiner = Examiner(folder / "keys" / "receipts.pub", model, 1)
        site, log = LogSite(self.books.log, self.books.ledger, self.books.keys), logging.getLogger("test")
        self.service = AuditorService(self.books, self.examiner, site, AuditorConfig(), log)
        books = self.books
        self.intake = Intake(books.log, books.ledger, self.examiner.trusted_keys, lambda: self.now)
        self.notary = Notary(books.log, books.ledger, books.keys, 1.0)
        self.docket = Docket(books.log, books.ledger, books.keys, self.read, self.examiner.audit, lambda: self.now)
        self.logs: dict[str, Sequence[Entry]] = {}
        self.now = 0
        self.server = RpcServer("127.0.0.1:0")
        self.server.add(self.service)

    async def read(self, subject: str) -> Sequence[Entry]:
        return self.logs.get(request_of(subject), ())

    def log(self, *requests: Done) -> None:
        """Takes their receipts, and signs."""
        self.logs |= {request.request_id: request.records for request in requests}
        self.intake.take([request.receipt for request in requests])
        self.notary.sign()

    async def audit(self, request: Done) -> tuple[str, list[tuple[str, str]]]:
        """Audits all that waits; the verdict on this one."""
        while await self.docket.next():
            pass
        found = self.books.ledger.audit_of(request.digest)
        assert found is not None
        assert found.verdict is not None
        signed = verdict.verify(found.verdict, [self.books.keys.verdicts.public_key()])
        assert signed.outcome == found.outcome
        return signed.outcome, [(level.level, level.outcome) for level in signed.findings]

    async def ask(self, method: str, request: object, reply: type[M]) -> M:
        return await self.channel.unary(f"/countersign.v1.AuditorService/{method}", request, reply, timeout=30)  # type: ignore[arg-type]

    async def start(self) -> None:
        self.channel = Channel(await self.server.start())

    async def close(self) -> None:
        await self.channel.close()
        await self.server.stop(0)
        await self.service.close()


@pytest.fixture
async def auditor(tmp_path: Path, model: Path) -> AsyncIterator[Auditor]:
    auditor = Auditor(tmp_path, model)
    await auditor.start()
    yield auditor
    await auditor.close()


async def test_an_honest_answer_passes_and_a_changed_token_fails(auditor: Auditor, answers: list[Done]) -> None:
    auditor.log(*answers)
    passed = [("form", "pass"), ("count", "pass"), ("tokens", "pass")]
    outcome, levels = await auditor.audit(answers[0])
    assert outcome in ("pass", "inconclusive"), "twelve tokens may be too few"
    assert levels[:2] == passed[:2]
    assert levels[2][1] != "fail"
    assert await auditor.audit(answers[2]) == ("fail", [*passed[:2], ("tokens", "fail")])
    assert await auditor.audit(answers[3]) == ("inconclusive", [*passed[:2], ("tokens", "inconclusive")])


@pytest.mark.parametrize("tolerance", [SAME, *OTHER.values()], ids=["same", *OTHER])
def test_as_many_fingerprints_are_drawn_as_it_takes_to_pass(tolerance: Tolerance) -> None:
    assert judge([0.0] * CHALLENGED, tolerance, complete=False).outcome == "pass"


async def test_a_receipt_of_another_arithmetic_than_was_agreed_fails(
    auditor: Auditor, answers: list[Done], model: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys" / "receipts.pub"
    for agreed, wanted in (("native fp32", "fail"), ("test fp32", "pass")):
        examiner = Examiner(keys, model, 1, [agreed])
        report = await examiner.audit(Disclosed(answers[0].receipt), ["form"])
        examiner.close()
        assert report.verdict == wanted


async def test_a_request_that_is_still_open_is_looked_at_again_later(auditor: Auditor, answers: list[Done]) -> None:
    request = answers[0]
    auditor.log(request)
    auditor.logs[request.request_id] = request.records[:-1]
    assert await auditor.docket.next()
    assert not await auditor.docket.next(), "not before its time"
    auditor.logs[request.request_id] = request.records
    auditor.now = wait_ms(0)
    assert (await auditor.audit(request))[1][0] == ("form", "pass")


async def test_what_cannot_be_audited_any_more_gets_a_verdict_that_says_so(
    auditor: Auditor, answers: list[Done]
) -> None:
    gone, vain = answers[0], answers[1]
    auditor.log(gone, vain)
    other = done(vain.request_id, PROMPT, [1, 2, 3])
    auditor.logs = {vain.request_id: other.records}
    expected = ("inconclusive", [("form", "pass"), ("count", "inconclusive")])
    for request, why in ((gone, "is gone"), (vain, "another receipt")):
        assert await auditor.audit(request) == expected
        found = auditor.books.ledger.audit_of(request.digest)
        assert found is not None
        assert found.verdict is not None
        assert why in verdict.verify(found.verdict, [auditor.books.keys.verdicts.public_key()]).findings[1].summary


async def test_a_token_log_of_nonsense_stops_nobody(auditor: Auditor, answers: list[Done]) -> None:
    nonsense, honest = answers[0], answers[1]
    auditor.log(nonsense, honest)
    log = LogState(nonsense.request_id)
    records = list(nonsense.records[:-1])
    for record in records:
        log = log.apply(record.sequence, record.data)
    for payload in (Cancelled(), Closed(reason=99, usage=log.usage())):  # type: ignore[arg-type]  # what a target may write
        records.append(Entry(log.sequence + 1, encode(nonsense.request_id, log.digest, payload)))
        if isinstance(payload, Cancelled):
            log = log.apply(records[-1].sequence, records[-1].data)
    auditor.logs[nonsense.request_id] = records
    assert (await auditor.audit(nonsense))[0] == "inconclusive"
    assert (await auditor.audit(honest))[1][0] == ("form", "pass")


async def test_a_case_that_breaks_is_said_like_an_audit_that_does(
    auditor: Auditor, answers: list[Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    auditor.log(answers[0])

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("countersign.services.auditor.docket.case_of", broken)
    for _ in range(5):
        auditor.now += 10**6
        assert await auditor.docket.next()
    assert await auditor.audit(answers[0]) == ("inconclusive", [("form", "inconclusive")])


async def test_an_audit_that_kills_the_process_keeps_no_other_waiting(
    auditor: Auditor, answers: list[Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly, honest = answers[0], answers[1]
    auditor.log(deadly, honest)

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as once:
        once.setattr("countersign.services.auditor.docket.case_of", kill)
        with pytest.raises(Killed):
            await auditor.docket.next()
    assert await auditor.docket.next()
    found = [auditor.books.ledger.audit_of(request.digest) for request in (deadly, honest)]
    assert [None if audit is None else audit.outcome is not None for audit in found] == [False, True]


async def test_a_token_log_without_end_is_not_read_to_its_end(auditor: Auditor, answers: list[Done]) -> None:
    auditor.log(answers[0])

    async def endless(_: str) -> Sequence[Entry]:
        raise ResourceExhausted("more than 128 MiB", reason="LOG_TOO_LARGE")

    auditor.docket._read = endless
    assert await auditor.audit(answers[0]) == ("inconclusive", [("form", "pass"), ("count", "inconclusive")])


async def test_without_a_key_to_check_with_audits_wait_for_it(auditor: Auditor, answers: list[Done]) -> None:
    auditor.log(answers[0])
    file = auditor.examiner._key_file
    good = file.read_bytes()
    file.write_bytes(b"rubbish")
    for _ in range(9):
        auditor.now += 10**6
        with pytest.raises(FailedPrecondition):
            await auditor.docket.next()
    file.write_bytes(good)
    auditor.now += 10**6
    assert (await auditor.audit(answers[0]))[1][0] == ("form", "pass")


async def test_an_audit_that_breaks_is_tried_again_and_then_said(
    auditor: Auditor, answers: list[Done], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    auditor.log(answers[0])

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("countersign.services.auditor.examiner.audit", broken)
    for _ in range(5):
        auditor.now += 10**6
        assert await auditor.docket.next()
    assert await auditor.audit(answers[0]) == ("inconclusive", [("form", "inconclusive")])
    assert len([record for record in caplog.records if record.message == "an audit failed"]) == 5


async def test_a_receipt_is_proven_by_what_the_auditor_answers(auditor: Auditor, answers: list[Done]) -> None:
    auditor.log(answers[0])
    auditor.log(*answers)
    keys = auditor.books.keys
    for request in answers:
        asked = pb.GetInclusionRequest(receipt_sha256=request.digest)
        proof = await auditor.ask("GetInclusion", asked, pb.GetInclusionResponse)
        checkpoint = notes.verify(proof.checkpoint, [keys.log_key]).checkpoint
        leaf = merkle.leaf_hash(strip(request.receipt))
        assert merkle.verify_inclusion(leaf, proof.index, checkpoint.size, proof.path, checkpoint.root)
        found = cose_receipt.verify_inclusion(proof.cose_receipt, leaf, [keys.log_key.key])
        assert (found.index, found.size, found.root) == (proof.index, checkpoint.size, checkpoint.root)
    grown = await auditor.ask("GetConsistency", pb.GetConsistencyRequest(old_size=1), pb.GetConsistencyResponse)
    first = await auditor.ask("GetCheckpoint", pb.GetCheckpointRequest(covers=0), pb.GetCheckpointResponse)
    newest = await auditor.ask("GetCheckpoint", pb.GetCheckpointRequest(), pb.GetCheckpointResponse)
    old, new = (notes.verify(note.note, [keys.log_key]).checkpoint for note in (first, newest))
    assert (old.size, new.size, grown.new_size) == (1, 4, 4)
    assert merkle.verify_consistency(1, 4, old.root, new.root, grown.path)


async def test_verdicts_come_page_by_page_in_the_order_of_the_log(auditor: Auditor, answers: list[Done]) -> None:
    auditor.log(*answers)
    await auditor.audit(answers[0])
    found, token, pages = list[bytes](), "", 0
    while pages == 0 or token:
        request = pb.ListVerdictsRequest(page_size=3, page_token=token)
        page = await auditor.ask("ListVerdicts", request, pb.ListVerdictsResponse)
        found += [entry.receipt_sha256 for entry in page.verdicts]
        token, pages = page.next_page_token, pages + 1
    assert (found, pages) == ([request.digest for request in answers], 2)
    failed = await auditor.ask("ListVerdicts", pb.ListVerdictsRequest(outcome="fail"), pb.ListVerdictsResponse)
    assert [entry.index for entry in failed.verdicts] == [2]
    log = await auditor.ask("GetLog", pb.GetLogRequest(), pb.GetLogResponse)
    assert (log.size, log.waiting, log.outcomes["fail"], log.outcomes["inconclusive"] > 0) == (4, 0, 1, True)


async def test_a_page_of_verdicts_goes_into_one_message_on_the_bus(
    auditor: Auditor, answers: list[Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    auditor.log(*answers)
    await auditor.audit(answers[0])
    monkeypatch.setattr("countersign.services.auditor.wire.MAX_PAGE_BYTES", 4000)
    found, token, pages = list[bytes](), "", 0
    while pages == 0 or token:
        page = await auditor.ask("ListVerdicts", pb.ListVerdictsRequest(page_token=token), pb.ListVerdictsResponse)
        assert len(page.verdicts) == 1 or sum(len(entry.statement) for entry in page.verdicts) <= 4000
        found += [entry.receipt_sha256 for entry in page.verdicts]
        token, pages = page.next_page_token, pages + 1
    assert found == [request.digest for request in answers]
    assert pages > 1


async def test_how_far_an_audit_is_is_said_at_every_stage(auditor: Auditor, answers: list[Done]) -> None:
    first, second = answers[0], answers[1]

    async def state(request: Done) -> int:
        asked = pb.GetVerdictRequest(receipt_sha256=request.digest)
        return (await auditor.ask("GetVerdict", asked, pb.GetVerdictResponse)).state

    with pytest.raises(NotFound) as unknown:
        await state(first)
    assert unknown.value.reason == "NOT_LOGGED"
    auditor.intake.take([first.receipt])
    assert await state(first) == pb.AUDIT_STATE_LOGGED
    asked = pb.GetInclusionRequest(receipt_sha256=first.digest)
    with pytest.raises(FailedPrecondition) as early:
        await auditor.ask("GetInclusion", asked, pb.GetInclusionResponse)
    assert early.value.reason == "NO_CHECKPOINT"
    auditor.log(first)
    assert await state(first) == pb.AUDIT_STATE_WAITING
    await auditor.audit(first)
    assert await state(first) == pb.AUDIT_STATE_DECIDED
    auditor.notary = Notary(auditor.books.log, auditor.books.ledger, auditor.books.keys, 0.0)
    auditor.log(second)
    assert await state(second) == pb.AUDIT_STATE_NOT_DRAWN


@pytest.mark.parametrize(
    ("method", "request_", "reply", "reason"),
    [
        ("GetInclusion", pb.GetInclusionRequest(receipt_sha256=b"short"), pb.GetInclusionResponse, "NO_DIGEST"),
        ("GetVerdict", pb.GetVerdictRequest(), pb.GetVerdictResponse, "NO_DIGEST"),
        ("ListVerdicts", pb.ListVerdictsRequest(page_token="x"), pb.ListVerdictsResponse, "NO_PAGE"),
        ("GetCheckpoint", pb.GetCheckpointRequest(covers=2**63), pb.GetCheckpointResponse, "NO_SUCH_SIZE"),
        ("GetConsistency", pb.GetConsistencyRequest(old_size=9), pb.GetConsistencyResponse, "NO_SUCH_SIZE"),
        ("GetConsistency", pb.GetConsistencyRequest(new_size=2**63), pb.GetConsistencyResponse, "NO_SUCH_SIZE"),
    ],
)
async def test_what_makes_no_sense_is_an_invalid_argument(
    auditor: Auditor, answers: list[Done], method: str, request_: object, reply: type[M], reason: str
) -> None:
    auditor.log(answers[0])
    with pytest.raises(InvalidArgument) as refusal:
        await auditor.ask(method, request_, reply)
    assert refusal.value.reason == reason


async def test_audits_stand_back_for_everything_else(auditor: Auditor) -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    audits = asyncio.get_running_loop().run_in_executor(auditor.examiner._thread, niceness)
    assert (await audits, niceness() < NICENESS) == (NICENESS, True)


async def test_openings_never_reach_the_log(auditor: Auditor, answers: list[Done]) -> None:
    """Even where they come with the receipt: prompt and output are the client's."""
    log = LogState("honest-1")
    for record in answers[0].records:
        log = log.apply(record.sequence, record.data)
    opened = attach(answers[0].receipt, openings_of(log))
    assert parse(opened).openings is not None
    auditor.intake.take([opened])
    assert parse(auditor.books.log.entry(0)).openings is None
    assert receipt_digest(auditor.books.log.entry(0)) == answers[0].digest
    assert auditor.intake.take([answers[0].receipt]).known == 1
