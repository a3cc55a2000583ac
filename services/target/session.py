"""One request as the target works on it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from opentelemetry.trace import Span

from countersign.services.engine.generation import Generation
from countersign.services.protocol.writer import Writer
from countersign.services.runtime.announcer import Party
from countersign.services.target.padding import Padding
from countersign.services.target.passes import Pass
from countersign.services.target.stopping import Stopper
from countersign.services.target.tracing import COMMIT, AnswerTrace
from countersign.v1.commit_pb2 import Opened
from countersign.v1.sampling_pb2 import Drafting, FinishReason

# Passes whose records may wait for the log while the next pass runs.
MAX_UNCOMMITTED = 2


@dataclass(slots=True)
class Session:
    """The request in the engine, and the passes that wait for the log.

    ``finish`` is set once the answer's last token is sampled, or when it ends otherwise; the committer then closes the
    log. ``loading`` while its prefix comes from the store; ``done`` once the log is closed or another's. ``changed``
    wakes the committer; ``queued_since`` on the loop's clock, until it is admitted for the first time. Only a fault
    has ``unseen``, how many first prompt tokens the engine was not given, and ``padding``, what goes into the log that
    was not sampled.
    """

    request_id: str
    opened: Opened
    writer: Writer
    stopper: Stopper
    generation: Generation
    loading: bool = False
    started_unix_ms: int = 0
    uncommitted: deque[Pass] = field(default_factory=deque)
    finish: FinishReason.ValueType | None = None
    message: str = ""
    done: bool = False
    stored_blocks: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    party: Party = field(default_factory=Party)
    unseen: int = 0
    padding: Padding | None = None
    trace: AnswerTrace = field(default_factory=AnswerTrace)
    queued_since: float | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.opened.prompt_token_ids)

    @property
    def output_tokens(self) -> int:
        added = 0 if self.padding is None else self.padding.added
        return self.unseen + len(self.generation.tokens) - self.prompt_tokens + added

    @property
    def span(self) -> Span:
        """What is done for it belongs there."""
        return self.trace.span

    @property
    def waits(self) -> bool:
        """No pass may include it now."""
        return self.loading or self.finish is not None or len(self.uncommitted) >= MAX_UNCOMMITTED

    @property
    def drafts(self) -> bool:
        """It takes proposals."""
        return self.opened.drafting != Drafting.DRAFTING_OFF

    def padded(self, sampled: Pass) -> Pass:
        """What of a pass goes into the log: what was sampled, but for a fault."""
        if self.padding is None:
            return sampled
        padded = self.padding.pad(sampled, self.stopper.room - 1)
        self.stopper.counts(len(padded.token_ids) - len(sampled.token_ids))
        return padded

    def end(self, reason: FinishReason.ValueType, message: str = "") -> None:
        """The answer ends with what was sampled so far; the first reason stands."""
        if self.finish is None:
            self.finish, self.message = reason, message
            self.trace.enters(COMMIT)

    def cancel(self) -> None:
        """The log says cancelled: what it does not hold never was."""
        self.uncommitted.clear()
        self.finish, self.message = FinishReason.FINISH_REASON_CANCELLED, ""
        self.trace.enters(COMMIT)
