"""What a process's /metrics says, as numbers to reckon with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.fetching import ask
from countersign.v1.registry_pb2 import Instance

MAX_BYTES = 8 << 20

Series = Mapping[str, Mapping[tuple[tuple[str, str], ...], float]]
"""By a sample's name, then by its labels."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """Of one process, ``at`` seconds of a clock that only goes forward; ``series``: None where it tells nothing."""

    instance: Instance
    at: float
    series: Series | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """All processes at about one time."""

    scrapes: Sequence[Scrape] = field(default_factory=tuple)

    def of(self, service: str) -> Look:
        """Those of one service."""
        return Look([each for each in self.scrapes if each.instance.service == service])

    def one(self, instance: str) -> Look:
        """That process alone; an empty look where it is not there."""
        return Look([each for each in self.scrapes if each.instance.instance == instance])

    def total(self, name: str, **labels: str) -> float | None:
        """The sum over all processes and series that have these labels; None where there is no such series."""
        values = [
            value
            for scrape in self.scrapes
            for key, value in (scrape.series or {}).get(name, {}).items()
            if labels.items() <= dict(key).items()
        ]
        return sum(values) if values else None

    def labels(self, name: str, label: str) -> dict[str, float]:
        """Sums by the value of one label."""
        found: dict[str, float] = {}
        for scrape in self.scrapes:
            for key, value in (scrape.series or {}).get(name, {}).items():
                found[dict(key).get(label, "")] = found.get(dict(key).get(label, ""), 0.0) + value
        return found


@dataclass(frozen=True, slots=True)
class Change:
    """Two looks at the same processes, and what came between."""

    before: Look
    now: Look

    @property
    def seconds(self) -> float:
        """Between them; 0 where there was no first look."""
        earlier = {each.instance.instance: each.at for each in self.before.scrapes}
        spans = [
            each.at - earlier[each.instance.instance] for each in self.now.scrapes if each.instance.instance in earlier
        ]
        return max(spans, default=0.0)

    def of(self, service: str) -> Change:
        """Those of one service."""
        return Change(self.before.of(service), self.now.of(service))

    def one(self, instance: str) -> Change:
        """That process alone."""
        return Change(self.before.one(instance), self.now.one(instance))

    def grown(self, name: str, **labels: str) -> float | None:
        """By how much a counter grew. A process that was not there before has nothing to compare with."""
        known = {each.instance.instance for each in self.before.scrapes if each.series is not None}
        now = Look([each for each in self.now.scrapes if each.instance.instance in known]).total(name, **labels)
        return None if now is None else max(0.0, now - (self.before.total(name, **labels) or 0.0))

    def rate(self, name: str, **labels: str) -> float | None:
        """A second."""
        grown = self.grown(name, **labels)
        return None if grown is None or self.seconds <= 0 else grown / self.seconds

    def mean(self, histogram: str) -> float | None:
        """Of what a histogram took in between; None where that is nothing."""
        return self.ratio(f"{histogram}_sum", f"{histogram}_count")

    def ratio(self, part: str, whole: str) -> float | None:
        """Of how two counters grew; None where the second did not."""
        parts, wholes = self.grown(part), self.grown(whole)
        return parts / wholes if parts is not None and wholes else None


def parsed(text: str) -> Series:
    """The samples of Prometheus's text format.

    Raises:
        ValueError: it is none.
    """
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def look(instances: Sequence[Instance]) -> Look:
    """Ask all at once; who does not answer in time, or nothing that can be read, tells nothing."""
    return Look(await asyncio.gather(*(asyncio.to_thread(_scraped, each) for each in instances)))


def _scraped(instance: Instance) -> Scrape:
    series: Series | None = None
    if instance.metrics_address:
        try:
            reply = ask(f"http://{instance.metrics_address}/metrics", most=MAX_BYTES)
            series = parsed(reply.body.decode(errors="replace")) if reply.status == 200 else None
        except (CountersignError, ValueError):
            series = None
    return Scrape(instance, time.monotonic(), series)
