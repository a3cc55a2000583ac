"""What the time of a span goes into."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

from opentelemetry import trace
from opentelemetry.trace import Span, Tracer
from opentelemetry.util.types import AttributeValue

from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.telemetry.tracing import record_error

_END = ""


class Phases:
    """What a span's time goes into, one phase after the other without a gap. They become spans below it when the last
    one ends: while the request waits, only the times are taken.

    Where the span tells when it began and ends (``start_time``, ``at_end``: ours do), the first phase begins with it
    and the last one ends with it, whatever kept this process from its work in between.
    """

    def __init__(self, source: Tracer, parent: Span) -> None:
        self._source = source
        self._parent = parent
        self._on = parent.is_recording()
        # Each phase and when it began; below by its place.
        self._begun: list[tuple[str, int]] = []
        self._noted: defaultdict[int, dict[str, AttributeValue]] = defaultdict(dict)
        self._failed: dict[int, CountersignError] = {}

    def begin(self, name: str) -> None:
        """The next one, from now on; the one before it ends. Nothing changes when it is the same."""
        begun = self._begun
        if self._on and not (begun and begun[-1][0] == name):
            begun.append((name, time.time_ns()))

    def note(self, key: str, value: AttributeValue) -> None:
        """An attribute of the one that is now."""
        if self._begun:
            self._noted[len(self._begun) - 1][key] = value

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """The next one; it lasts until the one after it begins, and has failed if a CountersignError comes through."""
        self.begin(name)
        try:
            yield
        except CountersignError as error:
            self._failed[len(self._begun) - 1] = error
            raise

    def end(self) -> None:
        """The last one ends."""
        if not self._begun:
            return
        at_end: Callable[[Callable[[int], None]], None] | None = getattr(self._parent, "at_end", None)
        if at_end is None:
            self._write(time.time_ns())
        else:
            at_end(self._write)

    def _write(self, ended_ns: int) -> None:
        name, began_ns = self._begun[0]
        self._begun[0] = (name, getattr(self._parent, "start_time", None) or began_ns)
        context = trace.set_span_in_context(self._parent)
        for place, ((name, began_ns), (_, end_ns)) in enumerate(pairwise([*self._begun, (_END, ended_ns)])):
            noted = self._noted.get(place)
            span = self._source.start_span(name, context, attributes=noted, start_time=began_ns)
            if place in self._failed:
                record_error(span, self._failed[place])
            span.end(end_ns)
        self._begun.clear()
        self._failed.clear()  # errors know the frames that they came through, and those this
