"""What fails below a running auditor, on a real nats-server: it waits, goes on, and nothing is lost or there twice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from requests_done import done

from countersign.services.auditor import service as auditing
from countersign.services.auditor.docket import Docket
from countersign.services.auditor.examiner import Examiner
from countersign.services.auditor.ledger import Ledger
from countersign.services.auditor.outbox import Outbox
from countersign.services.auditor.service import AuditorService, Books
from countersign.services.auditor.web import LogSite
from countersign.services.protocol.subjects import receipt_subject
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.config import AuditorConfig, Config, NatsConfig
from countersign.services.runtime.consumer import Consumer
from countersign.services.runtime.errors import FailedPrecondition, Unavailable
from countersign.services.runtime.journal import RECEIPTS, Journal
from countersign.services.runtime.nats_server import NatsServer
from countersign.verify.keys import write_public
from countersign.verify.receipt import receipt_digest
from countersign.verify.testing import signing_key

END_S = 30.0
CONFIG = AuditorConfig(checkpoint_s=0.05, share=0.0)


class Running:
    """An auditor that works, in this process."""

    def __init__(self, folder: Path, bus: Bus) -> None:
        write_public(folder / "keys" / "receipts.pub", signing_key().public_key())
        self.bus, self.journal = bus, Journal(bus)
        self.books = Books.open(Config(data_dir=folder, auditor=CONFIG))
        log, ledger, keys = self.books.log, self.books.ledger, self.books.keys
        examiner = Examiner(folder / "keys" / "receipts.pub", folder / "no model", 1)
        site = LogSite(log, ledger, keys)
        self.service = AuditorService(self.books, examiner, site, CONFIG, logging.getLogger("test"))
        docket = Docket(log, ledger, keys, self.journal.read, examiner.audit, lambda: 0)
        receipts = partial(Consumer.open, bus, RECEIPTS, "auditor", ack_wait_s=0.5)
        self.service.works(receipts, docket, Outbox(self.journal, ledger, keys))
        self.work: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.journal.ensure_streams(NatsConfig())
        self.work = asyncio.create_task(self.service.run())

    async def publish(self, name: str) -> None:
        await self.journal.append(receipt_subject(name), done(name).receipt, expected=0, timeout=10)

    async def signed(self, *names: str) -> None:
        """These receipts, each once, are in the log, in the ledger and under a checkpoint; it still runs."""
        async with asyncio.timeout(END_S):
            while (last := self.books.ledger.last_checkpoint()) is None or last[0] < len(names):
                assert self.work is not None
                assert not self.work.done(), self.work.exception()
                await asyncio.sleep(0.02)
        digests = [receipt_digest(self.books.log.entry(index)) for index in range(self.books.log.size)]
        assert sorted(digests) == sorted(done(name).digest for name in names)
        assert [entry.digest for entry in self.books.ledger.between(0, 100)] == digests

    async def close(self) -> None:
        if self.work is not None:
            self.work.cancel()
            await asyncio.gather(self.work, return_exceptions=True)
        await self.service.close()


@pytest.fixture
async def auditor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    monkeypatch.setattr(auditing, "RETRY_S", 0.05)
    async with NatsServer(tmp_path / "nats") as server:
        bus = await Bus.connect(server.url, "test")
        running = Running(tmp_path / "data", bus)
        yield running
        await running.close()
        await bus.close()


def fails_once(method: Callable[..., Any]) -> Callable[..., Any]:
    """As a database that goes away in that moment and comes back."""
    calls = iter([True])

    def call(*arguments: Any) -> Any:
        if next(calls, False):
            raise Unavailable("the ledger does not answer", reason="LEDGER_UNAVAILABLE")
        return method(*arguments)

    return call


@pytest.mark.parametrize("method", ["known", "record", "size", "signed", "between"])
async def test_a_ledger_that_is_away_for_a_moment_costs_nothing(
    auditor: Running, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Away between log and ledger, too: what the log has by then is not appended again."""
    await auditor.start()
    await auditor.publish("a")
    await auditor.signed("a")
    monkeypatch.setattr(Ledger, method, fails_once(getattr(Ledger, method)))
    await auditor.publish("b")
    await auditor.publish("c")
    await auditor.signed("a", "b", "c")


async def test_a_place_in_the_stream_that_is_gone_is_made_again(auditor: Running) -> None:
    await auditor.start()
    await auditor.publish("a")
    await auditor.signed("a")
    await auditor.bus.jetstream().delete_consumer(RECEIPTS, "auditor")
    await auditor.publish("b")
    await auditor.signed("a", "b")


@pytest.mark.parametrize(
    "wrong", [{"origin": "two words"}, {"origin": "a+b"}, {"origin": "x" * 256}, {"share": 1e-120}, {"share": -0.0}]
)
def test_what_no_checkpoint_could_say_is_refused_before_the_first(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(FailedPrecondition, match=r"auditor\.origin") as refusal:
        Books.open(Config(data_dir=tmp_path, auditor=replace(CONFIG, **wrong)))
    assert refusal.value.reason == "CONFIG_INVALID"
