"""Gives requests to targets, takes them from targets that are gone, and closes what nobody can finish."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

from countersign.services.protocol.commit import LogState
from countersign.services.protocol.custody import Custody, Verdict
from countersign.services.protocol.driver import settle
from countersign.services.protocol.errors import LogError
from countersign.services.protocol.events import Effect, Settled
from countersign.services.protocol.matching import arithmetic_of
from countersign.services.protocol.opener import Opener
from countersign.services.protocol.subjects import commit_subject
from countersign.services.router.placement import candidates
from countersign.services.router.splitting import Splitter
from countersign.services.runtime.errors import (
    CountersignError,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    ResourceExhausted,
    Unavailable,
    translated,
)
from countersign.services.runtime.service import Context
from countersign.services.runtime.telemetry import attributes as names
from countersign.services.runtime.telemetry import metrics
from countersign.services.runtime.telemetry.context import current_span
from countersign.v1.sampling_pb2 import FinishReason
from countersign.v1.target_pb2 import StartRequest, StartResponse

START_S = 5.0
# A live target answers a question within milliseconds, so that this much is a target that hangs.
ASK_S = 0.5
# How long a request waits for who comes in the place of targets that are gone. For so long the registry may tell of a
# dead one (its TTL): after that it is plain that there is none. A restart takes about as long.
REPLACED_S = 5.0
# Deadlines are in whole milliseconds, and the loop's clock is another than theirs.
CLOCK_S = 0.005
# What is said of the bus and not of a target.
AWAY = frozenset({"DISCONNECTED", "CONNECTION_LOST", "BUS_CLOSED"})


class Placer:
    """The targets as one router sees them."""

    def __init__(self, context: Context, wall_ms: Callable[[], int]) -> None:
        self._wall_ms = wall_ms
        self._bus, self._journal, self._registry = context.bus, context.journal, context.registry
        self._instance, self._log = context.instance, context.log
        self._splitter = Splitter(context)
        self._takeovers = metrics.counter(metrics.TAKEOVERS)

    async def place(self, opener: Opener) -> None:
        """Assign the request to a target that takes it; where none does, close it and raise why, unless its deadline
        has passed meanwhile. On return somebody has it, or the log says why not.

        A repeated call finds the log assigned: its target is asked to start it once more, which changes nothing where
        it has, and mends it where the first call's router died in between.
        """
        log = opener.log
        if log.ended or log.opened is None:
            return
        if log.epoch > 0 and await self._started(log, START_S) is None:
            return
        if log.epoch == 0:
            await self._splitter.prefill(log)
        refusal = await self._find(opener)
        if opener.log.cancelled is not None and opener.log.epoch == 0:
            await self._close(opener.log)  # while its prompt was computed, and no target has it
        elif refusal is not None:
            # Taken over by this router, no target can take it any more.
            if not await self._settled(opener, opener.assign(self._instance)):
                return  # it was cancelled, or another router has found a target
            message = f"no target took the request: {refusal}"
            if self._patience(opener.log) <= CLOCK_S:
                await self._settled(opener, opener.close(FinishReason.FINISH_REASON_DEADLINE, message))
                return  # an end as any other
            await self._settled(opener, opener.close(FinishReason.FINISH_REASON_ERROR, message))
            raise refusal

    async def look_after(self, custody: Custody, log: LogState, now: int) -> None:
        """Do what is due for a request that has been silent: ask its target, move it, or close it.

        Raises:
            Unavailable, DeadlineExceeded: the bus does not answer.
        """
        match custody.verdict(now, log, live=self._live(log)):
            case Verdict.ASK:
                custody.answered(now, log.epoch, held=await self._holds(log))
            case Verdict.MOVE:
                await self._move(custody, log, now)
            case Verdict.CLOSE:
                await self._close(log)
                custody.moved(now, placed=False)

    async def _holds(self, log: LogState) -> bool:
        """Whether the log's target works on the request, asked of it."""
        try:
            failure = await self._started(log, ASK_S, traced=False)
        except FailedPrecondition:
            return True  # the log has moved on, and will tell
        if failure is not None and failure.reason in AWAY:
            raise failure
        return failure is None

    def _live(self, log: LogState) -> bool | None:
        # Who does not see itself does not see the others either: the bus is away.
        if not self._registry.live("router"):
            return None
        return any(target.instance == log.instance and not target.draining for target in self._registry.live("target"))

    async def _move(self, custody: Custody, log: LogState, now: int) -> None:
        refusal = await self._assign(Opener(log), {log.instance})
        custody.moved(now, placed=refusal is None)
        span = current_span()
        if span.is_recording():
            span.add_event("takeover", {names.INSTANCE: log.instance, names.EPOCH: log.epoch})
            span.set_attribute(names.KEEP, True)
        about = {"request_id": log.request_id, "target": log.instance, "epoch": log.epoch, "tokens": len(log.tokens)}
        if refusal is None:
            self._takeovers.add(1)
            self._log.warning("a request was taken from its target", extra=about)
        else:
            self._log.warning("no target takes a request over, trying on", extra=about | {"reason": refusal.reason})

    async def _close(self, log: LogState) -> None:
        opener = Opener(log)
        if log.cancelled is not None:
            await self._settled(opener, opener.close(FinishReason.FINISH_REASON_CANCELLED))
        elif await self._settled(opener, opener.assign(self._instance)):
            message = f"target {log.instance} let the deadline pass"
            await self._settled(opener, opener.close(FinishReason.FINISH_REASON_DEADLINE, message))

    async def _find(self, opener: Opener) -> CountersignError | None:
        """As `_assign`; where those who were asked are gone, whoever comes in their place is asked too.

        In a rolling restart one target may have just gone when the other is not back yet. There was one a moment ago,
        or the request would not have been let in.
        """
        tried: set[str] = set()
        refusal = await self._assign(opener, tried)
        loop = asyncio.get_running_loop()
        until = loop.time() + self._patience(opener.log)
        while refusal is not None and _is_gone(refusal):
            about = {"request_id": opener.log.request_id, "reason": refusal.reason, "tried": len(tried)}
            self._log.info("all targets are gone, waiting for another", extra=about)
            match await self._awaited(opener.log, tried, until - loop.time()):
                case "another":
                    refusal = await self._assign(opener, tried)
                case "grown":
                    return None  # who follows it will see
                case "nobody":
                    break
        return refusal

    def _patience(self, log: LogState) -> float:
        """Seconds for which the request may wait for a target."""
        deadline = log.opened.deadline_unix_ms if log.opened is not None else 0
        return min(REPLACED_S, (deadline - self._wall_ms()) / 1000) if deadline else REPLACED_S

    async def _awaited(self, log: LogState, tried: set[str], patience: float) -> Literal["another", "grown", "nobody"]:
        """What comes first: a target that was not tried, a record in the log (it is cancelled, a target that hung has
        woken up, another router was first), or the end of the patience.
        """

        def look() -> str | None:
            able = (each.instance for each in candidates(self._registry.live("target"), log))
            return next((instance for instance in able if instance not in tried), None)

        tail = self._journal.tail(commit_subject(log.request_id), after=log.sequence)
        grown = asyncio.ensure_future(anext(tail))
        came = asyncio.ensure_future(self._registry.until(look, patience))
        try:
            await asyncio.wait({grown, came}, return_when=asyncio.FIRST_COMPLETED)
            if grown.done():
                grown.result()
                return "grown"
            return "nobody" if came.result() is None else "another"
        finally:
            grown.cancel()
            came.cancel()
            await asyncio.gather(grown, came, return_exceptions=True)
            await tail.aclose()

    async def _assign(self, opener: Opener, tried: set[str]) -> CountersignError | None:
        """Assign the request to the first target that takes it, of those not in ``tried``, where it puts whom it asks.
        None once it is settled, by whomever.
        """
        refusal: CountersignError = Unavailable("no target is alive", reason="NO_TARGET", help="try again")
        for target in self._splitter.answerers(opener.log):
            if target.instance in tried:
                continue
            tried.add(target.instance)
            if not await self._settled(opener, opener.assign(target.instance, arithmetic_of(target.model))):
                return None
            failure = await self._started(opener.log, START_S)
            if failure is None:
                return None
            if not isinstance(refusal, ResourceExhausted):  # one that is full is there, whoever else is not
                refusal = failure
        return refusal

    async def _settled(self, opener: Opener, effect: Effect) -> bool:
        """Whether the log says now what was wanted. Raises DataLoss where it is not as the protocol says."""
        with translated(LogError, DataLoss, about=f"the log of request {opener.log.request_id} is damaged"):
            return isinstance(await settle(opener, effect, self._journal), Settled)

    async def _started(self, log: LogState, patience: float, *, traced: bool = True) -> CountersignError | None:
        """Have the log's target start it; why it did not. None when it did, or when the request is another's by now."""
        start = StartRequest(request_id=log.request_id, epoch=log.epoch)
        try:
            await self._bus.call(
                "target", "Start", start, StartResponse, timeout=patience, instance=log.instance, traced=traced
            )
        except (ResourceExhausted, Unavailable, DeadlineExceeded) as error:
            return error
        except FailedPrecondition as error:
            if error.reason != "NOT_OWNER":
                raise  # the log has moved on, or the target's replica lags: whoever follows the log will see
        return None


def _is_gone(refusal: CountersignError) -> bool:
    """Whether a target that said this, or said nothing, stops, hangs or is dead; and not: is full, or cannot be reached
    from here.
    """
    return isinstance(refusal, Unavailable | DeadlineExceeded) and refusal.reason not in AWAY
