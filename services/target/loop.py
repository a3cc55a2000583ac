"""The target's loop: plan a pass, run it, hand the tokens to the log, ask for the next proposals."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from countersign.services.engine.engine import Engine, Ran, Result, Step
from countersign.services.engine.errors import EngineError, RankLost
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import CachedSequence
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.runtime.announcer import NOBODY, Announcer
from countersign.services.runtime.background import Background
from countersign.services.runtime.errors import DeadlineExceeded, Internal
from countersign.services.runtime.telemetry.context import span_context
from countersign.services.runtime.waiting import happened
from countersign.services.target.committer import Committer
from countersign.services.target.drafts import Drafts
from countersign.services.target.metering import PassMeter
from countersign.services.target.passes import Pass, Timing
from countersign.services.target.prefilling import PrefillJob, no_store
from countersign.services.target.prefixes import Prefixes, PrefixKeys
from countersign.services.target.session import Session
from countersign.services.target.tracing import DECODE, PREFILL, PREFIX
from countersign.v1.event_pb2 import ProtocolEvent, Sampled
from countersign.v1.sampling_pb2 import FinishReason

T = TypeVar("T")

# Times in a row that the ranks may be lost before requests end for it.
MAX_LOSSES = 3
# How long nobody wants anything before it is a time to check the books.
IDLE_S = 0.25
# Blocks that leave the cache between two passes: a megabyte or a few.
EXPORTED_AT_ONCE = 16


class TargetLoop:
    """All of a target's sessions. The model and its cache have one thread; all else runs on the event loop.

    A session waits in the engine for its turn, gets its prefix from the store, is prefilled in chunks, then decoded or
    verified pass by pass until its answer ends; its full blocks go to the store; it is forgotten when its log is
    closed. It sits passes out while its prefix loads and while too many of its records wait for the log. A prompt that
    is computed for another target runs beside them, is never decoded, and leaves the engine when the store has it.
    """

    def __init__(
        self,
        engine: Engine,
        drafts: Drafts,
        prefixes: Prefixes | None,
        keys: PrefixKeys,
        *,
        wall_ms: Callable[[], int],
        log: logging.Logger,
        announcer: Announcer = NOBODY,
    ) -> None:
        self._engine = engine
        self._drafts = drafts
        self._prefixes = prefixes
        self._keys = keys
        self._wall_ms = wall_ms
        self._log = log
        self._announcer = announcer
        self._meter = PassMeter(engine)
        self._sampled: list[ProtocolEvent] = []
        self._sessions: dict[str, Session] = {}
        self._prefills: dict[str, PrefillJob] = {}
        self._dropped = False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._checked = True
        self._losses = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="target")
        # Whoever takes pages: a pass, from its plan on, which counts the free ones, or a prefix that comes in.
        self._pages = asyncio.Lock()
        self._background = Background()

    @property
    def sessions(self) -> int:
        """Requests here, waiting ones included."""
        return len(self._sessions)

    @property
    def prefills(self) -> int:
        """Prompts that are computed for others."""
        return len(self._prefills)

    @property
    def pending_prompt_tokens(self) -> int:
        """Tokens of prompts, or of all that is known where an answer is taken over, that have no KV yet."""
        return sum(_pending(job.generation) for job in self._jobs().values())

    def find(self, request_id: str) -> Session | None:
        """The request, if it is here."""
        return self._sessions.get(request_id)

    def ended(self, session: Session) -> None:
        """Its ``finish`` was set: its committer shall look."""
        session.changed.set()
        self._wake.set()

    def add(self, session: Session, committer: Committer) -> None:
        """Queue a session, or only close its log if it has ended.

        Raises:
            ContextExceeded, RequestTooLarge: it never fits the model's context, or the cache.
        """
        if session.finish is None:
            self._engine.submit(session.generation)
        session.queued_since = asyncio.get_running_loop().time()
        self._sessions[session.request_id] = session
        self._tasks[session.request_id] = asyncio.create_task(
            committer.run(session, session.changed), context=session.trace.context()
        )
        self._wake.set()

    async def prefill(self, prefill: PrefillJob) -> None:
        """Compute a prompt for the store, and leave it when this ends, however it does.

        Raises:
            EngineError: it never fits the cache, or is here already.
            CountersignError: see :meth:`PrefillJob.run`; NO_STORE too where there is none.
        """
        if self._prefixes is None or self._prefixes.resting:
            raise no_store()
        name = prefill.generation.id
        self._engine.submit(prefill.generation)
        self._prefills[name] = prefill
        self._wake.set()
        try:
            await prefill.run(self._prefixes, self.wake)
        finally:
            del self._prefills[name]
            self._engine.remove(name)
            self._dropped = True
            self._wake.set()

    def wake(self) -> None:
        """Something changed: look again."""
        self._wake.set()

    async def run(self) -> None:
        """Work for ever."""
        while True:
            self._wake.clear()
            try:
                await self._reap()
                if not await self._step():
                    await self._sleep()
            except RankLost as error:
                await self._recover(error)

    async def close(self) -> None:
        """Stop the model's thread and every task."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._background.cancel()
        await self._in_thread(self._engine.close)
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._prefixes is not None:
            await self._prefixes.close()

    async def _step(self) -> bool:
        """One pass over whoever can run; False when nobody can."""
        self._hold()
        # The last token of a prefill may look like a decode.
        decodes = (self._sessions.get(generation.id) for generation in self._engine.decodes())
        decoding = [session for session in decodes if session is not None]
        drafts = await self._drafts.propose(decoding)
        async with self._pages:
            step = self._engine.plan(self._wall_ms(), drafts)
            for name in step.plan.expired:
                self._expire(name)
            self._trace(step)
            if step.idle and not (step.plan.admitted or step.plan.preempted):
                return False
            loading = step.plan.admitted if self._prefixes is not None else ()
            began = asyncio.get_running_loop().time()
            ran = await self._in_thread(self._engine.run, step, loading)
            seconds = asyncio.get_running_loop().time() - began
            self._measure(step, ran, seconds)
        for name in loading:
            job = self._jobs().get(name)
            if job is not None:  # else it left meanwhile
                job.loading = True
                self._background.spawn(self._load_prefix(job))
        if ran.computed:
            self._losses = 0
        timing = Timing(len(ran.computed), seconds, self._wall_ms() * 1_000_000)
        self._engine.settle(ran, {result.generation.id: self._take(result, timing) for result in ran.results})
        # Before the committers can append it: who sees a record has been told of its tokens.
        sampled, self._sampled = self._sampled, []
        await self._announcer.announce(*sampled)
        # The committers get their turn, so that the log does not wait for the next pass.
        await asyncio.sleep(0)
        self._meter.ran(step, ran, seconds)
        return True

    def _trace(self, step: Step) -> None:
        """Who enters another phase with this pass."""
        for name in step.plan.preempted:
            if name in self._sessions:
                self._sessions[name].trace.preempted()
        for name in step.plan.admitted:
            session = self._sessions.get(name)
            if session is None:
                continue
            session.trace.enters(PREFILL if self._prefixes is None else PREFIX)
            if session.queued_since is not None:
                self._meter.admitted(asyncio.get_running_loop().time() - session.queued_since)
                session.queued_since = None

    def _measure(self, step: Step, ran: Ran, seconds: float) -> None:
        """What a block takes to compute, from passes of prompts alone: the store keeps longer what is dearer."""
        tokens = sum(count for name, count in step.plan.prefills.items() if name in ran.computed)
        if self._prefixes is None or step.plan.decodes or tokens < PAGE_TOKENS:
            return
        now, before = round(1e6 * seconds / tokens * PAGE_TOKENS), self._prefixes.cost_us
        self._prefixes.cost_us = (3 * before + now) // 4 if before else now

    def _expire(self, name: str) -> None:
        """Its deadline has passed."""
        if name in self._prefills:
            self._prefills[name].end(DeadlineExceeded("the request's deadline has passed"))
        else:
            self._sessions[name].end(FinishReason.FINISH_REASON_DEADLINE)
            self.ended(self._sessions[name])

    async def _recover(self, error: RankLost) -> None:
        """All KV is lost and no token: every request is computed again, by new ranks. Not for ever."""
        self._losses += 1
        about = {"requests": len(self._engine), "error": str(error)}
        self._log.error("the ranks are lost, computing anew", extra=about)
        self._engine.requeue()
        await self._in_thread(self._engine.forget)
        if self._losses < MAX_LOSSES:
            return
        self._losses = 0
        for session in self._sessions.values():
            session.end(FinishReason.FINISH_REASON_ERROR, f"the ranks were lost {MAX_LOSSES} times in a row: {error}")
            self.ended(session)
        for prefill in self._prefills.values():
            prefill.end(Internal(f"the ranks were lost {MAX_LOSSES} times in a row: {error}", reason="RANK_LOST"))

    def _jobs(self) -> dict[str, Session | PrefillJob]:
        return {**self._sessions, **self._prefills}

    def _hold(self) -> None:
        """Leave those out of the next pass that may not take part, and let others in again."""
        for name, job in self._jobs().items():
            if name in self._engine:
                move = self._engine.scheduler.hold if job.waits else self._engine.scheduler.release
                move(name)

    def _take(self, result: Result, timing: Timing) -> list[int]:
        """Append a pass to its session; the tokens that belong to the answer."""
        session, outcome = self._sessions.get(result.generation.id), result.outcome
        kept: list[int] = []
        if session is None:
            prefill = self._prefills.get(result.generation.id)
            if prefill is not None and outcome.error:
                prefill.end(Internal(f"the prompt cannot be computed: {outcome.error}", reason="NOT_COMPUTED"))
            return kept
        # A fenced request's last pass may end after it is known.
        if session.finish is None and session.writer.wants_tokens and outcome.token_ids:
            kept, reason = session.stopper.take(outcome.token_ids)
            base = session.output_tokens
            session.trace.enters(DECODE)
            sampled = Pass(
                outcome.token_ids,
                result.drafted,
                outcome.accepted,
                outcome.fingerprints,
                timing,
            )
            padded = session.padded(sampled.cut(len(kept)))
            session.uncommitted.append(padded)
            self._sampled.append(_said(session, base, padded.token_ids))
            if reason is not None:
                session.end(reason)
        if outcome.error:
            session.end(FinishReason.FINISH_REASON_ERROR, outcome.error)
        session.changed.set()
        return kept

    async def _load_prefix(self, job: Session | PrefillJob) -> None:
        """Import the stored KV of the full blocks; at least one token is left to feed. Others go on meanwhile."""
        generation, prefixes = job.generation, self._prefixes
        try:
            if prefixes is None or generation.sequence is None:
                return
            held = generation.sequence.length // PAGE_TOKENS
            keys = self._keys(generation.tenant, generation.tokens[:-1])
            with span_context(job.span):
                blocks = await prefixes.fetch(generation.id, keys, held)
            async with self._pages:
                await self._in_thread(self._engine.load, generation, blocks)
            if isinstance(job, PrefillJob):
                lacking = await self._in_thread(_export, generation.sequence, job.lacking(held))
                job.loaded(lacking, held, len(blocks))
            else:
                job.stored_blocks = held + len(blocks)
                job.trace.found(job.stored_blocks)
        except EngineError as error:
            # What was imported before stays right; the rest is computed.
            about = {"request_id": generation.id, "error": str(error)}
            self._log.warning("the stored prefix does not fit", extra=about)
            if isinstance(job, PrefillJob):
                job.end(Internal(f"the stored prefix does not fit: {error}", reason="BAD_PREFIX"))
        finally:
            job.loading = False
            if isinstance(job, Session) and job.finish is None:
                job.trace.enters(PREFILL)
            if generation.sequence is not None and not generation.removed:
                generation.cached = min(generation.sequence.length, job.prompt_tokens)
                self._engine.scheduler.adopted(generation.id, generation.sequence.length)
            self._wake.set()

    async def _reap(self) -> None:
        """Forget what is done: its blocks go to the store, its pages back, its end to the draft."""
        over = [session for session in self._sessions.values() if session.done and not session.loading]
        for session in over:
            await self._keep_blocks(session)
            self._engine.remove(session.request_id)
            del self._sessions[session.request_id], self._tasks[session.request_id]
            if session.drafts:
                self._background.spawn(self._drafts.forget(session.request_id))
        if over or self._dropped:
            self._checked = self._dropped = False
            await self._in_thread(self._engine.sweep)

    async def _keep_blocks(self, session: Session) -> None:
        """Offer the full blocks of committed tokens, here and to the store."""
        generation = session.generation
        # A request that failed may have failed over its own KV.
        if generation.sequence is None or session.finish == FinishReason.FINISH_REASON_ERROR:
            return
        committed = session.prompt_tokens + len(session.writer.log.tokens)
        full = min(committed, generation.sequence.length) // PAGE_TOKENS
        generation.keys = self._keys(session.opened.tenant, generation.tokens[: full * PAGE_TOKENS])
        first, count = session.stored_blocks, len(generation.keys)
        if self._prefixes is not None and count > first:
            held = await self._in_thread(generation.sequence.fork)
            storing = self._store_blocks(self._prefixes, session.request_id, generation.keys, held, first)
            self._background.spawn(storing, session.trace.context())

    async def _store_blocks(
        self, prefixes: Prefixes, request_id: str, keys: Sequence[bytes], held: CachedSequence, first: int
    ) -> None:
        """Put those blocks of ``held`` that the store lacks, from ``first`` on: some at a time, passes in between."""
        try:
            async with prefixes.putting(request_id, keys, first, len(keys) - first) as put:
                for start in range(0, len(put.wanted), EXPORTED_AT_ONCE):
                    few = put.wanted[start : start + EXPORTED_AT_ONCE]
                    blocks = await self._in_thread(_export, held, [first + place for place in few])
                    await put.whole(dict(zip(few, blocks, strict=True)))
        except EngineError as error:
            about = {"request_id": request_id, "error": str(error)}
            self._log.warning("blocks are lost before they are stored", extra=about)
        finally:
            await self._in_thread(held.close)
            self._wake.set()

    async def _sleep(self) -> None:
        """Until something changes or the nearest deadline passes. A house that stays idle looks whether all is in its
        place: not at once, since others on this host may go on with what it has just done.
        """
        idle = not (self._sessions or self._prefills or self._checked)
        deadline = self._engine.scheduler.next_deadline
        timeout = max(0.0, (deadline - self._wall_ms()) / 1000) if deadline is not None else None
        if not await happened(self._wake, IDLE_S if idle else timeout) and idle:
            await self._check()

    async def _check(self) -> None:
        self._checked = True
        try:
            await self._in_thread(self._engine.check)
        except RankLost:
            raise
        except EngineError:
            self._log.exception("the engine's books are wrong")

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def _said(session: Session, base: int, token_ids: Sequence[int]) -> ProtocolEvent:
    """The event of one pass, whose tokens are not in the generation yet."""
    sampled = Sampled(epoch=session.writer.epoch, base=base, token_ids=token_ids)
    return session.party.says(session.writer.log.sequence, sampled=sampled)


def _export(sequence: CachedSequence | None, indices: Sequence[int]) -> list[bytes]:
    """Raises EngineError: it is closed, as all are once the ranks are lost."""
    return [] if sequence is None else [sequence.export_block(index) for index in indices]


def _pending(generation: Generation) -> int:
    """Tokens without KV, but for the last of an answer that goes on."""
    computed = generation.sequence.length if generation.sequence is not None else 0
    missing = len(generation.tokens) - computed
    return missing if missing > 1 else 0
