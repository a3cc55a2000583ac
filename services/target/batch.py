"""Which tokens of which requests go into the next forward pass. No clock, no tensor, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from countersign.services.target.session import Session

TOKEN_BUDGET = 512


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of one request to feed: its own, then the draft's proposals.

    ``rows`` logits are wanted, one for each token to sample: 0 inside a prefill, else the proposals and one more.
    """

    session: Session
    token_ids: tuple[int, ...]
    proposals: tuple[int, ...] = ()
    rows: int = 0


def plan(
    sessions: Sequence[Session],
    proposals: Mapping[str, tuple[int, ...]],
    *,
    chunk: int,
    budget: int = TOKEN_BUDGET,
) -> list[Work]:
    """Decodes and verifications first, then prefill chunks while the token budget lasts (SARATHI).

    The first prefill always gets a chunk, so that a full house of decodes cannot starve it.
    """
    runnable = [session for session in sessions if session.runnable]
    works = [_decode(s, proposals.get(s.request_id, ())) for s in runnable if not s.prefilling]
    left = budget - sum(len(work.token_ids) + len(work.proposals) for work in works)
    for index, session in enumerate(s for s in runnable if s.prefilling):
        if left <= 0 and index > 0:
            break
        work = _prefill(session, chunk if index == 0 else min(chunk, left))
        left -= len(work.token_ids)
        works.append(work)
    return works


def _decode(session: Session, proposed: tuple[int, ...]) -> Work:
    fed = tuple(session.tokens[session.sequence.length :])
    return Work(session, fed, proposed, rows=len(proposed) + 1)


def _prefill(session: Session, chunk: int) -> Work:
    start = session.sequence.length
    fed = tuple(session.tokens[start : start + chunk])
    return Work(session, fed, rows=1 if start + len(fed) == len(session.tokens) else 0)
