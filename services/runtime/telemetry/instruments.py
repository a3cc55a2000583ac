"""What counts: instruments as OpenTelemetry has them, with one number or one distribution for each set of attributes.

They are our own, since a value costs OpenTelemetry's SDK about ten times as much, and prometheus_client two or three
(docs/adr/0029). exposition.py reads them.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Generic, Literal, Protocol, TypeVar

from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.telemetry.context import current_span
from countersign.services.runtime.telemetry.traceparent import is_sampled, traceparent

Kind = Literal["counter", "histogram", "gauge", "observed counter"]
Attributes = Mapping[str, str]
Labels = tuple[tuple[str, str], ...]
Read = Callable[[], float | Mapping[str, float] | None]
"""What is so now: one number; or, of a row with an attribute, a number for each of its values; None: not known."""
Exemplar = tuple[str, float, float]
"""The traceparent of the span that was current, what it recorded, and when, in seconds since 1970."""
T = TypeVar("T")

# Series of one instrument; what comes beyond them is counted as one, so that no mistake fills a memory.
MOST_SERIES = 200
OVERFLOW: Labels = (("otel.metric.overflow", "True"),)
_NONE: Attributes = {}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Instrument:
    """A row. ``unit`` as UCUM has it; ``who`` records it; ``buckets``: a histogram's boundaries; ``values``: of a
    counter's one attribute, those that are counted from 0 on, so that the first of each is seen as a rise.
    """

    name: str
    kind: Kind
    unit: str
    who: str
    what: str
    attributes: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    values: tuple[str, ...] = ()


class Counter(Protocol):
    """Counts up."""

    def add(self, amount: float, attributes: Attributes = ...) -> None: ...


class Histogram(Protocol):
    """Takes one value at a time."""

    def record(self, value: float, attributes: Attributes = ...) -> None: ...


class _Nothing:
    def add(self, amount: float, attributes: Attributes = _NONE) -> None: ...

    def record(self, value: float, attributes: Attributes = _NONE) -> None: ...


NOTHING = _Nothing()
"""An instrument where nobody looks."""


class _Series(Generic[T]):
    """What is counted, for each set of the row's attributes, and of no others; from the start where the set is known.
    One thread writes; others may read ``items`` meanwhile.
    """

    def __init__(self, row: Instrument, make: Callable[[], T]) -> None:
        self._make = make
        self._names = row.attributes
        self._held: dict[Labels, T] = {}
        for known in [{row.attributes[0]: value} for value in row.values] if row.attributes else [_NONE]:
            self.of(known)

    def of(self, attributes: Attributes) -> T:
        """Of these, given in the row's order where it must be fast."""
        held = self._held.get(tuple(attributes.items()))
        return self._find(attributes) if held is None else held

    def items(self) -> list[tuple[Labels, T]]:
        return list(self._held.items())

    def _find(self, attributes: Attributes) -> T:
        labels = tuple((name, attributes[name]) for name in self._names if name in attributes)
        if labels not in self._held:
            labels = labels if len(self._held) < MOST_SERIES else OVERFLOW
            self._held.setdefault(labels, self._make())
        return self._held[labels]


class Sum:
    """A number that grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0


class SumCounter:
    """A counter that somebody looks at."""

    def __init__(self, row: Instrument) -> None:
        self.row = row
        self.series = _Series(row, Sum)

    def add(self, amount: float, attributes: Attributes = _NONE) -> None:
        self.series.of(attributes).value += amount


class Distribution:
    """Counts of values, each bucket's alone, the last beyond all boundaries; their sum; and of each bucket, the last
    value that a sampled span recorded.
    """

    __slots__ = ("counts", "exemplars", "sum")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * buckets
        self.sum = 0.0
        self.exemplars: list[Exemplar | None] = [None] * buckets


class BucketHistogram:
    """A histogram that somebody looks at."""

    def __init__(self, row: Instrument) -> None:
        self.row = row
        self._bounds = row.buckets
        self.series = _Series(row, lambda: Distribution(len(row.buckets) + 1))

    def record(self, value: float, attributes: Attributes = _NONE) -> None:
        held = self.series.of(attributes)
        place = bisect_left(self._bounds, value)
        held.counts[place] += 1
        held.sum += value
        span = traceparent(current_span())
        if span and is_sampled(span):
            held.exemplars[place] = (span, value, time.time())


class Observed:
    """A gauge, or a counter that is kept elsewhere: read when somebody looks."""

    def __init__(self, row: Instrument, read: Read) -> None:
        self.row = row
        self._read = read

    def items(self) -> list[tuple[Labels, float]]:
        """Nothing where it cannot be told now; ``MOST_SERIES`` at most."""
        try:
            now = self._read()
        except CountersignError:
            return []
        except Exception:  # noqa: BLE001  what others tell must not be lost with it
            _log.exception("a metric cannot be read", extra={"metric": self.row.name})
            return []
        if isinstance(now, Mapping):
            return [(((self.row.attributes[0], name),), value) for name, value in islice(now.items(), MOST_SERIES)]
        return [] if now is None else [((), now)]


class Meter:
    """The instruments of a process, or of a test: one for each row."""

    def __init__(self) -> None:
        self.counters: dict[str, SumCounter] = {}
        self.histograms: dict[str, BucketHistogram] = {}
        self.observed: dict[str, Observed] = {}

    def counter(self, row: Instrument) -> Counter:
        """Counts up, from 0 where it is known what will be counted."""
        return self.counters.setdefault(row.name, SumCounter(row))

    def histogram(self, row: Instrument) -> Histogram:
        """Takes one value at a time."""
        return self.histograms.setdefault(row.name, BucketHistogram(row))

    def observe(self, row: Instrument, read: Read) -> None:
        """``read`` is asked whenever somebody looks, in another thread: it must change nothing. What it cannot tell
        now, by None or a CountersignError, has no sample.
        """
        self.observed[row.name] = Observed(row, read)
