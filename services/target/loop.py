"""The target's loop: plan a batch, run it, hand the tokens to the log, ask for the next proposals."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from countersign.services.engine.errors import EngineError
from countersign.services.engine.kv import PAGE_TOKENS, PagedCache
from countersign.services.runtime.background import Background
from countersign.services.target.batch import plan
from countersign.services.target.committer import Committer
from countersign.services.target.drafts import Drafts
from countersign.services.target.prefixes import Prefixes
from countersign.services.target.session import Session
from countersign.services.target.verifier import Result, Verifier
from countersign.v1.sampling_pb2 import FinishReason

T = TypeVar("T")

# A verify pass feeds proposals beyond the committed tokens before it drops those rejected.
PROPOSAL_SLACK = 64


@dataclass(slots=True)
class Running:
    """A session in the batch, the task that commits for it, and the event that wakes that task."""

    session: Session
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class TargetLoop:
    """All of a target's sessions. Everything but the model runs on the event loop; the model has one thread.

    A session waits for room (admission by the KV that it may ever need), gets its prefix from the store, is prefilled
    in chunks, then decoded or verified each pass until its answer ends; its full blocks go to the store; it is
    forgotten when its log is closed.
    """

    def __init__(
        self,
        verifier: Verifier,
        cache: PagedCache,
        drafts: Drafts,
        prefixes: Prefixes | None,
        *,
        capacity_tokens: int,
        max_sequences: int,
        chunk: int,
        wall_ms: Callable[[], int],
        log: logging.Logger,
    ) -> None:
        self._verifier = verifier
        self._cache = cache
        self._drafts = drafts
        self._prefixes = prefixes
        self._capacity = capacity_tokens
        self._max_sequences = max_sequences
        self._chunk = chunk
        self._wall_ms = wall_ms
        self._log = log
        self._waiting: deque[Session] = deque()
        self._running: dict[str, Running] = {}
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="target")
        self._background = Background()

    @property
    def sessions(self) -> int:
        """Requests here, waiting ones included."""
        return len(self._waiting) + len(self._running)

    def find(self, request_id: str) -> Session | None:
        """The request, if it is here."""
        running = self._running.get(request_id)
        if running is not None:
            return running.session
        return next((session for session in self._waiting if session.request_id == request_id), None)

    def ended(self, session: Session) -> None:
        """Its ``finish`` was set from outside: its committer, once it has one, shall look."""
        if session.request_id in self._running:
            self._running[session.request_id].changed.set()
        self._wake.set()

    def add(self, session: Session) -> None:
        """Queue a session."""
        self._waiting.append(session)
        self._wake.set()

    def wake(self) -> None:
        """Something changed: look again."""
        self._wake.set()

    async def run(self, committer: Committer) -> None:
        """Work for ever."""
        while True:
            self._wake.clear()
            self._expire()
            await self._reap()
            self._admit(committer)
            if not await self._step():
                await self._sleep()

    async def close(self) -> None:
        """Stop the model's thread and every task."""
        tasks = [running.task for running in self._running.values() if running.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._background.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._prefixes is not None:
            await self._prefixes.close()

    async def _step(self) -> bool:
        """One pass over whoever can run; False when nobody can."""
        sessions = [running.session for running in self._running.values()]
        if not any(session.runnable for session in sessions):
            return False
        proposals = await self._drafts.propose(sessions)
        works = plan(sessions, proposals, chunk=self._chunk)
        for result in await self._in_thread(self._verifier.step, works):
            self._take(result)
        # The committers get their turn, so that the log does not wait for the next pass.
        await asyncio.sleep(0)
        return True

    def _take(self, result: Result) -> None:
        """Append a pass to its session and see whether the answer ends with it."""
        session = result.work.session
        running = self._running[session.request_id]
        if result.error:
            session.end(FinishReason.FINISH_REASON_ERROR, result.error)
        elif result.sampled is not None and session.finish is None:
            kept, reason = session.stopper.take(result.sampled.token_ids)
            session.tokens.extend(kept)
            session.uncommitted.append(result.sampled.cut(len(kept)))
            if reason is not None:
                session.end(reason)
        running.changed.set()

    def _expire(self) -> None:
        """End what is past its deadline, waiting or running."""
        now = self._wall_ms()
        for session in (*self._waiting, *(running.session for running in self._running.values())):
            deadline = session.opened.deadline_unix_ms
            if deadline and now >= deadline and session.finish is None:
                session.end(FinishReason.FINISH_REASON_DEADLINE)
                self.ended(session)

    def _admit(self, committer: Committer) -> None:
        """Let waiting sessions in, first come first served, while their KV is sure to fit; who has ended needs none."""
        for session in [session for session in self._waiting if session.finish is not None]:
            self._waiting.remove(session)
            self._enter(session, committer)
        while self._waiting and len(self._running) < self._max_sequences:
            session = self._waiting[0]
            held = (running.session for running in self._running.values())
            reserved = sum(_rounded(other) for other in held if other.finish is None or other.sequence.length)
            if self._running and reserved + _rounded(session) > self._capacity:
                return
            self._waiting.popleft()
            if self._prefixes is not None:
                session.loading = True
                self._background.spawn(self._load_prefix(self._prefixes, session))
            self._enter(session, committer)

    def _enter(self, session: Session, committer: Committer) -> None:
        running = self._running[session.request_id] = Running(session)
        running.task = asyncio.create_task(committer.run(session, running.changed))

    async def _load_prefix(self, prefixes: Prefixes, session: Session) -> None:
        """Import the stored KV of the full blocks; at least one token is left to feed. Others go on meanwhile."""
        try:
            keys = prefixes.keys(session.opened.tenant, session.tokens[:-1])
            blocks = await prefixes.fetch(session.request_id, keys)
            await self._in_thread(self._import, session, blocks)
            session.cached_tokens = min(session.sequence.length, session.prompt_tokens)
            session.stored_blocks = len(blocks)
        except EngineError as error:
            # What was imported before stays right; the rest is computed.
            self._log.warning("stored prefix does not fit request=%s error=%s", session.request_id, error)
        finally:
            session.loading = False
            self._wake.set()

    def _import(self, session: Session, blocks: list[bytes]) -> None:
        for block in blocks:
            session.sequence.import_block(block)

    async def _reap(self) -> None:
        """Forget what is done: its blocks go to the store, its pages back, its end to the draft."""
        over = [r.session for r in self._running.values() if r.session.done and not r.session.loading]
        for session in over:
            await self._store_blocks(session)
            await self._in_thread(session.sequence.close)
            del self._running[session.request_id]
            if session.drafts:
                self._background.spawn(self._drafts.forget(session.request_id))

    async def _store_blocks(self, session: Session) -> None:
        """Offer the full blocks of committed tokens that did not come from the store."""
        committed = session.prompt_tokens + len(session.writer.log.tokens)
        full = min(committed, session.sequence.length) // PAGE_TOKENS
        first = session.stored_blocks
        # A request that failed may have failed over its own KV.
        if self._prefixes is None or full <= first or session.finish == FinishReason.FINISH_REASON_ERROR:
            return
        blocks = await self._in_thread(lambda: [session.sequence.export_block(index) for index in range(first, full)])
        keys = self._prefixes.keys(session.opened.tenant, session.tokens[: full * PAGE_TOKENS])
        self._background.spawn(self._prefixes.store(session.request_id, keys, blocks[: len(keys) - first], first))

    async def _sleep(self) -> None:
        """Until something changes or the nearest deadline passes."""
        sessions = (*self._waiting, *(running.session for running in self._running.values()))
        deadlines = [s.opened.deadline_unix_ms for s in sessions if s.opened.deadline_unix_ms and s.finish is None]
        timeout = max(0.0, (min(deadlines) - self._wall_ms()) / 1000) if deadlines else None
        try:
            await asyncio.wait_for(self._wake.wait(), timeout)
        except TimeoutError:
            return

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def _rounded(session: Session) -> int:
    """Tokens of KV that a session may need, in whole pages, proposals of one pass included."""
    return -(-session.reserved_tokens // PAGE_TOKENS) * PAGE_TOKENS + PROPOSAL_SLACK
