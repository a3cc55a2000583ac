"""The table of instruments: what operators may rely on, and what no label can ever hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from countersign.services.runtime.telemetry import metrics
from countersign.services.runtime.telemetry.exposition import prometheus_name
from countersign.services.runtime.telemetry.instruments import Instrument
from countersign.services.runtime.telemetry.metrics import TABLE
from countersign.verify.spec import monitor

DOCS = Path(__file__).resolve().parents[3] / "docs" / "telemetry.md"

# Each of these takes its values from a list in the code, from the models that are served, or from the specification.
BOUNDED = {
    metrics.OPERATION,
    metrics.PROVIDER,
    metrics.MODEL,
    metrics.TOKEN_TYPE,
    metrics.ERROR,
    metrics.FINISH,
    metrics.STATE,
    metrics.OUTCOME,
    metrics.LEVEL,
    metrics.TIER,
    metrics.DIRECTION,
    metrics.PROPERTY,
    metrics.SOURCE,
    metrics.CONSTRAINT,
}


def series(row: Instrument) -> str:
    """Its name as Prometheus has it."""
    name = prometheus_name(row.name, row.unit, gauge=row.kind == "gauge")
    return f"{name}_total" if "counter" in row.kind else name


def test_no_two_rows_are_one_series() -> None:
    assert len({series(row) for row in TABLE}) == len(TABLE) > 40


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_row_is_whole_and_its_labels_are_bounded(row: Instrument) -> None:
    assert set(row.attributes) <= BOUNDED
    assert row.name.startswith(("gen_ai.server.", "countersign."))
    assert row.what
    assert (row.kind == "histogram") == bool(row.buckets)
    assert list(row.buckets) == sorted(set(row.buckets))
    assert len(row.attributes) <= 1 or row.kind in {"counter", "histogram"}, "an observed one has one attribute"


def test_the_conventions_boundaries_are_among_those_of_the_gen_ai_metrics() -> None:
    conventions = {
        metrics.REQUEST_DURATION: (
            0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
        ),
        metrics.TIME_TO_FIRST_TOKEN: (
            0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
        ),
        metrics.TIME_PER_OUTPUT_TOKEN: (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    }  # fmt: skip
    for row, boundaries in conventions.items():
        assert set(boundaries) <= set(row.buckets), row.name


def test_the_page_for_operators_has_a_row_for_each_and_for_nothing_else() -> None:
    rows = re.findall(r"^\| `([a-z0-9_]+)` \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", DOCS.read_text(), re.MULTILINE)
    documented = {name: (kind.strip(), labels.strip(), what.strip()) for name, kind, labels, what in rows}
    expected = {
        series(row): (
            row.kind.removeprefix("observed "),
            ", ".join(f"`{re.sub('[^a-z]', '_', name)}`" for name in row.attributes),
            f"{row.who}: {row.what}",
        )
        for row in TABLE
    }
    assert documented == expected


def test_a_violation_of_each_property_is_counted_from_zero_on() -> None:
    source = Path(monitor.__file__).read_text()
    told = set(monitor.PROPERTY_OF.values()) | set(re.findall(r'(?:Fault\(|, )"([A-Z][A-Za-z]+)"', source))
    assert told == set(metrics.VIOLATIONS.values)
