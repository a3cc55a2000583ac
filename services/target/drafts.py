"""Asks the draft service for proposals. Whatever goes wrong there costs speed only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import takewhile

from countersign.services.engine.speculation import Draft
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.errors import CountersignError
from countersign.services.target.backoff import Backoff
from countersign.services.target.session import Session
from countersign.v1.draft_pb2 import DraftSequence, ForgetRequest, ForgetResponse, ProposeRequest, ProposeResponse

TIMEOUT_S = 1.0


class Drafts:
    """The draft as the target sees it: what it holds of each request, and whether to ask it at all.

    After a failure nobody asks for a while: a dead or hung draft must not cost each step a time-out.
    """

    def __init__(
        self, bus: Bus, tokens: int, vocabulary_size: int, clock: Callable[[], float], log: logging.Logger
    ) -> None:
        self._bus = bus
        self._tokens = tokens
        self._vocabulary_size = vocabulary_size
        self._backoff = Backoff(clock)
        self._log = log
        self._held: dict[str, int] = {}

    async def propose(self, sessions: Sequence[Session]) -> dict[str, Draft]:
        """Proposals by request id for these sessions, which decode next; {} when the draft does not answer."""
        asks = [ask for ask in map(self._ask, sessions) if ask is not None]
        if not asks or self._backoff.resting:
            return {}
        try:
            response = await self._bus.call(
                "draft", "Propose", ProposeRequest(sequences=asks), ProposeResponse, timeout=TIMEOUT_S
            )
        except CountersignError as error:
            self._backoff.failed()
            self._held.clear()
            self._log.warning("draft does not answer, going on without error=%s", error.reason)
            return {}
        self._backoff.answered()
        return self._results(asks, response)

    async def forget(self, request_id: str) -> None:
        """Tell the draft that a request has ended."""
        if self._held.pop(request_id, None) is None:
            return
        try:
            await self._bus.call(
                "draft", "Forget", ForgetRequest(request_ids=[request_id]), ForgetResponse, timeout=TIMEOUT_S
            )
        except CountersignError as error:
            self._log.debug("draft was not told of the end request=%s error=%s", request_id, error.reason)

    def _ask(self, session: Session) -> DraftSequence | None:
        # The pass itself gives one token beyond the proposals: asking for the last one would be wasted.
        count = min(self._tokens, session.opened.sampling.max_tokens - session.output_tokens - 1)
        if not session.drafts or count < 1:
            return None
        tokens = session.generation.tokens
        base = min(self._held.get(session.request_id, 0), len(tokens) - 1)
        return DraftSequence(
            request_id=session.request_id,
            base=base,
            token_ids=tokens[base:],
            count=count,
            sampling=session.opened.sampling,
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
