"""What the engine refuses or cannot do.

EngineError
├── CheckpointError     the model folder is not understood, or not whole
├── InvalidSampling     a sampling parameter outside its range
├── InvalidSpan         a forward pass that makes no sense: no tokens, an unknown id, a closed sequence
├── ContextExceeded     more tokens than the model's context holds
├── InvalidBlock        bytes that are no KV block of this cache, or a block that is not full
├── OutOfPages          the KV cache is full
├── RequestTooLarge     more tokens than the whole KV cache ever holds
├── RankLost            a rank process is gone, silent or out of step: all KV is lost
└── NonFiniteLogits     the model answered NaN or infinity

The engine knows no network: a service turns these into what it answers.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of all."""


class CheckpointError(EngineError):
    """A model folder that is not understood. The message names the file, the field or tensor, and what is supported."""


class InvalidSampling(EngineError):
    """A sampling parameter outside its range. The message names it, its value and what is allowed."""


class InvalidSpan(EngineError):
    """A forward pass that makes no sense; nothing was computed or written."""


class ContextExceeded(EngineError):
    """A sequence would grow past the model's context; nothing was computed or written."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(f"a sequence of {tokens} tokens does not fit the model's context of {limit}")
        self.tokens = tokens
        self.limit = limit


class InvalidBlock(EngineError):
    """A KV block that cannot be exported or imported; the sequence is as it was."""


class OutOfPages(EngineError):
    """The KV cache has too few free pages; nothing was taken."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"the KV cache is full: {needed} pages of 16 tokens needed, {free} free")
        self.needed = needed
        self.free = free


class RequestTooLarge(EngineError):
    """A request whose KV could never fit the cache, not even alone; it was not taken."""

    def __init__(self, tokens: int, fits: int) -> None:
        super().__init__(
            f"a request of {tokens} tokens, prompt and max_tokens, never fits the KV cache: at most {fits} tokens would"
        )
        self.tokens = tokens
        self.fits = fits


class RankLost(EngineError):
    """A rank process ended, did not answer in time, or is out of step with the others. Nothing was computed, and the
    KV that the ranks kept is lost; ``rank`` is the one that is to blame, where it is known.
    """

    def __init__(self, why: str, rank: int | None = None) -> None:
        super().__init__(f"{'a rank' if rank is None else f'rank {rank}'} {why}")
        self.rank = rank


class NonFiniteLogits(EngineError):
    """NaN or +infinity among the logits (or -infinity alone), so that no token can be sampled.

    ``position`` is the absolute position of the token that was to be sampled, ``row`` the row of the batch it stood in.
    """

    def __init__(self, position: int, row: int = 0) -> None:
        super().__init__(f"the logits for the token at position {position} (row {row}) are not finite")
        self.position = position
        self.row = row
