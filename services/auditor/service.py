"""The auditor service: keeps receipts in a transparency log, audits those that are drawn, signs what it finds.

    CS_RECEIPTS -> Intake -> log, ledger -> Notary: checkpoint, draw -> Docket: audit, verdict -> Outbox -> CS_AUDITS

Each arrow rests on what is durable before it, so that any of them may be cut at any time (docs/adr/0025).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from google.protobuf.descriptor import ServiceDescriptor

from countersign.services.auditor.case import Disclosed
from countersign.services.auditor.cosigning import Cosigners, add_checkpoint
from countersign.services.auditor.docket import MOST_LOG_BYTES, Docket
from countersign.services.auditor.examiner import Examiner
from countersign.services.auditor.following import Follower
from countersign.services.auditor.intake import Intake
from countersign.services.auditor.keys import Keys
from countersign.services.auditor.ledger import Ledger
from countersign.services.auditor.metering import AuditMeter
from countersign.services.auditor.notary import Notary, stated
from countersign.services.auditor.outbox import Outbox
from countersign.services.auditor.peers import NOBODY, Others
from countersign.services.auditor.proofs import Proofs
from countersign.services.auditor.tracing import request_traceparent
from countersign.services.auditor.web import LogSite
from countersign.services.auditor.wire import digest_of, entry_of, fitting, level_of, page_of, response_of
from countersign.services.auditor.witness import Witness
from countersign.services.runtime.clock import wall_ms
from countersign.services.runtime.config import AuditorConfig, Config
from countersign.services.runtime.consumer import Consumer
from countersign.services.runtime.errors import (
    CountersignError,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Unavailable,
    translated,
)
from countersign.services.runtime.journal import RECEIPTS
from countersign.services.runtime.service import Call, Context
from countersign.services.runtime.telemetry import metrics, tracing
from countersign.services.runtime.telemetry.context import current_span
from countersign.services.runtime.waiting import happened
from countersign.v1 import auditor_pb2
from countersign.v1.auditor_pb2 import (
    AuditRequest,
    AuditResponse,
    GetCheckpointRequest,
    GetCheckpointResponse,
    GetConsistencyRequest,
    GetConsistencyResponse,
    GetInclusionRequest,
    GetInclusionResponse,
    GetLogRequest,
    GetLogResponse,
    GetVerdictRequest,
    GetVerdictResponse,
    ListEquivocationsRequest,
    ListEquivocationsResponse,
    ListVerdictsRequest,
    ListVerdictsResponse,
)
from countersign.v1.registry_pb2 import Instance
from countersign.verify.errors import KeyFileError, LogFolderError, Malformed
from countersign.verify.log.checkpoint import NoteKey
from countersign.verify.log.store import TileLog
from countersign.verify.merkle import EMPTY_ROOT
from countersign.verify.verdict import share_of

BATCH = 512
LOOK_S = 0.5
RETRY_S = 1.0
NO_KEY_S = 5.0
QUIET_S = 1.0

T = TypeVar("T")


def _check_stated(keys: Keys, share: float) -> None:
    """Before the first checkpoint, which cannot be taken back. Raises FailedPrecondition (reason CONFIG_INVALID)."""
    wanted = "auditor.origin is one word of at most 255 bytes without a plus, auditor.share 0 or not below 1e-99"
    with translated(Malformed, FailedPrecondition, reason="CONFIG_INVALID", help=wanted):
        share_of(stated(keys.origin, 0, EMPTY_ROOT, share))
        NoteKey.parse(keys.log_key.encode())


@dataclass(frozen=True, slots=True)
class Books:
    """All that the auditor keeps."""

    log: TileLog
    ledger: Ledger
    keys: Keys

    @staticmethod
    def open(config: Config) -> Books:
        """What ``data_dir`` and the ledger's URL hold, made if there is nothing.

        Raises:
            FailedPrecondition: keys, log folder or ledger cannot be used.
        """
        folder = config.data_dir / "auditor"
        with (
            translated(KeyFileError, FailedPrecondition, reason="KEY_FILE_UNUSABLE"),
            translated(LogFolderError, FailedPrecondition, reason="LOG_FOLDER_UNUSABLE"),
        ):
            keys = Keys.load(config.data_dir / "keys", config.auditor.origin)
            _check_stated(keys, config.auditor.share)
            log = TileLog.open(folder / "log")
        try:
            ledger = Ledger.open(config.auditor.ledger or f"sqlite:///{folder / 'ledger.db'}")
        except CountersignError:
            log.close()
            raise
        return Books(log, ledger, keys)

    def close(self) -> None:
        self.ledger.close()
        self.log.close()


class AuditorService:
    """Answers; where ``works`` gave it a stream of receipts, ``run`` also logs and audits those.

    ``others``: whom it watches, and who watches it. ``instance``: this process on the bus.
    """

    descriptor: ServiceDescriptor = auditor_pb2.DESCRIPTOR.services_by_name["AuditorService"]

    def __init__(
        self,
        books: Books,
        examiner: Examiner,
        site: LogSite,
        config: AuditorConfig,
        log: logging.Logger,
        others: Others = NOBODY,
        instance: str = "",
    ) -> None:
        self._books = books
        self._examiner = examiner
        self._site = site
        self._config = config
        self._logger = log
        self._instance = instance
        self._intake = Intake(books.log, books.ledger, examiner.trusted_keys, wall_ms)
        self._notary = Notary(books.log, books.ledger, books.keys, config.share)
        self._proofs = Proofs(books.log, books.ledger, books.keys)
        self._witness = Witness(books.ledger, books.keys, [peer.key for peer in others.follow], wall_ms)
        self._followers = [Follower(peer, self._witness, books.ledger) for peer in others.follow if peer.url]
        self._cosigners = Cosigners(books.log, books.ledger, self._notary, others.witnesses)
        if others.follow:
            site.add_post("/add-checkpoint", partial(add_checkpoint, self._witness))
        self._meter = AuditMeter()
        self._work: list[Callable[[], Awaitable[None]]] = []
        self._drawn, self._signed, self._uncosigned = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def works(self, receipts: Callable[[], Awaitable[Consumer]], docket: Docket, outbox: Outbox) -> None:
        """Gives it its place in the stream of receipts to work on; before ``run``."""
        self._work = [
            lambda: self._take_receipts(receipts),
            lambda: self._audit_drawn(docket),
            lambda: self._publish(outbox),
            self._gather_cosignatures,
            *(partial(self._follow, follower) for follower in self._followers),
        ]

    async def run(self) -> None:
        """Work for ever. Raises DataLoss where log, ledger and keys are not of each other."""
        await self._asked(self._catch_up)
        try:
            async with asyncio.TaskGroup() as group:
                for work in self._work:
                    group.create_task(self._patiently(work))
        except* CountersignError as failed:
            raise failed.exceptions[0] from None  # the process says it in one line
        await asyncio.Event().wait()

    async def close(self) -> None:
        await self._site.close()
        await asyncio.to_thread(self._examiner.close)
        self._books.close()

    def describe(self, instance: Instance) -> None:
        instance.active_requests = self._examiner.active

    async def Audit(self, request: AuditRequest, call: Call) -> AuditResponse:
        """Raises InvalidArgument for an unknown level, FailedPrecondition when the trusted key's file is unusable."""
        levels = [level_of(number) for number in request.levels]
        if (asked := tracing.context_of(request_traceparent(request.receipt))) is not None:
            current_span().add_link(asked)
        return response_of(await self._examiner.audit(Disclosed(request.receipt), levels))

    async def GetLog(self, request: GetLogRequest, call: Call) -> GetLogResponse:
        keys = self._books.keys
        counts = await asyncio.to_thread(self._books.ledger.counts)
        return GetLogResponse(
            origin=keys.origin,
            log_key=keys.log_key.encode(),
            witness_key=keys.witness_key.encode(),
            auditor_key=keys.verdicts.public_key().public_bytes_raw(),
            url=self._site.url,
            size=counts.receipts,
            refused=counts.refused,
            waiting=counts.waiting,
            outcomes=counts.outcomes,
            equivocations=counts.conflicts,
            instance=self._instance,
        )

    async def GetCheckpoint(self, request: GetCheckpointRequest, call: Call) -> GetCheckpointResponse:
        covers = request.covers if request.HasField("covers") else None
        _, note = await self._asked(self._proofs.checkpoint, covers)
        return GetCheckpointResponse(note=note)

    async def GetInclusion(self, request: GetInclusionRequest, call: Call) -> GetInclusionResponse:
        return await self._asked(self._proofs.inclusion, digest_of(request.receipt_sha256))

    async def GetConsistency(self, request: GetConsistencyRequest, call: Call) -> GetConsistencyResponse:
        return await self._asked(self._proofs.consistency, request.old_size, request.new_size)

    async def GetVerdict(self, request: GetVerdictRequest, call: Call) -> GetVerdictResponse:
        return await self._asked(self._proofs.verdict, digest_of(request.receipt_sha256))

    async def ListVerdicts(self, request: ListVerdictsRequest, call: Call) -> ListVerdictsResponse:
        after, most = page_of(request.page_size, request.page_token)
        found = await self._asked(self._books.ledger.verdicts, after, most, request.outcome or None)
        page = fitting(found)
        more = str(page[-1].index) if len(page) < len(found) or len(found) == most else ""
        return ListVerdictsResponse(verdicts=map(entry_of, page), next_page_token=more)

    async def ListEquivocations(self, request: ListEquivocationsRequest, call: Call) -> ListEquivocationsResponse:
        found = await self._asked(self._books.ledger.conflicts, request.origin or None)
        return ListEquivocationsResponse(statements=found)

    async def _asked(self, answer: Callable[..., T], *arguments: object) -> T:
        with translated(LogFolderError, DataLoss, reason="LOG_FOLDER_UNUSABLE"):
            return await _in_thread(answer, *arguments)

    def _catch_up(self) -> None:
        """What a crash, or a ledger that did not answer, left between log and ledger."""
        entered = self._intake.catch_up()
        self._notary.catch_up()
        if entered:
            self._logger.info("entered what the log had and the ledger lacked", extra={"entries": entered})

    async def _take_receipts(self, receipts: Callable[[], Awaitable[Consumer]]) -> None:
        """Begins anew after each failure: does what it left half done, and finds its place in the stream again."""
        await self._asked(self._catch_up)
        consumer = await receipts()
        try:
            await self._take_from(consumer)
        finally:
            await consumer.close()

    async def _take_from(self, consumer: Consumer) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            deliveries = await consumer.fetch(BATCH, min(LOOK_S, self._config.checkpoint_s))
            if deliveries:
                taken = await self._asked(self._intake.take, [delivery.data for delivery in deliveries])
                self._meter.taken(taken)
                for place in taken.later:
                    await consumer.postpone(deliveries[place], NO_KEY_S)
                done = [delivery for place, delivery in enumerate(deliveries) if place not in taken.later]
                await consumer.acknowledge(done)
            if loop.time() >= due:
                due = loop.time() + self._config.checkpoint_s
                if await self._asked(self._notary.sign) is not None:
                    for waiting in (self._drawn, self._signed, self._uncosigned):
                        waiting.set()

    async def _audit_drawn(self, docket: Docket) -> None:
        while True:
            self._drawn.clear()
            with translated(LogFolderError, DataLoss, reason="LOG_FOLDER_UNUSABLE"):
                while await docket.next():
                    self._signed.set()
            await happened(self._drawn, QUIET_S)

    async def _publish(self, outbox: Outbox) -> None:
        while True:
            self._signed.clear()
            await outbox.publish()
            await happened(self._signed, QUIET_S)

    async def _gather_cosignatures(self) -> None:
        while True:
            self._uncosigned.clear()
            if await self._asked(self._cosigners.gather):
                self._signed.set()
            await happened(self._uncosigned, self._config.follow_s)

    async def _follow(self, follower: Follower) -> None:
        while True:
            await self._asked(follower.look)
            self._signed.set()
            await asyncio.sleep(self._config.follow_s)

    async def _patiently(self, work: Callable[[], Awaitable[None]]) -> None:
        """Try again while bus, ledger or a key file cannot be used."""
        while True:
            try:
                await work()
            except (Unavailable, DeadlineExceeded, FailedPrecondition) as error:
                self._logger.warning("waiting for what cannot be used", extra={"error": str(error)})
            await asyncio.sleep(RETRY_S)


