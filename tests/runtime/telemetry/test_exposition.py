"""What Prometheus reads of what a meter has counted."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parsed_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parsed_text

from countersign.services.runtime.errors import Unavailable
from countersign.services.runtime.telemetry import metrics
from countersign.services.runtime.telemetry.context import span_context
from countersign.services.runtime.telemetry.exposition import Families, prometheus_name
from countersign.services.runtime.telemetry.instruments import MOST_SERIES, Meter


class Scraped:
    """A meter as a process has it, and what it looks like from outside."""

    def __init__(self) -> None:
        self.meter = Meter()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(Families(self.meter))

    def text(self) -> str:
        return generate_latest(self._registry).decode()

    def openmetrics(self) -> str:
        encoder, kind = choose_encoder("application/openmetrics-text; version=1.0.0")
        assert kind.startswith("application/openmetrics-text")
        return encoder(self._registry).decode()

    def family(self, name: str) -> Metric:
        """From OpenMetrics, whose parser also checks the format."""
        families: Iterable[Metric] = parsed_openmetrics(self.openmetrics())  # type: ignore[no-untyped-call]  # the library's
        return next(each for each in families if each.name == name)

    def values(self, name: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Of the samples of this name, by their labels."""
        samples = (sample for each in parsed_text(self.text()) for sample in each.samples if sample.name == name)
        return {tuple(sorted(sample.labels.items())): sample.value for sample in samples}


@pytest.fixture
def scraped() -> Scraped:
    return Scraped()


@pytest.mark.parametrize(
    ("name", "unit", "gauge", "expected"),
    [
        ("gen_ai.server.request.duration", "s", False, "gen_ai_server_request_duration_seconds"),
        ("countersign.store.bytes", "By", True, "countersign_store_bytes"),
        ("countersign.ring.sent", "By", False, "countersign_ring_sent_bytes"),
        ("countersign.takeovers", "{request}", False, "countersign_takeovers"),
        ("countersign.utilisation", "1", True, "countersign_utilisation_ratio"),
        ("countersign.audit.limit_used", "1", False, "countersign_audit_limit_used"),
        ("countersign.energy", "J", False, "countersign_energy_joules"),
    ],
)
def test_names_follow_opentelemetrys_rules_for_prometheus(name: str, unit: str, gauge: bool, expected: str) -> None:
    assert prometheus_name(name, unit, gauge=gauge) == expected


def test_counters_gauges_and_histograms_arrive_with_their_labels(scraped: Scraped) -> None:
    metrics.counter(metrics.VERDICTS, scraped.meter).add(2, {metrics.OUTCOME: "pass"})
    metrics.observe(metrics.TARGET_REQUESTS, lambda: {"waiting": 3, "running": 4}, scraped.meter)
    metrics.observe(metrics.BUS_DROPPED, lambda: 5, scraped.meter)
    metrics.histogram(metrics.PASS_DURATION, scraped.meter).record(0.003)
    assert scraped.values("countersign_auditor_verdicts_total") == {
        (("countersign_outcome", "pass"),): 2,
        # From 0 on, so that the first one is seen as a rise.
        (("countersign_outcome", "fail"),): 0,
        (("countersign_outcome", "inconclusive"),): 0,
    }
    assert scraped.values("countersign_target_requests") == {
        (("countersign_state", "waiting"),): 3,
        (("countersign_state", "running"),): 4,
    }
    assert scraped.values("countersign_bus_dropped_total") == {(): 5}
    assert scraped.values("countersign_pass_duration_seconds_count") == {(): 1}
    assert scraped.values("countersign_pass_duration_seconds_sum") == {(): 0.003}
    buckets = scraped.values("countersign_pass_duration_seconds_bucket")
    assert len(buckets) == len(metrics.PASS_DURATION.buckets) + 1
    assert (buckets[("le", "0.0025"),], buckets[("le", "0.005"),], buckets[("le", "+Inf"),]) == (0, 1, 1)


