"""The auditor over real gRPC, with a small real model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from countersign.services.auditor.examiner import Examiner
from countersign.services.auditor.service import AuditorService, Books
from countersign.services.auditor.web import LogSite
from countersign.services.runtime.config import AuditorConfig, Config
from countersign.services.runtime.errors import FailedPrecondition, InvalidArgument
from countersign.services.runtime.rpc import Channel, RpcServer
from countersign.v1.auditor_pb2 import AuditLevel, AuditOutcome, AuditRequest, AuditResponse
from countersign.v1.registry_pb2 import Instance
from countersign.verify.difr import load_reference
from countersign.verify.keys import write_public
from countersign.verify.receipt import sign
from countersign.verify.testing import Asked, example_receipt, generate, model_of, signing_key, write_tiny_model

PROMPT = tuple(range(60, 70))
LEVELS = [AuditLevel.AUDIT_LEVEL_FORM, AuditLevel.AUDIT_LEVEL_COUNT, AuditLevel.AUDIT_LEVEL_TOKENS]
PASS, FAIL = AuditOutcome.AUDIT_OUTCOME_PASS, AuditOutcome.AUDIT_OUTCOME_FAIL
INCONCLUSIVE = AuditOutcome.AUDIT_OUTCOME_INCONCLUSIVE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def output(model: Path) -> list[int]:
    return generate(load_reference(model, "fp32"), PROMPT, Asked(), 12)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys" / "receipts.pub"
    write_public(path, signing_key().public_key())
    return path


def service_in(folder: Path, key_file: Path, model: Path) -> AuditorService:
    """Without a bus: it answers, and works on nothing."""
    books = Books.open(Config(data_dir=folder))
    site = LogSite(books.log, books.ledger, books.keys)
    return AuditorService(books, Examiner(key_file, model, 1), site, AuditorConfig(), logging.getLogger("test"))


@pytest.fixture
async def auditor(model: Path, key_file: Path, tmp_path: Path) -> AsyncIterator[Channel]:
    service, server = service_in(tmp_path, key_file, model), RpcServer("127.0.0.1:0")
    server.add(service)
    channel = Channel(await server.start())
    yield channel
    await channel.close()
    await server.stop(0)
    await service.close()


async def ask(channel: Channel, receipt: bytes, *levels: AuditLevel.ValueType) -> AuditResponse:
    request = AuditRequest(receipt=receipt, levels=levels)
    return await channel.unary("/countersign.v1.AuditorService/Audit", request, AuditResponse, timeout=60)


def receipt_of(model: Path, output: list[int]) -> bytes:
    receipt = example_receipt(PROMPT, output, model=model_of(load_reference(model, "fp32")), asked=Asked())
    return sign(*receipt, signing_key())


async def test_an_honest_receipt_passes_every_level_with_its_figures(
    auditor: Channel, model: Path, output: list[int]
) -> None:
    response = await ask(auditor, receipt_of(model, output))
    assert response.verdict == PASS
    assert [(part.level, part.outcome) for part in response.levels] == [(level, PASS) for level in LEVELS]
    assert response.levels[2].figures["exact_matches"] == len(output)


async def test_a_changed_token_fails_at_the_tokens(auditor: Channel, model: Path, output: list[int]) -> None:
    response = await ask(auditor, receipt_of(model, [*output[:3], (output[3] + 1) % 256, *output[4:]]))
    assert response.verdict == FAIL
    assert [part.outcome for part in response.levels] == [PASS, PASS, FAIL]


async def test_bytes_that_are_no_receipt_fail_and_are_no_error_of_the_call(auditor: Channel) -> None:
    for receipt in (b"", b"nonsense"):
        response = await ask(auditor, receipt)
        assert response.verdict == FAIL
        assert len(response.levels) == 1


async def test_audits_asked_for_at_once_all_end(auditor: Channel, model: Path, output: list[int]) -> None:
    honest = receipt_of(model, output)
    responses = await asyncio.gather(*(ask(auditor, honest[:end]) for end in (len(honest), 9, len(honest), 40)))
    assert [response.verdict for response in responses] == [PASS, FAIL, PASS, FAIL]


async def test_only_the_levels_up_to_the_one_asked_for_run(auditor: Channel, model: Path, output: list[int]) -> None:
    response = await ask(auditor, receipt_of(model, output), AuditLevel.AUDIT_LEVEL_COUNT)
    assert [part.level for part in response.levels] == LEVELS[:2]


async def test_an_unknown_level_is_an_invalid_argument(auditor: Channel) -> None:
    for number in (0, 9):
        with pytest.raises(InvalidArgument, match=str(number)) as refusal:
            await ask(auditor, b"x", number)  # type: ignore[arg-type]  # what a peer may send
        assert refusal.value.reason == "UNKNOWN_LEVEL"


def receipt_key(path: Path, content: bytes | None) -> None:
    """Writes the key file, or takes it away."""
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


async def test_a_key_that_is_not_there_yet_is_used_once_it_is(
    auditor: Channel, key_file: Path, model: Path, output: list[int]
) -> None:
    honest = receipt_of(model, output)
    receipt_key(key_file, None)
    assert (await ask(auditor, honest, AuditLevel.AUDIT_LEVEL_FORM)).verdict == INCONCLUSIVE
    receipt_key(key_file, b"rubbish")
    with pytest.raises(FailedPrecondition, match="not an Ed25519 public key"):
        await ask(auditor, honest, AuditLevel.AUDIT_LEVEL_FORM)
    receipt_key(key_file, signing_key().public_key().public_bytes_raw())
    assert (await ask(auditor, honest, AuditLevel.AUDIT_LEVEL_FORM)).verdict == PASS


async def test_it_starts_and_announces_itself_without_loading_the_model(tmp_path: Path) -> None:
    service, instance = service_in(tmp_path, tmp_path / "none", tmp_path / "none"), Instance()
    service.describe(instance)
    assert instance.active_requests == 0
    await service.close()