async def _in_thread(answer: Callable[..., T], *arguments: object) -> T:
    """Ends with the thread, also when it is cancelled: log and ledger are closed next, and nobody may be at them."""
    work = asyncio.ensure_future(asyncio.to_thread(answer, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


async def create(context: Context) -> AuditorService:
    config = context.config
    others = Others.of(config.auditor)
    books = await asyncio.to_thread(Books.open, config)
    site = LogSite(books.log, books.ledger, books.keys)
    agreed = [name.strip() for name in config.auditor.arithmetics.split(",") if name.strip()]
    key_file = config.data_dir / "keys" / "receipts.pub"
    examiner = Examiner(key_file, config.auditor.model, config.auditor.threads, agreed)
    service = AuditorService(books, examiner, site, config.auditor, context.log, others, context.instance)
    try:
        await site.open(config.auditor.http_listen)
    except CountersignError:
        await service.close()
        raise
    journal, ledger, keys = context.journal, books.ledger, books.keys
    metrics.observe(metrics.LOG_SIZE, lambda: books.log.size)
    metrics.observe(metrics.AUDITS_WAITING, lambda: ledger.counts().waiting)
    metrics.observe(metrics.EQUIVOCATIONS, lambda: ledger.counts().conflicts)
    read = partial(journal.read, most=MOST_LOG_BYTES)
    docket = Docket(books.log, ledger, keys, read, examiner.audit, wall_ms)
    receipts = partial(Consumer.open, context.bus, RECEIPTS, f"auditor-{keys.log_name}")
    service.works(receipts, docket, Outbox(journal, ledger, keys))
    context.log.info("the log is served", extra={"url": site.url, "origin": keys.origin, "size": books.log.size})
    return service
