"""Proposals for what decodes next: looked up in the request itself, else from the draft service.

Whatever goes wrong there costs speed only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import takewhile

from countersign.services.engine.lookup import Lookup
from countersign.services.engine.speculation import Draft
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.config import DraftConfig
from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.telemetry import metrics
from countersign.services.target.backoff import Backoff
from countersign.services.target.session import Session
from countersign.v1.draft_pb2 import DraftSequence, ForgetRequest, ForgetResponse, ProposeRequest, ProposeResponse

TIMEOUT_S = 1.0


class Drafts:
    """The draft as the target sees it: what it holds of each request, and whether to ask it at all.

    After a failure nobody asks for a while: a dead or hung draft must not cost each step a time-out.
    """

    def __init__(
        self, bus: Bus, config: DraftConfig, vocabulary_size: int, clock: Callable[[], float], log: logging.Logger
    ) -> None:
        self._bus = bus
        self._config = config
        self._vocabulary_size = vocabulary_size
        self._clock = clock
        self._backoff = Backoff(clock)
        self._log = log
        self._calls = metrics.histogram(metrics.DRAFT_DURATION)
        self._held: dict[str, int] = {}
        self._lookups: dict[str, Lookup] = {}

    async def propose(self, sessions: Sequence[Session]) -> dict[str, Draft]:
        """Proposals by request id for these sessions, which decode next."""
        # The pass itself gives one token beyond the proposals: asking for the last one would be wasted.
        wanted = {session.request_id: session.generation.left - 1 for session in sessions if session.drafts}
        takers = [session for session in sessions if wanted.get(session.request_id, 0) > 0]
        found = {session.request_id: self._look_up(session, wanted[session.request_id]) for session in takers}
        proposals = {name: draft for name, draft in found.items() if draft}
        others = [session for session in takers if session.request_id not in proposals]
        return proposals | await self._drafted([self._ask(other, wanted[other.request_id]) for other in others])

    def _look_up(self, session: Session, wanted: int) -> Draft:
        if not self._config.lookup:
            return Draft()
        lookup = self._lookups.setdefault(session.request_id, Lookup(self._config.lookup))
        return Draft(lookup.propose(session.generation.tokens, min(self._config.lookup_tokens, wanted)))

    async def _drafted(self, asks: Sequence[DraftSequence]) -> dict[str, Draft]:
        """From the draft service; {} when it does not answer."""
        if not asks or self._backoff.resting:
            return {}
        began = self._clock()
        try:
            response = await self._bus.call(
                "draft", "Propose", ProposeRequest(sequences=asks), ProposeResponse, timeout=TIMEOUT_S
            )
        except CountersignError as error:
            self._backoff.failed()
            self._held.clear()
            self._calls.record(self._clock() - began, {metrics.ERROR: error.reason})
            self._log.warning("the draft does not answer, going on without", extra={"reason": error.reason})
            return {}
        self._backoff.answered()
        self._calls.record(self._clock() - began)
        return self._results(asks, response)

    async def forget(self, request_id: str) -> None:
        """Tell the draft that a request has ended."""
        self._lookups.pop(request_id, None)
        if self._held.pop(request_id, None) is None:
            return
        try:
            await self._bus.call(
                "draft", "Forget", ForgetRequest(request_ids=[request_id]), ForgetResponse, timeout=TIMEOUT_S
            )
        except CountersignError as error:
            about = {"request_id": request_id, "reason": error.reason}
            self._log.debug("the draft was not told of the end", extra=about)

    def _ask(self, session: Session, wanted: int) -> DraftSequence:
        tokens = session.generation.tokens
        base = min(self._held.get(session.request_id, 0), len(tokens) - 1)
        return DraftSequence(
            request_id=session.request_id,
            base=base,
            token_ids=tokens[base:],
            count=min(self._config.tokens, wanted),
            sampling=session.opened.sampling,
            tenant=session.opened.tenant,
            traceparent="" if base else session.trace.traceparent,
        )

    def _results(self, asks: Sequence[DraftSequence], response: ProposeResponse) -> dict[str, Draft]:
        proposals: dict[str, Draft] = {}
        for ask, proposal in zip(asks, response.proposals, strict=False):
            if proposal.request_id != ask.request_id:
                continue
            if proposal.WhichOneof("result") == "tokens":
                # What was sent counts as held, the proposals do not: they may be rejected.
                self._held[ask.request_id] = ask.base + len(ask.token_ids)
                ids = proposal.tokens.ids[: ask.count]
                proposals[ask.request_id] = Draft(tuple(takewhile(lambda token: token < self._vocabulary_size, ids)))
            else:
                self._held[ask.request_id] = 0
        return proposals
