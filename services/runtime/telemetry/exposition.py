"""A meter's instruments as Prometheus reads them: text, or OpenMetrics with exemplars.

Names follow OpenTelemetry's rules for Prometheus: dots become underscores, the unit follows, then _total. The text is
prometheus_client's.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from countersign.services.runtime.telemetry import instruments
from countersign.services.runtime.telemetry.instruments import BucketHistogram, Instrument, Labels, Meter
from countersign.services.runtime.telemetry.traceparent import ids

_UNITS = {"s": "seconds", "ms": "milliseconds", "By": "bytes", "J": "joules", "W": "watts"}


def prometheus_name(name: str, unit: str, *, gauge: bool = False) -> str:
    """The family's name; a counter's samples end in _total as well. Units in braces are words about what is counted."""
    suffix = "ratio" if unit == "1" and gauge else _UNITS.get(unit, "")
    name = _plain(name)
    return f"{name}_{suffix}" if suffix and not name.endswith(f"_{suffix}") else name


class Families(Collector):
    """A meter, as prometheus_client's registry takes it; safe to be asked by several threads."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._lock = threading.Lock()

    def collect(self) -> list[Family]:
        """All that has a series now."""
        meter = self._meter
        with self._lock:  # what is observed is read by one at a time
            observed = [_numbers(each.row, each.items()) for each in list(meter.observed.values())]
        counted = [
            _numbers(each.row, [(labels, total.value) for labels, total in each.series.items()])
            for each in list(meter.counters.values())
        ]
        families = [*counted, *map(_buckets, list(meter.histograms.values())), *observed]
        return [family for family in families if family.samples]


class Constant(Collector):
    """Families that stay as they are."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._families = families

    def collect(self) -> Sequence[Family]:
        return self._families


def _numbers(row: Instrument, values: Sequence[tuple[Labels, float]]) -> Family:
    """Of a counter or a gauge."""
    family = _family(row, "gauge" if row.kind == "gauge" else "counter")
    name = family.name if row.kind == "gauge" else f"{family.name}_total"
    for labels, value in values:
        family.add_sample(name, _labels(labels), value)
    return family


def _buckets(histogram: BucketHistogram) -> Family:
    family = _family(histogram.row, "histogram")
    bounds = [*map(floatToGoString, histogram.row.buckets), "+Inf"]
    for labels, held in histogram.series.items():
        named, counts = _labels(labels), list(accumulate(list(held.counts)))
        for bound, count, exemplar in zip(bounds, counts, held.exemplars, strict=True):
            family.add_sample(f"{family.name}_bucket", {**named, "le": bound}, count, exemplar=_exemplar(exemplar))
        family.add_sample(f"{family.name}_count", named, counts[-1])
        family.add_sample(f"{family.name}_sum", named, held.sum)
    return family


def _exemplar(exemplar: instruments.Exemplar | None) -> Exemplar | None:
    """By its trace alone."""
    if exemplar is None:
        return None
    span, value, seconds = exemplar
    trace_id, span_id = ids(span)
    return Exemplar({"trace_id": trace_id, "span_id": span_id}, value, seconds)


def _family(row: Instrument, kind: str) -> Family:
    name, unit = prometheus_name(row.name, row.unit, gauge=kind == "gauge"), _UNITS.get(row.unit, "")
    return Family(name, row.what, kind, unit if name.endswith(f"_{unit}") else "")


def _labels(labels: Labels) -> dict[str, str]:
    return {_plain(name): value for name, value in labels}


@cache
def _plain(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9]+", "_", name)
