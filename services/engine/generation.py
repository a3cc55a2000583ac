"""A request as the engine knows it, and what a pass computes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from countersign.services.engine.kv import CachedSequence
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.engine.runner import Work
from countersign.services.engine.sampling import Allowed, Sampling
from countersign.services.engine.speculation import Draft


class Constraint(Protocol):
    """What a request's tokens may be, such as a grammar. Its state follows the tokens accepted, never the proposed."""

    def masks(self, draft: Draft) -> Sequence[Allowed | None]:
        """What may follow the last token accepted, and each proposal: a mask of ``sampling.allow``, or None for all."""

    def accept(self, token_ids: Sequence[int]) -> None:
        """These tokens were sampled."""


Filled = Callable[[int, int, Sequence[bytes]], None]
"""Told in ``run``'s thread of the blocks that a pass fills: layer, first block, that layer's part of each. All layers
of the same blocks, in order, each as soon as it is done.
"""


@dataclass(slots=True, eq=False)
class Generation:
    """A request and what became of it so far.

    ``tokens``: prompt and output; more than the prompt at first where an answer goes on. ``keys``: the chained prefix
    keys of its first full pages, for pages shared between requests; none for none. ``cached``: how many of its tokens
    had their KV from such pages. ``filled``: whom to tell of its KV as it is computed.
    """

    id: str
    tokens: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    tenant: str = ""
    priority: int = 0
    deadline: int | None = None
    keys: Sequence[bytes] = ()
    constraint: Constraint | None = None
    filled: Filled | None = None
    sequence: CachedSequence | None = None
    cached: int = 0
    removed: bool = False
    prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)

    @property
    def generated(self) -> list[int]:
        """The output."""
        return self.tokens[self.prompt_tokens :]

    @property
    def left(self) -> int:
        """How many more tokens it may have."""
        return self.prompt_tokens + self.max_tokens - len(self.tokens)


def usable_keys(generation: Generation) -> Sequence[bytes]:
    """Keys of the pages that it may adopt: at least one token is left to feed."""
    return generation.keys[: (len(generation.tokens) - 1) // PAGE_TOKENS]


def work_of(generation: Generation, count: int, draft: Draft) -> Work:
    """``count`` tokens at most, then the draft; a sample is wanted if these are all that are known, else a proof that
    the numbers are finite if there are pages to share.
    """
    sequence = generation.sequence
    if sequence is None:
        raise AssertionError(f"request {generation.id} runs and was never admitted")
    fed = generation.tokens[sequence.length : sequence.length + count]
    samples = sequence.length + len(fed) == len(generation.tokens)
    masks = generation.constraint.masks(draft) if samples and generation.constraint is not None else None
    first, end = sequence.length // PAGE_TOKENS, (sequence.length + len(fed)) // PAGE_TOKENS
    proves = not samples and first < min(end, len(generation.keys))
    return Work(sequence, fed, generation.sampling, draft, samples, proves, masks)
