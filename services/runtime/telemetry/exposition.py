"""What OpenTelemetry's SDK has counted, as Prometheus reads it: text, or OpenMetrics with exemplars.

Names follow OpenTelemetry's rules for Prometheus: dots become underscores, the unit follows, then _total. The text is
prometheus_client's; docs/adr/0027 says why the way there is ours.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from opentelemetry.sdk.metrics import Exemplar as Measured
from opentelemetry.sdk.metrics.export import (
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricReader,
    MetricsData,
    NumberDataPoint,
    Sum,
)
from opentelemetry.sdk.metrics.view import View
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from countersign.services.runtime.telemetry.metrics import BOUND, BUCKET, SUM, Instrument

# Series of one instrument; what comes beyond them is counted as one, so that no mistake fills a memory.
MOST_SERIES = 200

_UNITS = {"s": "seconds", "ms": "milliseconds", "By": "bytes", "J": "joules", "W": "watts"}
_Key = tuple[str, tuple[tuple[str, str], ...], int]


def views(table: Sequence[Instrument]) -> list[View]:
    """Each row's own attributes and no others, and at most ``MOST_SERIES`` of their values."""
    streams = [stream for row in table for stream in _streams(row)]
    return [
        View(instrument_name=name, attribute_keys=keys, aggregation_cardinality_limit=MOST_SERIES)
        for name, keys in streams
    ]


def _streams(row: Instrument) -> list[tuple[str, set[str]]]:
    """The SDK's instruments of a row, with their attributes."""
    if row.kind == "observed histogram":
        return [(row.name + BUCKET, {BOUND}), (row.name + SUM, set())]
    return [(row.name, set(row.attributes))]


def prometheus_name(name: str, unit: str, *, gauge: bool = False) -> str:
    """The family's name; a counter's samples end in _total as well. Units in braces are words about what is counted."""
    suffix = "ratio" if unit == "1" and gauge else _UNITS.get(unit, "")
    name = _plain(name)
    return f"{name}_{suffix}" if suffix and not name.endswith(f"_{suffix}") else name


class PrometheusReader(MetricReader):
    """A reader of the SDK's that collects when somebody asks; safe to be asked by several threads.

    The SDK hands out an exemplar once. Here each stays until a newer one takes its place, so that it does not matter
    who else has looked.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._data: MetricsData | None = None
        self._exemplars: dict[_Key, Exemplar] = {}

    def families(self) -> list[Family]:
        """All that is known now."""
        with self._lock:
            self._data = None
            self.collect()
            found = {metric.name: metric for metric in _metrics(self._data)}
        families = (self._family(metric, found) for metric in found.values())
        return [family for family in families if family is not None]

    def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: object) -> None:  # noqa: ARG002  the SDK's
        self._data = metrics_data

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: object) -> None:
        """Nothing is held."""

    def _family(self, metric: Metric, others: Mapping[str, Metric]) -> Family | None:
        """None for what is told with another."""
        if metric.name.endswith(SUM) and metric.name.removesuffix(SUM) + BUCKET in others:
            return None
        if metric.name.endswith(BUCKET):
            return _tallied(metric, others.get(metric.name.removesuffix(BUCKET) + SUM))
        data, unit = metric.data, metric.unit or ""
        name = prometheus_name(metric.name, unit, gauge=isinstance(data, Gauge))
        match data:
            case Histogram():
                family = _named(metric, name, "histogram")
                for point in data.data_points:
                    self._histogram(family, point)
            case Sum(is_monotonic=True):
                family = _named(metric, name, "counter")
                for number in data.data_points:
                    self._counter(family, number)
            case Sum() | Gauge():
                family = _named(metric, name, "gauge")
                for number in data.data_points:
                    family.add_sample(name, _labels(number.attributes), number.value)
            case _:
                return None
        return family

    def _counter(self, family: Family, point: NumberDataPoint) -> None:
        labels, name = _labels(point.attributes), f"{family.name}_total"
        for measured in point.exemplars:
            self._remember((name, tuple(labels.items()), 0), measured)
        family.add_sample(name, labels, point.value, exemplar=self._exemplars.get((name, tuple(labels.items()), 0)))

    def _histogram(self, family: Family, point: HistogramDataPoint) -> None:
        labels, name = _labels(point.attributes), f"{family.name}_bucket"
        key = tuple(labels.items())
        for measured in point.exemplars:
            place = sum(measured.value > bound for bound in point.explicit_bounds)
            self._remember((name, key, place), measured)
        bounds = [*map(floatToGoString, point.explicit_bounds), "+Inf"]
        for place, (bound, count) in enumerate(zip(bounds, accumulate(point.bucket_counts), strict=True)):
            exemplar = self._exemplars.get((name, key, place))
            family.add_sample(name, {**labels, "le": bound}, count, exemplar=exemplar)
        family.add_sample(f"{family.name}_count", labels, point.count)
        family.add_sample(f"{family.name}_sum", labels, point.sum)

    def _remember(self, key: _Key, measured: Measured) -> None:
        """By its trace alone: attributes that a view took off stay off."""
        if measured.trace_id is None or measured.span_id is None:
            return
        labels = {"trace_id": f"{measured.trace_id:032x}", "span_id": f"{measured.span_id:016x}"}
        self._exemplars[key] = Exemplar(labels, measured.value, measured.time_unix_nano / 1e9)


class Families(Collector):
    """A reader, as prometheus_client's registry takes it."""

    def __init__(self, reader: PrometheusReader) -> None:
        self._reader = reader

    def collect(self) -> list[Family]:
        return self._reader.families()


class Constant(Collector):
    """Families that stay as they are."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._families = families

    def collect(self) -> Sequence[Family]:
        return self._families


def _metrics(data: MetricsData | None) -> Iterator[Metric]:
    for resource in data.resource_metrics if data is not None else ():
        for scope in resource.scope_metrics:
            yield from scope.metrics


def _tallied(buckets: Metric, total: Metric | None) -> Family:
    """An observed histogram, from its counters."""
    name = prometheus_name(buckets.name.removesuffix(BUCKET), buckets.unit or "")
    family = _named(buckets, name, "histogram")
    counts = {float(_labels(point.attributes)[BOUND]): point.value for point in _numbers(buckets)}
    bounds = sorted(counts)
    for bound, text in zip(bounds, map(floatToGoString, bounds), strict=True):
        family.add_sample(f"{name}_bucket", {BOUND: text}, counts[bound])
    family.add_sample(f"{name}_count", {}, max((sample.value for sample in family.samples), default=0))
    family.add_sample(f"{name}_sum", {}, sum(point.value for point in _numbers(total)))
    return family


def _numbers(metric: Metric | None) -> Sequence[NumberDataPoint]:
    return metric.data.data_points if metric is not None and isinstance(metric.data, Sum) else ()


def _named(metric: Metric, name: str, kind: str) -> Family:
    unit = _UNITS.get(metric.unit or "", "")
    return Family(name, metric.description or metric.name, kind, unit if name.endswith(f"_{unit}") else "")


def _labels(attributes: Mapping[str, object] | None) -> dict[str, str]:
    return {_plain(name): str(value) for name, value in sorted((attributes or {}).items())}


def _plain(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9]+", "_", name)
