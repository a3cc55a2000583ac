"""What a target counts: passes, rounds, commits, and what it holds. A handful of calls a pass, whatever its batch."""

from __future__ import annotations

from collections.abc import Sequence

from countersign.services.engine.engine import Engine, Ran, Result, Step
from countersign.services.engine.model import Executor
from countersign.services.engine.ranks.executor import RankedExecutor
from countersign.services.protocol.driver import Final
from countersign.services.protocol.events import AssignedTo, CancelledByClient, ClosedAlready, Fenced
from countersign.services.runtime.telemetry import metrics
from countersign.services.runtime.telemetry.instruments import Meter

_INPUT, _OUTPUT = {metrics.TOKEN_TYPE: "input"}, {metrics.TOKEN_TYPE: "output"}
_REFUSALS = {
    Fenced: {metrics.OUTCOME: "fenced"},
    AssignedTo: {metrics.OUTCOME: "fenced"},
    CancelledByClient: {metrics.OUTCOME: "cancelled"},
    ClosedAlready: {metrics.OUTCOME: "closed"},
}


class PassMeter:
    """A target's instruments of its loop."""

    def __init__(self, engine: Engine, meter: Meter | None = None) -> None:
        self._sharing, self._prompted = engine.sharing, engine.sharing.computed
        self._waited: list[float] = []
        self._queued = metrics.histogram(metrics.QUEUE_DURATION, meter)
        self._seconds = metrics.histogram(metrics.PASS_DURATION, meter)
        self._requests = metrics.histogram(metrics.PASS_REQUESTS, meter)
        self._fed = metrics.histogram(metrics.PASS_FED, meter)
        self._rounds = metrics.counter(metrics.ROUNDS, meter)
        self._accepted_of_round = metrics.histogram(metrics.ROUND_ACCEPTED, meter)
        self._proposed = metrics.counter(metrics.TOKENS_DRAFTED, meter)
        self._accepted = metrics.counter(metrics.TOKENS_ACCEPTED, meter)
        self._tokens = metrics.counter(metrics.TOKENS, meter)
        self._preempted = metrics.counter(metrics.PREEMPTIONS, meter)

    def admitted(self, seconds: float) -> None:
        """A request's turn has come, for the first time. Its pass is next: this is told after it."""
        self._waited.append(seconds)

    def ran(self, step: Step, ran: Ran, seconds: float) -> None:
        """A pass is over."""
        for waited in self._waited:
            self._queued.record(waited)
        self._waited.clear()
        if step.plan.preempted:
            self._preempted.add(len(step.plan.preempted))
        if not ran.computed:
            return
        self._seconds.record(seconds)
        self._requests.record(len(ran.computed))
        prompt, self._prompted = self._sharing.computed - self._prompted, self._sharing.computed
        drafted = sum(result.drafted for result in ran.results)
        decodes = sum(name in ran.computed for name in step.plan.decodes)
        self._fed.record(prompt + decodes + drafted)
        if prompt:
            self._tokens.add(prompt, _INPUT)
        self._sampled(ran.results, drafted)

    def _sampled(self, results: Sequence[Result], drafted: int) -> None:
        if results:
            self._rounds.add(len(results))
            self._tokens.add(sum(len(result.outcome.token_ids) for result in results), _OUTPUT)
        if not drafted:
            return
        self._proposed.add(drafted)
        self._accepted.add(sum(result.outcome.accepted for result in results))
        for result in results:
            if result.drafted:
                self._accepted_of_round.record(result.outcome.accepted)


class CommitMeter:
    """A target's instruments of its log."""

    def __init__(self, meter: Meter | None = None) -> None:
        self._seconds = metrics.histogram(metrics.COMMIT_DURATION, meter)
        self._conflicts = metrics.counter(metrics.COMMIT_CONFLICTS, meter)
        self._queried = metrics.counter(metrics.PREFIX_QUERIED, meter)
        self._found = metrics.counter(metrics.PREFIX_FOUND, meter)
        self._receipts = metrics.counter(metrics.RECEIPTS_MADE, meter)

    def settled(self, final: Final, seconds: float) -> None:
        """An append is over."""
        self._seconds.record(seconds)
        refusal = _REFUSALS.get(type(final))
        if refusal is not None:
            self._conflicts.add(1, refusal)

    def began(self, prompt: int, cached: int) -> None:
        """The first pass of an answer goes to the log: so much of its prompt needed not be computed."""
        self._queried.add(prompt)
        self._found.add(cached)

    def receipt(self) -> None:
        """One more is stored."""
        self._receipts.add(1)


def observe_engine(engine: Engine, executor: Executor, most: int, meter: Meter | None = None) -> None:
    """What the engine holds, whenever somebody looks; ``most`` requests may be there."""

    def requests() -> dict[str, float]:
        running = engine.scheduler.running
        return {"running": running, "waiting": max(0, len(engine) - running)}

    def pages() -> dict[str, float]:
        stats = engine.cache.stats()
        return {"used": stats.used, "cached": stats.cached, "free": stats.free}

    metrics.observe(metrics.TARGET_REQUESTS, requests, meter)
    metrics.observe(metrics.TARGET_LIMIT, lambda: most, meter)
    metrics.observe(metrics.PAGES, pages, meter)
    metrics.observe(metrics.PAGES_EVICTED, lambda: engine.cache.stats().evictions, meter)
    metrics.observe(metrics.RING_BYTES, executor.sent if isinstance(executor, RankedExecutor) else _alone, meter)


def _alone() -> dict[str, float]:
    """One rank sends nothing."""
    return {"forward": 0, "back": 0}
