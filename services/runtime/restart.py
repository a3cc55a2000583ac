"""When a process that ended is started again: a pure policy, no clock and no process in it.

Events: ``healthy`` and ``exited``. Effects: `Start` at a time, or `GiveUp`.

- The delay doubles with each failure in a row, from 0.2 s up to 5 s.
- A process that stayed healthy for a while has a clean record again.
- A process that has never been healthy is given up after a few failures: its command, its model or its configuration
  is wrong, and trying for ever would hide that. One that has been healthy is never given up: what it needs may return.
"""

from __future__ import annotations

from dataclasses import dataclass

MISCONFIGURED = 2
"""Exit code of a start that fails in the same way every time: it is not tried again."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds, but for ``attempts``."""

    first_delay: float = 0.2
    max_delay: float = 5.0
    attempts: int = 3
    steady: float = 10.0  # healthy for this long: failures before it are forgotten

    def delay(self, failures: int) -> float:
        """Before the start that follows this many failures in a row (at least 1)."""
        doublings = min(failures - 1, 60)  # a float holds 2 ** 60 times any sane delay; it does not hold 2 ** 2000
        return min(self.first_delay * 2.0**doublings, self.max_delay)


@dataclass(frozen=True, slots=True)
class Start:
    name: str
    at: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    name: str
    code: int
    failures: int


@dataclass(slots=True)
class _Record:
    failures: int = 0
    ever_healthy: bool = False
    healthy_since: float | None = None


class RestartPolicy:
    """The records of all processes of a stack. Times are seconds of any clock that does not go back."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._records: dict[str, _Record] = {}

    def healthy(self, name: str, at: float) -> None:
        record = self._record(name)
        record.ever_healthy = True
        record.healthy_since = at

    def exited(self, name: str, code: int, at: float) -> Start | GiveUp:
        """An end that nobody asked for: code 0 counts like any other, a service has no reason to end by itself."""
        record = self._record(name)
        if record.healthy_since is not None and at - record.healthy_since >= self._limits.steady:
            record.failures = 0
        record.healthy_since = None
        record.failures += 1
        hopeless = code == MISCONFIGURED or record.failures >= self._limits.attempts
        if not record.ever_healthy and hopeless:
            return GiveUp(name, code, record.failures)
        return Start(name, at + self._limits.delay(record.failures))

    def ever_healthy(self, name: str) -> bool:
        return self._record(name).ever_healthy

    def _record(self, name: str) -> _Record:
        return self._records.setdefault(name, _Record())
