"""``python switchable_service.py router --config FILE``: a service that makes no spans and counts nothing from SIGUSR2
to SIGUSR1, as one does whose telemetry is configured away.

Two stacks of which one is configured so differ in more than that: equal ones do, for as long as they run.
"""

from __future__ import annotations

import runpy
import signal
import sys
from typing import Any

from opentelemetry.trace import INVALID_SPAN, Span

from countersign.services.runtime.telemetry.instruments import BucketHistogram, SumCounter
from countersign.services.runtime.telemetry.recording import RecordingTracer


def _no_span(*_: object, **__: object) -> Span:
    return INVALID_SPAN


def _nothing(*_: object, **__: object) -> None:
    pass


def _methods() -> list[tuple[type, str, Any, Any]]:
    """Class, name, what it does, and what it does while telemetry is off."""
    off = {(RecordingTracer, "start_span"): _no_span, (RecordingTracer, "start_below"): _no_span}
    silent = {(SumCounter, "add"): _nothing, (BucketHistogram, "record"): _nothing}
    return [(owner, name, getattr(owner, name), other) for (owner, name), other in [*off.items(), *silent.items()]]


def main() -> None:
    """Run the service that the first argument names."""
    methods = _methods()

    def switch(number: int, _: object) -> None:
        for owner, name, does, other in methods:
            setattr(owner, name, does if number == signal.SIGUSR1 else other)

    signal.signal(signal.SIGUSR1, switch)
    signal.signal(signal.SIGUSR2, switch)
    service = sys.argv.pop(1)
    runpy.run_module(f"countersign.services.{service}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