def test_openmetrics_says_type_and_unit_and_passes_its_own_parser(scraped: Scraped) -> None:
    metrics.histogram(metrics.PASS_DURATION, scraped.meter).record(0.1)
    family = scraped.family("countersign_pass_duration_seconds")
    assert (family.type, family.unit, family.documentation) == ("histogram", "seconds", metrics.PASS_DURATION.what)


def exemplars(scraped: Scraped) -> list[tuple[float, str, str]]:
    """(value, trace, span) of the commit's buckets."""
    samples = scraped.family("countersign_pass_duration_seconds").samples
    found = [sample.exemplar for sample in samples if sample.exemplar]
    return [(each.value, each.labels["trace_id"], each.labels["span_id"]) for each in found]


def test_a_bucket_names_the_trace_that_last_fell_into_it_until_another_does(scraped: Scraped) -> None:
    histogram = metrics.histogram(metrics.PASS_DURATION, scraped.meter)
    tracer = TracerProvider().get_tracer("test")
    seen = []
    for value in (0.003, 0.004, 0.2):  # two of one bucket, one of another
        span = tracer.start_span("commit")
        with span_context(span):
            histogram.record(value)
            context = span.get_span_context()
            seen.append((value, f"{context.trace_id:032x}", f"{context.span_id:016x}"))
    assert exemplars(scraped) == seen[1:]
    assert exemplars(scraped) == seen[1:], "who looks first must not take it from the next"
    with span_context(tracer.start_span("commit")):
        histogram.record(0.0045)
    assert exemplars(scraped)[0][0] == 0.0045


def test_what_was_not_sampled_or_not_traced_is_no_exemplar(scraped: Scraped) -> None:
    histogram = metrics.histogram(metrics.PASS_DURATION, scraped.meter)
    histogram.record(0.003)
    with span_context(TracerProvider(sampler=ALWAYS_OFF).get_tracer("test").start_span("commit")):
        histogram.record(0.2)
    assert exemplars(scraped) == []


def test_an_attribute_that_the_table_does_not_name_reaches_nobody_not_even_in_an_exemplar(scraped: Scraped) -> None:
    with span_context(TracerProvider().get_tracer("test").start_span("commit")):
        metrics.histogram(metrics.PASS_DURATION, scraped.meter).record(0.1, {"countersign.request.id": "req-7"})
        metrics.counter(metrics.VERDICTS, scraped.meter).add(1, {"tenant": "acme", metrics.OUTCOME: "pass"})
    for text in (scraped.text(), scraped.openmetrics()):
        assert "countersign_auditor_verdicts_total" in text
        assert "req-7" not in text
        assert "acme" not in text


def test_series_are_bounded_whatever_values_a_label_takes(scraped: Scraped) -> None:
    counter = metrics.counter(metrics.REQUESTS, scraped.meter)
    for number in range(3 * MOST_SERIES):
        counter.add(1, {metrics.MODEL: f"model-{number}"})
    found = scraped.values("countersign_requests_total")
    assert len(found) == MOST_SERIES + 1
    assert found[("otel_metric_overflow", "True"),] == 2 * MOST_SERIES
    assert sum(found.values()) == 3 * MOST_SERIES


def failing() -> float:
    raise Unavailable("the ledger does not answer")


def broken() -> float:
    raise ZeroDivisionError


@pytest.mark.parametrize(("read", "logged"), [(failing, 0), (lambda: None, 0), (broken, 1)])
def test_what_cannot_be_told_now_has_no_sample_and_others_have(
    scraped: Scraped, caplog: pytest.LogCaptureFixture, read: Callable[[], float], logged: int
) -> None:
    metrics.observe(metrics.AUDITS_WAITING, read, scraped.meter)
    metrics.observe(metrics.LOG_SIZE, lambda: 12, scraped.meter)
    assert scraped.values("countersign_auditor_audits_waiting") == {}
    assert len(caplog.records) == logged, "a bug is told, what is not there yet is none"
    assert scraped.values("countersign_log_size") == {(): 12}


