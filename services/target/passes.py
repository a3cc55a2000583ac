"""What one forward pass gave a request."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Timing:
    """``batch`` requests took part in the pass, which took ``seconds`` and ended at ``ended_unix_ns``."""

    batch: int
    seconds: float
    ended_unix_ns: int


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward pass of the target gave a request. ``fingerprints``: one a token, or none."""

    token_ids: tuple[int, ...]
    drafted: int
    accepted: int
    fingerprints: tuple[bytes, ...] = ()
    timing: Timing = Timing(1, 0.0, 0)

    def cut(self, count: int) -> Pass:
        """Its first ``count`` tokens: the answer ended inside it."""
        return replace(
            self,
            token_ids=self.token_ids[:count],
            accepted=min(self.accepted, count),
            fingerprints=self.fingerprints[:count],
        )
