"""The target's loop and its committers in one process: a real model, a log in memory, no bus."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, cast

import pytest

from countersign.services.engine.engine import Engine, Ran, Step
from countersign.services.engine.errors import RankLost
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, load_model
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.engine.scheduler import Scheduler
from countersign.services.engine.speculation import Draft
from countersign.services.protocol.commit import LogState, encode, replay
from countersign.services.protocol.driver import settle
from countersign.services.protocol.opener import Opener
from countersign.services.protocol.subjects import commit_subject, receipt_subject
from countersign.services.protocol.writer import Writer
from countersign.services.runtime.telemetry import metrics
from countersign.services.runtime.telemetry.exposition import Families
from countersign.services.runtime.telemetry.instruments import Meter
from countersign.services.target.committer import Committer
from countersign.services.target.loop import MAX_LOSSES, TargetLoop
from countersign.services.target.prefixes import PrefixKeys
from countersign.services.target.receipts import ReceiptMaker
from countersign.services.target.session import Session
from countersign.services.target.stopping import Stopper
from countersign.v1.commit_pb2 import Cancelled, Opened
from countersign.v1.router_pb2 import ModelInfo
from countersign.v1.sampling_pb2 import Drafting, FinishReason, SamplingParams
from countersign.verify.receipt import parse, receipt_digest
from countersign.verify.testing import signing_key, write_tiny_model

PROMPT = list(b"def quicksort(items):")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return load_model(folder)


@dataclass(frozen=True, slots=True)
class Record:
    sequence: int
    data: bytes


@dataclass
class MemoryJournal:
    """Subjects with compare-and-set; ``on_receipt`` runs whenever a receipt is about to be stored."""

    subjects: dict[str, list[Record]] = field(default_factory=dict)
    on_receipt: Callable[[], None] = lambda: None

    async def try_append(self, subject: str, data: bytes, *, expected: int) -> int | Literal["refused", "lost"]:
        records = self.subjects.setdefault(subject, [])
        if expected != (records[-1].sequence if records else 0):
            return "refused"
        records.append(Record(expected + 1, data))
        return expected + 1

    async def append(self, subject: str, data: bytes, *, expected: int, timeout: float) -> int:  # noqa: ASYNC109  as Journal
        self.on_receipt()
        answer = await self.try_append(subject, data, expected=expected)
        assert isinstance(answer, int)
        return answer

    async def read(self, subject: str, *, after: int = 0) -> Sequence[Record]:
        return [record for record in self.subjects.get(subject, []) if record.sequence > after]

    async def last(self, subject: str) -> Record | None:
        records = self.subjects.get(subject)
        return records[-1] if records else None

    def log(self, name: str) -> LogState:
        return replay(name, self.subjects[commit_subject(name)])


class NoDrafts:
    async def propose(self, sessions: Sequence[Session]) -> dict[str, Draft]:
        return {}

    async def forget(self, request_id: str) -> None:
        """Nothing is held."""


@dataclass
class Put:
    """Takes the places that it wants."""

    wanted: list[int]
    taken: dict[int, bytes] = field(default_factory=dict)

    async def whole(self, blocks: dict[int, bytes]) -> None:
        assert not set(blocks) & set(self.taken)
        self.taken |= blocks


@dataclass
class MemoryPrefixes:
    """Takes what is offered but for the places that it ``has``; ``slow`` requests load until it is set."""

    offered: dict[str, int] = field(default_factory=dict)
    taken: dict[str, dict[int, bytes]] = field(default_factory=dict)
    has: set[int] = field(default_factory=set)
    on_put: Callable[[], None] | None = None
    slow: asyncio.Event | None = None
    cost_us: int = 0

    async def fetch(self, request_id: str, keys: Sequence[bytes], first: int) -> list[bytes]:
        if self.slow is not None:
            await self.slow.wait()
        return []

    @asynccontextmanager
    async def putting(self, request_id: str, keys: Sequence[bytes], first: int, count: int) -> AsyncIterator[Put]:
        assert len(keys) >= first + count
        put = Put([place for place in range(count) if first + place not in self.has])
        on_put, self.on_put = self.on_put, None
        if on_put is not None:
            on_put()
        yield put
        assert sorted(put.taken) == put.wanted, "what the store lacks, and nothing else"
        self.offered[request_id] = first + count
        self.taken[request_id] = put.taken

    async def close(self) -> None:
        """Nothing is open."""


class Watching(Engine):
    """Notes how many requests were in a pass at most, how many were preempted, and how often all KV was forgotten.

    Its ranks are lost in the next ``losses`` passes, and in so many looks at the pages.
    """

    most = preempted = forgotten = losses = idle_losses = loads = planned_meanwhile = 0
    loading = False

    def plan(self, now: int = 0, drafts: Mapping[str, Draft] = MappingProxyType({})) -> Step:
        self.planned_meanwhile += self.loading
        return super().plan(now, drafts)

    def load(self, generation: Generation, blocks: Sequence[bytes]) -> None:
        self.loads, self.loading = self.loads + 1, True
        time.sleep(0.02)  # as long as some hundred blocks take
        super().load(generation, blocks)
        self.loading = False

    def run(self, step: Step, skip: Collection[str] = ()) -> Ran:
        if self.losses and set(step.plan.decodes) | set(step.plan.prefills) - set(skip):
            self.losses -= 1
            raise RankLost("ended with code -9", 1)
        ran = super().run(step, skip)
        self.most = max(self.most, len(ran.computed))
        self.preempted += len(step.plan.preempted)
        return ran

    def check(self) -> None:
        if self.idle_losses:
            self.idle_losses -= 1
            raise RankLost("ended with code -9", 1)
        super().check()

    def forget(self) -> None:
        self.forgotten += 1
        super().forget()


@dataclass
class House:
    model: Model
    journal: MemoryJournal
    prefixes: MemoryPrefixes
    loop: TargetLoop
    engine: Watching
    committer: Committer

    async def add(self, name: str, max_tokens: int, prompt: Sequence[int] = PROMPT, timeout_ms: int = 0) -> Session:
        sampling = SamplingParams(max_tokens=max_tokens, top_p=1.0)
        opened = Opened(
            model="tiny",
            tenant="default",
            prompt_token_ids=prompt,
            sampling=sampling,
            drafting=Drafting.DRAFTING_OFF,
            salt_key=bytes(32),
            deadline_unix_ms=now_ms() + timeout_ms if timeout_ms else 0,
        )
        opener = Opener(LogState(name))
        await settle(opener, opener.open(opened), self.journal)
        await settle(opener, opener.assign("t"), self.journal)
        session = Session(
            request_id=name,
            opened=opened,
            writer=Writer(opener.log, epoch=1, instance="t"),
            stopper=Stopper(frozenset(), max_tokens),
            generation=Generation(name, list(prompt), max_tokens, deadline=opened.deadline_unix_ms or None),
            started_unix_ms=now_ms(),
        )
        self.loop.add(session, self.committer)
        return session

    async def idle(self) -> None:
        """Until every session is forgotten, its blocks offered, and its pages back."""
        await until(lambda: not self.loop.sessions)
        await self.loop._background.drain()
        await self.loop._in_thread(lambda: None)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  what is waited for has no event of its own
            await asyncio.sleep(0.005)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@asynccontextmanager
async def house(model: Model, *, capacity: int = 4096) -> AsyncIterator[House]:
    journal, prefixes, log = MemoryJournal(), MemoryPrefixes(), logging.getLogger("test")
    cache = PagedCache(model.config, "fp32", tokens=capacity)
    engine = Watching(model, cache, Scheduler(cache.free_tokens // PAGE_TOKENS, chunk=16))
    keys = PrefixKeys(bytes(32), "test")
    loop = TargetLoop(engine, cast("Any", NoDrafts()), cast("Any", prefixes), keys, wall_ms=now_ms, log=log)
    digest = bytes(range(32))
    info = ModelInfo(name="tiny", weights_sha256=digest, tokenizer_sha256=digest, config_sha256=digest, dtype="fp32")
    maker = ReceiptMaker(signing_key(), info, "test")
    committer = Committer(cast("Any", journal), maker, now_ms, loop.wake, log)
    running = asyncio.create_task(loop.run())
    try:
        yield House(model, journal, prefixes, loop, engine, committer)
        assert not running.done(), running
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await loop.close()


async def test_every_request_ends_with_all_tokens_and_the_receipt_that_closed_it_and_gives_its_pages_back(
    model: Model,
) -> None:
    async with house(model) as here:
        free = here.engine.cache.free_tokens
        for index in range(6):
            await here.add(f"r{index}", max_tokens=5 + index)
        await here.idle()
        for index in range(6):
            log = here.journal.log(f"r{index}")
            assert len(log.tokens) == 5 + index
            assert log.closed is not None
            last = here.journal.subjects[receipt_subject(f"r{index}")][-1]
            assert receipt_digest(last.data) == log.closed.receipt_sha256
        assert here.engine.cache.free_tokens == free
        here.engine.cache.check_integrity()
        assert here.engine.most > 1


async def test_a_pass_is_in_the_log_before_it_is_counted(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = []
    async with house(model) as target:
        ran = target.loop._meter.ran

        def counted(*arguments: Any) -> None:
            committed.append(len(target.journal.log("one").tokens))
            ran(*arguments)

        monkeypatch.setattr(target.loop._meter, "ran", counted)
        await target.add("one", max_tokens=4)
        await target.idle()
    passes = committed[-4:]
    assert passes == [1, 2, 3, 4]


async def test_passes_and_their_tokens_are_counted_and_how_long_each_request_waited(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter()
    monkeypatch.setattr(metrics._Process, "meter", meter)
    async with house(model) as target:
        for name in ("one", "two"):
            await target.add(name, max_tokens=4)
        await target.idle()
    samples = [sample for family in Families(meter).collect() for sample in family.samples]
    told = {(sample.name, *sample.labels.values()): sample.value for sample in samples}
    assert told["countersign_target_queue_duration_seconds_count",] == 2
    assert told["countersign_target_tokens_total", "output"] == 2 * 4
    assert told["countersign_target_tokens_total", "input"] == 2 * len(PROMPT)
    assert told["countersign_pass_fed_sum",] == 2 * len(PROMPT) + 2 * (4 - 1)  # the last token is never fed
    assert told["countersign_rounds_total",] == 2 * 4
    assert told["countersign_pass_duration_seconds_count",] == told["countersign_pass_requests_count",] >= 4
    assert told["countersign_receipts_made_total",] == 2
    assert told["countersign_commit_duration_seconds_count",] == 2 * (4 + 1)


async def test_a_cancel_between_receipt_and_closed_wins_and_the_receipt_says_so(model: Model) -> None:
    async with house(model) as here:

        def cancel_once() -> None:
            here.journal.on_receipt = lambda: None
            log = here.journal.log("r")
            record = encode("r", log.digest, Cancelled(cause="just in time"))
            here.journal.subjects[commit_subject("r")].append(Record(log.sequence + 1, record))

        here.journal.on_receipt = cancel_once
        await here.add("r", max_tokens=3)
        await here.idle()
        log = here.journal.log("r")
        assert log.closed is not None
        assert log.closed.reason == FinishReason.FINISH_REASON_CANCELLED
        last = here.journal.subjects[receipt_subject("r")][-1]
        assert receipt_digest(last.data) == log.closed.receipt_sha256
        assert parse(last.data).receipt.output.finish_reason == "cancelled"


async def test_a_cancel_that_is_learned_while_the_receipt_is_on_its_way_closes_the_log_as_cancelled(
    model: Model,
) -> None:
    async with house(model) as here:
        session = await here.add("r", max_tokens=3)

        def cancel_and_refresh() -> None:
            here.journal.on_receipt = lambda: None
            log = here.journal.log("r")
            record = Record(log.sequence + 1, encode("r", log.digest, Cancelled(cause="just in time")))
            here.journal.subjects[commit_subject("r")].append(record)
            session.writer.tail([record])

        here.journal.on_receipt = cancel_and_refresh
        await here.idle()
        log = here.journal.log("r")
        assert log.closed is not None
        assert log.closed.reason == FinishReason.FINISH_REASON_CANCELLED
        assert receipt_digest(here.journal.subjects[receipt_subject("r")][-1].data) == log.closed.receipt_sha256


@pytest.mark.parametrize("max_tokens", [10, 11, 12, 26, 27, 28])
async def test_only_blocks_of_committed_tokens_are_offered_to_the_store(model: Model, max_tokens: int) -> None:
    async with house(model) as here:
        await here.add("r", max_tokens=max_tokens)
        await until(lambda: "r" in here.prefixes.offered)
        # The last token's KV is never computed: nothing follows it.
        committed = len(PROMPT) + len(here.journal.log("r").tokens)
        assert here.prefixes.offered["r"] == (committed - 1) // PAGE_TOKENS


async def test_of_what_the_store_has_nothing_is_read_from_the_cache(model: Model) -> None:
    prompt = PROMPT * 20  # more blocks than are read at once
    async with house(model) as here:
        here.prefixes.has = {0, 1, 3}
        free = here.engine.cache.free_tokens
        await here.add("r", 8, prompt)
        await here.idle()
        offered, taken = here.prefixes.offered["r"], here.prefixes.taken["r"]
        assert sorted(taken) == [place for place in range(offered) if place not in {0, 1, 3}]
        await here.add("again", 8, prompt)
        await here.idle()
        assert here.prefixes.taken["again"] == taken
        assert here.engine.cache.free_tokens == free, "a page is still held"


async def test_blocks_that_are_lost_on_their_way_to_the_store_are_not_stored(model: Model) -> None:
    async with house(model) as here:
        here.prefixes.on_put = here.engine.forget
        await here.add("r", 8, PROMPT * 20)
        await here.idle()
        assert here.prefixes.on_put is None
        assert here.prefixes.offered == {}, "what pages of another time held was offered"
        await here.add("next", 8)
        await here.idle()
        assert "next" in here.prefixes.offered


async def test_requests_whose_kv_does_not_fit_together_are_preempted_and_all_end_with_their_own_tokens(
    model: Model,
) -> None:
    async with house(model) as here:
        await here.add("alone", max_tokens=80)
        await here.idle()
        expected = here.journal.log("alone").token_ids
    async with house(model, capacity=272) as here:
        for index in range(4):
            await here.add(f"r{index}", max_tokens=80)
        await here.idle()
        assert here.engine.most > 1
        assert here.engine.preempted > 0
        assert all(here.journal.log(f"r{index}").token_ids == expected for index in range(4))
        here.engine.check()


async def test_the_store_learns_what_a_block_took_to_compute(model: Model) -> None:
    async with house(model) as here:
        await here.add("r", max_tokens=2, prompt=PROMPT * 4)
        begin = time.monotonic()
        await here.idle()
        assert 0 < here.prefixes.cost_us < (time.monotonic() - begin) * 1e6


async def test_no_pass_is_planned_while_a_prefix_takes_pages(model: Model) -> None:
    async with house(model) as here:
        await here.add("long", max_tokens=80)
        for index in range(4):
            await here.add(f"r{index}", max_tokens=5)
        await here.idle()
        assert here.engine.loads == 5
        assert here.engine.planned_meanwhile == 0


async def test_lost_ranks_are_a_pause_until_they_are_lost_again_and_again(model: Model) -> None:
    async with house(model) as here:
        await here.add("alone", max_tokens=20)
        await here.idle()
        expected = here.journal.log("alone").token_ids
        here.engine.losses = MAX_LOSSES - 1
        await here.add("r", max_tokens=20)
        await here.idle()
        assert here.journal.log("r").token_ids == expected
        assert here.engine.forgotten == MAX_LOSSES - 1
        here.engine.losses = 1 << 30
        await here.add("never", max_tokens=20)
        await here.idle()
        here.engine.losses = 0
        log = here.journal.log("never")
        assert log.closed is not None
        assert log.closed.reason == FinishReason.FINISH_REASON_ERROR
        assert "the ranks were lost 3 times in a row: rank 1 ended with code -9" in log.closed.message
        await here.add("later", max_tokens=20)
        await here.idle()
        assert here.journal.log("later").token_ids == expected


async def test_ranks_that_are_lost_while_nobody_asks_are_forgotten_too(model: Model) -> None:
    async with house(model) as here:
        here.engine.idle_losses = 1
        await here.add("r", max_tokens=3)
        await here.idle()
        await until(lambda: here.engine.forgotten == 1)


async def test_a_deadline_that_passes_while_a_prefix_loads_ends_the_request_and_nothing_breaks(model: Model) -> None:
    async with house(model) as here:
        here.prefixes.slow = asyncio.Event()
        session = await here.add("r", max_tokens=5, timeout_ms=30)
        await until(lambda: session.done)
        assert here.loop.sessions == 1, "forgotten while its prefix was still loading"
        here.prefixes.slow.set()
        await here.idle()
        log = here.journal.log("r")
        assert log.closed is not None
        assert log.closed.reason == FinishReason.FINISH_REASON_DEADLINE


async def test_a_receipt_that_cannot_be_made_closes_the_log_with_an_error_and_no_receipt(model: Model) -> None:
    async with house(model) as here:
        session = await here.add("r", max_tokens=3)
        session.started_unix_ms = -1  # no verifier would take such a receipt
        await here.idle()
        log = here.journal.log("r")
        assert log.closed is not None
        assert log.closed.reason == FinishReason.FINISH_REASON_ERROR
        assert log.closed.receipt_sha256 == b""
        assert "no receipt" in log.closed.message
        assert len(log.tokens) == 3
