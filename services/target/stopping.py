"""Where an answer ends, at token granularity, so that speculation cannot move the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from countersign.services.engine.text import StopMatcher, Tokenizer
from countersign.v1.sampling_pb2 import FinishReason

CONTEXT_TOKENS = 8


@dataclass(slots=True)
class Stopper:
    """Fed each sampled token in order, tells whether the answer ends with it.

    ``end_token_ids`` end it wherever they are sampled; ``stop`` strings end it with the token that completes one. The
    tokenizer is needed only for stop strings.
    """

    end_token_ids: frozenset[int]
    max_tokens: int
    stop: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None
    _count: int = 0
    _matcher: StopMatcher = field(init=False)
    _context: list[int] = field(default_factory=list)
    _open: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._matcher = StopMatcher(self.stop)

    def prompt(self, token_ids: Sequence[int]) -> None:
        """The tokens before the answer, for the text of its first ones."""
        self._context = list(token_ids[-CONTEXT_TOKENS:])

    def take(self, token_ids: Iterable[int]) -> tuple[list[int], FinishReason.ValueType | None]:
        """The tokens that belong to the answer, and why it ends with the last of them, if it does."""
        taken: list[int] = []
        for token in token_ids:
            taken.append(token)
            reason = self._feed(token)
            if reason is not None:
                return taken, reason
        return taken, None

    @property
    def room(self) -> int:
        """How many tokens more the answer may have."""
        return self.max_tokens - self._count

    def counts(self, more: int) -> None:
        """So many tokens belong to the answer that were not sampled."""
        self._count += more

    def _feed(self, token: int) -> FinishReason.ValueType | None:
        self._count += 1
        if token in self.end_token_ids or self._completes_stop(token):
            return FinishReason.FINISH_REASON_STOP
        if self._count >= self.max_tokens:
            return FinishReason.FINISH_REASON_LENGTH
        return None

    def _completes_stop(self, token: int) -> bool:
        if not self.stop or self.tokenizer is None:
            return False
        self._open.append(token)
        pieces = self.tokenizer.decode_pieces(self._context, self._open, final=False)
        done, self._open = self._open[: len(pieces)], self._open[len(pieces) :]
        self._context = (self._context + done)[-CONTEXT_TOKENS:]
        return any(self._matcher.feed(piece).stopped for piece in pieces)
