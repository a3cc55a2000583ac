"""Whether a request is still in good hands: what a router decides that follows its log. Pure: no I/O, no clock.

A target is trusted as long as its log grows. When the log is silent for a while the target is asked. It loses the
request when it does not answer, or has withdrawn. To be wrong about it is safe, since the new epoch fences the old
owner (commit.py), and costs a prefill: so each move doubles the patience.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from countersign.services.protocol.commit import LogState

SILENCE_MS = 1000
"""How long a log may be silent before its target is asked."""
MAX_SILENCE_MS = 30_000
DEADLINE_GRACE_MS = 1000
"""A target ends its requests at their deadline; so long after it a router does."""


class Verdict(enum.Enum):
    """What to do about a request now."""

    WAIT = "wait"
    ASK = "ask"
    """Call the owner's ``Start``, which changes nothing where the request is; tell :meth:`Custody.answered`."""
    MOVE = "move"
    """Assign it to another target and tell :meth:`Custody.moved`."""
    CLOSE = "close"
    """Close its log: the deadline has passed, or it is cancelled, and its owner is gone."""


@dataclass(slots=True)
class Custody:
    """One request, from the time on at which somebody follows its log. All times in milliseconds of one clock, which
    is also that of the deadline.
    """

    quiet_since: int
    patience: int = SILENCE_MS
    lost_epoch: int = -1
    retry_at: int = 0

    def grew(self, now: int) -> None:
        """A record came."""
        self.quiet_since, self.lost_epoch = now, -1

    def answered(self, now: int, epoch: int, *, held: bool) -> None:
        """The owner of ``epoch`` said that it works on the request, or did not."""
        if held:
            self.quiet_since = now
        else:
            self.lost_epoch = epoch

    def moved(self, now: int, *, placed: bool) -> None:
        """It was assigned anew, or nobody could take it; the log itself tells a little later."""
        self.quiet_since, self.retry_at = now, now + SILENCE_MS
        if placed:
            self.patience = min(2 * self.patience, MAX_SILENCE_MS)

    def verdict(self, now: int, log: LogState, *, live: bool | None) -> Verdict:
        """``live``: whether the owner is in the registry; None when the registry cannot be trusted now."""
        if log.opened is None or log.closed is not None or now < self.retry_at:
            return Verdict.WAIT
        quiet = now - self.quiet_since
        deadline = log.opened.deadline_unix_ms
        overdue = bool(deadline) and now > deadline + DEADLINE_GRACE_MS
        gone = self.lost_epoch == log.epoch or (live is False and (log.epoch > 0 or quiet >= self.patience))
        if gone:
            return Verdict.CLOSE if overdue or log.cancelled is not None else Verdict.MOVE
        if overdue and quiet >= DEADLINE_GRACE_MS:
            return Verdict.CLOSE
        return Verdict.ASK if quiet >= self.patience and log.epoch > 0 else Verdict.WAIT
