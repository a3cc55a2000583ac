"""``python switchable_service.py router --config FILE``: a service that makes no spans and counts nothing from SIGUSR2
to SIGUSR1, as one does whose telemetry is configured away.

Two stacks of which one is configured so differ in more than that: equal ones do, for as long as they run.
"""

from __future__ import annotations

import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any

from opentelemetry.trace import INVALID_SPAN, Span

from countersign.services.runtime.telemetry.instruments import BucketHistogram, SumCounter
from countersign.services.runtime.telemetry.recording import RecordingTracer


def _no_span(*_: object, **__: object) -> Span:
    return INVALID_SPAN


def _nothing(*_: object, **__: object) -> None:
    pass


# What each does while telemetry is off.
OFF: list[tuple[type, str, Callable[..., Any]]] = [
    (RecordingTracer, "start_span", _no_span),
    (RecordingTracer, "start_below", _no_span),
    (SumCounter, "add", _nothing),
    (BucketHistogram, "record", _nothing),
]


def main() -> None:
    """Run the service that the first argument names."""
    on = [(owner, name, getattr(owner, name)) for owner, name, _ in OFF]

    def switch(number: int, _: object) -> None:
        for owner, name, does in on if number == signal.SIGUSR1 else OFF:
            setattr(owner, name, does)

    signal.signal(signal.SIGUSR1, switch)
    signal.signal(signal.SIGUSR2, switch)
    service = sys.argv.pop(1)
    runpy.run_module(f"countersign.services.{service}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
