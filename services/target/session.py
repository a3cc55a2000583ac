"""One request as the target works on it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from countersign.services.engine.kv import CachedSequence
from countersign.services.engine.sampling import Sampling
from countersign.services.protocol.writer import Writer
from countersign.services.target.stopping import Stopper
from countersign.v1.commit_pb2 import Opened
from countersign.v1.sampling_pb2 import Drafting, FinishReason

# Passes whose records may wait for the log while the next pass runs.
MAX_UNCOMMITTED = 2


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward pass of the target gave a request."""

    token_ids: tuple[int, ...]
    drafted: int
    accepted: int

    def cut(self, count: int) -> Pass:
        """Its first ``count`` tokens: the answer ended inside it."""
        return Pass(self.token_ids[:count], self.drafted, min(self.accepted, count))


@dataclass(slots=True)
class Session:
    """Tokens sampled so far, the KV of all but the last, and the passes that wait for the log.

    ``tokens`` is prompt and output. ``finish`` is set once the answer's last token is sampled, or when it ends
    otherwise; the committer then closes the log. ``loading`` while its prefix comes from the store; ``done`` once the
    log is closed or another's.
    """

    request_id: str
    opened: Opened
    writer: Writer
    sequence: CachedSequence
    sampling: Sampling
    stopper: Stopper
    tokens: list[int]
    loading: bool = False
    cached_tokens: int = 0
    started_unix_ms: int = 0
    uncommitted: deque[Pass] = field(default_factory=deque)
    finish: FinishReason.ValueType | None = None
    message: str = ""
    done: bool = False
    stored_blocks: int = 0

    @property
    def prompt_tokens(self) -> int:
        return len(self.opened.prompt_token_ids)

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def reserved_tokens(self) -> int:
        """The most tokens whose KV it may ever hold."""
        return self.prompt_tokens + self.opened.sampling.max_tokens

    @property
    def prefilling(self) -> bool:
        """More than the last token is not in the cache yet."""
        return self.sequence.length < len(self.tokens) - 1

    @property
    def runnable(self) -> bool:
        """The next pass may include it."""
        waits = self.loading or len(self.uncommitted) >= MAX_UNCOMMITTED
        return self.finish is None and not self.done and not waits

    @property
    def drafts(self) -> bool:
        """It takes proposals."""
        return self.opened.drafting != Drafting.DRAFTING_OFF

    def end(self, reason: FinishReason.ValueType, message: str = "") -> None:
        """The answer ends with what was sampled so far; the first reason stands."""
        if self.finish is None:
            self.finish, self.message = reason, message

    def cancel(self) -> None:
        """The log says cancelled: what it does not hold never was."""
        self.uncommitted.clear()
        self.finish, self.message = FinishReason.FINISH_REASON_CANCELLED, ""