def test_a_label_keeps_its_value_whatever_is_in_it(scraped: Scraped) -> None:
    metrics.counter(metrics.REQUESTS, scraped.meter).add(1, {metrics.MODEL: 'a"b\\c\nd'})
    assert scraped.values("countersign_requests_total") == {(("gen_ai_request_model", 'a"b\\c\nd'),): 1}


@pytest.mark.parametrize(
    ("value", "bucket"),
    [(0.0, "0.00025"), (0.0025, "0.0025"), (0.00251, "0.005"), (10, "10.0"), (99.0, "+Inf")],
)
def test_a_bucket_takes_what_is_at_most_its_boundary(scraped: Scraped, value: float, bucket: str) -> None:
    metrics.histogram(metrics.PASS_DURATION, scraped.meter).record(value)
    counts = scraped.values("countersign_pass_duration_seconds_bucket")
    assert next(dict(labels)["le"] for labels, count in counts.items() if count) == bucket
    assert scraped.values("countersign_pass_duration_seconds_sum") == {(): value}


def test_a_histogram_without_labels_is_there_before_its_first_value(scraped: Scraped) -> None:
    """So that the first one is seen as a rise; of one with labels nobody knows which there will be."""
    metrics.histogram(metrics.PASS_DURATION, scraped.meter)
    metrics.histogram(metrics.DRAFT_DURATION, scraped.meter)
    assert scraped.values("countersign_pass_duration_seconds_count") == {(): 0}
    assert "countersign_draft_call_duration" not in scraped.text()


def test_a_label_that_is_not_given_is_not_there_and_their_order_does_not_matter(scraped: Scraped) -> None:
    counter = metrics.counter(metrics.REQUESTS, scraped.meter)
    counter.add(1, {metrics.FINISH: "refused"})
    counter.add(1, {metrics.MODEL: "demo", metrics.FINISH: "stop"})
    counter.add(1, {metrics.FINISH: "stop", metrics.MODEL: "demo"})
    assert scraped.values("countersign_requests_total") == {
        (("countersign_finish_reason", "refused"),): 1,
        (("countersign_finish_reason", "stop"), ("gen_ai_request_model", "demo")): 2,
    }


def test_one_row_is_one_instrument_whoever_counts(scraped: Scraped) -> None:
    for _ in range(3):
        metrics.histogram(metrics.ROUND_ACCEPTED, scraped.meter).record(2)
    assert scraped.values("countersign_round_accepted_count") == {(): 3}
    assert scraped.values("countersign_round_accepted_sum") == {(): 6}


@pytest.fixture
def hectic() -> Iterator[None]:
    """Threads take turns a thousand times as often."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("hectic")
def test_a_scrape_amid_records_is_whole(scraped: Scraped) -> None:
    """No bucket counts more than the next, and the last one counts as many as there are."""
    histogram, families = metrics.histogram(metrics.PASS_DURATION, scraped.meter), Families(scraped.meter)
    done = threading.Event()

    def record() -> None:
        while not done.is_set():
            histogram.record(0.2)

    with ThreadPoolExecutor(1) as pool:
        recording = pool.submit(record)
        try:
            for _ in range(2000):
                [family] = families.collect()
                *buckets, count, _ = [each.value for each in family.samples]
                assert buckets == sorted(buckets)
                assert buckets[-1] == count
        finally:
            done.set()
        recording.result()


def test_a_series_that_begins_during_a_scrape_waits_for_the_next(scraped: Scraped) -> None:
    counter = metrics.counter(metrics.REQUESTS, scraped.meter)
    counter.add(1, {metrics.FINISH: "stop"})
    found = []
    for series in scraped.meter.counters[metrics.REQUESTS.name].series.items():
        counter.add(1, {metrics.FINISH: "length"})
        found.append(series)
    assert [labels for labels, _ in found] == [((metrics.FINISH, "stop"),)]
