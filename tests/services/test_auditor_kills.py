"""An auditor process killed again and again under load: no receipt lost, none twice, log and ledger of one mind."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import IO

import pytest
from auditor_process import AuditorProcess
from postgres import postgres
from requests_done import Done, done

from countersign.services.auditor.keys import Keys
from countersign.services.auditor.ledger import Ledger
from countersign.services.protocol.subjects import commit_subject, receipt_subject
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.config import NatsConfig
from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.journal import Journal
from countersign.services.runtime.nats_server import NatsServer
from countersign.v1.auditor_pb2 import GetLogRequest, GetLogResponse
from countersign.verify import sampling, verdict
from countersign.verify.keys import write_public
from countersign.verify.log import checkpoint as notes
from countersign.verify.log.store import TileLog
from countersign.verify.receipt import receipt_digest
from countersign.verify.testing import signing_key, write_tiny_model

END_S = 90.0


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[Bus]:
    async with NatsServer(tmp_path / "nats") as server:
        bus = await Bus.connect(server.url, "test")
        yield bus
        await bus.close()


async def publish(journal: Journal, request: Done) -> None:
    """As a target does: the log up to its last record, the receipt, then the last record."""
    *records, closed = request.records
    subject, last = commit_subject(request.request_id), 0
    for record in records:
        last = await journal.append(subject, record.data, expected=last, timeout=10)
    await journal.append(receipt_subject(request.request_id), request.receipt, expected=0, timeout=10)
    await journal.append(subject, closed.data, expected=last, timeout=10)


async def progress(bus: Bus) -> GetLogResponse | None:
    try:
        return await bus.call("auditor", "GetLog", GetLogRequest(), GetLogResponse, timeout=1)
    except CountersignError:
        return None


async def settled(bus: Bus, receipts: int) -> None:
    """All are logged, and all that was drawn is audited."""
    deadline, state = time.monotonic() + END_S, None
    while state is None or state.size < receipts or state.waiting or not state.outcomes:
        assert time.monotonic() < deadline, state
        await asyncio.sleep(0.2)
        state = await progress(bus)


async def hurt(folder: Path, bus: Bus, kills: int, a_life: int, ledger: str = "") -> None:
    rng, journal = random.Random(3), Journal(bus)
    await journal.ensure_streams(NatsConfig())
    write_public(folder / "keys" / "receipts.pub", signing_key().public_key())
    model = write_tiny_model(folder / "model")
    settings = ("auditor.share=0.5", "auditor.checkpoint_s=0.05", f"auditor.model={model}", f"auditor.ledger={ledger}")
    auditor = AuditorProcess(folder, bus._url, *settings)
    requests: list[Done] = []
    try:
        for life in range(kills + 1):
            auditor.start()
            for number in range(a_life):
                requests.append(done(f"r{life}-{number}"))
                await publish(journal, requests[-1])
            if life < kills:
                await asyncio.sleep(rng.random() * 1.5)
                auditor.kill()
        await settled(bus, len(requests))
        with closing(Ledger.open(ledger or f"sqlite:///{folder}/auditor/ledger.db")) as books:
            await told(books)
            assert auditor.stop() == 0
            assert [word for word in ('"exception"', "Traceback") if word in auditor.log] == [], auditor.log
            await check(folder, journal, requests, books)
    finally:
        auditor.kill()


async def told(ledger: Ledger) -> None:
    """All that was signed is out: a verdict is in the ledger a moment before it is in the stream."""
    async with asyncio.timeout(END_S):
        while ledger.unpublished_verdicts() or ledger.unpublished_checkpoints():  # noqa: ASYNC110  another process's
            await asyncio.sleep(0.1)


async def check(folder: Path, journal: Journal, requests: list[Done], ledger: Ledger) -> None:
    keys = Keys.load(folder / "keys")
    with TileLog.open(folder / "auditor" / "log") as log:
        digests = [receipt_digest(log.entry(index)) for index in range(log.size)]
        assert sorted(digests) == sorted(request.digest for request in requests), "lost, or twice"
        assert [entry.digest for entry in ledger.between(0, log.size)] == digests
        sizes = await published_sizes(journal, keys, log)
    drawn, begin = set[bytes](), 0
    for size, note in sizes.items():
        beacon = verdict.beacon_of(note, keys.log_key)
        drawn |= {digest for digest in digests[begin:size] if sampling.selected(beacon, digest, 0.5)}
        begin = size
    assert begin == len(digests), "the last checkpoint covers all"
    assert drawn
    for digest in digests:
        stored = await journal.read(f"cs.v1.verdict.{keys.auditor_name}.{digest.hex()}")
        assert len(stored) == (1 if digest in drawn else 0), "a verdict lost, twice, or not drawn"
        for entry in stored:
            found = verdict.verify(entry.data, [keys.verdicts.public_key()])
            found.was_drawn(keys.log_key)
            assert [level.outcome for level in found.findings][:2] == ["pass", "pass"]


async def published_sizes(journal: Journal, keys: Keys, log: TileLog) -> dict[int, bytes]:
    """All checkpoints in the stream, each of which the log must bear out."""
    found = {}
    for size in range(log.size + 1):
        entries = await journal.read(f"cs.v1.checkpoint.{keys.log_name}.{size}")
        assert len({entry.data for entry in entries}) == len(entries) <= 1, "a checkpoint twice"
        for entry in entries:
            signed = notes.verify(entry.data, [keys.log_key]).checkpoint
            assert (signed.size, signed.root) == (size, log.root(size))
            found[size] = entry.data
    return found


async def test_an_auditor_that_is_killed_loses_no_receipt_and_enters_none_twice(tmp_path: Path, bus: Bus) -> None:
    await hurt(tmp_path / "data", bus, kills=4, a_life=12)


async def test_a_witness_that_is_killed_in_between_cosigns_what_the_log_has_in_the_end(
    tmp_path: Path, bus: Bus
) -> None:
    journal = Journal(bus)
    await journal.ensure_streams(NatsConfig())
    folders = {name: tmp_path / name for name in ("log", "witness")}
    keys = {name: Keys.load(folder / "keys") for name, folder in folders.items()}
    write_public(folders["log"] / "keys" / "receipts.pub", signing_key().public_key())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    follow = (f"auditor.follow={keys['log'].log_key.encode()}", f"auditor.http_listen={listen}")
    asks = f"auditor.witnesses={keys['witness'].witness_key.encode()} http://{listen}"
    often = ("auditor.share=0", "auditor.checkpoint_s=0.05", "auditor.follow_s=0.1")
    witness = AuditorProcess(folders["witness"], bus._url, *follow)
    log = AuditorProcess(folders["log"], bus._url, asks, *often)
    try:
        witness.start()
        log.start()
        for number in range(12):
            await publish(journal, done(f"r{number}"))
            if number == 6:
                witness.kill()
        witness.start()
        subject, trusted = (
            f"cs.v1.checkpoint.{keys['log'].log_name}.12",
            (keys["log"].log_key, keys["witness"].witness_key),
        )
        async with asyncio.timeout(END_S):
            while True:
                entry = await journal.last(subject)
                if entry is not None and len(notes.verify(entry.data, trusted).signers) == 2:
                    break
                await asyncio.sleep(0.1)
        assert log.stop() == witness.stop() == 0
    finally:
        log.kill()
        witness.kill()
    ledger = Ledger.open(f"sqlite:///{folders['witness']}/auditor/ledger.db")
    assert ledger.counts().conflicts == 0
    ledger.close()


async def test_an_auditor_that_is_stopped_in_the_middle_of_an_audit_does_not_wait_for_its_end(
    tmp_path: Path, bus: Bus
) -> None:
    journal = Journal(bus)
    await journal.ensure_streams(NatsConfig())
    folder, model = tmp_path / "data", tmp_path / "model"
    write_public(folder / "keys" / "receipts.pub", signing_key().public_key())
    model.mkdir()
    os.mkfifo(model / "config.json")  # nobody ever writes: the audit never ends
    auditor = AuditorProcess(folder, bus._url, "auditor.share=1", "auditor.checkpoint_s=0.05", f"auditor.model={model}")
    try:
        auditor.start()
        await publish(journal, done("r"))
        with closing(await asyncio.to_thread(read_by_somebody, model / "config.json")):
            assert auditor.stop() == 0
        with closing(Ledger.open(f"sqlite:///{folder}/auditor/ledger.db")) as ledger:
            assert ledger.counts().waiting == 1
    finally:
        auditor.kill()


def read_by_somebody(fifo: Path) -> IO[bytes]:
    """Its other end, once somebody waits for what comes out of it."""
    deadline = time.monotonic() + END_S
    while True:
        try:
            return os.fdopen(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK), "wb")
        except OSError:  # nobody reads
            assert time.monotonic() < deadline
            time.sleep(0.05)


async def test_so_it_is_with_its_ledger_in_postgresql(tmp_path: Path, bus: Bus) -> None:
    with postgres() as url:
        await hurt(tmp_path / "data", bus, kills=2, a_life=10, ledger=url)


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_an_auditor_that_is_killed_100_times_loses_no_receipt(tmp_path: Path, bus: Bus) -> None:
    await hurt(tmp_path / "data", bus, kills=100, a_life=20)
