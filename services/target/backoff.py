"""How long to leave a service alone that did not answer: requests do without it sooner than wait for it each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Backoff:
    """Doubles from ``first`` to ``most`` seconds while it fails; ``clock`` is monotonic, in seconds."""

    clock: Callable[[], float]
    first: float = 1.0
    most: float = 30.0
    _until: float = 0.0
    _pause: float = 0.0

    @property
    def resting(self) -> bool:
        """Nobody should ask now."""
        return self.clock() < self._until

    def failed(self) -> None:
        self._pause = min(self.most, self._pause * 2 or self.first)
        self._until = self.clock() + self._pause

    def answered(self) -> None:
        self._pause = 0.0
