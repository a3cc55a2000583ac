"""What a target counts: passes, rounds, commits, and what it holds. A handful of calls a pass, whatever its batch."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.metrics import MeterProvider

from countersign.services.engine.engine import Engine, Ran, Result, Step
from countersign.services.engine.model import Executor
from countersign.services.engine.ranks.executor import RankedExecutor
from countersign.services.protocol.driver import Final
from countersign.services.protocol.events import AssignedTo, CancelledByClient, ClosedAlready, Fenced
from countersign.services.runtime.telemetry import metrics

_INPUT, _OUTPUT = {metrics.TOKEN_TYPE: "input"}, {metrics.TOKEN_TYPE: "output"}
_REFUSALS = {
    Fenced: {metrics.OUTCOME: "fenced"},
    AssignedTo: {metrics.OUTCOME: "fenced"},
    CancelledByClient: {metrics.OUTCOME: "cancelled"},
    ClosedAlready: {metrics.OUTCOME: "closed"},
}


class PassMeter:
    """A target's instruments of its loop."""

    def __init__(self, engine: Engine, provider: MeterProvider | None = None) -> None:
        self._sharing, self._prompted = engine.sharing, engine.sharing.computed
        self._queued = metrics.histogram(metrics.QUEUE_DURATION, provider)
        self._seconds = metrics.histogram(metrics.PASS_DURATION, provider)
        self._requests = metrics.histogram(metrics.PASS_REQUESTS, provider)
        self._fed = metrics.histogram(metrics.PASS_FED, provider)
        self._rounds = metrics.counter(metrics.ROUNDS, provider)
        self._accepted_of_round = metrics.tally(metrics.ROUND_ACCEPTED, provider)
        self._proposed = metrics.counter(metrics.TOKENS_DRAFTED, provider)
        self._accepted = metrics.counter(metrics.TOKENS_ACCEPTED, provider)
        self._tokens = metrics.counter(metrics.TOKENS, provider)
        self._preempted = metrics.counter(metrics.PREEMPTIONS, provider)

    def admitted(self, seconds: float) -> None:
        """A request's turn has come, for the first time."""
        self._queued.record(seconds)

    def ran(self, step: Step, ran: Ran, seconds: float) -> None:
        """A pass is over."""
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

    def __init__(self, provider: MeterProvider | None = None) -> None:
        self._seconds = metrics.tally(metrics.COMMIT_DURATION, provider)
        self._conflicts = metrics.counter(metrics.COMMIT_CONFLICTS, provider)
        self._queried = metrics.counter(metrics.PREFIX_QUERIED, provider)
        self._found = metrics.counter(metrics.PREFIX_FOUND, provider)
        self._receipts = metrics.counter(metrics.RECEIPTS_MADE, provider)

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


def observe_engine(engine: Engine, executor: Executor, most: int, provider: MeterProvider | None = None) -> None:
    """What the engine holds, whenever somebody looks; ``most`` requests may be there."""

    def requests() -> dict[str, float]:
        running = engine.scheduler.running
        return {"running": running, "waiting": max(0, len(engine) - running)}

    def pages() -> dict[str, float]:
        stats = engine.cache.stats()
        return {"used": stats.used, "cached": stats.cached, "free": stats.free}

    metrics.observe(metrics.TARGET_REQUESTS, requests, provider)
    metrics.observe(metrics.TARGET_LIMIT, lambda: most, provider)
    metrics.observe(metrics.PAGES, pages, provider)
    metrics.observe(metrics.PAGES_EVICTED, lambda: engine.cache.stats().evictions, provider)
    metrics.observe(metrics.RING_BYTES, executor.sent if isinstance(executor, RankedExecutor) else _alone, provider)


def _alone() -> dict[str, float]:
    """One rank sends nothing."""
    return {"forward": 0, "back": 0}
