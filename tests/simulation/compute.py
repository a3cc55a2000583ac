"""A model that is a hash function: the real engine and scheduler run on it, with pages to count and nothing in them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from types import SimpleNamespace
from typing import Any, cast

from countersign.services.engine.engine import Engine
from countersign.services.engine.pages import PAGE_TOKENS, pages_for
from countersign.services.engine.runner import Outcome, Work
from countersign.services.engine.scheduler import Scheduler
from countersign.services.engine.speculation import Draft, walk
from countersign.services.target.session import Session

VOCABULARY, END, CONTEXT = 64, 5, 96
Verdict = Callable[[tuple[int, ...], int], None]


def sample(prefix: Sequence[int], salt: str) -> int:
    """The token after ``prefix``. A prompt that begins with an odd token is answered differently by each ``salt``, as
    if its seed were not the same everywhere: what one target sampled tells nothing of what another would.
    """
    salt = salt if prefix[0] % 2 else ""
    return hashlib.blake2b(f"{salt}{list(prefix)}".encode(), digest_size=4).digest()[0] % VOCABULARY


@dataclass(eq=False)
class _Sequence:
    """``keys``: of its first pages, which others find."""

    cache: _Cache
    tokens: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def close(self) -> None:
        self.cache.open.remove(self)


@dataclass
class _Cache:
    pages: int
    open: list[_Sequence] = field(default_factory=list)

    @property
    def free_tokens(self) -> int:
        own = sum(pages_for(each.length) - len(each.keys) for each in self.open)
        free = self.pages - own - len({key for each in self.open for key in each.keys})
        assert free >= 0, "the scheduler promised pages that are not there"
        return free * PAGE_TOKENS

    def sequence(self) -> _Sequence:
        self.open.append(_Sequence(self))
        return self.open[-1]

    def adopt(self, sequence: _Sequence, keys: Sequence[bytes]) -> int:
        """What is behind its own pages and another holds; nothing stays when nobody does."""
        for other in self.open if len(sequence.keys) * PAGE_TOKENS == sequence.length else ():
            same = takewhile(lambda pair: pair[0] == pair[1], zip(other.keys, keys, strict=False))
            sequence.keys = max(sequence.keys, [key for key, _ in same], key=len)
            sequence.tokens += other.tokens[sequence.length : len(sequence.keys) * PAGE_TOKENS]
        return sequence.length

    def publish(self, sequence: _Sequence, keys: Sequence[bytes]) -> None:
        sequence.keys = list(keys)

    def check_integrity(self) -> None:
        assert not self.open, "pages are left over"


@dataclass
class _Runner:
    """Instead of `engine/runner.py`: tells ``verdict`` of each token that it samples, and after what."""

    salt: str
    verdict: Verdict
    model: Any = field(
        default_factory=lambda: SimpleNamespace(config=SimpleNamespace(context_length=CONTEXT, layers=1))
    )

    def __post_init__(self) -> None:
        self.model.executor = SimpleNamespace(close=lambda: None)

    def run(self, works: Sequence[Work], tell: object) -> list[Outcome]:
        return [self._run(work) for work in works]

    def _run(self, work: Work) -> Outcome:
        known = cast(_Sequence, work.sequence).tokens
        known += work.token_ids
        if not work.samples:
            return Outcome(sound=work.proves)
        draft = work.draft.token_ids
        walked = walk(work.draft, [sample([*known, *draft[:index]], self.salt) for index in range(len(draft) + 1)])
        for index, token in enumerate(walked.token_ids):
            self.verdict((*known, *walked.token_ids[:index]), token)
        known += walked.token_ids[: len(walked.path)]
        return Outcome(walked.token_ids, len(walked.path), sound=True)


class Drafts:
    """Proposals that are often right."""

    def __init__(self, salt: str) -> None:
        self._salt = salt

    async def propose(self, sessions: Sequence[Session]) -> dict[str, Draft]:
        return {each.request_id: self._draft(each.generation.tokens) for each in sessions if each.drafts}

    def _draft(self, tokens: list[int]) -> Draft:
        proposed: list[int] = []
        for _ in range(3):
            token = sample([*tokens, *proposed], self._salt)
            proposed.append(token if (token + len(tokens)) % 3 else (token + 1) % VOCABULARY)
        return Draft(tuple(proposed))

    async def forget(self, request_id: str) -> None:
        """Nothing is held."""


def engine(pages: int, salt: str, verdict: Verdict) -> Engine:
    cache = _Cache(pages)
    made = Engine(cast(Any, None), cast(Any, cache), Scheduler(pages, budget=48, chunk=16, most=8))
    made._runner = cast(Any, _Runner(salt, verdict))
    return made


class Silent(logging.Logger):
    """Takes no record, so asks no clock; what is logged with a traceback goes to ``note``."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__("simulation", logging.CRITICAL + 1)
        self._note = note

    def exception(self, msg: object, *args: object, **options: Any) -> None:
        self._note(str(msg) % args if args else str(msg))
